"""The functions of libcryptsetup.so.12 (>= 2.6) that staging and the image engine need, by ctypes.

Only workers (`csi_driver.host.workers`) and the short-lived processes of image commands call them: the volume key lives
in the thread that opened the mapping, and a call that hangs or crashes takes no server with it. Constants and
structures are those of <libcryptsetup.h>.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from csi_driver.luks import formats
from csi_driver.luks.formats import LuksFormat
from csi_driver.model.errors import CommandFailed, FailedPrecondition, ResourceExhausted, Unauthenticated
from csi_driver.model.secret import Passphrase

LIBRARY = "libcryptsetup.so.12"

KEYRING_KEY = 1 << 11

_ANY_SLOT = -1
_ANY_TOKEN = -1
_LOG_ERROR = 1
_PBKDF_NO_BENCHMARK = 1 << 1
_SECTOR = 512

_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Pbkdf(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("hash", ctypes.c_char_p),
        ("time_ms", ctypes.c_uint32),
        ("iterations", ctypes.c_uint32),
        ("max_memory_kb", ctypes.c_uint32),
        ("parallel_threads", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class _Luks2Parameters(ctypes.Structure):
    _fields_ = (
        ("pbkdf", ctypes.POINTER(_Pbkdf)),
        ("integrity", ctypes.c_char_p),
        ("integrity_params", ctypes.c_void_p),
        ("data_alignment", ctypes.c_size_t),
        ("data_device", ctypes.c_char_p),
        ("sector_size", ctypes.c_uint32),
        ("label", ctypes.c_char_p),
        ("subsystem", ctypes.c_char_p),
    )


@cache
def load_library() -> ctypes.CDLL:
    """Load the library once. Raises FailedPrecondition when it is not installed."""
    # libdevmapper below it waits for udev to answer, in a semaphore that a container does not share, for good
    # (bootc#2089). It looks at this when it first makes a device.
    os.environ["DM_DISABLE_UDEV"] = "1"
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise FailedPrecondition(f"{LIBRARY} cannot be loaded ({error}); install the package cryptsetup-bin") from None
    device, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    library.crypt_init.argtypes = [ctypes.POINTER(device), text]
    library.crypt_init_data_device.argtypes = [ctypes.POINTER(device), text, text]
    library.crypt_free.argtypes = [device]
    library.crypt_load.argtypes = [device, text, ctypes.c_void_p]
    library.crypt_set_log_callback.argtypes = [device, _LogCallback, ctypes.c_void_p]
    library.crypt_set_data_offset.argtypes = [device, ctypes.c_uint64]
    library.crypt_set_metadata_size.argtypes = [device, ctypes.c_uint64, ctypes.c_uint64]
    library.crypt_format.argtypes = [
        device, text, text, text, text, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
    ]  # fmt: skip
    library.crypt_keyslot_add_by_volume_key.argtypes = [
        device, number, text, ctypes.c_size_t, text, ctypes.c_size_t,
    ]  # fmt: skip
    library.crypt_activate_by_passphrase.argtypes = [
        device, text, number, text, ctypes.c_size_t, ctypes.c_uint32,
    ]  # fmt: skip
    library.crypt_get_volume_key_size.argtypes = [device]
    library.crypt_volume_key_get.argtypes = [
        device, number, ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), text, ctypes.c_size_t,
    ]  # fmt: skip
    library.crypt_set_pbkdf_type.argtypes = [device, ctypes.c_void_p]
    library.crypt_keyslot_add_by_passphrase.argtypes = [
        device, number, text, ctypes.c_size_t, text, ctypes.c_size_t,
    ]  # fmt: skip
    library.crypt_keyslot_destroy.argtypes = [device, number]
    library.crypt_token_json_set.argtypes = [device, number, text]
    library.crypt_set_uuid.argtypes = [device, text]
    # The volume's own flock guards every device; the library's lock files below /run/cryptsetup would only add a
    # folder that must be writable and a wait without a limit on a stopped process.
    library.crypt_metadata_locking(None, 0)
    return library


class CryptDevice:
    """An open context of the library; use it as a context manager. `where` names volume and device in errors."""

    def __init__(self, where: str, device: str, header: str | None = None) -> None:
        self._where = where
        self._library = load_library()
        self._handle = ctypes.c_void_p()
        self._messages: list[str] = []
        self._callback = _LogCallback(self._log)  # kept: the library holds a bare pointer to it
        if header is None:
            code = self._library.crypt_init(ctypes.byref(self._handle), device.encode())
        else:
            code = self._library.crypt_init_data_device(ctypes.byref(self._handle), header.encode(), device.encode())
        self._check(code, "open the device")
        self._library.crypt_set_log_callback(self._handle, self._callback, None)

    def close(self) -> None:
        """Free the context and the keys in it."""
        if self._handle.value is not None:
            self._library.crypt_free(self._handle)
            self._handle = ctypes.c_void_p()

    def load(self, version: int = 2) -> None:
        """Read the header of that LUKS version."""
        code = self._library.crypt_load(self._handle, b"LUKS%d" % version, None)
        self._check(code, f"read the LUKS{version} header")

    def format(
        self, chosen: LuksFormat, uuid: str, passphrase: Passphrase, volume_key: bytearray | None = None
    ) -> None:
        """luksFormat with one key slot, slot 0, for `passphrase`; no benchmark, explicit geometry.

        The library draws the volume key at random unless `volume_key` gives it, of `chosen.key_bits`.
        """
        self._check(
            self._library.crypt_set_data_offset(self._handle, chosen.data_offset // _SECTOR), "set the data offset"
        )
        self._check(
            self._library.crypt_set_metadata_size(self._handle, formats.HEADER_SIZE, formats.KEYSLOTS_SIZE),
            "set the header's size",
        )
        parameters = _Luks2Parameters(pbkdf=ctypes.pointer(_pbkdf(chosen)), sector_size=chosen.sector_size)
        cipher, _, mode = chosen.cipher.partition("-")
        self._check(
            self._library.crypt_format(
                self._handle, b"LUKS2", cipher.encode(), mode.encode(), uuid.encode(),
                None if volume_key is None else _memory(volume_key), chosen.key_bits // 8, ctypes.byref(parameters),
            ),
            "write the LUKS2 header",
        )  # fmt: skip
        secret = passphrase.reveal()
        self._check(
            self._library.crypt_keyslot_add_by_volume_key(self._handle, 0, None, 0, secret, len(secret)),
            "add the key slot",
        )

    def unlock(self, passphrase: Passphrase, flags: int = 0) -> int:
        """Try `passphrase`; with KEYRING_KEY the volume key goes into the calling thread's keyring.

        Returns the key slot that it opens. Raises Unauthenticated when it opens none.
        """
        secret = passphrase.reveal()
        code = self._library.crypt_activate_by_passphrase(self._handle, None, _ANY_SLOT, secret, len(secret), flags)
        self._check_opened(code, "try the passphrase", passphrase)
        return int(code)

    def add_keyslot(self, current: Passphrase, new: Passphrase, chosen: LuksFormat) -> int:
        """A further key slot, for `new`, with the key derivation of `chosen`; `current` opens one that is there.

        Returns the new slot. Raises Unauthenticated.
        """
        pbkdf = _pbkdf(chosen)
        self._check(self._library.crypt_set_pbkdf_type(self._handle, ctypes.byref(pbkdf)), "set the key derivation")
        old, fresh = current.reveal(), new.reveal()
        code = self._library.crypt_keyslot_add_by_passphrase(self._handle, _ANY_SLOT, old, len(old), fresh, len(fresh))
        self._check_opened(code, "add a key slot", current)
        return int(code)

    def destroy_keyslot(self, slot: int) -> None:
        """Take a key slot out of the header."""
        self._check(self._library.crypt_keyslot_destroy(self._handle, slot), f"remove key slot {slot}")

    def volume_key(self, passphrase: Passphrase) -> bytearray:
        """The volume key, for the caller to wipe. Raises Unauthenticated when `passphrase` opens no key slot."""
        secret = passphrase.reveal()
        key = bytearray(self._library.crypt_get_volume_key_size(self._handle))
        size = ctypes.c_size_t(len(key))
        code = self._library.crypt_volume_key_get(
            self._handle, _ANY_SLOT, _memory(key), ctypes.byref(size), secret, len(secret)
        )
        self._check_opened(code, "read the volume key", passphrase)
        return key

    def set_token(self, token: bytes | None, place: int = _ANY_TOKEN) -> None:
        """Write `token`, JSON with the members `type` and `keyslots`, into the header; None removes that of `place`."""
        self._check(self._library.crypt_token_json_set(self._handle, place, token), "write the token")

    def set_uuid(self, uuid: str) -> None:
        """Write another UUID into both copies of the header."""
        self._check(self._library.crypt_set_uuid(self._handle, uuid.encode()), "change the UUID")

    def _check_opened(self, code: int, what: str, passphrase: Passphrase) -> None:
        if code == -errno.EPERM:
            named = f" {passphrase.secret}" if passphrase.secret else ""
            raise Unauthenticated(
                f"the passphrase in the secret opens no key slot of {self._where}; put the passphrase it was last "
                f"given back into the secret{named}"
            )
        self._check(code, what)

    def _log(self, level: int, message: bytes, _: object) -> None:
        if level == _LOG_ERROR:
            self._messages.append(message.decode(errors="replace").strip())

    def _check(self, code: int, what: str) -> None:
        if code >= 0:
            return
        said = f" ({'; '.join(self._messages)})" if self._messages else ""
        text = f"libcryptsetup could not {what} of {self._where}: {os.strerror(-code)}{said}"
        if code == -errno.ENOSPC:
            raise ResourceExhausted(f"{text}; free space on the storage below it")
        if code == -errno.ENOMEM:
            raise ResourceExhausted(f"{text}; give the driver's pod more memory or choose a smaller pbkdfMemory")
        raise CommandFailed(text)


def _pbkdf(chosen: LuksFormat) -> _Pbkdf:
    threads = 0 if chosen.pbkdf == "pbkdf2" else 1
    return _Pbkdf(
        chosen.pbkdf.encode(), chosen.hash.encode(), 0, chosen.iterations, chosen.memory_kib, threads,
        _PBKDF_NO_BENCHMARK,
    )  # fmt: skip


def _memory(key: bytearray) -> "ctypes.Array[ctypes.c_char]":
    """The very bytes of `key`, so that no copy of it is left behind."""
    return (ctypes.c_char * len(key)).from_buffer(key)


@contextmanager
def crypt_device(where: str, device: str, header: str | None = None) -> Iterator[CryptDevice]:
    """A context of the library for the length of a block."""
    context = CryptDevice(where, device, header)
    try:
        yield context
    finally:
        context.close()


def check_library() -> str:
    """Load the library and say which; raises FailedPrecondition when it is not installed."""
    load_library()
    return f"{LIBRARY} can be loaded"


def load_library_if_present() -> None:
    """Load the library ahead of its first use; its absence is told by whoever uses it."""
    with suppress(FailedPrecondition):
        load_library()
