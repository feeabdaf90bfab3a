"""`luks-csi volume manifest`: what Kubernetes must be told of a volume that is there, and that it does not know.

That is so behind a cluster that was lost while its disks were not, behind an adoption, or a move to another driver.
"""

from collections.abc import Mapping
from typing import Any, Final

import click

from csi_driver.cli.names import volume_names
from csi_driver.cli.output import show_json
from csi_driver.cli.remote import Remote, is_encrypted
from csi_driver.model.errors import FailedPrecondition, InvalidArgument
from csi_driver.model.volume import FileSystemState, VolumeRecord, is_object_name

_ACCESS_MODES: Final = ("ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany")
_CEPH: Final = "rbd"

Place = tuple[str, str]
"""Namespace and name."""


def _place_in(text: str | None) -> Place | None:
    namespace, _, name = (text or "").partition("/")
    return (namespace, name) if is_object_name(namespace) and is_object_name(name) else None


def _place(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Place | None:
    place = _place_in(text)
    if text is not None and place is None:
        raise click.BadParameter(f"{text!r} must be NAMESPACE/NAME.")
    return place


@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.option("--claim", callback=_place, metavar="NAMESPACE/NAME",
              help="The claim that is to have it; by default the one that it was made for.")  # fmt: skip
@click.option("--class", "class_name", required=True, metavar="NAME",
              help="A StorageClass of the driver, which says whether the claim can be enlarged.")  # fmt: skip
@click.option("--secret", "secret_place", callback=_place, metavar="NAMESPACE/NAME",
              help="The secret with its passphrase, of a volume of Ceph with userID and userKey too.")  # fmt: skip
@click.option("--block", is_flag=True, help="As a raw block device, which is how it was used.")
@click.option("--access-mode", type=click.Choice(_ACCESS_MODES), default=_ACCESS_MODES[0], show_default=True,
              metavar="MODE", help=f"{', '.join(_ACCESS_MODES)}: how the claim may be used.")  # fmt: skip
def manifest(
    remote: Remote,
    volume_id: str,
    claim: Place | None,
    class_name: str,
    secret_place: Place | None,
    access_mode: str,
    *,
    block: bool,
) -> None:
    """Print a PersistentVolume of a volume that is there, and its claim, as `kubectl apply -f -` takes them.

    For volumes that Kubernetes does not know: its objects were lost, or the volume was adopted or moved. Where it does,
    nothing is to be made: two PersistentVolumes of one volume would be two owners. Changes nothing by itself.
    """
    found = remote.client.volume(volume_id)
    seen = remote.look(found.id)
    record = seen.record
    if record is None:
        raise FailedPrecondition(f"what volume {found.id} holds is not known: its record is {seen.source}")
    if claim is None and (claim := _place_in(record.parameters.claim)) is None:
        raise InvalidArgument(f"which claim volume {found.id} was made for is not recorded; name one by --claim")
    ceph = found.context.get("backend") == _CEPH
    if secret_place is None and (ceph or (is_encrypted(found) and record.key is None)):
        needs = "the user of Ceph" if ceph else "its passphrase"
        raise InvalidArgument(f"volume {found.id} is opened by a secret; name the one with {needs} by --secret")
    if block and record.file_system is FileSystemState.MADE:
        raise InvalidArgument(f"volume {found.id} holds a file system, {record.made_fs_type}; leave --block out")
    if access_mode == "ReadWriteMany" and not (ceph and block):
        raise InvalidArgument(f"volume {found.id} cannot be {access_mode}: block volumes of Ceph can")
    own = next(filter(is_object_name, (record.name, found.id)), None)
    if own is None:
        raise InvalidArgument(
            f"no object can be called {found.id}, as the volume is; move its content into another one"
        )
    driver = remote.client.plugin_info().name
    shared = {
        "accessModes": [access_mode],
        "storageClassName": class_name,
        "volumeMode": "Block" if block else "Filesystem",
    }
    size = str(found.capacity_bytes)
    namespace, name = claim
    volume: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": own, "annotations": {"pv.kubernetes.io/provisioned-by": driver}},
        "spec": {
            **shared,
            "capacity": {"storage": size},
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": namespace, "name": name},
            "csi": {
                "driver": driver,
                "volumeHandle": found.id,
                "volumeAttributes": dict(found.context),
                **_file_system(record),
                **(_secrets(secret_place, ceph=ceph) if secret_place else {}),
            },
            **_place_of(found.topology),
        },
    }
    if secret_place:
        # external-provisioner's, for whoever lets it delete the volume with the claim one day.
        kept = "volume.kubernetes.io/provisioner-deletion-secret"
        volume["metadata"]["annotations"] |= {f"{kept}-namespace": secret_place[0], f"{kept}-name": secret_place[1]}
    wanted = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {**shared, "resources": {"requests": {"storage": size}}, "volumeName": own},
    }
    show_json({"apiVersion": "v1", "kind": "List", "items": [volume, wanted]})


def _file_system(record: VolumeRecord) -> dict[str, str]:
    return {"fsType": record.made_fs_type} if record.made_fs_type else {}


def _secrets(secret: Place, *, ceph: bool) -> dict[str, object]:
    reference = {"namespace": secret[0], "name": secret[1]}
    calls = ("nodeStage", "controllerPublish", "controllerExpand") if ceph else ("nodeStage",)
    return {f"{call}SecretRef": reference for call in calls}


def _place_of(topology: Mapping[str, str]) -> dict[str, object]:
    """The nodes that can have it; {} for all."""
    if not topology:
        return {}
    terms = [{"key": key, "operator": "In", "values": [value]} for key, value in sorted(topology.items())]
    return {"nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": terms}]}}}
