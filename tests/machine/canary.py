"""`make canary`: no byte of a key leaves its place while a real server works.

A server with debug logs creates, stages, publishes, expands, unstages and deletes volumes, also one with a key of a
KMS, which is changed in use; it refuses wrong keys and odd secrets. Watched meanwhile: arguments and environment of
every process. Searched afterwards: logs, error texts, all files of the state directory and of every place for temporary
files, tables of mappings, readable keys, core dumps. What is looked for are any six bytes in a row of a passphrase, as
UTF-8, UTF-16, hexadecimal and base64, and the volume keys.
"""

import base64
import binascii
import contextlib
import ctypes
import json
import os
import re
import secrets
import signal
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.syscalls import NUMBERS, libc, syscall
from csi_driver.rpc.client import CsiClient, RemoteError
from csi_driver.volumes.capability import AccessMode, Capability
from tests.headers import run_cryptsetup
from tests.keys.program import program
from tests.machine.processes import has_ended, wait_for
from tests.machine.server import ServerProcess

LEAST_SAMPLES = 200
LEAST_PLACES = 35
_MOST_ROUNDS = 10  # a busy machine takes fewer samples of each
_WINDOW = 6
_TEMPORARY = ("/tmp", "/run", "/var/tmp", "/dev/shm")
_LARGEST_FILE = 16 << 20  # behind that a volume's file holds ciphertext only
_MIB = 1 << 20
_MUST_SEE = ("mkfs.ext4", "csi_driver.host.launcher")
_LINK, _UNLINK, _KEYCTL_READ = 8, 9, 11  # keyctl(2)
_THREAD_KEYRING, _USER_KEYRING = -1, -4
_MOUNT = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="ext4")
_BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
# Work that takes long enough to be seen: a key derivation and an mkfs of some tenths of a second.
_CLASS = {
    "encrypted": "true", "pbkdfMemory": "8192", "pbkdfIterations": "8",
    "mkfsOptions": "-i 1024 -I 256 -E lazy_itable_init=0",
}  # fmt: skip


_OF_KMS = {"encrypted": "true", "encryptionKMSID": "kms"}

Call = Callable[[], object]
Dumped = Callable[[int], bool]


class Needles:
    """What must not be found, by the name under which a hit is told."""

    def __init__(self) -> None:
        self._words: dict[bytes, str] = {}
        self._bytes: dict[bytes, str] = {}

    def add_text(self, name: str, text: str) -> None:
        """A passphrase of letters and digits: every six of them, in each encoding."""
        raw = text.encode()
        for at in range(len(raw) - _WINDOW + 1):
            piece = raw[at : at + _WINDOW]
            self._words[piece] = f"{name} (as text)"
            for digits in (piece.hex(), piece.hex().upper()):
                self._words[digits.encode()] = f"{name} (hexadecimal)"
        for start in range(3):  # base64 takes three bytes at a time
            coded = base64.b64encode(raw[start:]).rstrip(b"=")[:-2]
            for at in range(len(coded) - 8 + 1):
                self._words[coded[at : at + 8]] = f"{name} (base64)"

    def add_key(self, name: str, key: bytes) -> None:
        """A volume key: every eight bytes of it, as they are and in hexadecimal digits."""
        for at in range(len(key) - 7):
            piece = key[at : at + 8]
            self._bytes[piece] = name
            self._words[piece.hex().encode()] = f"{name} (hexadecimal)"

    def find(self, content: bytes) -> str | None:
        """The name of the first one in `content`."""
        # Without NULs, UTF-16 reads as UTF-8; and of random bytes only a few look like words.
        words = b"\n".join(re.findall(rb"[0-9A-Za-z+/]{6,}", content.replace(b"\0", b"")))
        return next(
            (
                name
                for forms, where in ((self._words, words), (self._bytes, content))
                for form, name in forms.items()
                if form in where
            ),
            None,
        )


@dataclass
class Report:
    """What was watched and searched, and what was found; a hit never tells the bytes."""

    samples: int = 0
    places: int = 0
    hits: list[str] = field(default_factory=list)

    def search(self, needles: Needles, place: str, content: bytes) -> None:
        """Look into one place."""
        self.places += 1
        if found := needles.find(content):
            self.hits.append(f"{found} in {place}")

    def summary(self) -> str:
        """The one line."""
        return f"samples={self.samples} places={self.places} hits={len(self.hits)}"


class Watch(threading.Thread):
    """Reads arguments and environment of all processes, over and over."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples = 0
        self.seen: dict[bytes, str] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.001):
            self.samples += 1
            for entry in filter(str.isdigit, os.listdir("/proc")):
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError), open(f"/proc/{entry}/{name}", "rb", buffering=0) as file:
                        content = file.read(_MIB)
                        if content not in self.seen:
                            self.seen[content] = f"the {name} of process {entry}"

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        self.join()

    def saw(self, program: str) -> bool:
        """Whether a process was seen with this among its arguments."""
        return any(program.encode() in content for content, place in self.seen.items() if "cmdline" in place)


class Canary:
    """One server, its traffic and all that is searched; `folder` is new and on a disk."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        letters = string.ascii_letters + string.digits
        self._right, self._wrong, self._odd = ("".join(secrets.choice(letters) for _ in range(40)) for _ in range(3))
        self._folder = folder
        self._server = server
        self._started = time.time()
        self._texts: list[str] = []
        self.needles = Needles()
        for name, text in (("the passphrase", self._right), ("a wrong one", self._wrong), ("an odd one", self._odd)):
            self.needles.add_text(name, text)
        self.report = Report()

    def run(self, *, cores: bool = True) -> Report:
        """Watch the server work, then search; with `cores` also crash its processes."""
        watch = Watch()
        watch.start()
        try:
            with CsiClient(self._server.endpoint) as client:
                for _ in range(_MOST_ROUNDS):
                    self._work(client)
                    if watch.samples >= LEAST_SAMPLES:
                        break
        finally:
            watch.end()
        self.report.samples = watch.samples
        for content, place in watch.seen.items():
            self.report.search(self.needles, place, content)
        self.report.hits += [f"blind: no {one} was seen" for one in _MUST_SEE if not watch.saw(one)]
        self._search_files()
        for number, text in enumerate(self._texts):
            self.report.search(self.needles, f"error text {number}", text.encode())
        if cores:
            self._crash()
        return self.report

    def _work(self, client: CsiClient) -> None:
        right = {"CRYPTO_KEY_VALUE": self._right}
        stage, target = self._folder / "stage", self._folder / "pods" / "mount"
        stage.mkdir(exist_ok=True)
        volume = client.create_volume("pvc-1", [_MOUNT], 128 * _MIB, parameters=_CLASS, secrets=right)
        for secret in (
            {"CRYPTO_KEY_VALUE": self._odd, "encryptionPassphrase": self._right},
            {"CRYPTO_KEY_PROVIDER": self._odd, **right},
            {"CRYPTO_KEY_CIPHER": self._odd, **right},
            {"CRYPTO_KEY_SIZE": self._odd, **right},
        ):
            self._refused(lambda secret=secret: client.stage(volume, stage, _MOUNT, secret))  # type: ignore[misc]
        self._tried(lambda: client.stage(volume, stage, _MOUNT, right))
        self._learn_volume_key("pvc-1", self._right)
        self._search_kernel()
        self._search_limits()
        self._tried(lambda: client.publish(volume, stage, target, _MOUNT))
        self._refused(lambda: client.expand_on_node("pvc-1", stage, 160 * _MIB, {"CRYPTO_KEY_VALUE": self._wrong}))
        self._tried(lambda: client.expand_on_node("pvc-1", stage, 160 * _MIB, right))
        self._search_files()
        self._tried(lambda: client.unpublish("pvc-1", target))
        self._tried(lambda: client.unstage("pvc-1", stage))
        self._refused(lambda: client.stage(volume, stage, _MOUNT, {"CRYPTO_KEY_VALUE": self._wrong}))
        self._tried(lambda: client.stage(volume, stage, _BLOCK, {"encryptionPassphrase": self._right}))
        self._search_kernel()
        self._tried(lambda: client.unstage("pvc-1", stage))
        self._tried(lambda: client.delete_volume("pvc-1"))
        self._work_with_kms(client, stage)

    def _work_with_kms(self, client: CsiClient, stage: Path) -> None:
        volume = client.create_volume("pvc-2", [_MOUNT], 64 * _MIB, parameters=_OF_KMS, secrets={})
        self._learn_kms_key()
        self._tried(lambda: client.stage(volume, stage, _MOUNT, {}))
        self._tried(lambda: client.expand_on_node("pvc-2", stage, 96 * _MIB, {}))
        program = str(Path(sys.executable).with_name("luks-csi"))
        options = [*kms_options(self._folder), "--state-dir", str(self._server.state_dir)]
        options += ["--endpoint", str(self._server.endpoint)]
        for command in (("keys", "rotate"), ("volume", "reencrypt")):
            done = subprocess.run(
                [program, *command, "pvc-2", "--yes", *options], check=False, capture_output=True, timeout=120
            )
            self._texts.append((done.stdout + done.stderr).decode())
        self._learn_volume_key("pvc-2", self._learn_kms_key())
        self._search_kernel()
        self._search_files()
        self._tried(lambda: client.unstage("pvc-2", stage))
        self._tried(lambda: client.delete_volume("pvc-2"))

    def _learn_kms_key(self) -> str:
        """The volume's own key as the program of the KMS unwraps it, by a pipe that nobody else reads."""
        record = json.loads((self._server.state_dir / "loopfile/volumes/pvc-2/record.json").read_text())
        trail = record["volume"]["key"]
        asked = {"operation": "unwrap", "name": trail["name"], "wrapped": trail["wrapped"]}
        done = subprocess.run(
            [str(self._folder / "wrap-key")],
            input=json.dumps(asked),
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        key = base64.b64decode(json.loads(done.stdout)["key"]).decode()
        self.needles.add_text("a key of a KMS", key)
        return key

    def _tried(self, call: Call) -> None:
        """A call whose success is another suite's business: here only its words count."""
        try:
            call()
        except RemoteError as error:
            self._texts.append(f"{error.code} {error}")

    def _refused(self, call: Call) -> None:
        before = len(self._texts)
        self._tried(call)
        if len(self._texts) == before:
            self.report.hits.append("a call with a wrong secret was not refused")

    def _learn_volume_key(self, volume: str, passphrase: str) -> None:
        disk = self._server.state_dir / f"loopfile/volumes/{volume}/disk.img"
        with contextlib.suppress(AssertionError):  # a planted bug may have kept the volume from being formatted
            dump = run_cryptsetup(
                *("luksDump", "-q", "--dump-volume-key", "--key-file", "-", str(disk)), key=passphrase.encode()
            ).decode()
            digits = re.search(r"MK dump:\s*([0-9a-f\s]+)", dump)
            if digits is not None:
                self.needles.add_key(f"the volume key of {volume}", binascii.unhexlify("".join(digits[1].split())))

    def _search_kernel(self) -> None:
        mapper = DeviceMapper()
        for name in mapper.names():
            device = mapper.get(name)
            for target in device.targets if device else ():
                self.report.search(self.needles, f"the table of {name}", target.params.encode())
                if target.type == "crypt" and not re.fullmatch(r":\d+:logon:\S+", target.params.split()[1]):
                    self.report.hits.append(f"a key that is no reference in the table of {name}")
        # What is in root's keyring is his whose own keyrings lead there: a login's session keyring does, not any does.
        syscall("keyctl", _LINK, _USER_KEYRING, _THREAD_KEYRING)
        try:
            for line in Path("/proc/keys").read_text(errors="replace").splitlines():
                self._search_key(line)
        finally:
            syscall("keyctl", _UNLINK, _USER_KEYRING, _THREAD_KEYRING)

    def _search_key(self, line: str) -> None:
        # Fields of /proc/keys (proc(5)): serial, flags, usage, timeout, permissions, uid, gid, type, description.
        fields = line.split()
        serial, kind = int(fields[0], 16), fields[7]
        self.report.search(self.needles, f"/proc/keys, {kind}", line.encode())
        if kind == "keyring":
            return
        payload = _read_key(serial)
        if payload is not None:
            self.report.search(self.needles, f"the payload of a {kind} key", payload)
            if "cryptsetup:" in line:
                self.report.hits.append(f"a volume key that can be read, of type {kind}")

    def _search_files(self) -> None:
        for folder in (str(self._folder), *_TEMPORARY):
            for path in _files(folder, self._started):
                self.report.search(self.needles, str(path), _content(path))

    def _processes(self) -> dict[str, int]:
        """The server, its launcher and a worker of it."""
        children = _children(self._server.pid)
        launcher = next(pid for pid in children if b"csi_driver.host.launcher" in _cmdline(pid))
        worker = next(iter(_children(launcher)))
        return {"server": self._server.pid, "launcher": launcher, "worker": worker}

    def _search_limits(self) -> None:
        for name, pid in self._processes().items():
            self.report.places += 1
            limits = Path(f"/proc/{pid}/limits").read_text()
            found = re.search(r"Max core file size\s+(\S+)\s+(\S+)", limits)  # see `hardening.forbid_core`
            if found is None or found.groups() != ("1", "1"):
                self.report.hits.append(f"the {name} may dump core: {found.groups() if found else 'no limit'}")

    def _crash(self) -> None:
        """Crash worker, launcher and server under a core pattern that asks no limit (core(5)): only dumpable counts."""
        with _core_trap(self._folder) as dumped:
            control = subprocess.Popen(["sleep", "60"])
            control.send_signal(signal.SIGSEGV)
            control.wait(10)
            wait_for(lambda: dumped(control.pid), "the core of a process that may dump it", 10)
            processes = self._processes()
            for name in ("worker", "launcher", "server"):
                os.kill(processes[name], signal.SIGSEGV)
                wait_for(lambda pid=processes[name]: has_ended(pid), f"the end of the {name}", 10)  # type: ignore[misc]
            time.sleep(0.5)
            for name, pid in processes.items():
                self.report.places += 1
                if dumped(pid):
                    self.report.hits.append(f"a core of the {name}")


def _read_key(serial: int) -> bytes | None:
    """The payload of a key, None when the kernel shows it to nobody."""
    buffer = ctypes.create_string_buffer(1 << 16)
    length = libc.syscall(
        ctypes.c_long(NUMBERS["keyctl"]), ctypes.c_long(_KEYCTL_READ), ctypes.c_long(serial), buffer, len(buffer)
    )
    return buffer.raw[:length] if length >= 0 else None


def _files(folder: str, since: float) -> Iterator[Path]:
    """Regular files below `folder` on its own file system, without those that nobody touched since then."""
    device = os.stat(folder).st_dev
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if os.lstat(os.path.join(at, name)).st_dev == device]
        for name in names:
            path = Path(at, name)
            with contextlib.suppress(OSError):
                facts = path.lstat()
                if path.is_file() and not path.is_symlink() and max(facts.st_mtime, facts.st_ctime) >= since - 2:
                    yield path


def _content(path: Path) -> bytes:
    """What is in a file, its holes left out."""
    pieces, at = [], 0
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        while at < _LARGEST_FILE:
            start = os.lseek(file.fileno(), at, os.SEEK_DATA)  # OSError: only a hole is left
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            pieces.append(os.pread(file.fileno(), end - start, start))
            at = end
    return b"".join(pieces)


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _children(pid: int) -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] not in "ZX":
                found.append(int(entry))
    return found


@contextlib.contextmanager
def _core_trap(folder: Path) -> Iterator[Dumped]:
    """Core dumps go to a program that notes whose they are; the host's own setting comes back in the end."""
    setting, trap = Path("/proc/sys/kernel/core_pattern"), folder / "trap"
    trap.write_text(f'#!/bin/sh\nhead -c 1 >/dev/null && : >"{folder}/core.$1"\n')
    trap.chmod(0o700)
    before = setting.read_text()
    setting.write_text(f"|{trap} %p")
    try:
        yield lambda pid: (folder / f"core.{pid}").exists()
    finally:
        setting.write_text(before)


def kms_options(folder: Path) -> list[str]:
    """Options for a KMS that is a program in `folder`."""
    return [
        "--kms-config", str(folder / "kms.json"), "--kms-programs", str(folder),
        "--audit-file", str(folder / "audit.jsonl"),
    ]  # fmt: skip


def watch(folder: Path, plant: str | None = None) -> Report:
    """Run a server, the real one or one with a planted leak, and search."""
    program(folder)
    (folder / "kms.json").write_text('{"kms": {"encryptionKMSType": "exec", "program": "wrap-key"}}')
    planted = (sys.executable, "-m", "tests.machine.canary_plants", plant or "")
    options = ("--log-level", "debug", *kms_options(folder))
    with ServerProcess(folder, *options, program=planted) if plant else ServerProcess(folder, *options) as server:
        return Canary(folder, server).run(cores=plant in (None, "core"))


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when enough was watched and nothing was found."""
    state = os.environ.get("MACHINE_STATE")
    with tempfile.TemporaryDirectory(dir=state, prefix="canary-", ignore_cleanup_errors=True) as folder:
        report = watch(Path(folder), *arguments)
    for hit in report.hits:
        print(f"hit: {hit}")
    print(report.summary(), flush=True)
    return int(bool(report.hits) or report.samples < LEAST_SAMPLES or report.places < LEAST_PLACES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
