"""A server of this version goes on where one of 0.1.0 was killed or cut: volumes in use, records, unfinished images."""

import base64
import hashlib
import os
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from csi_driver.host import blockdev, loopcontrol
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.loop import LoopDevices
from csi_driver.host.mounts import Mounts
from csi_driver.images.base import CHUNK, Progress
from csi_driver.images.checkpoint import Operation
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Clone
from csi_driver.keys.secret import SecretKey
from csi_driver.luks.device import dm_uuid
from csi_driver.model.secret import Passphrase
from csi_driver.rpc.client import CsiClient, RemoteError, RemoteVolume
from csi_driver.volumes.capability import AccessMode, Capability
from tests.machine.node import BLOCK, DATA_OFFSET, MIB, PASSPHRASE, SECRET
from tests.machine.old_leavings import OldVolume, identity_of, luks_format, luks_open, old_json
from tests.machine.processes import run
from tests.machine.server import ServerProcess

KINDS = [
    (True, "ext4"), (True, "xfs"), (True, "btrfs"), (True, None),
    (False, "ext4"), (False, "btrfs"), (False, None),
]  # fmt: skip
LEAST = {"xfs": 300 * MIB, "btrfs": 256 * MIB}
MARK = "trusted.luks-csi.revision"
FORMAT = {
    "cipher": "aes-xts-plain64", "key_bits": 512, "hash": "sha256", "pbkdf": "pbkdf2", "memory_kib": 0,
    "iterations": 600_000, "sector_size": 512, "data_offset": DATA_OFFSET,
}  # fmt: skip
DATA = b"precious".ljust(512, b".")


def old_volume(folder: Path, *, encrypted: bool = True, fs_type: str | None = "ext4") -> OldVolume:
    size = LEAST.get(fs_type or "", 32 * MIB)
    return OldVolume(folder / "state", "pvc-1", size, encrypted=encrypted, fs_type=fs_type)


def in_use(volume: OldVolume) -> None:
    """Its record, and what is recorded, as after the first stage."""
    if volume.luks_uuid is not None:
        volume.format()
    if volume.fs_type is None:
        volume.record(3 if volume.luks_uuid else 1, file_system="raw")
    else:
        volume.inside(mkfs=True)
        volume.record(4 if volume.luks_uuid else 2, file_system="made", made_fs_type=volume.fs_type)


def capability(volume: OldVolume) -> Capability:
    if volume.fs_type is None:
        return BLOCK
    return Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type=volume.fs_type)


def write(volume: OldVolume, target: Path) -> None:
    place = target if volume.fs_type is None else target / "file"
    descriptor = os.open(place, os.O_WRONLY | (0 if volume.fs_type is None else os.O_CREAT))
    try:
        os.pwrite(descriptor, DATA, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(volume: OldVolume, target: Path) -> bytes:
    place = target if volume.fs_type is None else target / "file"
    return place.read_bytes()[: len(DATA)] if volume.fs_type else _head(place)


def _head(device: Path) -> bytes:
    with device.open("rb") as file:
        return file.read(len(DATA))


def secret(volume: OldVolume) -> dict[str, str]:
    return dict(SECRET) if volume.luks_uuid else {}


def seen(volume: OldVolume, *paths: Path) -> object:
    """Mapping, loop devices and mounts of the volume: the same only if nobody touched them."""
    table = Mounts().table()
    found = [table.at(os.path.realpath(path)) for path in paths]
    return DeviceMapper().get(f"luks-{volume.name}"), LoopDevices().find(str(volume.disk)), found


def is_gone(volume: OldVolume) -> bool:
    """Whether nothing of it is open, attached or kept."""
    kept = str(volume.luks_uuid) in Path("/proc/keys").read_text()
    return DeviceMapper().get(f"luks-{volume.name}") is None and not LoopDevices().find(str(volume.disk)) and not kept


@contextmanager
def taken_over(folder: Path, volume: OldVolume) -> Iterator[tuple[CsiClient, RemoteVolume]]:
    """The server of this version on what is there, and the volume as it lists it."""
    assert not (folder / "state/identity").exists()
    with ServerProcess(folder) as server, CsiClient(server.endpoint) as client:
        assert (folder / "state/identity").exists()
        (found,) = client.volumes()
        assert (found.id, found.capacity_bytes) == (volume.name, volume.size)
        yield client, found


@pytest.mark.parametrize(("encrypted", "fs_type"), KINDS, ids=str)
def test_a_volume_in_use_goes_on_and_is_put_down(folder: Path, encrypted: bool, fs_type: str | None) -> None:  # noqa: FBT001 - pytest's way
    staging, first, second = folder / "stage", folder / "pods/1/volume", folder / "pods/2/volume"
    staging.mkdir()
    volume = old_volume(folder, encrypted=encrypted, fs_type=fs_type)
    in_use(volume)
    volume.publish(staging, volume.stage(staging), first)
    write(volume, first)
    kind, keys = capability(volume), secret(volume)
    with taken_over(folder, volume) as (client, found):
        before = seen(volume, staging, first)
        client.stage(found, staging, kind, keys)
        client.publish(found, staging, first, kind)
        assert seen(volume, staging, first) == before
        client.publish(found, staging, second, kind)
        assert read(volume, second) == DATA
        with pytest.raises(RemoteError, match=rf"still published at {first} and {second}"):
            client.unstage(volume.name, staging)
        size = 2 * volume.size
        assert client.expand_volume(volume.name, size) == size
        assert client.expand_on_node(volume.name, first, size) == size  # without a secret: the key is kept
        assert client.usage(volume.name, first)[0].total > 0.75 * size
        assert read(volume, first) == DATA
        client.unpublish(volume.name, first)
        client.unpublish(volume.name, second)
        client.unstage(volume.name, staging)
        assert is_gone(volume)
        client.stage(found, staging, kind, keys)
        client.publish(found, staging, first, kind)
        assert read(volume, first) == DATA
        client.unpublish(volume.name, first)
        client.unstage(volume.name, staging)
        client.delete_volume(volume.name)
    assert is_gone(volume)
    assert not volume.folder.exists()


def test_a_volume_that_was_staged_through_a_link_is_put_down_and_staged_in_a_folder(folder: Path) -> None:
    staging, target = folder / "stage", folder / "pods/1/volume"
    (folder / "elsewhere").mkdir()
    staging.symlink_to(folder / "elsewhere")
    volume = old_volume(folder)
    in_use(volume)
    volume.stage(staging)
    write(volume, staging)
    kind = capability(volume)
    with taken_over(folder, volume) as (client, found):
        client.stage(found, staging, kind, SECRET)
        client.publish(found, staging, target, kind)
        assert read(volume, target) == DATA
        client.unpublish(volume.name, target)
        client.unstage(volume.name, staging)
        assert is_gone(volume)
        staging.unlink()
        staging.mkdir()
        client.stage(found, staging, kind, SECRET)
        assert read(volume, staging) == DATA
        client.unstage(volume.name, staging)


def test_a_volume_that_was_left_staged_can_be_deleted(folder: Path) -> None:
    staging = folder / "stage"
    staging.mkdir()
    volume = old_volume(folder)
    in_use(volume)
    volume.stage(staging)
    with taken_over(folder, volume) as (client, _):
        client.delete_volume(volume.name)
    assert is_gone(volume)


def _prepared(volume: OldVolume) -> None:
    volume.record(0, luks=False, encryption="prepared")


def _unformatted(volume: OldVolume) -> None:
    volume.record(1, digest=False, encryption="formatting")


def _half_formatted(volume: OldVolume) -> None:
    volume.format()
    os.truncate(volume.disk, 32 << 10)  # both headers, and no key slot
    os.truncate(volume.disk, volume.size + 16 * MIB)
    volume.record(1, digest=False, encryption="formatting")


def _formatted(volume: OldVolume) -> None:
    volume.format()
    volume.record(1, digest=False, encryption="formatting")


def _no_file_system(volume: OldVolume) -> None:
    volume.format()
    volume.record(2)


def _mkfs_not_begun(volume: OldVolume) -> None:
    volume.format()
    volume.record(3, file_system="making")


def _mkfs_ended(volume: OldVolume) -> None:
    volume.format()
    volume.inside(mkfs=True)
    volume.record(3, file_system="making")


def _plain_mkfs_ended(volume: OldVolume) -> None:
    volume.inside(mkfs=True)
    volume.record(1, file_system="making")


def _plain_none(volume: OldVolume) -> None:
    volume.record(0)


@pytest.mark.parametrize(
    ("leave", "fs_type"),
    [
        *((leave, "ext4") for leave in (
            _prepared, _unformatted, _half_formatted, _formatted, _no_file_system, _mkfs_not_begun, _mkfs_ended,
            _plain_none, _plain_mkfs_ended,
        )),
        (_mkfs_ended, "xfs"),
        (_mkfs_ended, "btrfs"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_a_first_stage_that_was_cut_is_ended(folder: Path, leave: Callable[[OldVolume], None], fs_type: str) -> None:
    staging = folder / "stage"
    staging.mkdir()
    volume = old_volume(folder, encrypted="plain" not in leave.__name__, fs_type=fs_type)
    leave(volume)
    with taken_over(folder, volume) as (client, found):
        client.stage(found, staging, capability(volume), secret(volume))
        write(volume, staging)
        client.unstage(volume.name, staging)
        assert int(os.getxattr(volume.folder, MARK)) > 0  # from now on an older record is noticed
        client.stage(found, staging, capability(volume), secret(volume))
        assert read(volume, staging) == DATA
        client.unstage(volume.name, staging)


def test_a_mapping_that_an_orphan_made_on_a_free_loop_device_is_in_nobodys_way(folder: Path) -> None:
    """Seen: a worker that outlived its server opened the mapping by the name of a device that was free by then."""
    staging = folder / "stage"
    staging.mkdir()
    volume = old_volume(folder)
    _no_file_system(volume)
    node = loopcontrol.free_node()
    major, minor = blockdev.device_number(node)
    name = f"luks-{volume.name}"
    table = f"0 {volume.size // 512} crypt aes-xts-plain64 {'5a' * 64} 0 {major}:{minor} 32768"
    run("dmsetup", "create", name, "--uuid", dm_uuid(name, str(volume.luks_uuid)), "--table", table)
    with taken_over(folder, volume) as (client, found):
        client.stage(found, staging, capability(volume), SECRET)
        write(volume, staging)
        assert read(volume, staging) == DATA
        client.unstage(volume.name, staging)
    assert is_gone(volume)


@pytest.mark.parametrize("state", ["made", "raw", "cloning"])
def test_what_is_inside_a_closed_volume_stays(folder: Path, state: str) -> None:
    staging = folder / "stage"
    staging.mkdir()
    volume = old_volume(folder)
    volume.format()
    volume.inside(mkfs=True, content=DATA.decode())
    if state == "made":
        volume.record(4, file_system="made", made_fs_type="ext4")
    elif state == "raw":
        volume.record(3, file_system="raw")
    else:
        image, volume.luks_uuid = volume.luks_uuid, "5c1f6c0e-0d5f-4b52-9a36-0a7d5a1f4d11"
        volume.record(0, encryption="cloning", cloned_uuid=image, file_system="raw", backing_image="golden")
    with taken_over(folder, volume) as (client, found):
        client.stage(found, staging, capability(volume), SECRET)
        assert read(volume, staging) == DATA
        mapping = DeviceMapper().get(f"luks-{volume.name}")
        assert mapping is not None
        assert str(volume.luks_uuid).replace("-", "") in mapping.uuid
        client.unstage(volume.name, staging)


@contextmanager
def shown(file: Path, *, encrypted: bool) -> Iterator[BinaryIO]:
    """What is inside an image's file."""
    if not encrypted:
        with file.open("rb+") as inside:
            yield inside
        return
    luks_open(file, "takeover-image")
    try:
        with Path("/dev/mapper/takeover-image").open("rb+") as inside:
            yield inside
            os.fsync(inside.fileno())
    finally:
        run("cryptsetup", "close", "takeover-image")


@pytest.mark.parametrize("encrypted", [False, True])
def test_an_unfinished_image_is_gone_on_with(folder: Path, encrypted: bool) -> None:  # noqa: FBT001 - pytest's way
    ready, new = folder / "images/ready/golden", folder / "images/new/copy"
    for path in (ready, new, folder / "images/trash", folder / "images/locks"):
        path.mkdir(mode=0o700, parents=True)
    disk = random.Random("golden").randbytes(3 * CHUNK)
    (ready / "image").write_bytes(disk)
    told = {
        "name": "golden", "format": "raw", "size": len(disk), "file_size": len(disk), "luks": None, "secret": None,
        "created": "2026-11-20T00:00:00+00:00",
        "provenance": {"operation": "import", "source": "/srv/golden.raw", "checksum": None},
    }  # fmt: skip
    (ready / "record.json").write_bytes(old_json({"version": 1, "image": told}))
    file = (ready / "image").stat()
    durable = disk[: 2 * CHUNK]
    part, offset = new / "part", DATA_OFFSET if encrypted else 0
    with part.open("wb") as empty:
        empty.truncate(offset + len(disk))
    if encrypted:
        luks_format(part, str(uuid.uuid4()))
    with shown(part, encrypted=encrypted) as inside:
        inside.write(durable)
    stored = part.read_bytes()[offset:]
    digests = b"".join(hashlib.sha256(stored[at : at + CHUNK]).digest() for at in (0, CHUNK))
    source = {
        "device": file.st_dev, "inode": file.st_ino, "size": file.st_size, "mtime_ns": file.st_mtime_ns,
        "ctime_ns": file.st_ctime_ns,
    }  # fmt: skip
    plan = {
        "source": source, "source_format": "raw", "operation": "encrypt" if encrypted else "ignore",
        "payload": len(disk), "chunk": CHUNK, "format": FORMAT if encrypted else None,
    }  # fmt: skip
    checkpoint = {"version": 1, "plan": plan, "luks": identity_of(part) if encrypted else None}
    checkpoint["digests"] = base64.b64encode(digests).decode()
    (new / "checkpoint.json").write_bytes(old_json(checkpoint))
    library = ImageLibrary(folder / "images")
    assert library.unfinished() == ["copy"]
    done: list[int] = []

    @contextmanager
    def meter(what: str, total: int | None) -> Iterator[Progress]:  # noqa: ARG001 - the Protocol names them
        yield done.append

    if encrypted:
        key = SecretKey(Passphrase(PASSPHRASE.encode()), pbkdf="pbkdf2")
        library.clone(Clone("golden", "copy", Operation.ENCRYPT, new_key=key), meter)
    else:
        library.clone(Clone("golden", "copy"), meter)
    assert done[0] >= len(durable)
    with shown(library.file("copy"), encrypted=encrypted) as inside:
        assert inside.read() == disk
    assert library.unfinished() == []
