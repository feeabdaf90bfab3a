"""What commands alone do to volumes of their node, beside its server or without one; a server never loads it."""

from pathlib import Path
from typing import TYPE_CHECKING

from csi_driver.backends.base import Backend, TakesOver
from csi_driver.host.commands import Commands
from csi_driver.host.locks import VolumeLocks
from csi_driver.keys.sources import KeySources
from csi_driver.luks.mapping import Mappings
from csi_driver.model.settings import Limits
from csi_driver.volumes.adoption import Adoption
from csi_driver.volumes.check import Checking
from csi_driver.volumes.conversion import Conversions
from csi_driver.volumes.encryption import Encryption
from csi_driver.volumes.export import Exports
from csi_driver.volumes.filesystem import FileSystems
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.move import Moves
from csi_driver.volumes.move_copy import Place
from csi_driver.volumes.moved import Homes
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.recovery import Recovery
from csi_driver.volumes.rekey import Rekeying
from csi_driver.volumes.stages import Stages
from csi_driver.volumes.takeover import Takeover

if TYPE_CHECKING:
    from csi_driver.volumes.driver import Host


class Offline:
    """The use cases that no call of CSI asks for."""

    def __init__(
        self,
        limits: Limits,
        host: "Host",
        backend: Backend,
        locks: VolumeLocks,
        stages: Stages,
        presences: Presences,
        mappings: Mappings,
        commands: Commands,
        slots: KeySlots,
        encryption: Encryption,
        file_systems: FileSystems,
        sources: KeySources,
        keys: VolumeKeys,
        rekeying: Rekeying,
        homes: Homes,
        state_dir: Path,
    ) -> None:
        self.adoption = Adoption(backend, host.workers, host.loops, slots, sources, rekeying, limits)
        self.takeover = (
            Takeover(backend, backend.foreign, host.workers, slots, sources, rekeying, limits)
            if isinstance(backend, TakesOver)
            else None
        )
        self.checking = Checking(
            backend, presences, host.workers, commands, mappings, encryption, file_systems, keys, homes, limits
        )
        self.conversions = Conversions(
            backend, locks, presences, stages, host.workers, host.mapper, encryption, slots, keys, limits
        )
        self.exports = Exports(backend, locks, presences, host.loops, slots)
        self.recovery = Recovery(backend, presences, host.workers, host.loops, sources, keys, homes, limits)
        self.moves = Moves(Place(state_dir, backend, locks, presences), host.workers, keys, limits)
