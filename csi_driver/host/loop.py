"""Loop devices: one per backing file, kept so by a lock on the file, identified by device and inode.

The descriptor that is given to LOOP_CONFIGURE carries the lock (`csi_driver.host.ofdlock`), so the loop device itself
holds it for as long as it is bound, whatever happens to this process. Loop does not stop the same file from being bound
twice; the lock does. It is never unlocked, which would take it from the loop device as well: only closing releases it.
"""

import contextlib
import errno
import os
import stat
import time
from typing import Final, Self

from msgspec import Struct

from csi_driver.host import appendonly, blockdev, loopcontrol, ofdlock
from csi_driver.host.handle import Handle
from csi_driver.host.holders import Holders, describe
from csi_driver.host.loopcontrol import Flag
from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import (
    CommandFailed,
    DeviceAbsent,
    DeviceInUse,
    DeviceMismatch,
    DriverError,
    FailedPrecondition,
    ResourceExhausted,
)

_MAJOR: Final = 7
_BIND_TRIES: Final = 50
_BUSY_TRIES: Final = 5
_LOCK_TRIES: Final = 20
_PAUSE: Final = 0.02
_DETACH_WAIT: Final = 3.0


class LoopInfo(Struct, frozen=True):
    """A bound loop device: `backing_device` (st_dev) and `backing_inode` say which file, `backing_path` is a hint."""

    path: str
    major: int
    minor: int
    backing_device: int
    backing_inode: int
    backing_path: str
    read_only: bool
    autoclear: bool
    size_bytes: int

    def same_file(self, other: Self | None) -> bool:
        """Whether both are bound to the same file."""
        if other is None:
            return False
        return (self.backing_device, self.backing_inode) == (other.backing_device, other.backing_inode)


class AttachedLoop(Handle):
    """A handle on a bound loop device, /dev/loop<N>.

    An autoclear device stays while this or anything else (a mapping, a mount) has it open and vanishes with the last.
    """

    def __init__(self, fd: int, info: LoopInfo) -> None:
        super().__init__(fd, info.path)
        self.info = info


class LoopDevices:
    """Binds files to loop devices and finds, grows and releases them."""

    def attach(self, path: str, *, autoclear: bool, read_only: bool = False) -> AttachedLoop:
        """Bind the regular file `path` to a loop device with 512-byte blocks, with direct I/O where possible.

        A file that this driver already bound with the same flags gives a handle on that device. After a failure
        nothing remains bound. The file is not guarded afterwards. Raises DeviceAbsent, DeviceMismatch (not a regular
        file), DeviceInUse (bound or locked by somebody, who is named), ResourceExhausted (no loop device),
        FailedPrecondition, CommandFailed.
        """
        backing = _open_backing(path)
        try:
            file = os.fstat(backing)
            for _ in range(_LOCK_TRIES):
                if _lock(path, backing):
                    # Others are bound without the lock, by losetup: two devices on one file would tear it.
                    if foreign := self._bound_to(file):
                        raise DeviceInUse(
                            f"{path} is bound to {_listed(foreign)} by somebody else; release it with 'losetup -d'"
                        )
                    return self._bind(path, backing, file, autoclear=autoclear, read_only=read_only)
                existing = self._existing(path, file, autoclear=autoclear, read_only=read_only)
                if existing is not None:
                    return existing
                # Between lock and bind of another call, or while an autoclear device goes away.
                time.sleep(_PAUSE)
            owners = [holder for holder in Holders().of_file(path) if holder.pid != os.getpid()]
            who = describe(owners) if owners else "a process that this one cannot see"
            raise DeviceInUse(f"{path} is locked by {who}; end it or wait for its end, then call again")
        finally:
            os.close(backing)

    def guard(self, path: str) -> None:
        """Let nobody else open the file for writing, as `losetup` and `cryptsetup` do, or rename or remove it.

        Only while its lock is held, as a bound one's is. Undone by `unguard` and `attach`. Raises FailedPrecondition.
        """
        _set_guard(path, on=True)

    def unguard(self, path: str) -> None:
        """Take the guard off; not guarded or absent is fine. Raises FailedPrecondition."""
        _set_guard(path, on=False)

    def find(self, path: str) -> list[LoopInfo]:
        """All loop devices bound to the file at `path`, whoever bound them; empty when it is absent."""
        try:
            return self._bound_to(os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def info(self, device_path: str) -> LoopInfo | None:
        """What the loop device is bound to, or None when it is not bound or not there."""
        try:
            with self.open(device_path) as handle:
                return handle.info
        except DeviceAbsent:
            return None

    def file_of(self, major: int, minor: int) -> tuple[int, int] | None:
        """(st_dev, inode) of the file below the loop device of that number; None when it is none, or is not bound."""
        if major != _MAJOR:
            return None
        try:
            # The minor number is the loop's own only without partitions on loop devices (max_part=0).
            descriptor = loopcontrol.open_node(f"/dev/{blockdev.kernel_name((major, minor))}", read_only=True)
        except OSError:
            return None
        try:
            if os.fstat(descriptor).st_rdev != os.makedev(major, minor):
                return None
            found = loopcontrol.status(descriptor)
        finally:
            os.close(descriptor)
        return None if found is None else (found.device, found.inode)

    def open(self, device_path: str, *, read_only: bool = True) -> AttachedLoop:
        """A handle on a bound loop device. Raises DeviceAbsent when it is not bound or not there, CommandFailed."""
        try:
            descriptor = loopcontrol.open_node(device_path, read_only=read_only)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
                raise DeviceAbsent(f"the loop device {device_path} is not there") from None
            raise _failed("open", device_path, error) from None
        try:
            info = _info(device_path, descriptor)
            if info is None:
                raise DeviceAbsent(f"the loop device {device_path} is not bound to a file")
            return AttachedLoop(descriptor, info)
        except BaseException:
            os.close(descriptor)
            raise

    def set_capacity(self, device: Handle) -> None:
        """Take over the present size of the backing file. Raises CommandFailed."""
        try:
            loopcontrol.set_capacity(device.fd)
        except OSError as error:
            raise _failed("resize", device.name, error) from None

    def detach(self, device_path: str, expected: LoopInfo | None = None) -> None:
        """Release the loop device and wait until it is free; not bound is fine.

        One that was found as `expected` and has another file by now is somebody else's, and left alone. Raises
        DeviceInUse when something still has it open after some seconds; the kernel then frees it with the last close.
        Raises CommandFailed.
        """
        try:
            with self.open(device_path) as handle:
                before = handle.info
                if expected is not None and not expected.same_file(before):
                    return
                loopcontrol.clear(handle.fd)
        except DeviceAbsent:
            return
        except OSError as error:
            raise _failed("release", device_path, error) from None
        deadline = time.monotonic() + _DETACH_WAIT
        while before.same_file(self.info(device_path)):
            if time.monotonic() > deadline:
                raise DeviceInUse(
                    f"the loop device {device_path} of {before.backing_path} is still open somewhere; it is freed when "
                    f"the last user closes it"
                )
            time.sleep(_PAUSE)

    def _existing(self, path: str, file: os.stat_result, *, autoclear: bool, read_only: bool) -> AttachedLoop | None:
        """A handle on the one device that holds the lock, or None when there is none yet or none any more."""
        bound = self._bound_to(file)
        if not bound:
            return None
        if len(bound) > 1 or (bound[0].autoclear, bound[0].read_only) != (autoclear, read_only):
            raise DeviceInUse(
                f"{path} is bound to {_listed(bound)} and was wanted as one device with autoclear={autoclear}, "
                f"read_only={read_only}; release it first"
            )
        try:
            handle = self.open(bound[0].path, read_only=read_only)
        except DeviceAbsent:
            return None
        # Between the look and the open the device may have been released and bound to another file.
        if not bound[0].same_file(handle.info):
            handle.close()
            return None
        return handle

    def _bound_to(self, file: os.stat_result) -> list[LoopInfo]:
        """Bound devices of this file; the others cost one open and one ioctl each."""
        found = []
        for node in loopcontrol.bound_nodes():
            try:
                descriptor = loopcontrol.open_node(node, read_only=True)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno in (errno.ENXIO, errno.ENODEV):
                    continue
                raise _failed("open", node, error) from None
            try:
                status = loopcontrol.status(descriptor)
                if status is not None and (status.device, status.inode) == (file.st_dev, file.st_ino):
                    info = _info(node, descriptor)
                    if info is not None:
                        found.append(info)
            finally:
                os.close(descriptor)
        return found

    def _bind(self, path: str, backing: int, file: os.stat_result, *, autoclear: bool, read_only: bool) -> AttachedLoop:
        flags = Flag.DIRECT_IO | (Flag.AUTOCLEAR if autoclear else 0) | (Flag.READ_ONLY if read_only else 0)
        busy: list[str] = []
        for _ in range(_BIND_TRIES):
            node = loopcontrol.free_node()
            if busy.count(node) >= _BUSY_TRIES:
                # Not bound, but held: by a mapping that was made on it after its file had gone, say. The kernel would
                # name it for good.
                node = loopcontrol.new_node()
            device = -1
            try:
                device = loopcontrol.open_node(node, read_only=read_only)
                loopcontrol.configure(device, backing, path, flags)
            except OSError as error:
                if device >= 0:
                    os.close(device)
                if error.errno == errno.EINVAL and flags & Flag.DIRECT_IO:
                    flags &= ~Flag.DIRECT_IO
                elif error.errno in (errno.EBUSY, errno.ENXIO, errno.ENOENT):
                    # Another process was quicker, or the device is being made or released.
                    busy.append(node)
                    time.sleep(_PAUSE)
                else:
                    raise _failed(f"bind {path} to", node, error) from None
                continue
            try:
                if not read_only:
                    blockdev.make_writable(device)
                info = _info(node, device)
                if info is None or (info.backing_device, info.backing_inode) != (file.st_dev, file.st_ino):
                    found = "nothing" if info is None else info.backing_path
                    raise CommandFailed(f"{node} was bound to {path} and is found bound to {found}")
                return AttachedLoop(device, info)
            except BaseException:
                with contextlib.suppress(OSError):
                    loopcontrol.clear(device)
                os.close(device)
                raise
        raise ResourceExhausted(
            f"no loop device could be bound to {path} in {_BIND_TRIES} attempts; check 'losetup -l' for leaked devices"
        )


def _open_backing(path: str) -> int:
    try:
        # Looked at before opening: opening a FIFO would wait, opening a device could act.
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            raise DeviceMismatch(f"{path} is expected to be a regular file and is a {blockdev.kind(found.st_mode)}")
        if found.st_nlink != 1:
            # The file's device is found by device and inode: two volumes would share it, each thinking it its own.
            raise DeviceMismatch(
                f"{path} has {found.st_nlink} hard links and a volume's file must have one; remove the others, "
                f"'find -samefile {path}' finds them"
            )
        _set_guard(path, on=False)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)  # a lock wants it writable
    except (FileNotFoundError, NotADirectoryError):
        raise DeviceAbsent(f"the backing file {path} is not there; check that its file system is mounted") from None
    except OSError as error:
        raise CommandFailed(f"the backing file {path} could not be opened: {error_name(error)}") from None


def _set_guard(path: str, *, on: bool) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return  # absent, or nothing that could be bound
        raise FailedPrecondition(f"{path} cannot be opened ({error_name(error)}); check its file system") from None
    try:
        if not on or ofdlock.is_locked(descriptor):
            appendonly.set_append_only(descriptor, on=on)
    except OSError as error:
        raise FailedPrecondition(
            f"{path} cannot be {'guarded against' if on else 'opened to'} writers ({error_name(error)}); check "
            f"its file system, and run as root with CAP_LINUX_IMMUTABLE"
        ) from None
    finally:
        os.close(descriptor)


def _lock(path: str, backing: int) -> bool:
    try:
        return ofdlock.try_lock(backing)
    except OSError as error:
        raise FailedPrecondition(
            f"{path} cannot be locked ({error_name(error)}); keep it on a file system of this node"
        ) from None


def _info(path: str, descriptor: int) -> LoopInfo | None:
    try:
        status = loopcontrol.status(descriptor)
    except OSError as error:
        raise _failed("examine", path, error) from None
    if status is None:
        return None
    number = os.fstat(descriptor).st_rdev
    return LoopInfo(
        path=path,
        major=os.major(number),
        minor=os.minor(number),
        backing_device=status.device,
        backing_inode=status.inode,
        backing_path=loopcontrol.backing_file(path) or status.name,
        read_only=bool(status.flags & Flag.READ_ONLY),
        autoclear=bool(status.flags & Flag.AUTOCLEAR),
        size_bytes=blockdev.size_bytes(descriptor),
    )


def _listed(infos: list[LoopInfo]) -> str:
    return ", ".join(info.path for info in infos)


def _failed(action: str, path: str, error: OSError) -> DriverError:
    text = f"could not {action} the loop device {path}: {error_name(error)}"
    if error.errno in (errno.EPERM, errno.EACCES):
        return FailedPrecondition(f"{text}; run as root with CAP_SYS_ADMIN and access to loop devices")
    if error.errno == errno.EBUSY:
        return DeviceInUse(f"{text}; something uses it")
    return CommandFailed(text)
