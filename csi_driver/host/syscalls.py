"""The libc binding that the other host modules share: one place for ctypes declarations and errno."""

import ctypes
import errno
import os
from typing import Final

libc: Final = ctypes.CDLL(None, use_errno=True)
"""The C library of this process. Calls release the interpreter lock and keep errno per thread."""

libc.syscall.restype = ctypes.c_long
libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)

AT_FDCWD: Final = -100

# Numbers from 424 on are the same on all architectures that Linux runs containers on; add_key and keyctl are older.
NUMBERS: Final[dict[str, int]] = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "mount_setattr": 442,
    **{
        "x86_64": {"add_key": 248, "keyctl": 250},
        "s390x": {"add_key": 278, "keyctl": 280},
        "ppc64le": {"add_key": 269, "keyctl": 271},
    }.get(os.uname().machine, {"add_key": 217, "keyctl": 219}),  # the generic table: aarch64, riscv64, loongarch64
}
"""System call numbers by name (linux: arch/*/syscall tables, include/uapi/asm-generic/unistd.h)."""


def check(result: int, what: str) -> int:
    """Return `result`, or raise OSError with the thread's errno when it is negative. `what` names the call."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(name: str, *arguments: int | bytes | bytearray | None) -> int:
    """Make the system call `name` of NUMBERS; raises OSError.

    Text arguments are NUL-terminated bytes; a bytearray is memory that the kernel may write.
    """

    def converted(argument: int | bytes | bytearray | None) -> object:
        if isinstance(argument, int):
            return ctypes.c_long(argument)
        if isinstance(argument, bytearray):
            return (ctypes.c_char * len(argument)).from_buffer(argument)
        return ctypes.c_char_p(argument)

    return check(int(libc.syscall(ctypes.c_long(NUMBERS[name]), *map(converted, arguments))), name)


def error_name(error: OSError) -> str:
    """The symbol and the words of an error, for messages: "EBUSY, Device or resource busy"."""
    number = error.errno or 0
    return f"{errno.errorcode.get(number, str(number))}, {os.strerror(number)}"


def udev_is_running() -> bool:
    """Whether udevd manages /dev as this process sees it (sd-device looks for the same socket)."""
    return os.path.exists("/run/udev/control")
