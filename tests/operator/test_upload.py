"""Uploads, as a user does them: by the command, cut and gone on with, refused where a role does not allow it."""

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from csi_driver.agent.digests import digest_of
from csi_driver.kube.copies import AUDIENCE
from csi_driver.kube.kinds import IMAGE, NODE, VIRTUAL_MACHINE_IMAGE, Json, Kind, name_of, uid_of
from csi_driver.kube.kinds import NAMESPACE as NAMESPACE_KIND
from tests.image_clones import sha256
from tests.keys.apiserver import NAMESPACE
from tests.operator.lab import Lab
from tests.operator.proxy import proxy

_LUKS_CSI = str(Path(sys.executable).with_name("luks-csi"))
_ACCOUNT = Kind("", "v1", "ServiceAccount", "serviceaccounts", namespaced=True)
_ROLE = Kind("rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles")
_BINDING = Kind("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding", "clusterrolebindings")


@pytest.fixture(scope="module", autouse=True)
def accounts(lab: Lab) -> None:
    """The service account `uploader`, which may upload, and `nobody`, which may not."""
    for name in ("uploader", "nobody"):
        lab.kube.create(_ACCOUNT, {"metadata": {"name": name}}, NAMESPACE)
    rules = [{"apiGroups": ["images.luks.csi.internal"], "resources": ["images/upload"], "verbs": ["update"]}]
    lab.kube.create(_ROLE, {"metadata": {"name": "uploader"}, "rules": rules})
    binding = {
        "metadata": {"name": "uploader"},
        "roleRef": {"apiGroup": _ROLE.group, "kind": "ClusterRole", "name": "uploader"},
        "subjects": [{"kind": "ServiceAccount", "name": "uploader", "namespace": NAMESPACE}],
    }
    lab.kube.create(_BINDING, binding)


def _upload(lab: Lab, path: Path, name: str, account: str = "uploader", **more: str) -> subprocess.Popen[str]:
    options = [f"--{option.replace('_', '-')}={value}" for option, value in more.items()]
    # A shell's job in the background ignores SIGINT, and so would all below it.
    argv = [
        "env",
        "--default-signal=INT",
        _LUKS_CSI,
        "image",
        "upload",
        str(path),
        name,
        f"--service-account={NAMESPACE}/{account}",
        *options,
    ]
    environment = os.environ | {"KUBECONFIG": str(lab.kubeconfig)}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _content(path: Path, mib: int) -> bytes:
    content = os.urandom(1 << 20) * mib
    path.write_bytes(content)
    return content


def test_a_machine_image_waits_for_a_command_that_it_tells(lab: Lab, tmp_path: Path) -> None:
    content = _content(tmp_path / "disk.raw", 1)
    if lab.kube.get(NAMESPACE_KIND, "longhorn-system") is None:
        lab.kube.create(NAMESPACE_KIND, {"metadata": {"name": "longhorn-system"}})
    wanted = {"metadata": {"name": "vup"}, "spec": {"displayName": "vup.raw", "sourceType": "upload"}}
    name = f"vmi-{uid_of(lab.kube.create(VIRTUAL_MACHINE_IMAGE, wanted, 'default'))}"

    def imported() -> Json:
        found = lab.kube.get(VIRTUAL_MACHINE_IMAGE, "vup", "default") or {}
        told: dict[str, Json] = {each["type"]: each for each in found.get("status", {}).get("conditions", ())}
        return told.get("Imported", {"status": "Unknown", "message": ""})

    said = lab.wait("word of the command", lambda: (it := imported()["message"]).startswith("waits for: ") and it)
    assert said == f"waits for: luks-csi image upload FILE {name}"
    out, error = (running := _upload(lab, tmp_path / "disk.raw", said.split()[-1])).communicate(timeout=120)
    assert running.returncode == 0, out + error
    lab.wait("its end", lambda: imported()["status"] == "True")
    (node,) = lab.wait_copies(name, 1)
    assert lab.file(node, name).read_bytes() == content
    lab.kube.delete(VIRTUAL_MACHINE_IMAGE, "vup", "default")
    lab.wait("its deletion", lambda: lab.kube.get(VIRTUAL_MACHINE_IMAGE, "vup", "default") is None)


def test_a_file_is_uploaded_and_is_there_with_its_bytes(lab: Lab, tmp_path: Path) -> None:
    content = _content(tmp_path / "disk.raw", 4)
    out, said = (running := _upload(lab, tmp_path / "disk.raw", "up", copies="2")).communicate(timeout=120)
    assert (running.returncode, out) == (0, "image up of 4Mi is ready in the cluster\n"), said
    for node in lab.wait_copies("up", 2):
        assert lab.file(node, "up").read_bytes() == content
        assert not (lab.images_of(node) / "uploads" / "up").exists()
    _content(tmp_path / "other.raw", 4)
    said = _upload(lab, tmp_path / "other.raw", "up").communicate(timeout=60)[1]
    assert "has an Image up already, which is of a file with the checksum sha256:" in said
    again = _upload(lab, tmp_path / "disk.raw", "up")
    assert (again.communicate(timeout=60)[0], again.returncode) == ("image up of 4Mi is ready in the cluster\n", 0)
    lab.delete_image("up")


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "by the command"])
def test_an_upload_that_was_interrupted_goes_on_with_the_same_file_alone(
    lab: Lab, tmp_path: Path, *, by_hand: bool
) -> None:
    content = _content(tmp_path / "disk.raw", 64)
    _content(tmp_path / "other.raw", 64)
    spec = {} if by_hand else {"checksum": sha256(content).digest}
    lab.image("cut", {"upload": {}}, **spec)
    port = int(lab.wait("place of the upload", lambda: lab.status("cut").get("upload"))["address"].rpartition(":")[2])
    parts = [lab.images_of(node) / "uploads" / "cut" / "part" for node in ("one", "two")]

    def begun() -> Path | None:
        return next((part for part in parts if part.exists() and part.stat().st_size > 1 << 20), None)

    with proxy(port, most=8 << 20) as way:  # more than that does not come through: it cannot end before it is told to
        running = _upload(lab, tmp_path / "disk.raw", "cut", address=way.address.removeprefix("https://"))
        part = lab.wait("begin of the upload", begun)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
        assert running.returncode == 130, said
        assert "was interrupted; the same command goes on" in said
    received = 0
    while part.stat().st_size != received:  # until the agent has seen that nobody sends any more
        received = part.stat().st_size
        time.sleep(0.2)
    assert received < len(content)
    inode = part.stat().st_ino
    out, said = (running := _upload(lab, tmp_path / "other.raw", "cut")).communicate(timeout=120)
    assert (running.returncode, out) == (1, "")
    expected = f"{received} of {len(content)} bytes of another file" if by_hand else "to be of a file with the checksum"
    assert expected in said
    assert part.stat().st_size == received
    out, said = (running := _upload(lab, tmp_path / "disk.raw", "cut")).communicate(timeout=120)
    assert running.returncode == 0, (out, said)
    (node,) = lab.wait_copies("cut", 1)
    assert lab.file(node, "cut").read_bytes() == content
    assert lab.file(node, "cut").stat().st_ino == inode  # it was moved in, not copied
    lab.delete_image("cut")


def test_an_end_that_is_of_another_file_than_the_begin_is_found_out(lab: Lab, tmp_path: Path) -> None:
    """Where nobody had announced a digest, as a plain client may not, the begin of another file may lie there."""
    other, content = _content(tmp_path / "other.raw", 4), _content(tmp_path / "disk.raw", 4)
    lab.image("mixed", {"upload": {}})
    address = lab.wait("place of the upload", lambda: lab.status("mixed").get("upload"))["address"]
    half = tmp_path / "half"
    half.write_bytes(other[: 2 << 20])
    assert _curl(lab, address, "mixed", half, "-H", f"Content-Range: bytes 0-{(2 << 20) - 1}/{4 << 20}")[0] == 0
    said = (running := _upload(lab, tmp_path / "disk.raw", "mixed")).communicate(timeout=120)[1]
    assert running.returncode == 1
    assert f"expected {sha256(content)}" in said
    assert "image mixed has the checksum" in said  # and not a path of the node
    assert "what an Image is made of does not change: delete it and make it anew" in said
    lab.delete_image("mixed")


def test_a_limit_is_looked_at_first_and_may_be_raised(lab: Lab, tmp_path: Path) -> None:
    content = os.urandom(4 << 10) * (1 << 10)
    (tmp_path / "disk.raw").write_bytes(content)
    packed = tmp_path / "disk.raw.gz"
    packed.write_bytes(gzip.compress(content))
    assert packed.stat().st_size < 1 << 20
    for path, said in (
        (tmp_path / "disk.raw", f"image limited may have {1 << 20} bytes and {4 << 20} were to come; raise spec.limit"),
        (packed, "raise spec.limit of the Image"),  # what is in it is seen when it is there
    ):
        lab.image("limited", {"upload": {}}, limit="1Mi")
        told = (running := _upload(lab, path, "limited")).communicate(timeout=120)[1]
        assert running.returncode == 1
        assert said in told
        assert "--limit" not in told
        if path != packed:
            assert not any((lab.images_of(node) / "uploads" / "limited").exists() for node in lab.agents)
        lab.kube.patch(IMAGE, "limited", {"spec": {"limit": "1Gi"}})
        if path != packed:
            told = (running := _upload(lab, path, "limited")).communicate(timeout=120)[1]
            assert running.returncode == 0, told
        lab.wait_phase("limited")
        (node,) = lab.wait_copies("limited", 1)
        assert lab.file(node, "limited").read_bytes() == content
        lab.delete_image("limited")


def _curl(lab: Lab, address: str, name: str, path: Path, *options: str) -> tuple[int, str]:
    """As docs/images-kubernetes.md has it: exit code, and what it shows."""
    argv = [
        "curl", "--silent", "--show-error", "--fail-with-body", "--header", "@-", "--cacert", str(lab.tls / "ca.crt"),
        "--connect-to", f"agents.images.luks.csi.internal:443:{address}", "--upload-file", str(path), *options,
        f"https://agents.images.luks.csi.internal/v1/uploads/{name}",
    ]  # fmt: skip
    token = lab.token("uploader", AUDIENCE)
    done = subprocess.run(
        argv, input=f"Authorization: Bearer {token}\n", capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_curl_uploads_goes_on_and_is_refused_with_sentences(lab: Lab, tmp_path: Path) -> None:
    content = _content(tmp_path / "disk.raw", 4)
    digest = ("--header", f"Repr-Digest: {digest_of(sha256(content))}")
    lab.image("curled", {"upload": {}})
    address = lab.wait("place of the upload", lambda: lab.status("curled").get("upload"))["address"]
    half = tmp_path / "half"
    half.write_bytes(content[: 1 << 20])
    begin = ("--header", f"Content-Range: bytes 0-{(1 << 20) - 1}/{len(content)}")
    assert _curl(lab, address, "curled", half, *begin, *digest) == (0, "")
    rest = ("--continue-at", str(1 << 20))
    code, said = _curl(lab, address, "curled", tmp_path / "disk.raw", *rest)
    assert code == 22
    assert "what is here of image curled is of another file" in said
    assert "of this one it is not told" in said
    code, said = _curl(lab, address, "curled", tmp_path / "disk.raw", *rest, *digest, "--verbose")
    assert code == 0, said
    assert said.count("100 Continue") == 1
    lab.wait_phase("curled")
    (node,) = lab.wait_copies("curled", 1)
    assert lab.file(node, "curled").read_bytes() == content
    lab.delete_image("curled")


def test_who_may_not_upload_is_told_what_a_role_must_allow(lab: Lab, tmp_path: Path) -> None:
    _content(tmp_path / "disk.raw", 1)
    running = _upload(lab, tmp_path / "disk.raw", "mine", "nobody")
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "system:serviceaccount:luks-csi:nobody may not upload image mine" in said
    assert "a role must allow update of images/upload" in said
    lab.delete_image("mine")


def test_mistakes_have_sentences(lab: Lab, tmp_path: Path) -> None:
    _content(tmp_path / "disk.raw", 1)
    (tmp_path / "text.raw").write_text("404 page not found\n" * 100)
    running = _upload(lab, tmp_path / "text.raw", "text")
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "image text was not made: node " in said
    assert "what an Image is made of does not change: delete it and make it anew" in said
    said = _upload(lab, tmp_path / "disk.raw", "text").communicate(timeout=60)[1]
    assert "has an Image text already, which is to be of a file with the checksum sha256:" in said
    lab.delete_image("text")
    said = _upload(lab, tmp_path / "disk.raw", "text", checksum="0" * 64).communicate(timeout=60)[1]
    assert "disk.raw has the checksum sha256:" in said
    running = _upload(lab, tmp_path / "disk.raw", "Not_A_Name")
    assert "cannot be an image's name" in running.communicate(timeout=60)[1]
    running = _upload(lab, tmp_path / "disk.raw", "there", namespace="elsewhere")
    assert "there is no ConfigMap luks-csi-image-ca in namespace elsewhere" in running.communicate(timeout=60)[1]
    running = _upload(lab, tmp_path / "disk.raw", "there", "nowhere")
    assert "there is no ServiceAccount luks-csi/nowhere" in running.communicate(timeout=60)[1]
    assert {"text", "there"}.isdisjoint(map(name_of, lab.kube.list(IMAGE)[0]))


def test_an_upload_that_a_full_node_has_no_room_for_goes_to_another_one(lab: Lab, small: str, tmp_path: Path) -> None:
    content = _content(tmp_path / "disk.raw", 8)
    lab.image("big-up", {"upload": {}}, nodeSelector={"room": "little"})
    lab.wait("place of the upload", lambda: lab.status("big-up").get("upload"))
    _, said = (running := _upload(lab, tmp_path / "disk.raw", "big-up")).communicate(timeout=120)
    assert running.returncode == 1
    assert "image big-up cannot be uploaded: no space is left for image big-up" in said
    assert "make room" in said
    lab.wait_phase(
        "big-up", "Pending", f"node {small}: no space is left", "then this goes on: luks-csi image upload FILE big-up"
    )
    assert lab.status("big-up")["upload"]["node"] == small
    lab.kube.patch(NODE, "one", {"metadata": {"labels": {"room": "little"}}})
    out, said = (running := _upload(lab, tmp_path / "disk.raw", "big-up")).communicate(timeout=120)
    assert (running.returncode, out) == (0, "image big-up of 8Mi is ready in the cluster\n"), said
    assert lab.wait_copies("big-up", 1) == ["one"]
    assert lab.file("one", "big-up").read_bytes() == content
    assert "tried" not in lab.status("big-up")
    lab.delete_image("big-up")
    lab.kube.patch(NODE, "one", {"metadata": {"labels": {"room": None}}})
