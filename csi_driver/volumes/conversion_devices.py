"""The devices of a volume that is moved to another volume key, checked before they are used."""

from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.backends.base import Backend, MovesVolumeKey, storage_beside
from csi_driver.host import blockdev
from csi_driver.host.handle import Handle
from csi_driver.luks.image_header import ImageHeader, read_image_header
from csi_driver.luks.mapping import Fit
from csi_driver.model.errors import DeviceInUse, FailedPrecondition
from csi_driver.model.volume import LuksIdentity, VolumeRecord
from csi_driver.volumes.keyslots import KeySlots, where_is
from csi_driver.volumes.presence import Presence, Presences


class ConversionDevices:
    """Opens them, by identity."""

    def __init__(self, backend: Backend, presences: Presences, slots: KeySlots) -> None:
        self._backend = backend
        self._presences = presences
        self._slots = slots

    def beside(self, volume_id: str) -> MovesVolumeKey:
        """The backend's storage beside the volume's own. Raises FailedPrecondition where it keeps none."""
        return storage_beside(self._backend, volume_id)

    @contextmanager
    def attached(self, record: VolumeRecord) -> Iterator[Handle]:
        """The device of what is not moved yet, attached for as long as it is used where it is not for longer."""
        device = self._backend.device_of(record.id) or self._backend.attach(record.id, lasting=False)
        with device:
            self._presences.refuse_others(record.id, device)
            yield device

    @contextmanager
    def attached_next(self, record: VolumeRecord) -> Iterator[Handle]:
        """The device that it is moved to. Raises DeviceInUse, as `attached` does."""
        with self.beside(record.id).attach_next(record.id) as device:
            self._presences.refuse_others(record.id, device)
            yield device

    def usable(self, record: VolumeRecord) -> Presence:
        """What there is of it. Raises DeviceInUse for a plain one in use, FailedPrecondition for another's mapping."""
        present = self._presences.of(record.id, record)
        if record.encryption is None and present.is_open:
            self._presences.refuse_others(record.id)
            raise DeviceInUse(
                f"volume {record.id} is in use and only one that is not can be encrypted; end its pods, and unstage it "
                f"if Kubernetes does not"
            )
        if present.mapping is not None and present.fit is not Fit.FITS:
            raise FailedPrecondition(
                f"the mapping {present.mapping.name} is not over the device of volume {record.id}; unstage the volume"
            )
        return present

    def header(self, record: VolumeRecord, device: Handle, identity: LuksIdentity) -> ImageHeader:
        """The checked header of one of the volume's devices, in this process."""
        where = where_is(record, device)

        def read(offset: int, length: int) -> bytes:
            with open(device, "rb", buffering=0) as opened:
                return blockdev.read_at(opened.fileno(), offset, length)

        found = read_image_header(where, read, blockdev.size_bytes(device.fd), self._slots.header_limits)
        if found.identity != identity:
            raise FailedPrecondition(
                f"expected the header with UUID {identity.uuid} and volume key digest {identity.digest} on {where}, "
                f"found UUID {found.identity.uuid} and digest {found.identity.digest}; nothing was changed, check the "
                f"record and that this is the volume's device"
            )
        return found
