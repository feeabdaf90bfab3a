"""`make images-hostile`: hostile files and addresses go through `luks-csi image import`, and the kernel watches.

Each must be refused with a sentence of its own, nothing may be written outside the state folder, nothing be read but
the source and the program's own code, and nothing be left. Good images are taken in between, so that a command that
refuses everything, or opens files that no import needs, shows as well.

SEED and COUNT choose: COUNT of the cases, drawn with SEED; all by default.
"""

import contextlib
import gzip
import io
import lzma
import os
import random
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import zstandard

from csi_driver.images.library import ImageLibrary
from tests import headers
from tests.image_builders import DISK, Make, file_of
from tests.image_corpus import GOOD, HOSTILE, MOST_BYTES, Hostile
from tests.image_server import serving
from tests.machine.image_lab import PROGRAM, digest_of, files_below, image_command, work_folder
from tests.machine.opens import Opens, Ran, WatchedCall, run_watched

LEAST_HOSTILE: Final = 25

_ROOT: Final = Path(__file__).parents[2]
_SECONDS: Final = 120.0  # of one import
_SECONDS_OF_ALL: Final = 1200.0
_CODE: Final = tuple(
    f"{os.path.realpath(folder)}/"
    for folder in (
        sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), _ROOT / "csi_driver", "/lib", "/lib64", "/usr/lib",
        "/usr/share/zoneinfo", "/usr/share/locale",
    )
)  # fmt: skip
"""Where programs and their libraries lie."""
# What the dynamic linker, the C library and OpenSSL read in every process, and the random numbers.
_SYSTEM: Final = frozenset({
    "/etc/ld.so.cache", "/etc/locale.alias", "/etc/localtime", "/etc/ssl/openssl.cnf", "/dev/null", "/dev/urandom",
    "/usr/bin/dash", os.path.realpath("/bin/sh"), os.path.realpath(sys.executable),
})  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An import: `make` puts the source into a folder, `sentence` is a regular expression; None is for a good image.

    `source` is what the command is told in place of the file, `options` are added to it.
    """

    name: str
    make: Make | None = None
    sentence: str | None = None
    source: str | None = None
    options: tuple[str, ...] = ()


@dataclass
class Result:
    """What came of all cases; each entry of `hits` is a sentence."""

    refused: int = 0
    taken: int = 0
    opened: int = 0
    hits: list[str] = field(default_factory=list)


def _wrapped(wrap: Callable[[bytes], bytes], content: bytes, cut: int = 0) -> Make:
    return file_of("disk.img", lambda: wrap(content)[: -cut or None])


def _special(make: Callable[[Path], object]) -> Make:
    def made(folder: Path) -> Path:
        make(folder / "disk.img")
        return folder / "disk.img"

    return made


def _of_corpus(each: Hostile) -> Case:
    """As it is, but what shall lie in a gzip is put there: the corpus holds what comes out."""
    if not each.name.endswith(" in gzip"):
        return Case(each.name, each.make, each.sentence)

    def made(folder: Path) -> Path:
        path = each.make(folder)
        path.write_bytes(gzip.compress(path.read_bytes()))
        return path

    return Case(each.name, made, each.sentence)


_WRAPS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}
_BOMB: Final = bytes(2 * MOST_BYTES)
_DISK: Final = file_of("disk.img", lambda: DISK)

# What is hostile not by what is in the file, but by its name, its place, its wrapping or its checksum.
COMMANDS: Final = [
    *(
        Case(f"a source named {source}", None, "which QEMU takes as instructions|are not fetched by file:", source)
        for source in ('json:{"driver":"raw","file.filename":"/etc/shadow"}', "nbd://127.0.0.1/", "file:/etc/shadow")
    ),
    *(
        Case(f"a bomb in {name}", _wrapped(wrap, _BOMB), f"more than the {MOST_BYTES} bytes that are allowed")
        for name, wrap in _WRAPS.items()
    ),
    *(
        Case(f"{name} cut short", _wrapped(wrap, DISK, 9), f"its {name} stream ends before its end")
        for name, wrap in _WRAPS.items()
    ),
    Case("a wrong SHA-512", _DISK, "has the checksum sha512:", options=("--checksum", "0" * 128)),
    Case("a wrong SHA-256", _DISK, "has the checksum sha256:", options=("--checksum", "sha256:" + "0" * 64)),
    Case("half a checksum", _DISK, "checksum of 99 characters", options=("--checksum", "0" * 99)),
    Case("a secret for a plain image", _DISK, "is not encrypted", options=("--secret", "default/key")),
    Case("a folder", _special(Path.mkdir), "is a directory"),
    Case("a FIFO", _special(os.mkfifo), "is a FIFO"),
    Case("a device", None, "is a character device", "/dev/zero"),
    Case("nothing there", None, r"is not there|\(ENOENT", "/nowhere/disk.img"),
    *(
        Case(f"the address {address}", None, f"leads to .*, an? {kind}", f"http://{address}/disk.img")
        for address, kind in (
            ("127.0.0.1:{port}", "loopback"), ("[::1]:{port}", "loopback"), ("2130706433:{port}", "loopback"),
            ("[::ffff:127.0.0.1]:{port}", "loopback"), ("0.0.0.0:{port}", "unspecified"),
            ("169.254.169.254", "cloud's metadata"), ("[fd00:ec2::254]", "cloud's metadata"),
            ("[fe80::1]", "link-local"), ("224.0.0.1", "multicast"),
        )
    ),
]  # fmt: skip

CASES: Final = [
    *map(_of_corpus, HOSTILE),
    *COMMANDS,
    *(Case(each.name, each.make) for each in GOOD),
    *(Case(f"raw in {name}", _wrapped(wrap, DISK)) for name, wrap in _WRAPS.items()),
]


Run = Callable[[Sequence[str]], Ran]


def by_command(arguments: Sequence[str]) -> Ran:
    """As a user does, and watched."""
    return run_watched([*PROGRAM, *arguments], _SECONDS)


def _in_this_process(arguments: Sequence[str]) -> Ran:
    """Without a new interpreter, and not watched."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            image_command(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Ran(code, output.getvalue(), errors.getvalue(), Opens())


class Lab:
    """A folder in which imports are tried; `run` runs `luks-csi image` with these arguments."""

    def __init__(self, folder: Path, run: Run = by_command) -> None:
        self._state = folder / "state"
        self._given = folder / "given"
        self._temporary = folder / "temporary"
        self._run = run
        self.result = Result()

    def try_all(self, cases: Sequence[Case]) -> Result:
        """Try each; a hit is told on standard error as it comes."""
        return _unasked(lambda port: self.try_with(port, cases))

    def try_with(self, port: int, cases: Sequence[Case]) -> Result:
        """Try each; `port` is that of the server which addresses of this machine lead to."""
        ImageLibrary(self._state / "images").names()
        with _temporary_files_in(self._temporary):
            for number, case in enumerate(cases):
                if number % 25 == 0:
                    print(f"case {number + 1} of {len(cases)}: {case.name}", file=sys.stderr, flush=True)
                for hit in self._try(case, port):
                    self.result.hits.append(f"{case.name}: {hit}")
                    print(f"hit: {case.name}: {hit}", file=sys.stderr, flush=True)
        return self.result

    def _try(self, case: Case, port: int) -> list[str]:
        self._given.mkdir()
        path = case.make(self._given) if case.make else None
        source = str(path) if path else (case.source or "").replace("{port}", str(port))
        before = self._facts(path)
        arguments = ["import", source, "hostile", "--limit", str(MOST_BYTES), *case.options]
        ran = self._run([*arguments, "--state-dir", str(self._state)])
        self.result.opened += len(ran.opens.opened)
        hits = _strays(ran.opens, (f"{self._state}/",), {source}) + _judged(case, ran.code, ran.errors)
        library = ImageLibrary(self._state / "images")
        if ran.code == 0:
            self.result.taken += 1
        else:
            self.result.refused += 1
        if "hostile" in library.names():
            library.delete("hostile")
        hits += [f"{place} is left" for place in sorted(files_below(self._state)) if not _EMPTY.fullmatch(place)]
        if self._facts(path) != before:
            hits.append("the source or the folder for temporary files is not what it was")
        for left in sorted(self._given.iterdir()):
            left.rmdir() if left.is_dir() else left.unlink()
        self._given.rmdir()
        return hits

    def _facts(self, path: Path | None) -> object:
        """All that must stay as it is."""
        content = digest_of(path) if path and path.is_file() else None
        return content, files_below(self._given), files_below(self._temporary)


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Let commands and calls keep temporary files in a folder of their own: /tmp is everybody's, and may be full."""
    folder.mkdir(exist_ok=True)
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"], tempfile.tempdir = str(folder), None
    try:
        yield
    finally:
        tempfile.tempdir = None
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


# The folders of a library, and the lock files that stay while a name is in use.
_EMPTY: Final = re.compile(r"images/|images/(ready|new|trash|locks)/")


def _strays(opens: Opens, ours: tuple[str, ...], sources: Container[str]) -> list[str]:
    """Files that an import has no business with."""
    hits = [f"wrote {path}" for path in sorted(opens.written) if not path.startswith(ours)]
    return hits + [
        f"opened {path}"
        for path in sorted(opens.opened - opens.written)
        if not (path.startswith((*ours, *_CODE)) or path in _SYSTEM or path in sources or os.path.isdir(path))
    ]


def _judged(case: Case, code: int, errors: str) -> list[str]:
    if case.sentence is None:
        return [f"a good image was refused: {errors.strip()}"] if code else []
    if code == 0:
        return ["it was taken"]
    said = [line for line in errors.splitlines() if line.startswith("luks-csi: ")]
    if len(said) != 1 or "Traceback" in errors:
        return [f"it ended with {code} and without one sentence: {errors.strip()[-300:]}"]
    if not re.search(case.sentence, said[0]):
        return [f"it was refused with another sentence: {said[0]}"]
    return []


def try_in_one_process(folder: Path, cases: Sequence[Case]) -> Result:
    """Try each in one process, which is watched as a whole: no interpreter starts for each of them."""
    lab = Lab(folder, _in_this_process)
    sources = {case.source for case in cases if case.source}
    headers.formatted()  # kept for the corpus: what cryptsetup opens for that is not the import's

    def watched(port: int) -> Result:
        with WatchedCall(lambda: print(msgspec.json.encode(lab.try_with(port, cases)).decode())) as call:
            ran = call.end(_SECONDS_OF_ALL)
        assert not ran.code, ran.errors
        result = msgspec.json.decode(ran.output, type=Result)
        result.opened += len(ran.opens.opened)
        result.hits += _strays(ran.opens, (f"{folder}/state/", f"{folder}/given/"), sources)
        return result

    return _unasked(watched)


def _unasked(try_cases: Callable[[int], Result]) -> Result:
    """Try cases with a server on loopback, at the port that they are told, that must not be asked."""
    with serving(DISK) as server:
        result = try_cases(server.port)
        if server.requests:
            result.hits.append(f"a server on loopback was asked {len(server.requests)} times")
    return result


def main() -> int:
    """Exit code 0 when every case was as it must be."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 100_000)
    wanted = int(os.environ.get("COUNT") or len(CASES))
    chosen = random.Random(seed).sample(CASES, min(wanted, len(CASES)))
    started = time.monotonic()
    with work_folder("hostile-") as folder:
        result = Lab(folder).try_all(chosen)
    hostile = sum(case.sentence is not None for case in CASES)
    print(
        f"cases={len(chosen)} refused={result.refused} taken={result.taken} opened={result.opened} "
        f"hits={len(result.hits)} corpus={hostile} seconds={time.monotonic() - started:.0f} seed={seed}"
    )
    return int(bool(result.hits) or hostile < LEAST_HOSTILE)


if __name__ == "__main__":
    sys.exit(main())
