"""The demo passes, and each thing that it claims can turn out false."""

import io
from collections.abc import Mapping
from pathlib import Path

from csi_driver.host.loop import LoopDevices
from csi_driver.rpc.client import RemoteVolume
from tests.machine.demo import Demo
from tests.machine.leaks import Facts
from tests.machine.transcript import Transcript

CHEAP = {"encrypted": "true", "pbkdf": "pbkdf2", "pbkdfIterations": "1000"}


class Plants(Demo):
    """A demo of a driver that takes any key, loses a byte and leaks a loop device."""

    def __init__(self, folder: Path, transcript: Transcript, parameters: Mapping[str, str]) -> None:
        super().__init__(folder, transcript, parameters)
        self._wrong = self._key

    def _restage(self, volume: RemoteVolume) -> None:
        with (self._stage_folder(volume) / "data").open("r+b") as file:
            file.write(b"B")
        super()._restage(volume)

    def _clean_up(self, *volumes: RemoteVolume) -> None:
        leaked = self._folder / "leaked"
        leaked.write_bytes(bytes(1 << 20))
        LoopDevices().attach(str(leaked), autoclear=False).close()
        super()._clean_up(*volumes)


def run(demo: Demo, output: io.StringIO, folder: Path) -> tuple[int, str]:
    """The exit code and the last line; nothing may stay, whatever was found."""
    before = Facts.now(folder)
    code = demo.run()
    assert not [line for line in Facts.now(folder).more_than(before) if not line.startswith("files:")]
    return code, output.getvalue().splitlines()[-1]


def test_it_passes_and_says_what_it_counted(folder: Path) -> None:
    output = io.StringIO()
    transcript = Transcript(output)
    code, last = run(Demo(folder, transcript), output, folder)
    assert (code, transcript.failed) == (0, []), output.getvalue()
    assert last.startswith(f"demo: {transcript.passed} checks passed, ")
    assert last.endswith("nothing left behind (mappings 0, loop devices 0, mounts 0, keys 0)")
    assert transcript.passed >= 20
    assert "\x1b" not in output.getvalue()
    assert max(map(len, output.getvalue().splitlines())) <= 110


def test_without_encryption_the_search_of_the_backing_file_finds_what_a_pod_wrote(folder: Path) -> None:
    output = io.StringIO()
    transcript = Transcript(output)
    code, last = run(Demo(folder, transcript, {"encrypted": "false"}), output, folder)
    assert code == 1
    assert "checks FAILED" in last
    failed = "\n".join(transcript.failed)
    assert "none of its 262144 lines is in the" in failed
    assert "it is tagged encrypted=true" in failed
    assert "through dm-crypt" in failed


def test_a_driver_that_takes_any_key_loses_a_byte_and_leaks_is_found_out(folder: Path) -> None:
    output = io.StringIO()
    transcript = Transcript(output)
    code, _ = run(Plants(folder, transcript, CHEAP), output, folder)
    assert code == 1
    expected = (
        "cryptsetup finds LUKS2 with one key slot, behind argon2id",
        "it is refused, with code UNAUTHENTICATED",
        "and nothing of the attempt remains open, mounted or attached",
        "all 16777216 bytes of the pod are there",
        "what the pod wrote is untouched",
        "the kernel holds nothing that was not there before",
    )
    assert len(transcript.failed) == len(expected), transcript.failed
    for statement, start in zip(transcript.failed, expected, strict=True):
        assert statement.startswith(start)
