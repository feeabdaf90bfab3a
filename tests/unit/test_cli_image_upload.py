"""`luks-csi image upload` at an API in memory: what it looks at before it makes one, and of which file that is."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from csi_driver.images.checksum import Checksum
from csi_driver.kube.copies import AUTHORITY
from csi_driver.kube.kinds import CONFIG_MAP, IMAGE, Json
from csi_driver.model.errors import NotFound, Unavailable
from tests.cli import run_cli
from tests.image_clones import sha256
from tests.operator_fakes import Call, FakeApi

CONTENT, OTHER = b"one disk" * 64, b"two disk" * 64
SHA512 = hashlib.sha512(CONTENT).hexdigest()
AWAITED: Json = {"phase": "Pending", "message": "waits", "upload": {"node": "one", "address": "one:9810"}}
READY: Json = {"phase": "Ready", "message": "", "virtualSize": len(CONTENT), "checksum": sha256(CONTENT).digest}


class Cluster(FakeApi):
    """With the accounts of `accounts`, and a kubeconfig that has the token `own_token`."""

    def __init__(self) -> None:
        super().__init__()
        self.own_token: str | None = None
        self.accounts = ["up/uploader"]
        self.sent: list[Checksum] = []
        self.put(CONFIG_MAP, {"metadata": {"name": AUTHORITY}, "data": {"ca.crt": "PEM"}}, "luks-csi")

    def account_token(self, namespace: str, name: str, _audience: str) -> str:
        if f"{namespace}/{name}" not in self.accounts:
            raise NotFound(f'there is no ServiceAccount {namespace}/{name}: serviceaccounts "{name}" not found')
        return "token"

    def put(self, kind: Any, thing: Json, namespace: str = "") -> Json:
        """An Image is awaited by an agent at once."""
        return super().put(kind, {"status": AWAITED, **thing} if kind is IMAGE else thing, namespace)

    def image(self, status: Json, **spec: object) -> None:
        self.put(IMAGE, {"metadata": {"name": "disk"}, "spec": {"source": {"upload": {}}, **spec}, "status": status})

    def seen(self) -> Json:
        image = self.get(IMAGE, "disk")
        assert image is not None
        return image


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()

    class Sent:
        def __init__(self, to: str, ca: str, token: str, image: str) -> None:
            assert (to, ca, token, image) == ("one:9810", "PEM", "token", "disk")

        def send(self, _path: Path, checksum: Checksum, _progress: object) -> None:
            found.sent.append(checksum)
            found.change(IMAGE, "disk", {"status": READY | {"upload": None}})

    monkeypatch.setattr("csi_driver.cli.image_upload.cluster", lambda _kubeconfig: found)
    monkeypatch.setattr("csi_driver.agent.sending.Sender", Sent)
    return found


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path


def upload(path: Path, *options: str) -> Result:
    return run_cli("image", "upload", path, "disk", "--service-account=up/uploader", *options)


@pytest.mark.parametrize(("option", "checksum"), [("", sha256(CONTENT).digest), (f"--checksum={SHA512}", SHA512)])
def test_the_image_gets_the_checksum_of_the_file(api: Cluster, disk: Path, option: str, checksum: str) -> None:
    for _ in range(2):  # the second time it is ready
        done = upload(disk, *filter(None, [option]))
        assert (done.exit_code, done.stdout) == (0, "image disk of 512 is ready in the cluster\n"), done.stderr
        assert "checking: 100% of 512B" in done.stderr
    assert api.seen()["spec"]["checksum"] == checksum
    assert api.sent == [Checksum.parse(checksum)]


def test_another_checksum_than_the_files_is_told_before_anything_is_made(api: Cluster, disk: Path) -> None:
    done = upload(disk, f"--checksum={'0' * 64}")
    assert done.exit_code == 1
    assert f"{disk} has the checksum {sha256(CONTENT)}, expected sha256:000" in done.stderr
    assert api.written() == []


@pytest.mark.parametrize(
    ("status", "spec", "of"),
    [
        (READY, {"checksum": sha256(OTHER).digest}, f"which is of a file with the checksum {sha256(OTHER)}"),
        (READY | {"checksum": sha256(OTHER).digest}, {}, f"which is of a file with the checksum {sha256(OTHER)}"),
        (AWAITED, {"checksum": sha256(OTHER).digest}, f"which is to be of a file with the checksum {sha256(OTHER)}"),
        ({"phase": "Failed", "message": "no"}, {"checksum": "0" * 128}, "to be of a file with the checksum sha512:000"),
    ],
)
def test_an_image_of_another_file_is_not_this_one(api: Cluster, disk: Path, status: Json, spec: Json, of: str) -> None:
    api.image(status, **spec)
    done = upload(disk)
    assert (done.exit_code, done.stdout, api.sent) == (1, "", [])
    assert of in done.stderr
    assert f"and {disk} has sha" in done.stderr
    assert "choose another name, or delete that Image" in done.stderr


def test_an_image_that_names_no_checksum_is_taken_and_held_to_what_is_announced(api: Cluster, disk: Path) -> None:
    api.image(AWAITED)
    assert upload(disk).exit_code == 0
    assert upload(disk).exit_code == 0  # ready, with the very bytes
    assert api.sent == [sha256(CONTENT)]


def test_an_image_that_is_no_upload_is_left_alone(api: Cluster, disk: Path) -> None:
    api.image(AWAITED, secretRef={"name": "key", "namespace": "vms"})
    assert "has an Image disk already that comes from something else" in upload(disk).stderr
    assert api.sent == []


def test_what_is_missing_is_told_before_anything_is_made(api: Cluster, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for done, code, said in (
        (run_cli("image", "upload", disk, "disk"), 2, "the kubeconfig has no bearer token"),
        (upload(disk, "--service-account=up/none"), 1, "there is no ServiceAccount up/none"),
        (upload(disk, "--service-account=none"), 2, "must be NAMESPACE/NAME"),
        (upload(disk, "--namespace=elsewhere"), 1, f"there is no ConfigMap {AUTHORITY} in namespace elsewhere"),
        (upload(tmp_path / "empty"), 1, "is empty; name an image with something in it"),
    ):
        assert (done.exit_code, said in done.stderr) == (code, True), done.stderr
    assert api.written() == []


@pytest.mark.parametrize(
    ("verb", "said", "then"),
    [
        (
            "create", 'failed calling webhook "images.images.luks.csi.internal": connection refused',
            "connection refused; run the command again when luks-csi's operator is up",
        ),
        ("get", "etcdserver: no leader", "no leader; run the command again when that works"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_not_asked_again_by_a_command(
    api: Cluster, disk: Path, verb: str, said: str, then: str
) -> None:
    def fail(call: Call) -> None:
        if call.verb == verb:
            raise Unavailable(f"the Kubernetes API failed for Image: {said}; it is tried again")

    api.before = fail
    done = upload(disk)
    assert (done.exit_code, done.stderr.splitlines()[-1].endswith(then)) == (1, True), done.stderr
