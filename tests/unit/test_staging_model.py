"""Volumes staged, used, killed and staged again over a fake kernel, against a model of what must hold.

Whatever fails and whenever the driver is killed: nothing is formatted once it is encrypted, nothing gets a file system
once it has one or was shown as a block device, an error of stage leaves nothing open, the same call again succeeds, and
what was written is there.
"""

import contextlib
import dataclasses
import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.host.fshealth import Ailment
from csi_driver.host.handle import Handle
from csi_driver.images.cluster import ClusterImages
from csi_driver.images.store import ImageStore
from csi_driver.keys.secret import SecretKey, read_secret
from csi_driver.luks.formats import DATA_OFFSET
from csi_driver.model.errors import (
    Aborted,
    CommandFailed,
    DeadlineExceeded,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from csi_driver.model.settings import Limits, Settings
from csi_driver.model.volume import EncryptionState, FileSystemState, VolumeRecord
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.condition import Conditions
from csi_driver.volumes.drift import KeyDrift
from csi_driver.volumes.encryption import Encryption
from csi_driver.volumes.expand import ExpandRequest, Expansion
from csi_driver.volumes.filesystem import FileSystems
from csi_driver.volumes.from_image import BackingImages
from csi_driver.volumes.healing import Healing
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.provision import CreateRequest, Provisioning
from csi_driver.volumes.publish import Publishing, PublishRequest
from csi_driver.volumes.rekey import Rekeying
from csi_driver.volumes.stage import StageRequest, Staging
from csi_driver.volumes.stages import Stages
from tests.fake_host import NoHolders, SteppedFiles, at_home, no_kms
from tests.fake_kernel import (
    FakeMappingHandle,
    Kernel,
    KernelCommands,
    KernelFileSystemHealth,
    KernelMappings,
    KernelMounts,
    KernelWorkers,
    Killed,
    content_of,
)
from tests.told_lines import told_lines

MIB = 1 << 20
MOUNT = Capability(AccessMode.SINGLE_NODE_WRITER, block=False)
BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
KEY = read_secret({"CRYPTO_KEY_VALUE": "right"})
WRONG_KEY = read_secret({"CRYPTO_KEY_VALUE": "wrong"})
NO_KEY = SecretKey(passphrase=None)
INJECTED = "the fault of the test"
NAMES = ("enc-1", "enc-2", "plain-1")


def is_encrypted(name: str) -> bool:
    return name.startswith("enc")


class Rig:
    """A driver over a fake kernel; `restart` puts a new driver in the place of a dead one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel = Kernel()
        self.kernel.formatting = self._before_format
        self.kernel.making = self._before_mkfs
        self.shown_as_block: set[str] = set()
        for name in ("stages", "pods"):
            (folder / name).mkdir(parents=True)
        self._build()
        self.backend.prepare()

    def restart(self) -> None:
        """What a new process does at its start."""
        self.kernel.end_of_process()
        self._build()
        self.look_at_what_stands()

    def look_at_what_stands(self) -> None:
        """What a server does at its start and every few seconds; a pod that writes waits for it."""
        for name in self.mappings.names():
            self.encryption.resume(self.backend, None, self.mappings.get(name), None)

    def reboot(self) -> None:
        self.kernel.reboot()
        for path in (self.folder / "stages").glob("[!.]*"):
            document = msgspec.json.decode(path.read_bytes())
            path.write_bytes(msgspec.json.encode(document | {"boot_id": "an earlier one"}))
        self.restart()

    def _build(self) -> None:
        kernel, limits = self.kernel, Limits()
        files, commands, workers, mounts = (
            SteppedFiles(kernel.step),
            KernelCommands(kernel),
            KernelWorkers(kernel),
            KernelMounts(kernel),
        )
        self.backend = LoopfileBackend(self.folder / "loopfile", 0, files, kernel.loops, RecordCodec())
        self.mappings = KernelMappings(kernel)
        stages = self.stages = Stages(self.folder / "stages", files)
        slots = KeySlots(workers, limits)
        self.encryption = Encryption(workers, self.mappings, slots, limits)
        made = self.file_systems = FileSystems(workers, commands, mounts, NoHolders(), limits)
        keys = self.keys = no_kms()
        here = self.folder / "images"
        images = BackingImages(ImageStore(here, files), ClusterImages(here), workers, slots, keys, limits)
        presences = Presences(self.backend, stages, self.mappings, mounts)
        self.conditions = Conditions(self.backend, presences, KernelFileSystemHealth(kernel))
        self.healing = Healing(self.backend, presences, workers, made, KernelFileSystemHealth(kernel))
        self.rekeying = Rekeying(self.backend, presences, workers, slots, keys)
        self.drift = KeyDrift(self.backend, stages, slots, keys)
        self.staging = Staging(
            self.backend,
            lambda: None,
            stages,
            presences,
            workers,
            self.encryption,
            made,
            self.mappings,
            self.healing,
            self.drift,
            keys,
            self.rekeying,
            at_home(self.backend),
        )
        self.provisioning = Provisioning(
            Settings(node_id="node-1"), self.backend, images, lambda: None, self.staging.release, keys
        )
        self.publishing = Publishing(self.backend, presences, mounts, NoHolders(), made, self.healing)
        self.expansion = Expansion(
            self.backend, lambda: None, presences, workers, self.encryption, slots, made, self.healing, keys
        )

    # The calls

    def create(self, name: str, size: int = 64 * MIB) -> None:
        parameters = {"encrypted": "true"} if is_encrypted(name) else {}
        self.provisioning.create(CreateRequest(name, size, 0, (MOUNT,), parameters, KEY))

    def stage(self, name: str, capability: Capability = MOUNT, key: SecretKey = KEY, path: str = "") -> None:
        self.staging.stage(StageRequest(name, path or self.staging_path(name), capability, key, {}))
        if capability.block:
            self.shown_as_block.add(name)

    def unstage(self, name: str) -> None:
        self.staging.unstage(name, self.staging_path(name))

    def publish(self, name: str) -> None:
        path = str(self.folder / "pods" / name)
        self.publishing.publish(PublishRequest(name, self.staging_path(name), path, MOUNT, read_only=False, context={}))

    def unpublish(self, name: str) -> None:
        self.publishing.unpublish(name, str(self.folder / "pods" / name))

    def expand(self, name: str, size: int, key: SecretKey = NO_KEY) -> None:
        self.provisioning.expand(name, size, 0)
        self.expansion.expand(ExpandRequest(name, self.staging_path(name), size, 0, key))

    def delete(self, name: str) -> None:
        self.provisioning.delete(name)
        self.shown_as_block.discard(name)

    # What pods do, and what is there

    def staging_path(self, name: str) -> str:
        return f"/staging/{name}"

    def device(self, name: str) -> str:
        if is_encrypted(name):
            return f"/dev/mapper/luks-{name}"
        (loop,) = self.kernel.loops.find(str(self.folder / "loopfile" / "volumes" / name / "disk.img"))
        return loop.path

    def guarded(self, name: str) -> bool:
        return any(f"/{name}/" in path for path in self.kernel.loops.guarded)

    def write(self, name: str, file: str, text: str) -> None:
        content = self.kernel.read(self.device(name))
        assert content.inside.fs_type == "ext4"
        content.inside.files[file] = text
        self.kernel.write(self.device(name), content)

    def write_raw(self, name: str, text: str) -> None:
        content = self.kernel.read(self.device(name))
        content.inside.raw = text
        self.kernel.write(self.device(name), content)

    def record(self, name: str) -> VolumeRecord | None:
        try:
            return self.backend.get(name)
        except NotFound:
            return None

    def _record_of(self, loop: str) -> VolumeRecord:
        found = self.record(Path(self.kernel.loops.bound[loop].info.backing_path).parent.name)
        assert found is not None
        return found

    def _before_format(self, loop: str) -> None:
        record = self._record_of(loop)
        assert record.encryption is EncryptionState.FORMATTING, f"luksFormat of a volume that is {record.encryption}"
        assert f"luks-{record.id}" not in self.kernel.mappings, "luksFormat under an open mapping"

    def _before_mkfs(self, loop: str) -> None:
        record = self._record_of(loop)
        assert record.file_system is FileSystemState.MAKING, f"mkfs of a volume that is {record.file_system}"
        assert record.id not in self.shown_as_block, "mkfs of a volume that was shown as a block device"
        assert record.encryption in (None, EncryptionState.ENCRYPTED)


def one_fault(kind: str, number: int) -> Callable[[str], None]:
    """A plan that lets step `number` fail or the driver be killed at it."""
    left = [number]

    def plan(step: str) -> None:
        left[0] -= 1
        if left[0] != -1:
            return
        if kind == "kill":
            raise Killed
        of_files = any(word in step for word in ("fill", "size", "rename", "remove", "folder", "sync"))
        if of_files and "fsync_device" not in step:
            raise OSError(errno.EIO, INJECTED)
        raise CommandFailed(f"{step}: {INJECTED}")

    return plan


def no_fault(_: str) -> None:
    """Nothing goes wrong."""


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """In memory where that is to be had: nothing here is about disks."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


@pytest.fixture
def folder() -> Iterator[Path]:
    with temporary_folder() as made:
        yield made


# --- every step of every call, one fault each ------------------------------------------------------------------------


Life = Callable[["Rig", str], Iterator[tuple[str, Callable[[], None]]]]


def life(rig: Rig, name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A volume's life, call by call; each call may be repeated."""
    path = rig.staging_path(name)
    yield "create", lambda: rig.create(name)
    yield "first stage", lambda: rig.stage(name)
    assert rig.guarded(name)
    assert rig.kernel.size(rig.device(name)) == 64 * MIB
    rig.write(name, "a", "written")
    yield "publish", lambda: rig.publish(name)
    yield "expand", lambda: rig.expand(name, 96 * MIB)
    assert rig.guarded(name)
    assert rig.kernel.size(rig.device(name)) == 96 * MIB
    assert rig.kernel.read(rig.device(name)).inside.fs_bytes == 96 * MIB
    yield "unpublish", lambda: rig.unpublish(name)
    yield "unstage", lambda: rig.unstage(name)
    assert not rig.guarded(name)
    assert rig.kernel.traces(name) == []
    yield "stage again", lambda: rig.stage(name)
    assert rig.kernel.read(rig.device(name)).inside.files == {"a": "written"}
    assert any(mount.mount_point == path for mount in rig.kernel.mounted)
    yield "unstage again", lambda: rig.unstage(name)
    yield "stage as a block device", lambda: rig.stage(name, BLOCK)
    assert rig.kernel.read(rig.device(name)).inside.files == {"a": "written"}
    yield "unstage the block device", lambda: rig.unstage(name)
    assert rig.kernel.traces(name) == []
    yield "delete", lambda: rig.delete(name)
    assert rig.record(name) is None
    assert [path for path in (rig.folder / "loopfile").rglob("*") if path.is_file()] == []


def block_life(rig: Rig, name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "create", lambda: rig.create(name)
    yield "first stage", lambda: rig.stage(name, BLOCK)
    rig.write_raw(name, "written")
    yield "expand", lambda: rig.expand(name, 96 * MIB)
    assert rig.kernel.size(rig.device(name)) == 96 * MIB
    yield "unstage", lambda: rig.unstage(name)
    with pytest.raises(FailedPrecondition, match=r"never gets a file system"):
        rig.stage(name, MOUNT)
    assert rig.kernel.traces(name) == []
    yield "stage again", lambda: rig.stage(name, BLOCK)
    assert rig.kernel.read(rig.device(name)).inside.raw == "written"
    yield "unstage again", lambda: rig.unstage(name)
    yield "delete", lambda: rig.delete(name)


def most_steps(folder: Path, lead: Life, name: str) -> int:
    """Of all calls of a life in which nothing goes wrong."""
    rig, most = Rig(folder), 0
    for _, act in lead(rig, name):
        seen: list[str] = []
        rig.kernel.plan = seen.append
        act()
        most = max(most, len(seen))
    return most


@pytest.mark.parametrize(
    ("lead", "name", "kind", "after"),
    [
        *((life, "enc-1", kind, after) for kind in ("fail", "kill") for after in ("repeat", "unstage")),
        *((lead, "enc-1", "kill", "reboot") for lead in (life, block_life)),
        *((block_life, "enc-1", kind, "repeat") for kind in ("fail", "kill")),
        *((lead, "plain-1", kind, "repeat") for lead in (life, block_life) for kind in ("fail", "kill")),
    ],
)
def test_every_step_of_every_call_may_fail_once(folder: Path, lead: Life, name: str, kind: str, after: str) -> None:
    """In the n-th life of a volume the n-th step of each call fails, and then the call is made again."""
    most = most_steps(folder / "recorded", lead, name)
    assert most > 10
    for step in range(most):
        rig = Rig(folder / str(step))
        for what, act in lead(rig, name):
            stumble(rig, name, what, act, one_fault(kind, step), after)
            act()
        assert os.listdir(rig.folder / "stages") == []


def stumble(rig: Rig, name: str, what: str, act: Callable[[], None], plan: Callable[[str], None], after: str) -> None:
    """The call with a fault in it, and what must hold then; the call itself is made again by the caller."""
    before = rig.kernel.traces(name)
    rig.kernel.plan = plan
    try:
        act()
    except Killed:
        rig.kernel.plan = no_fault
        rig.restart()
    except (DriverError, OSError):
        rig.kernel.plan = no_fault
        if "stage" in what and not before:
            assert rig.kernel.traces(name) == [], f"{what} failed and left something open"
        assert not rig.kernel.loops.handles
    rig.kernel.plan = no_fault
    if after == "reboot" and what != "expand" and "publish" not in what:
        rig.reboot()
    if after == "unstage" and "stage" in what:
        rig.unstage(name)
        assert rig.kernel.traces(name) == []


@pytest.mark.parametrize("capability", [MOUNT, BLOCK])
def test_a_mapping_that_was_left_suspended_is_resumed_by_whatever_comes_next(
    folder: Path, capability: Capability
) -> None:
    rig = Rig(folder)
    rig.create("enc-1")
    calls: list[Callable[[], None]] = [
        lambda: rig.stage("enc-1", capability),
        lambda: rig.expand("enc-1", 64 * MIB),
        lambda: rig.expand("enc-1", 96 * MIB),
        rig.restart,
    ]
    for call in calls:
        rig.stage("enc-1", capability)
        rig.kernel.mappings["luks-enc-1"].suspended = True
        call()
        assert not rig.kernel.mappings["luks-enc-1"].suspended
    rig.kernel.mappings["luks-enc-1"].suspended = True
    rig.unstage("enc-1")
    assert rig.kernel.traces("enc-1") == []


def test_a_pod_writes_on_after_an_expansion_that_failed_in_the_middle(folder: Path) -> None:
    rig = Rig(folder)
    rig.create("enc-1")
    rig.stage("enc-1")

    def failing(step: str) -> None:
        if step == "in resize":
            raise CommandFailed(INJECTED)

    rig.kernel.plan = failing
    with pytest.raises(CommandFailed):
        rig.expand("enc-1", 96 * MIB)
    rig.kernel.plan = no_fault
    assert rig.kernel.mappings["luks-enc-1"].suspended
    rig.look_at_what_stands()
    rig.write("enc-1", "file", "precious")


def test_a_volume_whose_stage_was_lost_is_told_to_be_mounted_and_not_published(folder: Path) -> None:
    """There is nobody who could unpublish it from its staging path."""
    rig = Rig(folder)
    rig.create("enc-1")
    rig.stage("enc-1")
    (folder / "stages" / "enc-1").unlink()
    with pytest.raises(DeviceInUse, match=r"^volume enc-1 is still mounted at /staging/enc-1; unmount it there first$"):
        rig.delete("enc-1")
    rig.unstage("enc-1")
    rig.delete("enc-1")


@pytest.mark.parametrize("staged", [True, False])
def test_unpublish_unmounts_in_a_worker_what_nothing_else_shows(folder: Path, *, staged: bool) -> None:
    """That ends the file system, which writes to its device; to end one place of many does nothing of the kind."""
    rig = Rig(folder)
    rig.create("enc-1")
    rig.stage("enc-1")
    rig.publish("enc-1")
    if not staged:
        rig.kernel.mounted.pop(0)
    steps: list[str] = []
    rig.kernel.plan = steps.append
    rig.unpublish("enc-1")
    assert ("before unmount_volume" in steps) is not staged
    assert "after unmount" in steps


@pytest.mark.parametrize("name", ["enc-1", "plain-1"])
def test_what_is_staged_is_put_down_while_nobody_answers_for_its_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The API of Kubernetes or a Ceph cluster may be away; what the kernel shows and the stage says is enough."""
    rig = Rig(folder)
    rig.create(name)
    rig.stage(name)

    def away(_: str) -> VolumeRecord:
        raise Unavailable("nobody answers")

    monkeypatch.setattr(rig.backend, "get", away)
    rig.unstage(name)
    assert not rig.kernel.mounted
    assert rig.stages.get(name) is None


def test_a_clone_whose_stage_was_cut_before_it_grew_grows_with_the_next_one(folder: Path) -> None:
    rig = Rig(folder)
    rig.create("enc-1")
    rig.stage("enc-1")
    content = rig.kernel.read(rig.device("enc-1"))
    content.inside.fs_bytes //= 2  # the image's
    rig.kernel.write(rig.device("enc-1"), content)
    rig.unstage("enc-1")
    record = rig.backend.get("enc-1")
    parameters = msgspec.structs.replace(record.parameters, backing_image="image-1")
    rig.backend.update(msgspec.structs.replace(record, parameters=parameters))

    def plan(step: str) -> None:
        if step == "before grow":
            raise Killed

    rig.kernel.plan = plan
    with pytest.raises(Killed):
        rig.stage("enc-1")
    rig.kernel.plan = no_fault
    rig.restart()
    rig.stage("enc-1")
    assert rig.kernel.read(rig.device("enc-1")).inside.fs_bytes == rig.kernel.size(rig.device("enc-1"))


def test_what_another_node_formats_behind_the_look_at_its_record_is_not_formatted_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend lets several nodes have what is settled, and the other one's record is that by then."""
    rig = Rig(folder)
    rig.create("enc-1")
    real = rig.backend.attach

    def attach(volume_id: str, *, lasting: bool) -> Handle:
        monkeypatch.undo()
        rig.stage("enc-1", BLOCK)
        content = rig.kernel.read(rig.device("enc-1"))
        content.inside.raw = "precious"
        rig.kernel.write(rig.device("enc-1"), content)
        rig.unstage("enc-1")
        return real(volume_id, lasting=lasting)

    monkeypatch.setattr(rig.backend, "attach", attach)
    with pytest.raises(Aborted, match=r"^volume enc-1 was changed, formatted by another node perhaps, while"):
        rig.stage("enc-1", BLOCK)
    rig.stage("enc-1", BLOCK)
    assert rig.kernel.read(rig.device("enc-1")).inside.raw == "precious"


@pytest.mark.parametrize("program", ["mkfs", "e2fsck"])
def test_after_an_error_no_thread_of_a_call_closes_a_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """The last close writes back what the killed program has written, which need not end."""
    rig, closing = Rig(folder), list[bool]()
    rig.create("enc-1")
    if program == "e2fsck":
        rig.stage("enc-1")
        rig.kernel.ailing[rig.kernel.mounted[0].device] = Ailment.ERROR_FLAG
    real = FakeMappingHandle.close

    def close(self: FakeMappingHandle) -> None:
        if self.fd >= 0:
            closing.append(threading.current_thread() is threading.main_thread())
        real(self)

    def fail(step: str) -> None:
        if step in ("in mkfs", "before e2fsck"):
            closing.clear()
            raise DeadlineExceeded("it did not end in time and was killed")

    monkeypatch.setattr(FakeMappingHandle, "close", close)
    rig.kernel.plan = fail
    with pytest.raises(DeadlineExceeded):
        rig.stage("enc-1")
    assert closing[:1] == [False]


@pytest.mark.parametrize("name", ["enc-1", "plain-1"])
def test_what_grew_while_it_was_closed_is_filled_by_the_next_stage_if_it_can_be(folder: Path, name: str) -> None:
    def cannot_grow(step: str) -> None:
        if step == "before grow":
            raise CommandFailed(INJECTED)

    rig = Rig(folder)
    rig.create(name)
    rig.stage(name)
    rig.write(name, "file", "precious")
    rig.unstage(name)
    rig.provisioning.expand(name, 96 * MIB, 0)
    rig.kernel.plan = cannot_grow
    with told_lines() as lines:
        rig.stage(name, key=KEY if is_encrypted(name) else NO_KEY)
    assert rig.kernel.read(rig.device(name)).inside.fs_bytes == 64 * MIB
    assert [line.fields["error"] for line in lines if line.level == "warning"] == [INJECTED]
    rig.unstage(name)
    rig.kernel.plan = no_fault
    rig.stage(name)
    inside = rig.kernel.read(rig.device(name)).inside
    assert (inside.fs_bytes, inside.files) == (96 * MIB, {"file": "precious"})


@pytest.mark.parametrize(("fs_type", "asked"), [("ext4", False), ("xfs", True)])
def test_a_file_system_that_is_seen_to_fill_its_device_is_not_asked_to_grow(
    folder: Path, fs_type: str, *, asked: bool
) -> None:
    rig, shown = Rig(folder), msgspec.structs.replace(MOUNT, fs_type=fs_type)
    rig.create("enc-1", 512 * MIB)
    rig.stage("enc-1", shown)
    rig.unstage("enc-1")
    steps: list[str] = []
    rig.kernel.plan = steps.append
    rig.stage("enc-1", shown)
    assert ("before grow" in steps) is asked


# --- any order of calls and faults -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Volume:
    """What the model knows of a volume. `stage` is how it is staged; `sure` is False after a call was cut."""

    capacity: int
    stage: Capability | None = None
    sure: bool = True
    published: bool = False
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    raw: str = ""
    digest: str = ""


FAULTS = st.none() | st.tuples(st.sampled_from(["fail", "kill"]), st.integers(0, 45))
VOLUMES = st.sampled_from(NAMES)
Fault = tuple[str, int] | None


class StagingMachine(RuleBasedStateMachine):
    """The model: every rule makes one call, perhaps with a fault, and says what may come of it."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self.folder = self._stack.enter_context(temporary_folder())
        self.rig = Rig(self.folder)
        self.volumes: dict[str, Volume] = {}

    def teardown(self) -> None:
        self.rig.kernel.end_of_process()
        self._stack.close()

    def attempt(self, act: Callable[[], None], fault: Fault) -> Exception | Killed | None:
        """Make the call; what came of it. A killed driver is replaced."""
        self.rig.kernel.plan = one_fault(*fault) if fault else no_fault
        outcome: Exception | Killed | None = None
        try:
            act()
        except Killed as killed:
            outcome = killed
        except (DriverError, OSError) as error:
            outcome = error
        self.rig.kernel.plan = no_fault
        if isinstance(outcome, Killed):
            self.rig.restart()
        assert not self.rig.kernel.loops.handles, "a handle of a loop device was left open"
        return outcome

    @initialize()
    def first(self) -> None:
        for name in NAMES[::2]:
            self.create(name, None)

    @rule(name=VOLUMES, fault=FAULTS)
    def create(self, name: str, fault: Fault) -> None:
        if name in self.volumes and self.volumes[name].capacity != 64 * MIB:
            return
        outcome = self.attempt(lambda: self.rig.create(name), fault)
        assert fault or outcome is None
        if name not in self.volumes and self.rig.record(name) is not None:
            self.volumes[name] = Volume(64 * MIB)
        assert outcome is not None or name in self.volumes

    @rule(name=VOLUMES, fault=FAULTS)
    def delete(self, name: str, fault: Fault) -> None:
        volume = self.volumes.get(name)
        if volume and (volume.stage or not volume.sure or volume.published):
            return
        outcome = self.attempt(lambda: self.rig.delete(name), fault)
        assert fault or outcome is None
        if self.rig.record(name) is None:
            self.volumes.pop(name, None)
            self.rig.shown_as_block.discard(name)
        assert outcome is not None or name not in self.volumes

    @rule(
        name=VOLUMES,
        capability=st.sampled_from([MOUNT, MOUNT, BLOCK]),
        key=st.sampled_from([KEY, KEY, KEY, WRONG_KEY, NO_KEY]),
        fault=FAULTS,
    )
    def stage(self, name: str, capability: Capability, key: SecretKey, fault: Fault) -> None:
        volume, record = self.volumes.get(name), self.rig.record(name)
        if volume is None or record is None:
            assert isinstance(self.attempt(lambda: self.rig.stage(name, capability, key), fault), NotFound)
            return
        if key is WRONG_KEY and record.encryption is not EncryptionState.ENCRYPTED:
            key = KEY  # a volume that was never formatted takes any
        before = self.rig.kernel.traces(name)
        outcome = self.attempt(lambda: self.rig.stage(name, capability, key), fault)
        if outcome is None:
            assert volume.stage in (None, capability) or not volume.sure
            volume.stage, volume.sure = capability, True
            # A stage that was there already is for NodeExpandVolume to enlarge.
            self.check_staged(name, volume, 0 if before else volume.capacity)
            return
        if isinstance(outcome, Killed):
            volume.sure = False
            if capability.block:
                self.rig.shown_as_block.discard(name)
            return
        if fault and INJECTED not in str(outcome):
            volume.sure = False  # the fault may have met what was undone after another error
        elif not before:
            assert self.rig.kernel.traces(name) == [], f"stage failed ({outcome}) and left something open"
            volume.stage, volume.sure = None, True
        elif volume.stage != capability or fault:
            volume.sure = volume.sure and not fault
        if fault is None:
            self.check_refusal(name, volume, capability, key, outcome)

    def check_refusal(self, name: str, volume: Volume, capability: Capability, key: SecretKey, outcome: object) -> None:
        """Without a fault stage may only refuse for a reason."""
        record = self.rig.record(name)
        assert record is not None
        staged_otherwise = volume.stage not in (None, capability) or not volume.sure
        no_file_system = not capability.block and record.file_system is FileSystemState.RAW
        if staged_otherwise or no_file_system:
            return
        assert is_encrypted(name), outcome
        assert key is not KEY, outcome
        assert key is NO_KEY or isinstance(outcome, Unauthenticated)

    def check_staged(self, name: str, volume: Volume, least: int) -> None:
        """A stage that succeeded shows the volume whole, with what was written."""
        device = self.rig.device(name)
        assert self.rig.kernel.size(device) >= least
        assert not is_encrypted(name) or not self.rig.kernel.mappings[f"luks-{name}"].suspended
        inside = self.rig.kernel.read(device).inside
        assert inside.files == volume.files
        assert inside.raw == volume.raw
        shown = [mount for mount in self.rig.kernel.mounted if mount.mount_point == self.rig.staging_path(name)]
        assert volume.stage is not None
        assert len(shown) == (0 if volume.stage.block else 1)
        assert volume.stage.block or inside.fs_type == "ext4"

    @rule(name=VOLUMES, fault=FAULTS)
    def unstage(self, name: str, fault: Fault) -> None:
        volume = self.volumes.get(name)
        outcome = self.attempt(lambda: self.rig.unstage(name), fault)
        if volume is None:
            assert fault or outcome is None
        elif outcome is None:
            assert self.rig.kernel.traces(name) == []
            assert not volume.published
            volume.stage, volume.sure = None, True
        else:
            assert fault or volume.published, f"unstage is always possible: {outcome}"
            volume.sure = False

    @precondition(lambda self: any(one.stage and one.sure for one in self.volumes.values()))
    @rule(data=st.data(), file=st.sampled_from("ab"), text=st.text("xyz", min_size=1, max_size=3))
    def write(self, data: st.DataObject, file: str, text: str) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, one in self.volumes.items() if one.stage and one.sure)))
        volume = self.volumes[name]
        self.rig.look_at_what_stands()
        if volume.stage == MOUNT:
            self.rig.write(name, file, text)
            volume.files[file] = text
        else:
            self.rig.write_raw(name, text)
            volume.raw = text

    @rule(name=VOLUMES, fault=FAULTS)
    def publish(self, name: str, fault: Fault) -> None:
        volume = self.volumes.get(name)
        if volume is None or volume.stage != MOUNT or not volume.sure:
            return
        outcome = self.attempt(lambda: self.rig.publish(name), fault)
        assert fault or outcome is None
        path = str(self.folder / "pods" / name)
        volume.published = any(mount.mount_point == path for mount in self.rig.kernel.mounted)
        assert volume.published or outcome is not None

    @rule(name=VOLUMES, fault=FAULTS)
    def unpublish(self, name: str, fault: Fault) -> None:
        outcome = self.attempt(lambda: self.rig.unpublish(name), fault)
        assert fault or outcome is None
        path = str(self.folder / "pods" / name)
        still = any(mount.mount_point == path for mount in self.rig.kernel.mounted)
        assert not still or outcome is not None
        if name in self.volumes:
            self.volumes[name].published = still

    @rule(name=VOLUMES, more=st.integers(0, 3), key=st.sampled_from([KEY, NO_KEY]), fault=FAULTS)
    def expand(self, name: str, more: int, key: SecretKey, fault: Fault) -> None:
        volume = self.volumes.get(name)
        if volume is None or volume.stage is None or not volume.sure:
            return
        size = volume.capacity + more * 8 * MIB
        outcome = self.attempt(lambda: self.rig.expand(name, size, key), fault)
        record = self.rig.record(name)
        assert record is not None
        assert volume.capacity <= record.capacity_bytes <= size
        volume.capacity = record.capacity_bytes
        if outcome is None:
            assert record.capacity_bytes == size
            self.check_staged(name, volume, size)
            assert volume.stage.block or self.rig.kernel.read(self.rig.device(name)).inside.fs_bytes >= size
        elif fault is None:
            raise AssertionError(f"expand failed: {outcome}")

    @rule()
    def restart(self) -> None:
        self.rig.restart()

    @rule()
    def reboot(self) -> None:
        self.rig.reboot()
        for volume in self.volumes.values():
            volume.stage, volume.sure, volume.published = None, True, False

    @invariant()
    def what_was_written_is_on_the_disk(self) -> None:
        for name, volume in self.volumes.items():
            path = self.folder / "loopfile" / "volumes" / name / "disk.img"
            assert path.stat().st_size >= volume.capacity + (DATA_OFFSET if is_encrypted(name) else 0)
            with path.open("rb") as disk:
                content = content_of(disk.read(4096))
            assert content.inside.files == volume.files
            assert content.inside.raw == volume.raw
            record = self.rig.record(name)
            assert record is not None
            if record.encryption is EncryptionState.ENCRYPTED:
                assert record.luks is not None
                assert volume.digest in ("", record.luks.digest), "the volume key was changed"
                assert content.luks is not None
                assert content.luks.digest == record.luks.digest
                volume.digest = record.luks.digest or ""

    @invariant()
    def nothing_is_open_that_no_volume_has(self) -> None:
        for name in NAMES:
            if name not in self.volumes:
                assert self.rig.kernel.traces(name) == []


TestStagingMachine = StagingMachine.TestCase
TestStagingMachine.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    phases=[Phase.generate],  # making a failure shorter takes minutes, and thirty calls can be read
    suppress_health_check=[HealthCheck.too_slow],
)
