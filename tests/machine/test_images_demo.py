"""A small `make images-demo`, and the proof that each thing which it claims can turn out false."""

import io
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from csi_driver.images.base import MIB
from tests.machine import image_plants
from tests.machine.image_lab import image_command
from tests.machine.images_demo import Demo
from tests.machine.opens import Watched, WatchedCall, WatchedCommand
from tests.machine.transcript import Transcript

_SIZE = 8 * MIB
_CHEAP = {"CRYPTO_PBKDF": "pbkdf2"}
_LOOKED_FOR = "--encryption"  # in the arguments of processes


class SmallDemo(Demo):
    """With a command only where its arguments are looked for; else a call, that starts no interpreter.

    `plants` are bugs (image_plants) by the word of a command line that they are for.
    """

    def __init__(self, folder: Path, transcript: Transcript, plants: Mapping[str, str]) -> None:
        super().__init__(folder, transcript, _SIZE, wishes=_CHEAP)
        self._plants = plants

    def _watched(self, arguments: Sequence[str]) -> Watched:
        if arguments[2] == "never" or _LOOKED_FOR not in arguments:
            return WatchedCall(partial(image_command, arguments))
        for word, plant in self._plants.items():
            if word in arguments and "showing" in plant:
                return WatchedCommand([sys.executable, "-m", image_plants.__name__, plant, *arguments])
            if word in arguments:
                return WatchedCall(partial(image_plants.main, plant, list(arguments)))
        return super()._watched(arguments)


class ShortDemo(SmallDemo):
    """It ends when it has encrypted."""

    def _steps(self) -> None:
        self._import(self._make_qcow2())
        self._encrypt()


class MiddleDemo(SmallDemo):
    """It ends when it has encrypted and decrypted."""

    def _steps(self) -> None:
        self._import(self._make_qcow2())
        self._encrypt()
        self._decrypt()


def run(kind: type[SmallDemo], folder: Path, plants: Mapping[str, str]) -> tuple[int, Transcript, str]:
    output = io.StringIO()
    transcript = Transcript(output)
    code = kind(folder, transcript, plants).run()
    return code, transcript, output.getvalue()


def test_it_passes_and_says_what_it_checked(folder: Path) -> None:
    code, transcript, said = run(SmallDemo, folder, {})
    assert (code, transcript.failed) == (0, []), said
    assert said.splitlines()[-1].startswith("images-demo: 31 checks passed, ")
    assert max(map(len, said.splitlines())) <= 110


def test_a_plain_file_a_shown_key_and_a_spoilt_byte_are_found_out(folder: Path) -> None:
    plants = {"encrypt": "unpacking+showing", "decrypt": "flipping"}
    code, transcript, said = run(MiddleDemo, folder, plants)
    expected = (
        "the kernel saw it write its result and the records beside it",
        "the disk never had less free space than the result takes",
        "no key is in any of ",
        "no key is in any of ",  # decrypt is a call here: the search does not see its arguments
        "the result is the disk, byte for byte",
    )
    assert code == 1
    assert len(transcript.failed) == len(expected), said
    for statement, start in zip(transcript.failed, expected, strict=True):
        assert statement.startswith(start)


def test_a_copy_in_place_of_an_encryption_is_found_out(folder: Path) -> None:
    code, transcript, said = run(ShortDemo, folder, {"encrypt": "copying"})
    assert code == 1
    assert transcript.failed[0].startswith("the pattern is nowhere in the "), said
