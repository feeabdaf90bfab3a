"""Use cases without a host below them, for tests of what stands above: they record what they are asked."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from csi_driver.host.holders import Holders
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.regularly import Regularly
from csi_driver.keys.secret import SecretKey
from csi_driver.model.errors import NotFound
from csi_driver.model.settings import Settings
from csi_driver.model.volume import EncryptionState, VolumeParameters, VolumeRecord, volume_id_for
from csi_driver.volumes.capability import Capability
from csi_driver.volumes.driver import Driver, build_driver
from csi_driver.volumes.expand import ExpandRequest, Expansion
from csi_driver.volumes.health import Health
from csi_driver.volumes.provision import Capacity, CreateRequest, Provisioning, VolumeView
from csi_driver.volumes.publish import Publishing, PublishRequest
from csi_driver.volumes.rotation import KeyRotation
from csi_driver.volumes.stage import StageRequest, Staging
from csi_driver.volumes.usage import Usage, Usages


def nothing(_: object) -> None:
    """What a call does unless a test says otherwise."""


@dataclasses.dataclass
class Calls:
    """What the use cases were asked, in order; `then` runs within each call, under the volume's lock."""

    made: list[object] = dataclasses.field(default_factory=list)
    then: Callable[[object], None] = nothing

    def note(self, what: object) -> None:
        self.made.append(what)
        self.then(what)


class FakeProvisioning(Provisioning):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.views: dict[str, VolumeView] = {}
        self.refusing: str | None = None

    def create(self, request: CreateRequest) -> VolumeView:
        self._calls.note(request)
        record = VolumeRecord(
            id=volume_id_for(request.name),
            name=request.name,
            capacity_bytes=request.required_bytes,
            parameters=VolumeParameters(encrypted=True),
            encryption=EncryptionState.PREPARED,
            created="2026-11-20T00:00:00+00:00",
        )
        return self.views.setdefault(record.id, VolumeView(record, {"encrypted": "true"}, [{"place": "here"}]))

    def new_id(self, name: str, given: Mapping[str, str]) -> str:
        return volume_id_for(name)

    def delete(self, volume_id: str) -> None:
        self._calls.note(("delete", volume_id))
        self.views.pop(volume_id, None)

    def get(self, volume_id: str) -> VolumeView:
        if volume_id not in self.views:
            raise NotFound(f"volume {volume_id} does not exist")
        return self.views[volume_id]

    def list(self, max_entries: int, starting_token: str) -> tuple[list[VolumeView], str]:
        start = int(starting_token or 0)
        end = start + max_entries if max_entries else len(self.views)
        return list(self.views.values())[start:end], str(end) if end < len(self.views) else ""

    def capacity(
        self, given: Mapping[str, str], topology: Mapping[str, str] | None, wanted: Sequence[Capability]
    ) -> Capacity:
        self._calls.note(("capacity", given, topology, wanted))
        return Capacity(1000, 900)

    def refusal(
        self, volume_id: str, context: Mapping[str, str], parameters: Mapping[str, str], wanted: Sequence[Capability]
    ) -> str | None:
        self._calls.note(("refusal", volume_id, context, parameters, wanted))
        return self.refusing

    def expand(self, volume_id: str, required_bytes: int, limit_bytes: int) -> int:
        self._calls.note(("expand", volume_id, required_bytes, limit_bytes))
        return required_bytes


class FakeStaging(Staging):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def stage(self, request: StageRequest) -> None:
        self._calls.note(request)

    def unstage(self, volume_id: str, staging_path: str) -> None:
        self._calls.note(("unstage", volume_id, staging_path))


class FakePublishing(Publishing):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def publish(self, request: PublishRequest) -> None:
        self._calls.note(request)

    def unpublish(self, volume_id: str, target_path: str) -> None:
        self._calls.note(("unpublish", volume_id, target_path))


class FakeExpansion(Expansion):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def expand(self, request: ExpandRequest) -> int:
        self._calls.note(request)
        return request.required_bytes


class FakeUsages(Usages):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def of(self, volume_id: str, volume_path: str) -> list[Usage]:
        self._calls.note(("usage", volume_id, volume_path))
        return [Usage("bytes", 100, 60, 30), Usage("inodes", 10)]


class FakeKeyRotation(KeyRotation):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def rotate(self, volume_id: str, secret: SecretKey) -> None:
        self._calls.note(("rotate", volume_id, secret))

    def overdue(self) -> int:
        return 5

    def failed(self) -> int:
        return 1


class FakeJob(Regularly):
    """Its thread is noted in `life` and not started; `at_work` is what it ends at a stop."""

    def __init__(self) -> None:
        self.life: list[str] = []
        self.at_work: Callable[[], object] = list

    def start(self) -> None:
        self.life.append("started")

    def ask_to_end(self) -> None:
        self.life.append("asked to end")

    def join(self) -> None:
        self.at_work()
        self.life.append("ended")


class FakeHealth(Health):
    def __init__(self) -> None:
        self.blocked_by: str | None = None
        self.mappings: Callable[[], int] = lambda: 3

    def obstacle(self) -> str | None:
        return self.blocked_by

    def open_mappings(self) -> int:
        return self.mappings()

    def drifted_secrets(self) -> int:
        return 2

    def free_bytes(self) -> int:
        return 4096

    def thin_pool_percent(self) -> int:
        return 61

    def root_keys(self) -> int:
        return 7

    def root_keys_percent(self) -> int:
        return 2

    def processes(self) -> int:
        return 3

    def resident_bytes(self) -> int:
        return 8192


@dataclasses.dataclass
class FakeUseCases:
    """A driver of fakes, with real locks, and handles to the fakes."""

    driver: Driver
    calls: Calls
    provisioning: FakeProvisioning
    health: FakeHealth
    rotation: FakeKeyRotation
    job: FakeJob


def fake_use_cases(folder: Path, settings: Settings | None = None) -> FakeUseCases:
    """A driver whose use cases do nothing; its lock files are in `folder`."""
    settings = settings or Settings(endpoint=folder / "csi.sock", node_id="node-1", state_dir=folder / "state")
    (folder / "locks").mkdir(exist_ok=True)
    calls, health = Calls(), FakeHealth()
    provisioning, rotation, job = FakeProvisioning(calls), FakeKeyRotation(calls), FakeJob()
    driver = dataclasses.replace(
        build_driver(settings),
        locks=VolumeLocks(folder / "locks", Holders()),
        provisioning=provisioning,
        staging=FakeStaging(calls),
        publishing=FakePublishing(calls),
        expansion=FakeExpansion(calls),
        usage=FakeUsages(calls),
        rotation=rotation,
        jobs=(job,),
        health=health,
    )
    return FakeUseCases(driver, calls, provisioning, health, rotation, job)
