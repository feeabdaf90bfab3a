"""Ceph in the cluster: its daemons on the host, the driver for it as users install it, what there is of a volume."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from csi_driver.backends.rbdplace import image_name
from tests.backends.ceph import CLUSTER, POOL, USER, Ceph
from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.deployed import SECONDS, Deployed
from tests.cluster.documents import applied
from tests.cluster.driver import DEPLOY, PASSPHRASE
from tests.cluster.images import OURS, OURS_WITH_CEPH
from tests.cluster.leftovers import left_on
from tests.cluster.settings import HOST, SCRATCH

NAMESPACE = "luks-csi-rbd"
NAME = "rbd.luks.csi.internal"
FOLDER = DEPLOY / "rbd"
CLASS = "csi-rbd"
SECRET, SECRETS = "csi-rbd-secret", "default"
"""The Secret of the class, as Ceph-CSI's documents name it, and where it is."""

_CEPH = SCRATCH / "ceph"
_STAY = {"rbd_directory", "rbd_children", "rbd_info", "rbd_trash", "luks-csi.volumes"}
_NO_MODULES = {
    "apiVersion": "apps/v1",
    "kind": "DaemonSet",
    "metadata": {"name": "luks-csi-node"},
    "spec": {"template": {"spec": {"volumes": [{"name": "modules", "hostPath": None, "emptyDir": {}}]}}},
}
_CALLS = ("provisioner", "controller-publish", "controller-expand", "node-stage")


@contextlib.contextmanager
def ceph_installed(cluster: Cluster, *components: str) -> Iterator[Ceph]:
    """A Ceph, the driver for it as docs/ceph.md says, with components of deploy/kubernetes, and the class CLASS."""
    with _folder() as folder, Ceph(folder, HOST) as ceph:
        config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _named("ceph-csi-config", NAMESPACE)}
        config |= {"data": {"config.json": ceph.config()}}
        own = ceph_secret(SECRET, NAMESPACE, ceph.key)
        brought = ceph_secret(SECRET, SECRETS, ceph.key, encryptionPassphrase=PASSPHRASE)
        with applied(cluster, FOLDER / "namespace.yaml", config, own, brought):
            installed = _with_programs(folder / "installed", components)
            cluster.install(installed)
            try:
                with applied(cluster, ceph_class(CLASS)):
                    yield ceph
            finally:
                cluster.uninstall(installed)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Where one Ceph is: a monitor is not made where an earlier one was."""
    try:
        yield _CEPH
    finally:
        shutil.rmtree(_CEPH)


def _with_programs(folder: Path, components: Sequence[str]) -> Path:
    """What users install, with the image that has Ceph's programs; these nodes have no folder /lib/modules."""
    folder.mkdir()
    name, _, tag = OURS_WITH_CEPH.rpartition(":")
    driver, *parts = (os.path.relpath(DEPLOY / each, folder) for each in ("rbd", *components))
    (folder / "kustomization.yaml").write_text(
        f"resources: [{driver}]\n"
        f"components: {json.dumps(parts)}\n"
        f"images: [{{name: {OURS.rpartition(':')[0]}, newName: {name}, newTag: {tag}}}]\n"
        f"patches: [{{patch: '{json.dumps(_NO_MODULES)}'}}]\n"
    )
    return folder


def _named(name: str, namespace: str) -> Json:
    return {"name": name, "namespace": namespace}


def ceph_secret(name: str, namespace: str, key: str, **more: str) -> Json:
    """A user of Ceph, and what else a secret of a class has."""
    entries = {"userID": USER, "userKey": key, **more}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": _named(name, namespace), "stringData": entries}


def ceph_class(name: str, secret: str = SECRET, parameters: Mapping[str, str] | None = None, **fields: Any) -> Json:
    """The class of docs/ceph.md, with a key derivation that costs nothing."""
    named = {f"csi.storage.k8s.io/{call}-secret-name": secret for call in _CALLS}
    placed = {f"csi.storage.k8s.io/{call}-secret-namespace": SECRETS for call in _CALLS}
    cheap = {"encrypted": "true", "pbkdf": "pbkdf2", "pbkdfIterations": "1000"}
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": NAME,
        "parameters": {"clusterID": CLUSTER, "pool": POOL, **cheap, **named, **placed, **(parameters or {})},
        "allowVolumeExpansion": True,
        **fields,
    }


class OnCeph(Deployed):
    """One whose volume is in Ceph."""

    def scale(self, replicas: int) -> None:
        """To 0: until no node has the volume. A pod that came before that would find it staged."""
        super().scale(replicas)
        if not replicas:
            self.cluster.wait("end of the attachment", lambda: not self._attachments(), SECONDS)

    def _attachments(self) -> list[Json]:
        names = {volume["metadata"]["name"] for volume in self.volumes()}
        found = self.cluster.items("VolumeAttachment")
        return [one for one in found if one["spec"]["source"]["persistentVolumeName"] in names]


@contextlib.contextmanager
def on_ceph(cluster: Cluster, ceph: Ceph, storage_class: str = CLASS) -> Iterator[OnCeph]:
    """A Deployment in a namespace of its own; at the end nothing of it is left, on any node or in Ceph."""
    with cluster.namespace() as namespace:
        yield OnCeph(cluster, namespace, storage_class)
    cluster.wait("end of all volumes", lambda: nothing_left(cluster, ceph), SECONDS)


def ciphertext(ceph: Ceph, volume_id: str) -> bytes:
    """What Ceph has of a volume."""
    file = _CEPH / "exported"
    ceph.admin("rbd", "export", "--no-progress", f"{POOL}/{image_name(volume_id)}", str(file))
    try:
        return file.read_bytes()
    finally:
        file.unlink()


def nothing_left(cluster: Cluster, ceph: Ceph) -> bool:
    """Raises AssertionError naming what is left of volumes in Ceph or on a node."""
    found = set(ceph.admin("rados", "-p", POOL, "ls").split()) - _STAY
    assert not found, found
    for node in cluster.nodes:
        left = left_on(node)
        assert not left, left
        told = node.run("ls /sys/bus/rbd/devices /var/lib/luks-csi-rbd/stages 2>/dev/null; true").text.split()
        assert all(word.endswith(":") for word in told), told
    return True
