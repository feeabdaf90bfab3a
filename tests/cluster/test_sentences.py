"""What users read in the events of a pod, claim or volume when something is wrong: the driver's sentence, with what to
do. Nothing of the failed call stays open on the node, and all goes on by itself once the cause is mended.
"""

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.documents import applied
from tests.cluster.driver import KEY, Driver, pod, secret, storage_class, volume_id
from tests.cluster.leftovers import assert_clean, assert_closed, record
from tests.cluster.pods import Pods
from tests.cluster.sentences import MENDED_SECONDS, SAID_SECONDS, made, restore_secret, said

pytestmark = pytest.mark.timeout(900)  # the last test pays for the end of what they share


@pytest.fixture(scope="module", autouse=True)
def clean(cluster: Cluster, driver: Driver) -> Iterator[Driver]:
    """The driver, which has left nothing behind when all tests of the module have ended."""
    yield driver
    for node in cluster.nodes:
        assert_clean(node)


@pytest.fixture
def pods(cluster: Cluster, clean: Driver) -> Iterator[Pods]:
    """Pods and claims of one test on node 1. At the end nothing is left but the volumes of this module's fixtures."""
    with cluster.namespace() as namespace:
        yield Pods(cluster, clean, namespace, cluster.node(1))
    others = {volume_id(volume) for volume in cluster.items("PersistentVolume")}
    for node in cluster.nodes:
        assert_clean(node, others)


@pytest.fixture(scope="module")
def kept(cluster: Cluster, clean: Driver) -> Iterator[Pods]:
    """The claims `data` and `other`, formatted and with their name in a file; no pod uses them."""
    with cluster.namespace() as namespace:
        pods = Pods(cluster, clean, namespace, cluster.node(1))
        for name in ("data", "other"):
            pods.claim(name)
            cluster.apply([pod(name, name)], namespace)
        for name in ("data", "other"):
            cluster.pod_running(name, namespace)
            pods.sh(name, f"echo {name} > /data/text && sync /data/text")
            pods.end(name, name)
        yield pods


def _unstages(pods: Pods) -> int:
    """How often kubelet has asked the driver's container to unstage the volume of the claim `data`."""
    lines = pods.driver.logs(pods.node).splitlines()
    return sum('"NodeUnstageVolume"' in line and pods.volume().id in line for line in lines)


def _waits_for(pods: Pods, name: str) -> str:
    """Why the container of a pod waits."""
    (status,) = pods.get(name)["status"].get("containerStatuses") or [{"state": {}}]
    return str(status["state"].get("waiting", {}).get("reason"))


@contextmanager
def _refused(pods: Pods, *words: str) -> Iterator[None]:
    """A pod that cannot start says so and leaves nothing open; after the block, which mends the cause, it starts by
    itself and finds its data.
    """
    volume = pods.volume()
    name = f"late-{secrets.token_hex(2)}"  # events of another pod of that name would do else
    before, unstages = record(pods.node, volume.id), _unstages(pods)
    pods.cluster.apply([pod(name)], pods.namespace)
    try:
        said(pods, "Pod", name, *words)
        assert_closed(pods.node, volume.id)
        pods.cluster.wait("waiting container", lambda: _waits_for(pods, name) == "ContainerCreating", SAID_SECONDS)
        assert _unstages(pods) == unstages, "kubelet has tidied up, not the driver"
        yield
        pods.cluster.pod_running(name, pods.namespace, MENDED_SECONDS)
        assert pods.sh(name, "cat /data/text") == "data"
        assert record(pods.node, volume.id) == before
    finally:
        pods.end(name)


_SECRETS = {
    "wrong-key": (
        {"CRYPTO_KEY_VALUE": "another passphrase"},
        ("code = Unauthenticated", "opens no key slot of volume", "put the passphrase it was last given back"),
    ),
    "no-entry": (
        {"OTHER": "another entry"},
        (
            "code = FailedPrecondition",
            "the secret holds neither CRYPTO_KEY_VALUE nor encryptionPassphrase; add one of them to the secret that ",
            "csi.storage.k8s.io/node-stage-secret-name and -namespace of its StorageClass name",
        ),
    ),
    "empty-entry": (
        {"CRYPTO_KEY_VALUE": ""},
        ("code = FailedPrecondition", "the secret's entry CRYPTO_KEY_VALUE is empty; put the passphrase there"),
    ),
    # Kubelet's own sentence.
    "no-secret": (None, ("MountVolume", f'secrets "{KEY}" not found')),
}


@pytest.mark.parametrize("case", _SECRETS)
def test_a_pod_tells_what_its_secret_lacks(kept: Pods, case: str) -> None:
    entries, words = _SECRETS[case]
    api = kept.cluster.api
    api.delete("Secret", KEY, kept.namespace)
    try:
        if entries is not None:
            api.create({**secret(), "stringData": entries}, kept.namespace)
        with _refused(kept, *words):
            restore_secret(kept)
    finally:
        restore_secret(kept)


_FILES = {
    "absent": (
        "true",
        ("the backing file {file} is not there; check that its file system is mounted",),
    ),
    "short": (
        "cp --sparse=always aside disk.img; truncate --size=-16M disk.img",
        (" bytes long and ", " are recorded; check the storage below it"),
    ),
    "zeros-for-a-header": (
        "cp --sparse=always aside disk.img; dd if=/dev/zero of=disk.img bs=1M count=4 conv=notrunc",
        ("expected the volume's LUKS2 header", "found only zeros", "nothing was written, check the storage"),
    ),
    "noise-for-a-header": (
        "cp --sparse=always aside disk.img; dd if=/dev/urandom of=disk.img bs=1M count=4 conv=notrunc",
        ("found other data at its start; nothing was written, check that this is the volume's device",),
    ),
    "another-file-system": (
        "truncate --reference=aside disk.img; mkfs.ext4 -q disk.img",
        ("found other data at its start; nothing was written, check that this is the volume's device",),
    ),
    "another-volume": (
        "cp --sparse=always ../{other}/disk.img disk.img",
        ("expected LUKS2 with UUID", "found UUID", "nothing was written, check that this is the volume's device"),
    ),
}


@pytest.mark.parametrize("case", _FILES)
def test_a_device_that_is_not_what_it_was_is_told_and_not_written_to(kept: Pods, case: str) -> None:
    harm, words = _FILES[case]
    volume = kept.volume()
    names = {"file": volume.file, "other": kept.volume("other").id}
    folder = Path(volume.file).parent
    digest = f"cd {folder}; test ! -e disk.img || sha256sum disk.img"
    kept.node.run(f"set -e; cd {folder}; mv disk.img aside; {harm.format(**names)}")
    try:
        before = kept.node.run(digest).text
        with _refused(kept, "code = FailedPrecondition", *(one.format(**names) for one in words)):
            assert kept.node.run(digest).text == before
            kept.node.run(f"cd {folder}; mv aside disk.img")
    finally:
        kept.node.run(f"cd {folder}; test ! -e aside || mv aside disk.img")


_CLASSES = {
    "unknown-parameter": ({"chipher": "aes-xts-plain64"}, "unknown", "cipher"),
    "no-truth": ({"encrypted": "yes"}, "the parameter encrypted is 'yes'; it must be", '"true" or "false"'),
    "too-cheap": ({"pbkdfIterations": "10"}, "pbkdfIterations", "1000"),
    "two-keys": ({"encryptionKMSID": "vault", "generateKey": "true"}, "encryptionKMSID and generateKey", "leave one"),
}


@pytest.mark.parametrize("case", _CLASSES)
def test_a_claim_tells_what_its_class_has_wrong(pods: Pods, case: str) -> None:
    parameters, *words = _CLASSES[case]
    mode = "Immediate"
    with ExitStack() as stack:
        with applied(pods.cluster, storage_class("strange", parameters, volumeBindingMode=mode)):
            pods.claim(storage_class="strange")
            said(pods, "PersistentVolumeClaim", "data", "code = InvalidArgument", *words)
            assert pods.status()["phase"] == "Pending"
            assert not made(pods)
        stack.enter_context(applied(pods.cluster, storage_class("strange", volumeBindingMode=mode)))
        pods.cluster.wait("bound claim", lambda: pods.status()["phase"] == "Bound", MENDED_SECONDS)


_CLAIM_SECRETS = {
    "empty-entry": ({"CRYPTO_KEY_VALUE": ""}, "the secret's entry CRYPTO_KEY_VALUE is empty; put the passphrase there"),
    "no-such-provider": (
        {"CRYPTO_KEY_PROVIDER": "vault"},
        "the secret's entry CRYPTO_KEY_PROVIDER names a key provider that does not exist; leave it out or set it to",
    ),
    "no-such-cipher": (
        {"CRYPTO_KEY_CIPHER": "rot13"},
        "the secret's entry CRYPTO_KEY_CIPHER is wrong; it must be one of aes-xts-plain64",
    ),
}


@pytest.fixture(scope="module")
def told(cluster: Cluster, clean: Driver) -> Iterator[dict[str, str]]:
    """What claims say that were refused for their secrets, by case. The secrets are mended then, and in the end, after
    their pods have come up by themselves, without the five minutes' pause after an InvalidArgument.
    """
    name = {"csi.storage.k8s.io/provisioner-secret-name": "${pvc.name}"}
    with applied(cluster, storage_class("by-claim", name)), cluster.namespace() as namespace:
        pods = Pods(cluster, clean, namespace, cluster.node(1))
        for case, (entries, _) in _CLAIM_SECRETS.items():
            wrong = secret(case)["stringData"] | entries
            cluster.api.create({**secret(case), "stringData": wrong}, namespace)
            pods.claim(case, storage_class="by-claim")
            cluster.apply([pod(case, case)], namespace)
        sentences = {case: said(pods, "PersistentVolumeClaim", case, "rpc error") for case in _CLAIM_SECRETS}
        assert not made(pods)
        for case in _CLAIM_SECRETS:
            cluster.api.delete("Secret", case, namespace)
            cluster.api.create(secret(case), namespace)
        yield sentences
        for case in _CLAIM_SECRETS:
            cluster.pod_running(case, namespace, MENDED_SECONDS)


@pytest.mark.parametrize("case", _CLAIM_SECRETS)
def test_a_claim_tells_what_its_secret_has_wrong(told: dict[str, str], case: str) -> None:
    _, sentence = _CLAIM_SECRETS[case]
    assert "code = FailedPrecondition" in told[case]
    assert sentence in told[case]


def test_the_driver_tells_who_keeps_a_volume_busy(pods: Pods) -> None:
    """Kubelet has no pod any more to tell it of: it stands in the driver's log, and in the events of the volume that
    cannot be deleted.
    """
    pods.claim()
    pods.start("one")
    volume = pods.volume()
    holder = pods.node.run(f"exec 3< {volume.mapping}; setsid sleep 1000 0</dev/null >/dev/null 2>&1 & echo $!").text
    try:
        pods.cluster.api.delete("Pod", "one", pods.namespace)
        sentence = f"the mapping {volume.mapping} cannot be closed: it is kept busy by process {holder} (sleep)"

        def told() -> Json | None:
            lines = [line for line in pods.driver.logs(pods.node).splitlines() if sentence in line]
            return {"line": lines[0]} if lines else None

        line = pods.cluster.wait("sentence of the driver", told)["line"]
        assert "NodeUnstageVolume" in line
        assert "end that first" in line
        pods.cluster.api.delete("PersistentVolumeClaim", "data", pods.namespace)
        said(pods, "PersistentVolume", volume.id, "code = FailedPrecondition", sentence, namespace="")
    finally:
        pods.node.run(f"kill {holder}")
    pods.cluster.wait("end of the volume", lambda: not pods.cluster.get("PersistentVolume", volume.id), MENDED_SECONDS)
