"""What this driver accepts of a LUKS2 header, asked before any key is tried.

A header is unauthenticated. What the volume's record says outside the device decides; the rest must be what this
driver itself writes. Source of the rules: CVE-2021-4122 (forged reencryption), CVE-2025-59054 and CVE-2025-58356
(null ciphers), and key slot costs that exhaust a node.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise

from msgspec import Struct

from csi_driver.luks.formats import (
    ARGON2_DEFAULT_MEMORY_KIB,
    ARGON2_LEAST_MEMORY_KIB,
    ARGON2_LEAST_TIME,
    ARGON2_READABLE_TIME,
    CIPHER_KEY_BITS,
    HASHES,
    PBKDF2_LEAST_ITERATIONS,
    PBKDF2_MOST_ITERATIONS,
    SECTOR_SIZES,
)
from csi_driver.luks.header import Header
from csi_driver.luks.header_metadata import SALT_BYTES, Argon2i, Digest, Keyslot, Pbkdf2, refusal, with_advice
from csi_driver.model.errors import DeviceShort, ForeignSignature
from csi_driver.model.volume import LuksIdentity

_STRIPES = 4000
_ALIGNMENT = 4096
_LUKS1_DIGEST_BYTES = 20  # of any hash; it stays so when it becomes LUKS2 (cryptsetup-convert(8))
_MOST_KEYSLOTS_BYTES = 128 << 20  # LUKS2 itself has no larger key slot area


class Limits(Struct, frozen=True):
    """The most that opening a volume may cost. A device on the storage says what it costs; the node says what it has.

    memory_kib, time, cpus: Argon2's memory in KiB, passes and lanes. iterations: of PBKDF2, in key slots and digest.
    keyslots: how many key slots there may be, since a wrong key is tried on each. hashes: those that key slots and
    digest may be made with.
    """

    memory_kib: int = ARGON2_DEFAULT_MEMORY_KIB
    time: int = ARGON2_READABLE_TIME
    cpus: int = 4
    iterations: int = PBKDF2_MOST_ITERATIONS
    keyslots: int = 8
    hashes: tuple[str, ...] = HASHES


DEFAULT_LIMITS = Limits()


def validate(
    header: Header,
    expected: LuksIdentity,
    device_size: int,
    where: str,
    *,
    limits: Limits = DEFAULT_LIMITS,
    keyslots: Collection[int] | None = None,
) -> None:
    """Refuse `header` unless it is what `expected`, the volume's record, says and costs no more than `limits`.

    `device_size` is the device's in bytes. `keyslots` are the ids of the key slots that must be there, no more and no
    less; None asks for at least one. A record without a digest (while formatting) accepts any. `where` names volume
    and device. Raises ForeignSignature for another UUID, DeviceShort when the data segment has no room, InvalidHeader
    for everything else.
    """
    if header.uuid != expected.uuid:
        raise ForeignSignature(
            f"expected LUKS2 with UUID {expected.uuid} on {where}, found UUID {header.uuid}; nothing was written, "
            "check that this is the volume's device"
        )
    for reason in _violations(header, expected, limits, keyslots):
        error = refusal(where, reason)
        raise with_advice(error, reason.advice) if isinstance(reason, _Cost) else error
    if device_size < expected.data_offset + expected.sector_size:
        raise DeviceShort(
            f"expected more than {expected.data_offset} bytes on {where}, found {device_size}; "
            "check the storage below it"
        )


def _violations(
    header: Header, expected: LuksIdentity, limits: Limits, keyslots: Collection[int] | None
) -> Iterator[str]:
    """What is wrong, most telling first; each rule may rely on the ones before it."""
    yield from _config(header)
    yield from _segment(header, expected)
    yield from _layout(header, expected)
    yield from _digest(header, expected, limits)
    yield from _keyslot_ids(header, limits, keyslots)
    for key, slot in header.keyslots.items():
        yield from _keyslot(f"key slot {key}", slot, expected, limits)
    yield from _areas(header)
    for key, token in header.tokens.items():
        if not header.keyslots.keys() >= set(token.keyslots):
            yield f"expected token {key} to name existing key slots, found {_listed(token.keyslots)}"


def _config(header: Header) -> Iterator[str]:
    requirements = header.config.requirements
    if requirements and requirements.mandatory:
        # online-reencrypt makes libcryptsetup decrypt or encrypt the data as it opens it
        yield f"expected no requirements, found {_listed(requirements.mandatory)}"
    if header.config.flags:
        yield f"expected no persistent activation flags, found {_listed(header.config.flags)}"


def _segment(header: Header, expected: LuksIdentity) -> Iterator[str]:
    if set(header.segments) != {"0"}:
        yield f"expected segment 0 alone, found {_listed(header.segments) or 'none'}"
    segment = header.segments["0"]
    if segment.flags:
        yield f"expected no segment flags, found {_listed(segment.flags)}"
    if segment.integrity is not None:
        yield "expected no integrity in segment 0, found some"
    if segment.encryption not in CIPHER_KEY_BITS:
        yield f"expected one of the ciphers {_listed(CIPHER_KEY_BITS)} in segment 0, found {segment.encryption!r}"
    for name, wanted, found in (
        ("cipher", expected.cipher, segment.encryption),
        ("offset", expected.data_offset, segment.offset),
        ("size", "dynamic", segment.size),
        ("iv_tweak", 0, segment.iv_tweak),
        ("sector size", expected.sector_size, segment.sector_size),
    ):
        if wanted != found:
            yield f"expected {name} {wanted} in segment 0, found {found}"
    if segment.sector_size not in SECTOR_SIZES:
        yield f"expected one of the sector sizes {_listed(SECTOR_SIZES)}, found {segment.sector_size}"
    if segment.offset % segment.sector_size:
        yield (
            f"expected segment 0 to begin at a multiple of its sector size {segment.sector_size}, "
            f"found {segment.offset}"
        )


def _layout(header: Header, expected: LuksIdentity) -> Iterator[str]:
    size = header.config.keyslots_size
    if size > _MOST_KEYSLOTS_BYTES:
        # key slots are read whole before any key is tried
        yield f"expected at most {_MOST_KEYSLOTS_BYTES} bytes for the key slot area, found {size}"
    end = 2 * header.hdr_size + size
    if end > expected.data_offset:
        yield f"expected the key slot area to end before the data at {expected.data_offset}, found its end at {end}"


def _digest(header: Header, expected: LuksIdentity, limits: Limits) -> Iterator[str]:
    if len(header.digests) != 1:
        yield f"expected one digest, found {len(header.digests)}"
    for digest in header.digests.values():
        if digest.segments != ("0",):
            yield f"expected the digest to be of segment 0, found {_listed(digest.segments) or 'none'}"
        if sorted(digest.keyslots) != sorted(header.keyslots):
            yield (
                f"expected the digest to be of every key slot ({_listed(header.keyslots)}), "
                f"found {_listed(digest.keyslots) or 'none'}"
            )
        yield from _pbkdf2("digest", digest, limits)
        lengths = (hashlib.new(digest.hash).digest_size, _LUKS1_DIGEST_BYTES)
        if len(digest.digest) not in lengths:
            yield f"expected a digest of {lengths[0]} bytes, found {len(digest.digest)}"
    if expected.digest is not None and header.key_digest != expected.digest:
        yield f"expected the volume key digest {expected.digest}, found {header.key_digest}"


def _keyslot_ids(header: Header, limits: Limits, wanted: Collection[int] | None) -> Iterator[str]:
    if wanted is None:
        if not 1 <= len(header.keyslots) <= limits.keyslots:
            yield f"expected 1 to {limits.keyslots} key slots, found {len(header.keyslots)}"
    elif {int(key) for key in header.keyslots} != set(wanted):
        yield f"expected key slots {_listed(sorted(wanted))}, found {_listed(header.keyslots) or 'none'}"


def _keyslot(name: str, slot: Keyslot, expected: LuksIdentity, limits: Limits) -> Iterator[str]:
    if slot.key_size * 8 != expected.key_bits:
        yield f"expected a key of {expected.key_bits} bits in {name}, found {slot.key_size * 8}"
    if slot.priority == 0:
        yield f"expected {name} to be in use, found priority 0"
    area = slot.area
    if area.encryption not in CIPHER_KEY_BITS:
        yield f"expected one of the ciphers {_listed(CIPHER_KEY_BITS)} in {name}, found {area.encryption!r}"
    if area.key_size * 8 not in CIPHER_KEY_BITS[area.encryption]:
        yield (
            f"expected a key of {_listed(CIPHER_KEY_BITS[area.encryption])} bits for {area.encryption} in {name}, "
            f"found {area.key_size * 8}"
        )
    if slot.af.stripes != _STRIPES:
        yield f"expected {_STRIPES} stripes in {name}, found {slot.af.stripes}"
    if slot.af.hash not in limits.hashes:
        yield f"expected one of the hashes {_listed(limits.hashes)} in {name}, found {slot.af.hash!r}"
    if isinstance(slot.kdf, Pbkdf2):
        yield from _pbkdf2(name, slot.kdf, limits)
    else:
        yield from _argon2(name, slot.kdf, limits)


def _pbkdf2(name: str, kdf: Pbkdf2 | Digest, limits: Limits) -> Iterator[str]:
    if kdf.hash not in limits.hashes:
        yield f"expected one of the hashes {_listed(limits.hashes)} in {name}, found {kdf.hash!r}"
    yield from _salt(name, kdf.salt)
    yield from _within(f"PBKDF2 iterations in {name}", kdf.iterations, PBKDF2_LEAST_ITERATIONS, limits.iterations)


class _Cost(str):
    """A reason that a limit of the node's own gives; `advice` is to raise that."""

    __slots__ = ("advice",)
    advice: str


def _too_much_memory(reason: str, kib: int) -> _Cost:
    found = _Cost(reason)
    found.advice = (
        f"if its volume was made so, as cryptsetup and Longhorn do, allow as much with --pbkdf-memory-limit {kib}Ki, "
        f"here and at the server on the node, which needs it for each stage"
    )
    return found


def _argon2(name: str, kdf: Argon2i, limits: Limits) -> Iterator[str]:
    yield from _salt(name, kdf.salt)
    for reason in _within(f"KiB of Argon2 memory in {name}", kdf.memory, ARGON2_LEAST_MEMORY_KIB, limits.memory_kib):
        yield _too_much_memory(reason, kdf.memory) if kdf.memory > limits.memory_kib else reason
    yield from _within(f"Argon2 passes in {name}", kdf.time, ARGON2_LEAST_TIME, limits.time)
    yield from _within(f"Argon2 lanes in {name}", kdf.cpus, 1, limits.cpus)


def _salt(name: str, salt: bytes) -> Iterator[str]:
    if len(salt) != SALT_BYTES:
        yield f"expected a salt of {SALT_BYTES} bytes in {name}, found {len(salt)}"


def _within(what: str, found: int, least: int, most: int) -> Iterator[str]:
    if not least <= found <= most:
        yield f"expected {least} to {most} {what}, found {found}"


def _areas(header: Header) -> Iterator[str]:
    """Each within the key slot area, large enough for its key material, none on top of another."""
    start, end = 2 * header.hdr_size, 2 * header.hdr_size + header.config.keyslots_size
    taken = sorted((slot.area.offset, slot.area.offset + slot.area.size, key) for key, slot in header.keyslots.items())
    for first, last, key in taken:
        if first < start or last > end:
            yield f"expected the area of key slot {key} within {start} to {end}, found {first} to {last}"
        if first % _ALIGNMENT:
            yield f"expected the area of key slot {key} to begin at a multiple of {_ALIGNMENT}, found {first}"
        needed = header.keyslots[key].key_size * _STRIPES
        if last - first < needed:
            yield f"expected at least {needed} bytes for the area of key slot {key}, found {last - first}"
    for (_, last, key), (first, _, other) in pairwise(taken):
        if first < last:
            yield f"expected separate areas, found those of key slots {key} and {other} to overlap"


def _listed(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)
