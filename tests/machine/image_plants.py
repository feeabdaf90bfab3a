"""`python -m tests.machine.image_plants PLANT[+PLANT] ARGUMENT…`: `luks-csi image ARGUMENT…` with bugs in it.

Each bug must turn a suite of the image engine red (test_image_hostile.py, test_image_limits.py, test_images_demo.py).
"""

import contextlib
import io
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from csi_driver.images.library import ImageLibrary
from tests.machine.image_lab import image_command

Arguments = list[str]


def _state(arguments: Arguments) -> Path:
    return Path(arguments[arguments.index("--state-dir") + 1])


@contextlib.contextmanager
def _probing(arguments: Arguments) -> Iterator[None]:
    """Lets qemu-img find out what an image is before anything was checked."""
    if arguments[0] == "import":
        subprocess.run(["qemu-img", "info", "--backing-chain", arguments[1]], check=False, capture_output=True)
    yield


@contextlib.contextmanager
def _unpacking(arguments: Arguments) -> Iterator[None]:
    """Makes a raw file of the source for as long as the command takes."""
    if arguments[0] == "import":
        raw = Path("/var/tmp/planted.raw")
        shutil.copyfile(arguments[1], raw)
    else:
        raw = _state(arguments) / "planted.raw"
        source = ImageLibrary(_state(arguments) / "images").file(arguments[1])
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(source), str(raw)], check=True)
    try:
        yield
    finally:
        raw.unlink()


@contextlib.contextmanager
def _leaving(arguments: Arguments) -> Iterator[None]:
    """Does not clean up after a refusal."""
    try:
        yield
    finally:
        left = _state(arguments) / "images/new/hostile/part"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"left")


@contextlib.contextmanager
def _taking(_: Arguments) -> Iterator[None]:
    """Says that all went well."""
    try:
        yield
    except SystemExit:
        sys.exit(0)


@contextlib.contextmanager
def _mumbling(_: Arguments) -> Iterator[None]:
    """Does not say why."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        print("luks-csi: the image is refused", file=sys.stderr)
        sys.exit(end.code)


@contextlib.contextmanager
def _showing(arguments: Arguments) -> Iterator[None]:
    """Hands the passphrase to a program as its argument."""
    if "--secret-dir" in arguments:
        key = Path(arguments[arguments.index("--secret-dir") + 1], "CRYPTO_KEY_VALUE").read_text()
        with subprocess.Popen(["sh", "-c", "sleep 0.5; :", "sh", key]):
            time.sleep(0.1)
    yield


@contextlib.contextmanager
def _copying(arguments: Arguments) -> Iterator[None]:
    """Takes `encrypt` for `ignore`."""
    if "encrypt" in arguments:
        at = arguments.index("encrypt")
        arguments[at : at + 3] = ["ignore"]  # and no secret
    yield


@contextlib.contextmanager
def _hasty(arguments: Arguments) -> Iterator[None]:
    """Writes before it looks whether there is room."""
    if arguments[0] == "clone":
        part = _state(arguments) / "images/new" / arguments[2] / "part"
        part.parent.mkdir()
        part.write_bytes(b"a first byte")
    yield


@contextlib.contextmanager
def _flipping(arguments: Arguments) -> Iterator[None]:
    """Spoils a byte of what it decrypted."""
    try:
        yield
    finally:
        if "decrypt" in arguments:
            image = ImageLibrary(_state(arguments) / "images").file(arguments[2])
            with image.open("r+b") as file:
                first = file.read(1)[0]
                file.seek(0)
                file.write(bytes([first ^ 1]))


PLANTS: dict[str, Callable[[Arguments], AbstractContextManager[None]]] = {
    "probing": _probing,
    "unpacking": _unpacking,
    "leaving": _leaving,
    "taking": _taking,
    "mumbling": _mumbling,
    "showing": _showing,
    "copying": _copying,
    "flipping": _flipping,
    "hasty": _hasty,
}


def main(plants: str, arguments: Arguments) -> None:
    """Run the command with the bugs, of which there may be several: "unpacking+showing"."""
    with contextlib.ExitStack() as stack:
        for plant in plants.split("+"):
            stack.enter_context(PLANTS[plant](arguments))
        image_command(arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
