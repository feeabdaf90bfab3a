"""Inside the guest, after a crash: whether all that was acknowledged is there, and nothing half made.

Calls go through the driver's own server; what they left is looked at apart from it, in the kernel and on the disk.
"""

import os
import random
from collections.abc import Callable, Sequence

import msgspec

from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.model.errors import DriverError
from csi_driver.model.volume import EncryptionState, FileSystemState, VolumeRecord
from csi_driver.rpc.client import RemoteError
from tests.machine.crash_log import Expected, Fact, Identity, Step, expected
from tests.machine.crash_node import Node
from tests.machine.kernel import bound_loops, mounts
from tests.machine.storage import VOLUMES


class Report(msgspec.Struct):
    """What a check found. `cut` counts what a crash had cut: first stages, by the states of encryption and file system
    that were recorded ("formatting/none"), and "creating", "deleting".
    """

    volumes: list[str] = msgspec.field(default_factory=list)
    bytes: int = 0
    lost: list[str] = msgspec.field(default_factory=list)
    reformatted: list[str] = msgspec.field(default_factory=list)
    unstageable: list[str] = msgspec.field(default_factory=list)
    left: list[str] = msgspec.field(default_factory=list)
    cut: dict[str, int] = msgspec.field(default_factory=dict)

    def add(self, other: "Report") -> None:
        """Take in another check."""
        self.volumes += other.volumes
        self.bytes += other.bytes
        self.lost += other.lost
        self.reformatted += other.reformatted
        self.unstageable += other.unstageable
        self.left += other.left
        for what, times in other.cut.items():
            self.count(what, times)

    def count(self, what: str, times: int = 1) -> None:
        self.cut[what] = self.cut.get(what, 0) + times

    @property
    def findings(self) -> list[str]:
        """All that must not be, a sentence each."""
        kinds = (self.lost, self.reformatted, self.unstageable, self.left)
        return [finding for kind in kinds for finding in kind]


def check(
    node: Node, tell: Callable[[Fact], None], facts: Sequence[Fact], rng: random.Random, *, everything: bool
) -> Report:
    """Stage every volume and compare it with `facts`; then delete some of them, or `everything`.

    What is made good on the way (a cut CreateVolume repeated, say) is told in turn.
    """
    report = Report()
    checker = _Checker(node, tell, report)
    volumes = list(expected(facts).values())
    for volume in volumes:
        if volume.deleted:
            checker.gone(volume)
        elif checker.present(volume) and (everything or volume.deleting or rng.random() < 0.4):
            checker.delete(volume)
    kept = {volume.id for volume in volumes if not volume.deleted}
    report.left += leftovers(node, kept)
    return report


class _Checker:
    def __init__(self, node: Node, tell: Callable[[Fact], None], report: Report) -> None:
        self._node = node
        self._tell = tell
        self._report = report

    def gone(self, volume: Expected) -> None:
        """A deleted volume stays deleted, and deleting it again succeeds."""
        if self._record(volume) is not None:
            self._report.lost.append(f"volume {volume.id} was deleted and is there again")
        self._node.delete(volume.id)

    def present(self, volume: Expected) -> bool:
        """Whether the volume is there after all; it is whole then, or the report says what is not."""
        report = self._report
        record = self._record(volume)
        if record is None:
            if volume.created and not volume.deleting:
                report.lost.append(f"volume {volume.id} was created and is gone")
                return False
            if volume.deleting:
                report.count("deleting")
                self.delete(volume)
                return False
            report.count("creating")
        try:
            # What a caller does who got no answer; who got one may do it as well.
            capacity = self._node.create(volume.id, volume.kind, volume.asked if record is None else 0)
        except RemoteError as error:
            report.lost.append(f"volume {volume.id} cannot be created again: {error}")
            return False
        self._learn(volume, Fact(Step.CREATED, volume.id, volume.kind, capacity))
        record = record or self._record(volume)
        if record is not None:
            self._check(volume, record)
        report.volumes.append(volume.id)
        return True

    def delete(self, volume: Expected) -> None:
        self._learn(volume, Fact(Step.DELETING, volume.id, volume.kind))
        self._node.delete(volume.id)
        self._learn(volume, Fact(Step.DELETED, volume.id, volume.kind))

    def _check(self, volume: Expected, record: VolumeRecord) -> None:
        report = self._report
        if not volume.capacity <= record.capacity_bytes <= volume.asked:
            report.lost.append(
                f"volume {volume.id} has {record.capacity_bytes} bytes, and {volume.capacity} to {volume.asked} were "
                f"acknowledged"
            )
        if volume.identity is None and volume.staged:
            report.count(f"{record.encryption or 'plain'}/{record.file_system}")
        if len(volume.identities) > 1:
            report.reformatted.append(f"volume {volume.id} was more than one volume: {volume.identities}")
        recorded = None
        if record.luks is not None and record.encryption is EncryptionState.ENCRYPTED:
            recorded = Identity(record.luks.uuid, record.luks.digest, None)
        known = volume.identity or recorded
        # What a crash cut and a stage now brings to its end has to be what comes again.
        times = 2 if volume.identity is None else 1
        self._learn(volume, Fact(Step.FORMATTING, volume.id, volume.kind))
        try:
            for _ in range(times):
                self._node.stage(volume.id, volume.kind)
                self._check_staged(volume, volume.identity or known)
                self._check_content(volume)
                self._node.unstage(volume.id)
        except RemoteError as error:
            report.unstageable.append(f"volume {volume.id} ({record.encryption}, {record.file_system}): {error}")
            self._compare(volume, volume.identity or known, self._node.luks_identity(volume.id))

    def _check_staged(self, volume: Expected, known: Identity | None) -> None:
        """A staged volume is recorded as such, is the one that is known, and is as large as was acknowledged."""
        if (record := self._record(volume)) is not None:
            encryption = EncryptionState.ENCRYPTED if volume.kind.encrypted else None
            file_system = FileSystemState.RAW if volume.kind.block else FileSystemState.MADE
            if (record.encryption, record.file_system) != (encryption, file_system):
                self._report.lost.append(
                    f"volume {volume.id} is staged and recorded as {record.encryption}, {record.file_system}"
                )
        if volume.kind.kms and (record is None or record.rekey or self._node.key_slots(volume.id) != 1):
            self._report.lost.append(f"volume {volume.id} is staged and a change of its key did not end")
        identity, usable = self._node.identity(volume.id, volume.kind), self._node.usable(volume.id, volume.kind)
        self._compare(volume, known, identity)
        if usable < volume.usable or (volume.kind.block and usable < volume.capacity):
            self._report.lost.append(
                f"volume {volume.id} shows {usable} bytes, and {volume.usable} of {volume.capacity} were acknowledged"
            )
        self._learn(volume, Fact(Step.STAGED, volume.id, volume.kind, usable=usable, identity=identity))

    def _compare(self, volume: Expected, known: Identity | None, found: Identity) -> None:
        if known is not None and not known.agrees(found):
            self._report.reformatted.append(f"volume {volume.id} was {known} and is {found}")

    def _check_content(self, volume: Expected) -> None:
        path = self._node.publish(volume.id, volume.kind)
        for record in volume.records:
            try:
                found = _read(str(path / record.file), record.offset, record.size)
            except OSError as error:
                self._report.lost.append(f"record {record} of volume {volume.id} cannot be read: {error}")
                continue
            if found == record.content(volume.id):
                self._report.bytes += record.size
            else:
                self._report.lost.append(f"record {record} of volume {volume.id} has other content")
        self._node.unpublish(volume.id)

    def _record(self, volume: Expected) -> VolumeRecord | None:
        try:
            return self._node.record(volume.id)
        except DriverError as error:
            self._report.lost.append(f"the record of volume {volume.id} cannot be read: {error}")
            return None

    def _learn(self, volume: Expected, fact: Fact) -> None:
        self._tell(fact)
        volume.learn(fact)


def leftovers(node: Node, volumes: set[str]) -> list[str]:
    """What is there of volumes that are gone or not staged: all that is no volume of `volumes`, on the disk and in the
    kernel.
    """
    state = node.state_dir
    found = [f"the mapping {name}" for name in DeviceMapper().names() if name.startswith("luks-")]
    found += [f"the loop device {loop}" for loop in bound_loops() if _is_below(loop.backing_path, state)]
    found += [f"the mount {mount}" for mount in mounts() if _is_below(mount.mount_point, "/mnt/crash")]
    below, none = node.below, set[str]()
    known = {below.root / "volumes": volumes, below.root / "new": none, below.root / "trash": none}
    for folder, allowed in {**known, state / "locks": volumes, state / "stages": none}.items():
        found += [f"the file {folder.relative_to(state)}/{entry}" for entry in set(os.listdir(folder)) - allowed]
    found += [f"the logical volume of {entry}" for entry in below.made() - volumes]
    found += [f"the mapping {name}" for name in DeviceMapper().names() if name.startswith(VOLUMES)]
    for volume in volumes & set(os.listdir(below.root / "volumes")):
        extra = set(os.listdir(below.folder(volume))) - below.files
        if node.is_between_keys(volume):
            extra -= {"next.img"}
        found += [f"the file {entry} of volume {volume}" for entry in extra]
    return [f"{thing} is left" for thing in found]


def _is_below(path: str, folder: object) -> bool:
    return path.startswith(f"{folder}/")


def _read(path: str, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
