"""What dm-crypt does to sectors, done to whole chunks of a file: the ciphers of `csi_driver.luks.formats`.

The format is that of dm-crypt (linux: drivers/md/dm-crypt.c, Documentation/admin-guide/device-mapper/dm-crypt.rst):
each sector is encrypted on its own, with an IV that is made of the sector's number, which counts 512 bytes whatever the
sector size is. AES comes from OpenSSL's libcrypto.so.3, which libcryptsetup needs too.

There are two ways to the same bytes. `bulk.c` works on many sectors at once, with the interpreter lock released;
`hatch_build.py` compiles it where there is a C compiler. The other way calls libcrypto's own modes sector by sector. It
serves where nothing was compiled, and is what the compiled part is tested against.
"""

import ctypes
import hashlib
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final, Protocol

from csi_driver.luks.formats import CIPHER_KEY_BITS, SECTOR_SIZES, check_key_bits
from csi_driver.model.errors import CommandFailed, FailedPrecondition, InvalidArgument

LIBRARY: Final = "libcrypto.so.3"
COMPILED: Final = os.path.join(os.path.dirname(__file__), "libbulk.so")
SOURCE: Final = os.path.join(os.path.dirname(__file__), "bulk.c")

_UNIT: Final = 512
_BLOCK: Final = 16
_NUMBERS: Final = 1 << 64
_READABLE: Final = 0  # PyBUF_SIMPLE
_WRITABLE: Final = 1  # PyBUF_WRITABLE

_pointer = ctypes.c_void_p


class _Parameters(ctypes.Structure):
    """`struct parameters` of bulk.c, which tells what the fields mean."""

    _fields_ = (
        ("key", ctypes.c_uint8 * 64),
        ("key_size", ctypes.c_uint32),
        ("iv_key_size", ctypes.c_uint32),
        ("sector_size", ctypes.c_uint32),
        ("xts", ctypes.c_uint32),
        ("narrow", ctypes.c_uint32),
    )


class _Engine(Protocol):
    def crypt(self, given: _Parameters, encrypt: int, first: int, source: int, target: int, sectors: int) -> None:
        """Work on sectors between two addresses. Raises CommandFailed when libcrypto refuses."""


class SectorCipher:
    """One volume key in one cipher; made by `sector_cipher`. Safe for several threads at a time.

    It keeps a copy of the key and wipes that when it goes away. Python's own bytes, the caller's too, cannot be wiped.
    """

    def __init__(self, engine: _Engine, parameters: _Parameters) -> None:
        self._engine = engine
        self._parameters = parameters
        # Not at exit: a thread that is still at work would encrypt with the zeros.
        weakref.finalize(self, _wipe, parameters).atexit = False

    @property
    def compiled(self) -> bool:
        """Whether the compiled part does the work, with the interpreter lock released."""
        return isinstance(self._engine, _Compiled)

    def encrypt(self, first: int, source: memoryview, target: memoryview) -> None:
        """Encrypt all of `source` into `target`, which is as long and may be the same memory.

        Both are contiguous and whole sectors long. `first` is the number of the first sector in units of 512 bytes
        from the segment's start, plus the segment's `iv_tweak`. Raises CommandFailed when libcrypto refuses, ValueError
        or BufferError for memory or a number that do not fit.
        """
        self._crypt(1, first, source, target)

    def decrypt(self, first: int, source: memoryview, target: memoryview) -> None:
        """Decrypt all of `source` into `target`, as `encrypt`."""
        self._crypt(0, first, source, target)

    def _crypt(self, encrypt: int, first: int, source: memoryview, target: memoryview) -> None:
        size = self._parameters.sector_size
        length = source.nbytes
        if length != target.nbytes or length % size:
            raise ValueError(f"{length} bytes into {target.nbytes}: not the same number of sectors of {size} bytes")
        if first % (size // _UNIT) or not 0 <= first <= _NUMBERS - length // _UNIT:
            raise ValueError(f"{first} is not the number of a sector of {size} bytes, in units of {_UNIT} bytes")
        if not length:
            return
        with _memory(source, _READABLE) as reading, _memory(target, _WRITABLE) as writing:
            if 0 < abs(reading - writing) < length:
                raise ValueError(f"source and target overlap by {length - abs(reading - writing)} of {length} bytes")
            self._engine.crypt(self._parameters, encrypt, first, reading, writing, length // size)


def sector_cipher(cipher: str, key: bytes, sector_size: int, *, compiled: bool | None = None) -> SectorCipher:
    """A cipher of `formats.CIPHER_KEY_BITS` with this volume key and sector size in bytes.

    `compiled` chooses the way; None takes the compiled part where it is there. Raises InvalidArgument for a cipher, key
    or sector size that is none of ours, FailedPrecondition when libcrypto or a compiled part that is asked for cannot
    be loaded.
    """
    if cipher not in CIPHER_KEY_BITS:
        raise InvalidArgument(f"the cipher {cipher} is not supported; choose one of {', '.join(CIPHER_KEY_BITS)}")
    check_key_bits(cipher, len(key) * 8)
    if sector_size not in SECTOR_SIZES:
        raise InvalidArgument(
            f"the sector size {sector_size} is not supported; choose one of {', '.join(map(str, SECTOR_SIZES))}"
        )
    _, mode, iv = cipher.split("-")
    half = len(key) // 2
    if mode == "xts" and key[:half] == key[half:]:
        # XTS is not secure then, and libcrypto's refuses to encrypt (FIPS 140-3 implementation guidance, C.I).
        raise InvalidArgument(f"both halves of the {len(key) * 8}-bit key for {cipher} are equal; use a random key")
    # ESSIV's key is as long as the hash, so its AES is AES-256 for every volume key.
    material = key + hashlib.sha256(key).digest() if iv == "essiv:sha256" else key
    data_key_size = half if mode == "xts" else len(key)
    parameters = _Parameters(
        key_size=data_key_size,
        iv_key_size=len(material) - data_key_size,
        sector_size=sector_size,
        xts=mode == "xts",
        narrow=iv == "plain",
    )
    ctypes.memmove(ctypes.addressof(parameters), material, len(material))
    use_compiled = _is_there() if compiled is None else compiled
    return SectorCipher(_compiled() if use_compiled else _sector_by_sector(), parameters)


class _Compiled:
    """bulk.c."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(COMPILED)
        except OSError as error:
            raise FailedPrecondition(
                f"the compiled part of luks-csi cannot be loaded ({error}); build it again where a C compiler is"
            ) from None
        library.bulk_load.argtypes = [ctypes.c_char_p]
        library.bulk_load.restype = ctypes.c_char_p
        if complaint := library.bulk_load(LIBRARY.encode()):
            raise _no_libcrypto(complaint.decode(errors="replace"))
        self._function = library.bulk_crypt
        self._function.argtypes = [
            ctypes.POINTER(_Parameters), ctypes.c_int, ctypes.c_uint64, _pointer, _pointer, ctypes.c_size_t,
        ]  # fmt: skip

    def crypt(self, given: _Parameters, encrypt: int, first: int, source: int, target: int, sectors: int) -> None:
        _check(1 + self._function(ctypes.byref(given), encrypt, first, source, target, sectors))


class _SectorBySector:
    """libcrypto's own XTS and CBC, called for each sector (EVP_EncryptInit(3))."""

    def __init__(self) -> None:
        try:
            # PyDLL: a call is far shorter than letting the interpreter lock go and getting it back.
            self._library = library = ctypes.PyDLL(LIBRARY)
        except OSError as error:
            raise _no_libcrypto(str(error)) from None
        number = ctypes.c_int
        library.EVP_get_cipherbyname.argtypes = [ctypes.c_char_p]
        library.EVP_get_cipherbyname.restype = _pointer
        library.EVP_CIPHER_CTX_new.restype = _pointer
        library.EVP_CIPHER_CTX_free.argtypes = [_pointer]
        library.EVP_CIPHER_CTX_free.restype = None
        library.EVP_CIPHER_CTX_set_padding.argtypes = [_pointer, number]
        library.EVP_CipherInit_ex.argtypes = [_pointer, _pointer, _pointer, _pointer, ctypes.c_char_p, number]
        library.EVP_CipherUpdate.argtypes = [_pointer, _pointer, ctypes.POINTER(number), _pointer, number]

    def crypt(self, given: _Parameters, encrypt: int, first: int, source: int, target: int, sectors: int) -> None:
        size = given.sector_size
        numbers = range(first, first + sectors * (size // _UNIT), size // _UNIT)
        mask = (1 << 32) - 1 if given.narrow else _NUMBERS - 1
        ivs = b"".join((number & mask).to_bytes(_BLOCK, "little") for number in numbers)
        key = ctypes.addressof(given)
        if given.xts and given.key_size == 24:
            self._xts_192(given, encrypt, ivs, source, target)
            return
        if given.iv_key_size and not given.xts:
            ivs = self._ecb(given.iv_key_size, key + given.key_size, 1, ivs)
        name = f"AES-{given.key_size * 8}-{'XTS' if given.xts else 'CBC'}"
        written = ctypes.byref(ctypes.c_int())
        start, update = self._library.EVP_CipherInit_ex, self._library.EVP_CipherUpdate
        with self._context(name, key, encrypt) as context:
            for at in range(sectors):
                iv = ivs[at * _BLOCK : (at + 1) * _BLOCK]
                _check(start(context, None, None, None, iv, encrypt))
                _check(update(context, target + at * size, written, source + at * size, size))

    def _xts_192(self, given: _Parameters, encrypt: int, ivs: bytes, source: int, target: int) -> None:
        """XTS as IEEE 1619 defines it, around ECB: libcrypto has none with AES-192."""
        key = ctypes.addressof(given)
        sealed = self._ecb(given.key_size, key + given.key_size, 1, ivs)
        tweaks = bytearray()
        for at in range(0, len(sealed), _BLOCK):
            tweak = int.from_bytes(sealed[at : at + _BLOCK], "little")
            for _ in range(given.sector_size // _BLOCK):
                tweaks += tweak.to_bytes(_BLOCK, "little")
                tweak = (tweak << 1) ^ (tweak >> 127) * (1 << 128 | 0x87)
        whitening = int.from_bytes(tweaks, "little")

        def whitened(data: bytes) -> bytes:
            return (int.from_bytes(data, "little") ^ whitening).to_bytes(len(tweaks), "little")

        inner = self._ecb(given.key_size, key, encrypt, whitened(ctypes.string_at(source, len(tweaks))))
        ctypes.memmove(target, whitened(inner), len(tweaks))

    def _ecb(self, key_size: int, key: int, encrypt: int, data: bytes) -> bytes:
        target = ctypes.create_string_buffer(len(data))
        with self._context(f"AES-{key_size * 8}-ECB", key, encrypt) as context:
            _check(self._library.EVP_CipherUpdate(context, target, ctypes.byref(ctypes.c_int()), data, len(data)))
        return target.raw

    @contextmanager
    def _context(self, name: str, key: int, encrypt: int) -> Iterator[int]:
        library = self._library
        context = library.EVP_CIPHER_CTX_new()
        try:
            cipher = library.EVP_get_cipherbyname(name.encode())
            _check(library.EVP_CipherInit_ex(context, cipher, None, key, None, encrypt))
            _check(library.EVP_CIPHER_CTX_set_padding(context, 0))
            yield context
        finally:
            library.EVP_CIPHER_CTX_free(context)


def fits(library: str, source: str) -> bool:
    """Whether a library is there and was made of that source: a build without a compiler leaves an older one."""
    try:
        with open(library, "rb") as compiled, open(source, "rb") as text:
            return hashlib.sha256(text.read()).hexdigest().encode() in compiled.read()
    except FileNotFoundError:
        return False


@cache
def _is_there() -> bool:
    return fits(COMPILED, SOURCE)


_compiled = cache(_Compiled)
_sector_by_sector = cache(_SectorBySector)


class _Buffer(ctypes.Structure):
    """Py_buffer, of Python's stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_Buffer)]
_release_buffer.restype = None


@contextmanager
def _memory(view: memoryview, flags: int) -> Iterator[int]:
    """The address of a view's bytes, which stay where they are within the block. Raises BufferError."""
    buffer = _Buffer()
    _get_buffer(view, ctypes.byref(buffer), flags)
    try:
        yield buffer.buf
    finally:
        _release_buffer(ctypes.byref(buffer))


def _wipe(parameters: _Parameters) -> None:
    ctypes.memset(ctypes.addressof(parameters), 0, ctypes.sizeof(parameters))


def _check(result: int) -> None:
    """EVP functions answer 1, or 0 for a failure (EVP_EncryptInit(3))."""
    if result != 1:
        raise CommandFailed(f"{LIBRARY} refused to encrypt or decrypt; see whether this OpenSSL has AES switched on")


def _no_libcrypto(complaint: str) -> FailedPrecondition:
    return FailedPrecondition(f"{LIBRARY} cannot be used ({complaint}); install OpenSSL 3, package libssl3")
