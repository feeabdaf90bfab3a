"""The bulk ciphers against published vectors, against what dm-crypt made, and the two ways against each other."""

import ctypes
import gc
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hatch_build
from csi_driver.luks.bulk import COMPILED, SOURCE, SectorCipher, fits, sector_cipher
from csi_driver.model.errors import InvalidArgument
from tests.bulk_cases import CASES, DATA, DIGESTS, FIRST, WAYS, Case, digest, done

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@needs_compiler
def test_the_compiled_part_is_there_and_is_what_is_taken() -> None:
    assert sector_cipher("aes-xts-plain64", bytes(range(64)), 512).compiled
    assert not sector_cipher("aes-xts-plain64", bytes(range(64)), 512, compiled=False).compiled


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize(
    ("key", "number", "begins"),
    [
        # IEEE 1619-2007, annex B: vectors 4 and 10, data units of 512 bytes
        (
            "2718281828459045235360287471352631415926535897932384626433832795", 0,
            "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
        ),
        (
            "2718281828459045235360287471352662497757247093699959574966967627\
3141592653589793238462643383279502884197169399375105820974944592", 0xFF,
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
        ),
    ],
    ids=["AES-128", "AES-256"],
)  # fmt: skip
def test_xts_is_that_of_the_standard(key: str, number: int, begins: str, *, compiled: bool) -> None:
    cipher = sector_cipher("aes-xts-plain64", bytes.fromhex(key), 512, compiled=compiled)
    assert done(cipher.encrypt, number, bytes(range(256)) * 2)[:32].hex() == begins


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_cipher_does_what_dm_crypt_did(case: Case, *, compiled: bool) -> None:
    cipher = sector_cipher(case.cipher, case.key, case.sector_size, compiled=compiled)
    ciphertext = done(cipher.encrypt, FIRST, DATA)
    assert digest(ciphertext) == DIGESTS[str(case)]
    assert done(cipher.decrypt, FIRST, ciphertext) == DATA


@pytest.mark.parametrize("compiled", WAYS[:1])
@given(
    case=st.sampled_from(CASES),
    sectors=st.integers(0, 200),
    first=st.integers(0, 1 << 58) | st.integers((1 << 29) - 200, 1 << 29),
    shift=st.integers(0, 63),
    seed=st.binary(min_size=8, max_size=8),
)
def test_both_ways_agree_at_any_place_length_and_alignment(
    case: Case, sectors: int, first: int, shift: int, seed: bytes, *, compiled: bool
) -> None:
    first *= 8
    length = min(sectors, 40 * 4096 // case.sector_size) * case.sector_size
    data = (seed * (length // len(seed) + 9))[shift % 8 :][:length]
    reference = sector_cipher(case.cipher, case.key, case.sector_size, compiled=False)
    cipher = sector_cipher(case.cipher, case.key, case.sector_size, compiled=compiled)
    expected = done(reference.encrypt, first, data)
    for work, source, result in ((cipher.encrypt, data, expected), (cipher.decrypt, expected, data)):
        area = bytearray(b"\xa5" * (length + 128))
        work(first, memoryview(source), memoryview(area)[shift : shift + length])
        assert area == b"\xa5" * shift + result + b"\xa5" * (128 - shift)
        # In place.
        area[shift : shift + length] = source
        within = memoryview(area)[shift : shift + length]
        work(first, within, within)
        assert area == b"\xa5" * shift + result + b"\xa5" * (128 - shift)


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("cipher", ["aes-xts-plain64", "aes-cbc-essiv:sha256"])
def test_many_threads_share_a_cipher(cipher: str, *, compiled: bool) -> None:
    shared = sector_cipher(cipher, bytes(range(32)), 512, compiled=compiled)
    data = DATA * 4
    whole = done(shared.encrypt, 0, data)
    target = bytearray(len(data))
    size = 8 * 512

    def part(at: int) -> None:
        shared.encrypt(at // 512, memoryview(data)[at : at + size], memoryview(target)[at : at + size])

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            target[:] = bytes(len(target))
            list(pool.map(part, range(0, len(data), size)))
            assert target == whole


@pytest.mark.parametrize("compiled", WAYS)
def test_memory_that_does_not_fit_is_refused_untouched(*, compiled: bool) -> None:
    cipher = sector_cipher("aes-xts-plain64", bytes(range(64)), 4096, compiled=compiled)
    area = bytearray(3 * 4096)
    view = memoryview(area)
    for source, target, words in (
        (view[:4096], view[4096:], "4096 bytes into 8192"),
        (view[:512], view[512:1024], "whole|same number of sectors"),
        (view[:8192], view[4096:], "overlap by 4096 of 8192"),
        (view[4096:], view[:8192], "overlap by 4096 of 8192"),
    ):
        with pytest.raises(ValueError, match=words):
            cipher.encrypt(0, source, target)
    with pytest.raises(BufferError):
        cipher.encrypt(0, view[:4096], memoryview(bytes(4096)))
    with pytest.raises(BufferError):
        cipher.encrypt(0, memoryview(bytearray(8192))[::2], view[:4096])
    for first in (-8, 4, (1 << 64) - 8 + 8):
        with pytest.raises(ValueError, match=f"{first} is not the number"):
            cipher.encrypt(first, view[:4096], view[4096:8192])
    assert area == bytes(len(area))
    cipher.encrypt((1 << 64) - 8, view[:4096], view[4096:8192])
    assert any(area[4096:8192])


@pytest.mark.parametrize(
    ("cipher", "bits", "sector_size", "words"),
    [
        ("serpent-xts-plain64", 512, 512, "the cipher serpent-xts-plain64 is not supported; choose one of aes-xts"),
        ("aes-xts-plain64", 128, 512, "no 128-bit key; choose one of 256, 384, 512"),
        ("aes-cbc-plain", 512, 512, "no 512-bit key"),
        ("aes-xts-plain64", 512, 8192, "the sector size 8192 is not supported; choose one of 512, 1024"),
        ("aes-xts-plain64", 512, 0, "the sector size 0 is not supported"),
    ],
)
def test_what_is_none_of_ours_is_refused(cipher: str, bits: int, sector_size: int, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        sector_cipher(cipher, bytes(range(bits // 8)), sector_size)


def test_a_key_of_two_equal_halves_is_refused_and_not_shown() -> None:
    with pytest.raises(InvalidArgument, match="both halves of the 256-bit key") as refused:
        sector_cipher("aes-xts-plain64", b"0123456789abcdef" * 2, 512)
    assert "0123" not in str(refused.value)
    with pytest.raises(InvalidArgument):
        sector_cipher("aes-xts-plain64", b"0123456789abcdef" * 2, 512, compiled=False)


def test_the_key_is_wiped_when_the_cipher_goes() -> None:
    key = bytes(range(100, 132))
    cipher: SectorCipher | None = sector_cipher("aes-cbc-essiv:sha256", key, 512)
    assert cipher is not None
    parameters = cipher._parameters  # noqa: SLF001 - looks whether the key is still in memory
    assert ctypes.string_at(ctypes.addressof(parameters), len(key)) == key
    assert repr(key) not in repr(cipher)
    del cipher
    gc.collect()
    assert bytes(parameters) == bytes(ctypes.sizeof(parameters))


@needs_compiler
def test_the_compiled_part_compiles_without_a_warning(tmp_path: Path) -> None:
    command = [
        "cc",
        *hatch_build.BULK_FLAGS,
        "-Werror",
        "-o",
        str(tmp_path / "bulk.so"),
        str(ROOT / hatch_build.BULK_SOURCE),
    ]
    subprocess.run(command, check=True, timeout=60)


@pytest.mark.parametrize(
    ("compiler", "words"),
    [("no-such-cc", "there is no C compiler no-such-cc"), ("false", "false ended with status 1")],
)
def test_a_build_without_a_compiler_says_so_and_leaves_a_library_alone_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compiler: str, words: str
) -> None:
    source = tmp_path / hatch_build.BULK_SOURCE
    source.parent.mkdir(parents=True)
    source.write_text("no C at all")
    assert not hatch_build.compile_bulk(tmp_path, compiler)
    said = capsys.readouterr().err
    assert f"libbulk.so is left out, so images are encrypted more slowly: {words}" in said
    (tmp_path / hatch_build.BULK).write_text("of an older build")
    assert hatch_build.compile_bulk(tmp_path, compiler)
    assert f"libbulk.so stays as it is: {words}" in capsys.readouterr().err
    assert (tmp_path / hatch_build.BULK).read_text() == "of an older build"
    assert sorted(path.name for path in source.parent.iterdir()) == ["bulk.c", "libbulk.so"]


@needs_compiler
def test_only_a_library_of_the_source_beside_it_is_used(tmp_path: Path) -> None:
    source, library = tmp_path / hatch_build.BULK_SOURCE, tmp_path / hatch_build.BULK
    source.parent.mkdir(parents=True)
    shutil.copyfile(ROOT / hatch_build.BULK_SOURCE, source)
    assert not fits(str(library), str(source))
    assert hatch_build.compile_bulk(tmp_path, "cc")
    assert fits(str(library), str(source))
    source.write_text(source.read_text() + "/* newer */")
    assert not fits(str(library), str(source))
    assert fits(COMPILED, SOURCE)
    assert sector_cipher("aes-xts-plain64", bytes(range(64)), 512).compiled
