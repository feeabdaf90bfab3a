"""Uploads, as a user does them: by the command, cut and gone on with, refused where a role does not allow it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from csi_driver.kube.kinds import NODE, Kind
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


def test_a_file_is_uploaded_and_is_there_with_its_bytes(lab: Lab, tmp_path: Path) -> None:
    content = _content(tmp_path / "disk.raw", 4)
    out, said = (running := _upload(lab, tmp_path / "disk.raw", "up", copies="2")).communicate(timeout=120)
    assert (running.returncode, out) == (0, "image up of 4Mi is ready in the cluster\n"), said
    for node in lab.wait_copies("up", 2):
        assert lab.file(node, "up").read_bytes() == content
        assert not (lab.images_of(node) / "uploads" / "up").exists()
    again = _upload(lab, tmp_path / "disk.raw", "up")
    assert (again.communicate(timeout=60)[0], again.returncode) == ("image up of 4Mi is ready in the cluster\n", 0)
    lab.delete_image("up")


def test_an_upload_that_was_interrupted_goes_on(lab: Lab, tmp_path: Path) -> None:
    content = _content(tmp_path / "disk.raw", 64)
    lab.image("cut", {"upload": {}})
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
    out, said = (running := _upload(lab, tmp_path / "disk.raw", "cut")).communicate(timeout=120)
    assert running.returncode == 0, (out, said)
    (node,) = lab.wait_copies("cut", 1)
    assert lab.file(node, "cut").read_bytes() == content
    assert lab.file(node, "cut").stat().st_ino == inode  # it was moved in, not copied
    lab.delete_image("cut")


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
    assert (
        _upload(lab, tmp_path / "disk.raw", "text", checksum="0" * 64)
        .communicate(timeout=60)[1]
        .startswith("luks-csi: the cluster has an Image text already that comes from something else")
    )
    lab.delete_image("text")
    running = _upload(lab, tmp_path / "disk.raw", "Not_A_Name")
    assert "cannot be an image's name" in running.communicate(timeout=60)[1]
    running = _upload(lab, tmp_path / "disk.raw", "there", namespace="elsewhere")
    assert "there is no ConfigMap luks-csi-image-ca in namespace elsewhere" in running.communicate(timeout=60)[1]
    lab.delete_image("there")


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
