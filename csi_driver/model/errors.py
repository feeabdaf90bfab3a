"""Every error the driver raises on purpose, in one tree.

Each class is one situation of the table in docs/architecture.md ("Errors"); `csi_driver.rpc.status` is the only place
that turns a class into a gRPC code. The text of an error is one sentence for a person: what failed, on which volume and
device, what was expected and found, what to do. It never holds a secret.

    DriverError
    ├── InvalidArgument        a request or parameter that cannot be right: only a new class or claim helps
    ├── OutOfRange             a size that cannot be made
    ├── NotFound               unknown volume or path
    ├── AlreadyExists          same name or stage, other properties
    ├── Unauthenticated        the secret is there and opens nothing
    ├── PermissionDenied       a key management system refuses us
    ├── FailedPrecondition     device, header, host or secret unlike what is recorded or needed
    │   ├── KeyLost            a key management system has a volume's key no more
    │   ├── KeyNeeded          the kernel has the volume key no more, and the call brought nothing to open it with
    │   ├── DeviceMismatch     the device is not what its record says
    │   │   ├── DeviceAbsent       it is not there
    │   │   ├── DeviceShort        it is smaller than recorded
    │   │   ├── DeviceUnreadable   reads fail
    │   │   ├── DeviceBlank        all zero though recorded as encrypted
    │   │   └── ForeignSignature   it holds something that is not ours
    │   ├── InvalidHeader      a LUKS2 header that must not be used
    │   ├── MappingMismatch    an open mapping that is not ours to use
    │   └── DeviceInUse        somebody keeps a device or mount busy
    ├── Aborted                a state that passes by itself
    │   ├── VolumeBusy         another call, or an earlier child, is at work on this volume
    │   └── Stopped            a signal asked long work to end
    ├── InvalidToken           a paging token we did not give out (the CSI spec wants ABORTED)
    ├── ResourceExhausted      no space; wrong node for a node-local volume
    ├── DeadlineExceeded       a command ran out of time, a device hangs
    ├── Unavailable            a key service, or the driver below, cannot be reached
    └── CommandFailed          an external command or system call failed in a way nobody foresaw
"""

from csi_driver.model.text import printable, shortened


class DriverError(Exception):
    """Base of all errors raised on purpose; its text is one sentence for a person.

    It may quote whatever came in a request or stands in a name, so it is bounded and printable wherever it is shown.
    """

    def __str__(self) -> str:
        return shortened(printable(super().__str__()))


class InvalidArgument(DriverError):
    """A request or parameter that cannot be right; nothing was changed.

    Only a new class or claim helps: external-provisioner leaves a claim alone for five minutes after this one. What a
    user can put right elsewhere, in a secret say, is a FailedPrecondition.
    """


class OutOfRange(DriverError):
    """A size outside what can be made."""


class NotFound(DriverError):
    """An unknown volume or path."""


class AlreadyExists(DriverError):
    """The same name or stage exists with other properties."""


class Unauthenticated(DriverError):
    """The secret is present and opens no key slot."""


class PermissionDenied(DriverError):
    """A key management system knows us and refuses, or does not take our credentials."""


class FailedPrecondition(DriverError):
    """Device, header, host or secret are unlike what is recorded or needed; repeating alone does not help."""


class KeyLost(FailedPrecondition):
    """A key management system has the key no more, or it no longer unwraps what was wrapped with it."""


class KeyNeeded(FailedPrecondition):
    """The kernel has the volume key of an open mapping no more, and the call brought nothing that opens its header."""


class DeviceMismatch(FailedPrecondition):
    """The device is not what the volume's record says."""


class DeviceAbsent(DeviceMismatch):
    """The volume's device or backing file is not there."""


class DeviceShort(DeviceMismatch):
    """The device is smaller than recorded."""


class DeviceUnreadable(DeviceMismatch):
    """Reads of the device fail, so nothing can be said about its content."""


class DeviceBlank(DeviceMismatch):
    """The device reads as zeros though it is recorded as formatted."""


class ForeignSignature(DeviceMismatch):
    """The device holds data that is not this volume's."""


class InvalidHeader(FailedPrecondition):
    """A LUKS2 header that is damaged, forged or outside what this driver writes."""


class MappingMismatch(FailedPrecondition):
    """An open mapping is not ours to use: another device, another UUID, a zombie."""


class DeviceInUse(FailedPrecondition):
    """A process or mount keeps a device or mount busy."""


class Aborted(DriverError):
    """A state that passes by itself: call again."""


class VolumeBusy(Aborted):
    """Another call, or a child of an earlier one, is at work on this volume."""


class Stopped(Aborted):
    """A signal asked long work to end, and it did where it can go on later. `signal` is its name, such as SIGINT."""

    def __init__(self, text: str, signal: str = "SIGINT") -> None:
        super().__init__(text)
        self.signal = signal


class InvalidToken(DriverError):
    """A paging token that this driver did not give out."""


class ResourceExhausted(DriverError):
    """No space is left, or the volume lives on another node."""


class DeadlineExceeded(DriverError):
    """A command ran out of time or a device does not answer."""


class Unavailable(DriverError):
    """A key service, or the driver below the backend csi, cannot be reached."""


class CommandFailed(DriverError):
    """An external command or system call failed in a way that no other class describes."""
