"""Everything that changes a volume's key, or gives it one, as jobs that a test can cut, and what they run on."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.workers import Workers
from csi_driver.keys.base import Announce, Wrapped, Wrapping, nobody
from csi_driver.keys.ledger import KeyLedger
from csi_driver.keys.secret import read_secret
from csi_driver.model.errors import DriverError, Unauthenticated
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import EncryptionState, KeyTrail, VolumeRecord, mapping_name
from csi_driver.volumes.adoption import Adoption, AdoptRequest
from csi_driver.volumes.conversion import Watch
from csi_driver.volumes.keys import VolumeKeys
from tests.keys.given import GivenSources
from tests.machine.keeping import KeepingKms, WrappingKms
from tests.machine.node import BLOCK, CHEAP, LIMITS, MIB, NONE, SECRET, VOLUME, Node

SIZE: Final = 3 * MIB + MIB // 2
THEIRS: Final = "theirs"
"""The name of the key of what `Adopt` adopts."""

_OTHER: Final[Mapping[str, str]] = {"CRYPTO_KEY_VALUE": "another passphrase"}
_BOTH: Final[Mapping[str, str]] = {**_OTHER, "CRYPTO_KEY_VALUE_PREVIOUS": SECRET["CRYPTO_KEY_VALUE"]}
_KEPT: Final[Mapping[str, str]] = {"encrypted": "true", "encryptionKMSID": "keeps"}
_WRAPPED: Final[Mapping[str, str]] = {"encrypted": "true", "encryptionKMSID": "wraps"}
_PLAIN: Final[Mapping[str, str]] = {"encrypted": "false"}

Kept = tuple[dict[str, Passphrase], dict[str, Passphrase]]
"""What the two KMS have."""


class Lost(Exception):
    """What must not be, in a sentence."""


class Lab:
    """A node on a folder, and the KMS that it asks; `tell` is called whenever what these have is another."""

    def __init__(
        self,
        folder: Path,
        workers: Workers,
        content: bytes,
        kept: Kept,
        tell: Callable[[], None] = lambda: None,
        files: Files | None = None,
    ) -> None:
        keeps, wraps = _Keeps(tell), _Wraps(tell)
        keeps.kept, wraps.wrapped = dict(kept[0]), dict(kept[1])
        self.kept: Kept = keeps.kept, wraps.wrapped
        self.sources = GivenSources(keeps=keeps, wraps=Wrapping(wraps))
        self.keys = VolumeKeys(self.sources, KeyLedger(folder / "state", files or Files()))
        self.node = Node(folder, workers, given_keys=self.keys, files=files or Files())
        self.content = content
        self.foreign = folder / "foreign.img"
        self._workers = workers

    def made(self, parameters: Mapping[str, str], secret: Mapping[str, str], volume: str = VOLUME) -> None:
        """A volume with the content, left staged."""
        self.node.create(volume, size=SIZE, parameters=parameters, capability=BLOCK, secret=secret)
        self.node.stage(volume, BLOCK, secret=secret)
        with open(self._shown(volume), "r+b", buffering=0) as file:
            file.write(self.content)
            os.fsync(file.fileno())

    def holds(self, secret: Mapping[str, str], when: str) -> None:
        """Raise Lost unless the volume can be staged and shows its content."""
        try:
            self.node.stage(capability=BLOCK, secret=secret)
            with open(self._shown(VOLUME), "rb", buffering=0) as file:
                if file.read(SIZE) != self.content:
                    raise Lost(f"the content is another one {when}")
            self.node.unstage()
        except (DriverError, OSError) as error:
            raise Lost(f"it cannot be used {when}: {error}") from None

    def opens(self, record: VolumeRecord, passphrase: Passphrase | None) -> bool:
        """Whether that opens the header."""
        with self.node.store.attach(VOLUME, lasting=False) as device:
            try:
                self.node.slots.verify(record, device, passphrase or Passphrase(b""))
            except Unauthenticated:
                return False
        return True

    def adopt(self) -> None:
        """`luks-csi volume adopt`, of what a KMS keeps the key for."""
        adoption = Adoption(
            self.node.store, self._workers, self.node.loops, self.node.slots, self.sources, self.node.rekeying, LIMITS
        )  # fmt: skip
        trail = KeyTrail(kms_id="keeps", type="given", name=THEIRS)
        adoption.adopt(AdoptRequest(VOLUME, self.foreign, read_secret({}), trail))

    def rotate(self, secret: Mapping[str, str], new: Mapping[str, str]) -> None:
        """`luks-csi keys rotate`."""
        with self.node.locks.hold(VOLUME):
            self.node.rekeying.rotate(VOLUME, read_secret(secret), read_secret(new).passphrase)

    def clear(self) -> None:
        """Let go of the volume, whatever a check has left."""
        with suppress(DriverError, OSError):
            self.node.unstage()
        if self.node.mapping() is not None:
            DeviceMapper().remove(mapping_name(VOLUME))

    def _shown(self, volume: str) -> str:
        found = self.node.record(volume)
        return self.node.loops_of(volume)[0].path if found.encryption is None else f"/dev/mapper/luks-{volume}"


class _Keeps(KeepingKms):
    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self._tell = tell

    def create(self, name: str, announce: Announce = nobody) -> KeyTrail:
        made = super().create(name, announce)
        self._tell()
        return made

    def destroy(self, trail: KeyTrail) -> None:
        super().destroy(trail)
        self._tell()


class _Wraps(WrappingKms):
    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self._tell = tell

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        made = super().wrap(name, key)
        self._tell()
        return made


class Job:
    """Something that changes a key: from `secret` to `new`, which are the same where a KMS has it."""

    secret: Mapping[str, str] = NONE
    new: Mapping[str, str] = NONE
    parameters: Mapping[str, str] = CHEAP
    staged = True

    def prepare(self, lab: Lab) -> None:
        """What is there before."""
        lab.made(self.parameters, self.secret)
        if not self.staged:
            lab.node.unstage()

    def run(self, lab: Lab) -> None:
        """Do it, or what a cut has left of it; once it is done it may be done once more."""
        raise NotImplementedError

    def is_done(self, lab: Lab, record: VolumeRecord, before: VolumeRecord) -> bool:
        """Whether what the call has promised is there."""
        return record.key != before.key


class Passphrases(Job):
    """`luks-csi keys rotate` of a volume that opens with a secret."""

    secret, new = SECRET, _OTHER

    def run(self, lab: Lab) -> None:
        lab.rotate(SECRET, _OTHER)

    def is_done(self, lab: Lab, record: VolumeRecord, before: VolumeRecord) -> bool:
        old, new = (read_secret(each).passphrase for each in (SECRET, _OTHER))
        return lab.opens(record, new) and not lab.opens(record, old)


class ChangedSecret(Passphrases):
    """A stage with CRYPTO_KEY_VALUE_PREVIOUS."""

    staged = False

    def run(self, lab: Lab) -> None:
        lab.node.stage(capability=BLOCK, secret=_BOTH)
        lab.node.unstage()


class KeyOfKms(Job):
    """`luks-csi keys rotate` of a volume whose key a KMS keeps."""

    parameters = _KEPT

    def run(self, lab: Lab) -> None:
        lab.rotate(NONE, NONE)


class Rewrap(Job):
    """`luks-csi keys rewrap`."""

    parameters = _WRAPPED

    def run(self, lab: Lab) -> None:
        with lab.node.locks.hold(VOLUME):
            lab.node.rekeying.rewrap(VOLUME, read_secret({}))


class VolumeKey(Job):
    """`luks-csi volume reencrypt` of a volume in use."""

    secret = new = SECRET

    def run(self, lab: Lab) -> None:
        lab.node.conversions.reencrypt(VOLUME, read_secret(SECRET), Watch())

    def is_done(self, lab: Lab, record: VolumeRecord, before: VolumeRecord) -> bool:
        return record.luks is not None and before.luks is not None and record.luks.digest != before.luks.digest


class ClosedVolumeKey(VolumeKey):
    """The same of one that is not in use."""

    staged = False


class InPlace(Job):
    """`luks-csi volume encrypt` of a plain volume, with a passphrase."""

    parameters, staged = _PLAIN, False
    new: Mapping[str, str] = SECRET
    kms: str | None = None

    def run(self, lab: Lab) -> None:
        if lab.node.record().encryption is None:
            lab.node.conversions.encrypt(VOLUME, read_secret(self.new), self.kms, Watch(), generate=False)

    def is_done(self, lab: Lab, record: VolumeRecord, before: VolumeRecord) -> bool:
        return record.encryption is EncryptionState.ENCRYPTED


class InPlaceOfKms(InPlace):
    """The same with a key that a KMS keeps."""

    new, kms = NONE, "keeps"


class Adopt(Job):
    """`luks-csi volume adopt` of a file whose key a KMS keeps for somebody else: the copy gets one of its own."""

    def prepare(self, lab: Lab) -> None:
        source = "source"
        theirs = lab.sources.given["keeps"].create(THEIRS)
        passphrase = {"CRYPTO_KEY_VALUE": lab.sources.given["keeps"].fetch(theirs).reveal().decode()}
        lab.made(CHEAP, passphrase, source)
        lab.node.unstage(source)
        lab.foreign.write_bytes(lab.node.disk(source).read_bytes())
        lab.node.delete(source)
        os.sync()
        os.sync()  # what the first one has written to loop devices

    def run(self, lab: Lab) -> None:
        if not lab.node.store.has(VOLUME):
            lab.adopt()
        else:
            lab.rotate(NONE, NONE)

    def is_done(self, lab: Lab, record: VolumeRecord, before: VolumeRecord) -> bool:
        return record.key is not None and record.key.name != THEIRS


JOBS: Mapping[str, Job] = {
    "passphrase": Passphrases(),
    "changed-secret": ChangedSecret(),
    "key-of-kms": KeyOfKms(),
    "rewrap": Rewrap(),
    "volume-key": VolumeKey(),
    "volume-key-closed": ClosedVolumeKey(),
    "encrypt": InPlace(),
    "encrypt-kms": InPlaceOfKms(),
    "adopt": Adopt(),
}
