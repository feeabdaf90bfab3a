"""Encrypted images and the real cryptsetup: each opens, and reads, what the other made; and clones that are killed."""

import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from csi_driver.images.base import MIB
from csi_driver.images.checkpoint import Operation
from csi_driver.images.luks_reader import LuksReader
from csi_driver.images.source import RawReader
from csi_driver.images.target import Encryption
from csi_driver.luks.formats import CIPHER_KEY_BITS, LuksFormat
from csi_driver.model.errors import DriverError, ForeignSignature, InvalidHeader, Unauthenticated
from tests.headers import forged, run_cryptsetup
from tests.image_clones import (
    CHEAP,
    ENCRYPTED,
    HEADER,
    OTHER_PASSPHRASE,
    PASSPHRASE,
    WHERE,
    child,
    clone,
    complete,
    decrypted,
    digest_of,
    encrypted,
    kill,
    make_source,
    target_of,
)

ENCRYPT, DECRYPT = Operation.ENCRYPT, Operation.DECRYPT
SEED = int(os.environ.get("SEED") or random.randrange(1 << 32))
COUNT = int(os.environ.get("COUNT") or 2)


@pytest.mark.parametrize(
    "chosen",
    [
        LuksFormat(),
        replace(CHEAP, cipher="aes-xts-plain64", key_bits=256, hash="sha512", sector_size=4096),
        replace(CHEAP, cipher="aes-xts-plain", key_bits=512, hash="sha384", sector_size=1024),
        replace(CHEAP, cipher="aes-cbc-plain64", key_bits=192, sector_size=2048),
        replace(CHEAP, cipher="aes-cbc-plain", key_bits=128),
        LuksFormat(cipher="aes-cbc-essiv:sha256", key_bits=256, pbkdf="argon2i", memory_kib=32, hash="sha512"),
    ],
    ids=lambda chosen: f"{chosen.cipher}-{chosen.key_bits}-{chosen.sector_size}",
)
def test_cryptsetup_opens_what_was_chosen_and_nothing_else(tmp_path: Path, chosen: LuksFormat) -> None:
    source = make_source(tmp_path / "source.raw", MIB + 5)
    result = clone(ENCRYPT, source, tmp_path / "image", Encryption(chosen, PASSPHRASE))
    run_cryptsetup("open", "--test-passphrase", "--key-file", "-", str(result.part), key=PASSPHRASE.reveal())
    assert result.luks is not None
    assert f"UUID:          \t{result.luks.uuid}\n" in run_cryptsetup("luksDump", str(result.part)).decode()
    said = msgspec.json.decode(run_cryptsetup("luksDump", "--dump-json-metadata", str(result.part)))
    (segment,), (slot,), (token,) = (said[name].values() for name in ("segments", "keyslots", "tokens"))
    assert segment == {
        "type": "crypt",
        "offset": str(HEADER),
        "size": "dynamic",
        "iv_tweak": "0",
        "encryption": chosen.cipher,
        "sector_size": chosen.sector_size,
    }
    assert (slot["key_size"] * 8, slot["af"]["hash"]) == (chosen.key_bits, chosen.hash)
    assert slot["kdf"]["type"] == chosen.pbkdf
    assert slot["kdf"].get("iterations", slot["kdf"].get("time")) == chosen.iterations
    assert slot["kdf"].get("memory", 0) == chosen.memory_kib
    assert token == {"type": "luks-csi", "keyslots": [], "payload_bytes": str(MIB + 5)}


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("cipher", CIPHER_KEY_BITS)
def test_what_cryptsetup_encrypts_is_read(tmp_path: Path, cipher: str, sector_size: int) -> None:
    """`cryptsetup reencrypt --encrypt` moves the data 16 MiB on and encrypts it, all in one file."""
    source = make_source(tmp_path / "source.raw", 2 * MIB)
    image = tmp_path / "image.luks"
    image.write_bytes(source.read_bytes() + bytes(2 * HEADER))
    run_cryptsetup(
        *("reencrypt", "--encrypt", "-q", "--type", "luks2", "--reduce-device-size", "32M", "--key-file", "-"),
        *("--cipher", cipher, "--key-size", "256", "--sector-size", str(sector_size)),
        *("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", str(image)),
        key=PASSPHRASE.reveal(),
    )
    result = clone(DECRYPT, image, tmp_path / "plain")
    assert result.part.read_bytes()[: 2 * MIB] == source.read_bytes()


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("cipher", CIPHER_KEY_BITS)
def test_what_was_encrypted_is_decrypted_by_cryptsetup(tmp_path: Path, cipher: str, sector_size: int) -> None:
    source = make_source(tmp_path / "source.raw", 2 * MIB)
    chosen = encrypted(cipher=cipher, key_bits=256, sector_size=sector_size)
    image = clone(ENCRYPT, source, tmp_path / "image", chosen).part
    run_cryptsetup(
        *(
            "reencrypt",
            "--decrypt",
            "-q",
            "--force-offline-reencrypt",
            "--header",
            str(tmp_path / "header"),
            "--key-file",
            "-",
            str(image),
        ),
        key=PASSPHRASE.reveal(),
    )
    with image.open("rb") as file:
        assert file.read(2 * MIB) == source.read_bytes()


def test_the_token_is_believed_about_the_padding_of_the_last_sector_alone(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source.raw", 100_000)
    chosen = encrypted(sector_size=4096)
    image = clone(ENCRYPT, source, tmp_path / "image", chosen).part
    whole = image.read_bytes()
    data = len(whole) - HEADER

    def payload_with(said: object) -> int:
        image.write_bytes(forged(whole, lambda metadata: metadata["tokens"]["0"].update(payload_bytes=said)))
        with closing(LuksReader(RawReader(str(image), WHERE), PASSPHRASE, WHERE)) as reader:
            return reader.size

    assert payload_with("100000") == 100_000
    assert payload_with("99999") == 99_999
    for lie in ("1", "0", "-1", str(data + 1), "9" * 19, "9" * 5000, "1e5", 100_000, None):
        assert payload_with(lie) == data
    image.write_bytes(whole)
    os.truncate(image, len(whole) + MIB)  # a volume that was made of it, and grew
    with closing(LuksReader(RawReader(str(image), WHERE), PASSPHRASE, WHERE)) as reader:
        assert reader.size == data + MIB


def test_an_image_that_cannot_be_opened_is_refused_with_its_reason(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source.raw", 100_000)
    image = clone(ENCRYPT, source, tmp_path / "image", ENCRYPTED).part

    def refused(path: Path, error: type[DriverError], message: str) -> None:
        with closing(RawReader(str(path), WHERE)) as raw, pytest.raises(error, match=message):
            LuksReader(raw, PASSPHRASE, WHERE)

    refused(source, ForeignSignature, f"expected the volume's LUKS2 header on {WHERE}, found other data")
    with closing(RawReader(str(image), WHERE)) as raw:
        with pytest.raises(Unauthenticated, match=f"opens no key slot of {WHERE}"):
            LuksReader(raw, OTHER_PASSPHRASE, WHERE)
        assert LuksReader(raw, PASSPHRASE, WHERE).size == 100_000
    whole = image.read_bytes()
    image.write_bytes(forged(whole, lambda metadata: metadata["segments"].clear()))
    refused(image, InvalidHeader, "expected segment 0 alone, found none")
    image.write_bytes(whole[: 40 * 1024])
    refused(image, DriverError, WHERE)
    image.write_bytes(forged(whole, lambda metadata: metadata["keyslots"]["0"]["kdf"].update(iterations=10_000_001)))
    refused(image, InvalidHeader, "PBKDF2 iterations in key slot 0, found 10000001")


@pytest.mark.parametrize("operation", Operation)
def test_a_clone_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path, operation: Operation) -> None:
    chooser = random.Random(f"{SEED} {operation}")
    print(f"SEED={SEED} COUNT={COUNT}")
    source = make_source(tmp_path / "source.raw", 16 * MIB + 1000, SEED)
    wanted = digest_of(source)
    given = source
    if operation in (Operation.DECRYPT, Operation.REENCRYPT):
        given = clone(ENCRYPT, source, tmp_path / "given", ENCRYPTED).part
    encryption = target_of(operation)
    for number in range(COUNT):
        made = tmp_path / f"made {number}"
        reached = []
        for _ in range(chooser.randint(1, 3)):
            with child(operation, given, made) as process:
                reached.append(kill(process, chooser.uniform(0, 0.4)))
        resumed = complete(operation, given, made)
        print(f"{operation}: killed at {reached} of {source.stat().st_size} bytes, {resumed} chunks were there")
        part = made / "part"
        found = decrypted(part, tmp_path / "plain", encryption.passphrase) if encryption else digest_of(part)
        assert found == wanted
        assert sorted(os.listdir(made)) == ["checkpoint.json", "part"]
        part.unlink()


def test_a_kill_late_in_a_clone_costs_little(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source.raw", 16 * MIB)
    with child(ENCRYPT, source, tmp_path / "made") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdigit() and int(line) > 12 * MIB:
                process.send_signal(signal.SIGKILL)
                break
    assert complete(ENCRYPT, source, tmp_path / "made") > 100  # of 256 chunks


def test_a_limit_on_the_size_of_files_is_no_room_and_nothing_is_left(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source.raw", 16 * MIB)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.image_clones", ENCRYPT, str(source), str(tmp_path / "made")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20 * MIB, 20 * MIB))
        _, errors = process.communicate(timeout=60)
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    assert b"no space for image debian-12 in" in errors
    assert not (tmp_path / "made").exists()


def _in_child(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_memory_does_not_grow_with_the_image(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from csi_driver.images.checkpoint import Operation
        from csi_driver.images.stream import Pace
        from tests.image_clones import ENCRYPTED, clone
        source, folder = map(Path, sys.argv[1:])
        sealed = clone(Operation.ENCRYPT, source, folder / "sealed", ENCRYPTED, pace=Pace(), verify=True)
        clone(Operation.DECRYPT, sealed.part, folder / "plain", pace=Pace(), verify=True)
        # Not getrusage(2): its peak is that of the parent too, from before the exec.
        print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    """
    peaks = []
    for size in (16 * MIB, 128 * MIB):
        folder = tmp_path / str(size)
        folder.mkdir()
        peaks.append(int(_in_child(code, str(make_source(folder / "source", size)), str(folder))))
    assert peaks[1] < peaks[0] + 8 * 1024
    assert max(peaks) < 80 * 1024


def test_a_source_that_does_not_answer_is_told_and_the_target_stays_locked(tmp_path: Path) -> None:
    code = """
        import sys, threading
        from pathlib import Path
        from dataclasses import replace
        from csi_driver.images.checkpoint import Operation
        from csi_driver.model.errors import DeadlineExceeded, VolumeBusy
        from tests.image_clones import ENCRYPTED, SMALL, clone
        source, folder = map(Path, sys.argv[1:])
        hang = threading.Event().wait
        short = replace(SMALL, patience=1)
        try:
            clone(Operation.ENCRYPT, source, folder, ENCRYPTED, before=lambda _: hang(), pace=short)
        except DeadlineExceeded as error:
            print(error)
        try:
            clone(Operation.ENCRYPT, source, folder, ENCRYPTED)
        except VolumeBusy as error:
            print(error)
    """
    source = make_source(tmp_path / "source.raw", MIB)
    said = _in_child(code, str(source), str(tmp_path / "made")).splitlines()
    assert said[0].startswith(
        "nothing of image debian-12 could be read or written for 1 seconds; look at the kernel log"
    )
    assert said[1].startswith("another run is at work on image debian-12 in ")
    assert clone(ENCRYPT, source, tmp_path / "made", ENCRYPTED).resumed == 0


def test_three_encryptions_of_one_source_at_once(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source.raw", 4 * MIB)
    runs = [child(ENCRYPT, source, tmp_path / str(number)) for number in range(3)]
    errors = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], errors
    for number in range(3):
        assert decrypted(tmp_path / str(number) / "part", tmp_path / "plain") == digest_of(source)
