"""Mappings that a killed step of a move to another volume key has left suspended: every read and write waits there."""

from csi_driver.backends.base import Backend
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.dmcontrol import NoDeviceMapper
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.log import log
from csi_driver.host.regularly import Ending
from csi_driver.host.workers import Workers
from csi_driver.luks.mapping import Fit
from csi_driver.model.errors import DriverError, VolumeBusy
from csi_driver.model.volume import is_mapping_name, volume_of
from csi_driver.volumes.encryption import Encryption
from csi_driver.volumes.presence import Presences


class StandingVolumes:
    """Lets I/O flow again, under each volume's lock."""

    def __init__(
        self,
        backend: Backend,
        locks: VolumeLocks,
        presences: Presences,
        workers: Workers,
        mapper: DeviceMapper,
        encryption: Encryption,
    ) -> None:
        self._backend = backend
        self._locks = locks
        self._presences = presences
        self._workers = workers
        self._mapper = mapper
        self._encryption = encryption

    def look(self, ending: Ending) -> None:
        """Look at all mappings of volumes; what fails is logged. One that a step holds just now is left to it."""
        try:
            names = self._mapper.names()
        except NoDeviceMapper:
            return
        for name in filter(is_mapping_name, names):
            if ending():
                return
            volume_id = volume_of(name)
            try:
                mapping = self._mapper.get(name)
                if mapping is None or not mapping.suspended or not self._backend.has(volume_id):
                    continue
                with self._locks.hold(volume_id), self._workers.session():
                    record = self._backend.get(volume_id)
                    present = self._presences.of(volume_id, record)
                    if record.conversion is not None and present.fit is Fit.FITS:
                        self._encryption.resume(self._backend, record, present.mapping, present.stage)
            except VolumeBusy:
                continue
            except (DriverError, OSError) as error:
                log.error("a volume stands still", volume_id=volume_id, error=str(error))
