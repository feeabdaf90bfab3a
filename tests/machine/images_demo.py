"""`make images-demo`: a qcow2 is encrypted, opened by the kernel's dm-crypt, decrypted, copied and given another key.

Every step is the real command. What is claimed is looked up elsewhere: in the open mapping, in the bytes of the files,
in what the kernel saw the command write, in the arguments of all processes, in the free space.
"""

import contextlib
import os
import random
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import msgspec

from csi_driver import __version__
from csi_driver.images.base import MIB
from csi_driver.images.library import ImageLibrary
from tests.machine.image_lab import (
    COMMAND_SECONDS,
    PROGRAM,
    converted,
    cryptsetup,
    digest_of,
    files_below,
    holds,
    opened,
    size_of,
    work_folder,
)
from tests.machine.leaks import Facts, clear, settled
from tests.machine.opens import Ran, Watched, WatchedCommand
from tests.machine.transcript import Transcript

SIZE = 1 << 30
_LOOK_SECONDS = 0.05
_OTHER_CIPHER = "aes-cbc-essiv:sha256"
_SLACK = 16  # this part of the disk's size may go from the free space besides the result: records, the log, a test's


class Watch(threading.Thread):
    """Looks at arguments and environment of all processes and at the free space of a disk, over and over."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._ended = threading.Event()
        self.shown: set[bytes] = set()
        self.before = self.least = self._free()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self.least = min(self.least, self._free())
            for entry in filter(str.isdigit, os.listdir("/proc")):
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        self.shown.add(Path("/proc", entry, name).read_bytes())

    def _free(self) -> int:
        found = os.statvfs(self._folder)
        return found.f_bfree * found.f_frsize


class Demo:
    """The steps in their order, in `folder`, with a disk of `size` bytes.

    `program` stands for `luks-csi image`; `wishes` are entries of the secrets besides the key.
    """

    def __init__(
        self,
        folder: Path,
        transcript: Transcript,
        size: int = SIZE,
        program: Sequence[str] = PROGRAM,
        wishes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._folder = folder
        self._state = folder / "state"
        self._say = transcript
        self._size = size
        self._program = program
        self._wishes = wishes
        self._library = ImageLibrary(self._state / "images")
        # A new line for each run: nothing older on the disk can hold it.
        self._line = f"A VM wrote this; it must not reach the disk. {secrets.token_hex(9)}".ljust(63).encode() + b"\n"
        self._keys = {name: secrets.token_urlsafe(24) for name in ("key", "new-key", "wrong-key")}
        self._digest = ""
        self._before = Facts.now(folder)

    def run(self) -> int:
        """Run to the end or to the first error; returns the exit code. Nothing stays, whatever happens."""
        say = self._say
        say.say(f"luks-csi {__version__} on {os.uname().release}; the lines with $ are what runs.")
        try:
            with self._told_errors():
                self._steps()
        finally:
            clear(self._before, self._folder)
        checks = say.passed + len(say.failed)
        if say.failed:
            say.verdict(f"images-demo: {len(say.failed)} of {checks} checks FAILED: {'; '.join(say.failed)}")
            return 1
        say.verdict(f"images-demo: {checks} checks passed, {say.seconds:.1f} s, nothing left behind")
        return 0

    def _steps(self) -> None:
        step = self._say.step
        with step(f"Make a disk of {self._size // MIB} MiB with a known pattern in it, as a qcow2"):
            qcow2 = self._make_qcow2()
        with step("Import it"):
            self._import(qcow2)
        with step("Encrypt it, in one pass and watched"):
            self._encrypt()
        with step("Open it with cryptsetup: the kernel's dm-crypt decrypts"):
            self._check_inside("secret", "key", "the VM's disk, byte for byte")
        with step("Decrypt it"):
            self._decrypt()
        with step("Try what cannot be"):
            self._refuse()
        with step("Copy it as it is (ignore, the default): it stays encrypted"):
            self._copy()
        with step(f"Give it another key and cipher (reencrypt to {_OTHER_CIPHER})"):
            self._reencrypt()
        with step("Delete the sources: the encrypted copies do without them"):
            self._delete_sources(qcow2)
        with step("Clean up"):
            self._clean_up()

    def _make_qcow2(self) -> Path:
        disk, draw = self._folder / "disk", random.Random(self._size)
        pattern = self._line * (self._size // 16 // len(self._line))
        with disk.open("wb") as file:
            for part in range(16):  # a half is holes
                file.seek(part * self._size // 16)
                if part in (3, 9):
                    file.write(pattern)
                elif part % 2:
                    for _ in range(16):
                        file.write(draw.randbytes(self._size // 256))
            file.truncate(self._size)
        self._digest = digest_of(disk)
        qcow2 = converted(disk, "qcow2")
        disk.unlink()
        for name, key in self._keys.items():
            secret = self._folder / name
            secret.mkdir(mode=0o700)
            for entry, text in {**self._wishes, "CRYPTO_KEY_VALUE": key}.items():
                (secret / entry).write_text(text)
        (self._folder / "new-key/CRYPTO_KEY_CIPHER").write_text(_OTHER_CIPHER)
        self._say.tell(f"sha256 of the disk: {self._digest}")
        self._say.check("the search for the pattern finds it in the qcow2", holds(qcow2, self._line), True)
        return qcow2

    def _import(self, qcow2: Path) -> None:
        self._succeed("import", str(qcow2), "disk")
        record = self._library.get("disk")
        found = (record.format.value, record.size, record.luks)
        self._say.check(
            f"it is known as a qcow2 of {self._size} bytes, not encrypted", found, ("qcow2", self._size, None)
        )

    def _encrypt(self) -> None:
        check = self._say.check
        with Watch(self._folder) as watch:
            ran = self._succeed("clone", "disk", "secret", "--encryption", "encrypt", "--secret-dir", "key")
        file = self._library.file("secret")
        self._check_written(ran, "secret")
        taken = watch.before - watch.least - file.stat().st_blocks * 512
        check(
            f"the disk never had less free space than the result takes ({max(taken, 0) // 1024} KiB besides)",
            taken < self._size // _SLACK,
            True,
        )
        self._check_hidden(watch)
        dump = self._dump(file)
        segment, slot = dump["segments"]["0"], dump["keyslots"]["0"]
        found = (segment["encryption"], segment["sector_size"], segment["offset"], slot["kdf"]["type"])
        pbkdf = self._wishes.get("CRYPTO_PBKDF", "argon2id")
        check(
            f"cryptsetup finds LUKS2 in it, its key slot behind {pbkdf}",
            found,
            ("aes-xts-plain64", 512, str(16 * MIB), pbkdf),
        )

    def _check_written(self, ran: Ran, name: str) -> None:
        """All that the command wrote is its part, its checkpoint and its record."""
        own = re.compile(
            rf"(new|ready)/{name}/(part|image|checkpoint\.json|record\.json|\.\w+\.json\.new)|new/\.{name}\.lock|locks/{name}"
        )
        images = f"{self._state}/images/"
        strange = [
            path
            for path in sorted(ran.opens.written)
            if not own.fullmatch(path.removeprefix(images).removesuffix(" (deleted)"))
        ]
        self._say.check("the kernel saw it write its result and the records beside it, no other file", strange, [])
        file = self._library.file(name)
        plain = holds(file, self._line)
        self._say.check(f"the pattern is nowhere in the {size_of(file)} bytes of the result", plain, False)

    def _check_hidden(self, watch: Watch) -> None:
        """No process showed a key; and the search would have found one, as it saw the command itself."""
        seen = any(b"--encryption" in content or b"--new-secret-dir" in content for content in watch.shown)
        shown = [name for name, key in self._keys.items() if any(key.encode() in content for content in watch.shown)]
        self._say.check(
            f"no key is in any of {len(watch.shown)} arguments and environments that were seen",
            (seen, shown),
            (True, []),
        )

    def _check_inside(self, name: str, key: str, statement: str) -> None:
        """Look into an encrypted image through the real cryptsetup."""
        file = self._library.file(name)
        self._say.tell(f"# cryptsetup open --type luks2 --readonly --key-file - {file} …")
        with opened(file, self._keys[key].encode()) as mapping:
            self._say.check(f"the mapping has {self._size} bytes", size_of(mapping), self._size)
            digest = digest_of(mapping)
        self._say.check(f"they are {statement} (sha256 {self._digest[:12]}…)", digest, self._digest)

    def _decrypt(self) -> None:
        with Watch(self._folder) as watch:
            self._succeed("clone", "secret", "plain", "--encryption", "decrypt", "--secret-dir", "key")
        self._check_hidden(watch)
        file = self._library.file("plain")
        found = (size_of(file), digest_of(file))
        self._say.check(
            f"the result is the disk, byte for byte (sha256 {self._digest[:12]}…)", found, (self._size, self._digest)
        )
        holes = file.stat().st_blocks * 512 < self._size * 3 // 4
        self._say.check("and its zeros are holes again", holes, True)

    def _refuse(self) -> None:
        wrong = ("clone", "secret", "never", "--encryption", "decrypt", "--secret-dir", "wrong-key")
        twice = ("clone", "secret", "never", "--encryption", "encrypt", "--secret-dir", "key")
        plain = ("clone", "disk", "never", "--encryption", "decrypt", "--secret-dir", "key")
        for what, words, sentence in (
            ("a wrong key", wrong, "passphrase"),
            ("encrypting what is encrypted", twice, "is encrypted already"),
            ("decrypting what is not encrypted", plain, "is not encrypted"),
        ):
            ran = self._run(*words)
            self._say.tell(ran.errors.strip().splitlines()[-1].removeprefix("luks-csi: ") if ran.errors else "")
            self._say.check(f"{what} is refused", (ran.code, sentence in ran.errors), (1, True))
        left = [place for place in files_below(self._state / "images") if "never" in place]
        self._say.check("nothing of them is left", left, [])

    def _copy(self) -> None:
        self._succeed("clone", "secret", "copy")
        source, copy = self._library.file("secret"), self._library.file("copy")
        self._say.check("the copy is the encrypted image, byte for byte", digest_of(copy), digest_of(source))
        secret = self._library.get("copy").luks == self._library.get("secret").luks
        self._say.check("its record says that it is encrypted, and how", secret, True)

    def _reencrypt(self) -> None:
        with Watch(self._folder) as watch:
            words = ("--encryption", "reencrypt", "--secret-dir", "key", "--new-secret-dir", "new-key")
            ran = self._succeed("clone", "secret", "other", *words)
        self._check_written(ran, "other")
        self._check_hidden(watch)
        self._check_inside("other", "new-key", "the VM's disk still")
        old, new = self._library.get("secret").luks, self._library.get("other").luks
        cipher = new.cipher if new else "none"
        self._say.check(f"its cipher is {_OTHER_CIPHER}", cipher, _OTHER_CIPHER)
        self._say.check("it has a volume key of its own", old and new and old.digest != new.digest, True)
        refused = "it was opened"
        try:
            with opened(self._library.file("other"), self._keys["key"].encode()):
                pass
        except subprocess.CalledProcessError as error:
            refused = error.stderr.decode().strip()
        self._say.check("and the old key no longer opens it", refused, "No key available with this passphrase.")

    def _delete_sources(self, qcow2: Path) -> None:
        for name in ("disk", "secret", "plain"):
            self._succeed("delete", name, "--yes")
        qcow2.unlink()
        self._check_inside("copy", "key", "the VM's disk still")
        plain = [path for path in map(Path, self._below()) if path.is_file() and holds(path, self._line)]
        self._say.check("and nothing on the state disk holds the pattern any more", plain, [])

    def _clean_up(self) -> None:
        for name in ("copy", "other"):
            self._succeed("delete", name, "--yes")
        for name in self._keys:
            for entry in (self._folder / name).iterdir():
                entry.unlink()
            (self._folder / name).rmdir()
        left = sorted(place for place in files_below(self._state / "images") if not place.endswith("/"))
        self._say.check("no file is left of the images", left, [])
        leaked = settled(lambda: [one for one in Facts.now(self._folder).more_than(self._before) if one[:5] != "files"])
        self._say.check("the kernel holds nothing that was not there before", leaked, [])

    def _run(self, *words: str) -> Ran:
        """Run a command, watched; secrets lie in the folder."""
        self._say.command(f"image {' '.join(words).replace(f'{self._folder}/', '')}")
        arguments = [str(self._folder / word) if word in self._keys else word for word in words]
        with self._watched([*arguments, "--state-dir", str(self._state)]) as command:
            return command.end(COMMAND_SECONDS)

    def _watched(self, arguments: Sequence[str]) -> Watched:
        return WatchedCommand([*self._program, *arguments])

    def _succeed(self, *words: str) -> Ran:
        ran = self._run(*words)
        for line in (*ran.errors.splitlines()[-1:], *ran.output.splitlines()):
            self._say.tell(line)
        if ran.code:
            raise AssertionError(f"the command ended with {ran.code}: {ran.errors.strip()}")
        return ran

    def _dump(self, file: Path) -> dict[str, Any]:
        """The metadata of a header, by cryptsetup."""
        text = cryptsetup("luksDump", "--dump-json-metadata", str(file))
        return msgspec.json.decode(text, type=dict[str, Any])

    def _below(self) -> list[str]:
        return [str(self._folder / place) for place in files_below(self._folder) if not place.endswith("/")]

    @contextlib.contextmanager
    def _told_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told and cleaned up after
            self._say.failed.append(f"step {self._say.title} was cut short")
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else b""
            self._say.say(f"    {type(error).__name__}: {error} {(said or b'').decode().strip()}")


def main() -> int:
    with work_folder("images-") as folder:
        return Demo(folder, Transcript()).run()


if __name__ == "__main__":
    sys.exit(main())
