"""`luks-csi volume manifest`: what Kubernetes must be told of a volume that is there, and that it does not know.

That is so behind a cluster that was lost while its disks were not, behind an adoption, or a move to another driver.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from csi_driver.cli.names import volume_names
from csi_driver.cli.output import show_json, show_text
from csi_driver.cli.remote import Remote, is_encrypted
from csi_driver.host.mountoptions import parse_options
from csi_driver.keys.sources import GENERATED
from csi_driver.model.errors import FailedPrecondition, InvalidArgument
from csi_driver.model.volume import FileSystemState, VolumeRecord, is_object_name
from csi_driver.volumes.moved import refuse_giving

if TYPE_CHECKING:
    from csi_driver.rpc.client import RemoteVolume

_ACCESS_MODES: Final = ("ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany")

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
              help="The secret that the class names: with its passphrase, with the user of Ceph.")  # fmt: skip
@click.option("--block/--filesystem", "block", default=None,
              help="How it was used, where the record does not tell.")  # fmt: skip
@click.option("--plain", is_flag=True, help="It is not encrypted, and that is right.")
@click.option("--mount-option", "mount_options", multiple=True, metavar="OPTION",
              help="One of the class; may be repeated.")  # fmt: skip
@click.option("--access-mode", type=click.Choice(_ACCESS_MODES), metavar="MODE",
              help=f"How the claim may be used: {', '.join(_ACCESS_MODES)}. To be told for a block volume of Ceph, "
                   "else it is the first one.")  # fmt: skip
def manifest(
    remote: Remote,
    volume_id: str,
    claim: Place | None,
    class_name: str,
    secret_place: Place | None,
    mount_options: tuple[str, ...],
    access_mode: str | None,
    *,
    block: bool | None,
    plain: bool,
) -> None:
    """Print a PersistentVolume of a volume that is there, and its claim, as `kubectl create -f -` takes them.

    For volumes that Kubernetes does not know: its objects were lost, or the volume was adopted or moved. Where it does,
    nothing is to be made: two PersistentVolumes of one volume would be two owners. Changes nothing by itself.
    """
    found = remote.client.volume(volume_id)
    seen = remote.look(found.id)
    record = seen.record
    if record is None:
        raise FailedPrecondition(f"what volume {found.id} holds is not known: its record is {seen.source}")
    refuse_giving(record)
    if claim is None and (claim := _place_in(record.parameters.claim)) is None:
        raise InvalidArgument(f"which claim volume {found.id} was made for is not recorded; name one by --claim")
    if found.published:
        show_text(
            f"note: volume {found.id} is given to node {', '.join(found.published)}; if no VolumeAttachment says so, "
            f"take it back by 'luks-csi volume detach', or no other node gets it",
            err=True,
        )
    ceph = found.context.get("backend") == "rbd"
    _check_key(found, record, secret_place, ceph=ceph, plain=plain)
    block = _is_block(record, block)
    parse_options(mount_options, record.made_fs_type)
    if mount_options and block:
        raise InvalidArgument("a block volume is mounted nowhere; leave --mount-option out")
    if ceph and block and access_mode is None:
        raise InvalidArgument(
            f"how volume {found.id} may be used is not recorded; say --access-mode, as its claim had it"
        )
    if access_mode == "ReadWriteMany" and not (ceph and block):
        raise InvalidArgument(f"volume {found.id} cannot be {access_mode}: block volumes of Ceph can")
    own = next(filter(is_object_name, (record.name, found.id)), f"x-{hashlib.sha256(found.id.encode()).hexdigest()}")
    driver = remote.client.plugin_info().name
    shared = {
        "accessModes": [access_mode or _ACCESS_MODES[0]],
        "storageClassName": class_name,
        "volumeMode": "Block" if block else "Filesystem",
    }
    size, (namespace, name) = str(found.capacity_bytes), claim
    volume: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": own,
            "annotations": {
                "pv.kubernetes.io/provisioned-by": driver,
                **(_deletion(secret_place) if secret_place else {}),
            },
        },
        "spec": {
            **shared,
            "capacity": {"storage": size},
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": namespace, "name": name},
            "csi": {
                "driver": driver,
                "volumeHandle": found.id,
                "volumeAttributes": dict(found.context),
                **({"fsType": record.made_fs_type} if record.made_fs_type else {}),
                **(_secrets(secret_place, ceph=ceph) if secret_place else {}),
            },
            **({"mountOptions": list(mount_options)} if mount_options else {}),
            **_places(found.topologies),
        },
    }
    wanted = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {**shared, "resources": {"requests": {"storage": size}}, "volumeName": own},
    }
    show_json({"apiVersion": "v1", "kind": "List", "items": [volume, wanted]})


def _check_key(found: "RemoteVolume", record: VolumeRecord, secret: Place | None, *, ceph: bool, plain: bool) -> None:
    """Raise InvalidArgument where what opens the volume is not told, or told otherwise than its record has it."""
    encrypted = is_encrypted(found)
    if plain and encrypted:
        raise InvalidArgument(f"volume {found.id} is encrypted; leave --plain out")
    if not encrypted and (record.parameters.encrypted or not plain):
        raise InvalidArgument(
            f"volume {found.id} is not encrypted, says its record"
            + (", and that it was to be: restore the one that it had" if plain else "; if that is right, say --plain")
        )
    if secret is None and ceph:
        raise InvalidArgument(f"volume {found.id} is reached by a user of Ceph; name the secret with it by --secret")
    if secret is not None and plain and not ceph:
        raise InvalidArgument(f"volume {found.id} is not encrypted, and no secret opens it; leave --secret out")
    if secret is None and encrypted:
        if record.key is None:
            raise InvalidArgument(f"volume {found.id} is opened by a passphrase; name the secret with it by --secret")
        if record.key.type != GENERATED:
            show_text(
                f"note: the key of volume {found.id} comes from the KMS {record.key.kms_id} ({record.key.type}); where "
                f"its entry takes something from the secret of the class, name that by --secret",
                err=True,
            )


def _is_block(record: VolumeRecord, told: bool | None) -> bool:  # noqa: FBT001 - as click has it
    """How it was used. A record knows the file systems that were made here alone, not those of images or of a VM."""
    if record.file_system is FileSystemState.MADE and told:
        raise InvalidArgument(f"volume {record.id} holds a file system, {record.made_fs_type}; leave --block out")
    if record.file_system is not FileSystemState.MADE and told is None:
        raise InvalidArgument(
            f"how volume {record.id} was used is not recorded; say --block or --filesystem, as its claim had it"
        )
    return bool(told)


def _deletion(secret: Place) -> dict[str, str]:
    """external-provisioner's annotations, for whoever lets it delete the volume with the claim one day."""
    place = "volume.kubernetes.io/provisioner-deletion-secret"
    return {f"{place}-namespace": secret[0], f"{place}-name": secret[1]}


def _secrets(secret: Place, *, ceph: bool) -> dict[str, object]:
    reference = {"namespace": secret[0], "name": secret[1]}
    calls = ("nodeStage", "controllerPublish", "controllerExpand") if ceph else ("nodeStage",)
    return {f"{call}SecretRef": reference for call in calls}


def _places(topologies: Sequence[Mapping[str, str]]) -> dict[str, object]:
    """The nodes that can have it, those of any of these; {} for all."""
    terms = [
        {"matchExpressions": [{"key": key, "operator": "In", "values": [value]} for key, value in sorted(each.items())]}
        for each in topologies
    ]
    return {"nodeAffinity": {"required": {"nodeSelectorTerms": terms}}} if terms else {}
