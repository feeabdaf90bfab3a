"""The data path: what a pod reads and writes, by fio, and the processor time that it costs the whole machine.

Everything lies on loop devices over files of one disk, as the backend loopfile makes them. A bare dm-crypt device is
made by cryptsetup's own programs, with the same cipher and key size.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.measure import ratio, side_by_side
from benchmarks.servers import CHEAP, our_server, random_key
from benchmarks.table import Row
from csi_driver.model.volume import mapping_name
from csi_driver.rpc.client import CsiClient
from csi_driver.volumes.capability import AccessMode, Capability

_MIB = 1 << 20
_GIB = 1 << 30
_DEVICE_BYTES = 256 * _MIB
TURNS = 8
_STEP_SECONDS = 300
_BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
_TICKS = os.sysconf("SC_CLK_TCK")
_IDLE = (3, 4)  # of the fields of /proc/stat: idle and iowait, proc(5)


@dataclass(frozen=True)
class _Load:
    """What fio does: `bytes` in all, in pieces of `piece`."""

    what: str
    kind: str
    piece: str
    bytes: int


_LOADS = (
    _Load("write, 4 MiB", "write", "4M", 192 * _MIB),
    _Load("read, 4 MiB", "read", "4M", 192 * _MIB),
    _Load("write, 4 KiB at random", "randwrite", "4k", 16 * _MIB),
    _Load("read, 4 KiB at random", "randread", "4k", 16 * _MIB),
)


@dataclass
class Side:
    """A device, and what the processor time of each run on it was, in seconds; `mapping` is the volume's own."""

    device: str
    mapping: str = ""
    busy: list[float] = field(default_factory=list)

    def run(self, load: _Load) -> float:
        """Seconds of one run of fio, past the page cache."""
        before = _busy()
        done = subprocess.run(
            [
                "fio", "--name=data", f"--filename={self.device}", f"--rw={load.kind}", f"--bs={load.piece}",
                f"--size={_DEVICE_BYTES}", f"--io_size={load.bytes}", "--direct=1", "--ioengine=libaio", "--iodepth=8",
                "--randrepeat=1", "--end_fsync=1", "--output-format=json", "--thread", "--norandommap",
            ],
            check=True, capture_output=True, timeout=_STEP_SECONDS,
        )  # fmt: skip
        self.busy.append(_busy() - before)
        (job,) = json.loads(done.stdout)["jobs"]
        return float(job["job_runtime"]) / 1e3


def rows(folder: Path) -> Iterator[Row]:
    """Ours against bare dm-crypt on the same kind of device, then each default against the other choice."""
    for program in ("fio", "cryptsetup", "losetup"):
        subprocess.run([program, "--version"], check=True, stdout=subprocess.DEVNULL)
    with our_server(folder / "data") as server, CsiClient(server.endpoint) as client:
        ours = partial(block_volume, client, folder)
        for sector in (512, 4096):
            yield from compared(
                f"ours, sectors of {sector}, against bare dm-crypt", 1 / 0.97,
                ours(f"ours-{sector}", {"sectorSize": str(sector)}), _bare(folder, sector),
            )  # fmt: skip
        yield from compared(
            "sectors of 4096 against 512", 1.0,
            ours("large", {"sectorSize": "4096"}), ours("small", {"sectorSize": "512"}),
        )  # fmt: skip
        yield from compared(
            "the kernel's work queues against none", 1.1,
            ours("queues", {"sectorSize": "4096"}),
            ours("none", {"sectorSize": "4096", "noReadWorkqueue": "true", "noWriteWorkqueue": "true"}),
        )  # fmt: skip
        yield from compared(
            "a loop device past the page cache against through it", 1.5,  # small reads cost more
            _bare(folder, 4096), _bare(folder, 4096, direct=False),
        )  # fmt: skip
        yield from compared(
            "encrypted, sectors of 4096, against plain", 20.0,
            ours("encrypted", {"sectorSize": "4096"}), ours("plain", {"encrypted": "false"}),
        )  # fmt: skip


@contextmanager
def block_volume(
    client: CsiClient, folder: Path, name: str, parameters: dict[str, str], node: str = ""
) -> Iterator[Side]:
    """A block volume of ours, as a pod gets it; given to that `node` before, where one is named."""
    crypt = CHEAP if parameters.get("encrypted") != "false" else {}
    secrets = {"CRYPTO_KEY_VALUE": random_key()} if crypt else {}
    given = {**crypt, **{key: value for key, value in parameters.items() if key != "encrypted"}}
    stage, target = folder / f"{name}-stage", folder / f"{name}-pod"
    stage.mkdir()
    volume = client.create_volume(name, [_BLOCK], _DEVICE_BYTES, parameters=given, secrets=secrets)
    if node:
        client.attach(volume, node, _BLOCK, secrets)
    client.stage(volume, stage, _BLOCK, secrets)
    client.publish(volume, stage, target, _BLOCK)
    try:
        yield Side(str(target), mapping_name(volume.id))
    finally:
        client.unpublish(volume.id, target)
        client.unstage(volume.id, stage)
        if node:
            client.detach(volume.id, node)
        client.delete_volume(volume.id)
        stage.rmdir()


@contextmanager
def _bare(folder: Path, sector: int, *, direct: bool = True) -> Iterator[Side]:
    """What cryptsetup makes of a loop device that losetup makes."""
    image, name = folder / f"bare-{direct}.img", f"bench-bare-{direct}".lower()
    with ExitStack() as undo:
        image.touch()
        undo.callback(image.unlink)
        os.truncate(image, _DEVICE_BYTES + 16 * _MIB)
        made = _run("losetup", f"--direct-io={'on' if direct else 'off'}", "--find", "--show", str(image))
        device = made.strip()
        undo.callback(_run, "losetup", "--detach", device)
        key, cheap = random_key(), ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
        shape = ("--type", "luks2", "--cipher", "aes-xts-plain64", "--key-size", "512", "--sector-size", str(sector))
        _run("cryptsetup", "luksFormat", "--batch-mode", *shape, *cheap, "--key-file", "-", device, key=key)
        _run("cryptsetup", "open", "--key-file", "-", device, name, key=key)
        undo.callback(_run, "cryptsetup", "close", name)
        yield Side(f"/dev/mapper/{name}")


@contextmanager
def same_device(mapping: str) -> Iterator[Side]:
    """Bare dm-crypt on the device of that mapping, beside it: its table, with a key of its own."""
    start, length, kind, cipher, _, *more = _run("dmsetup", "table", mapping).split()
    name, key = "bench-same-device", os.urandom(64).hex()
    table = " ".join((start, length, kind, cipher, key, *more))
    _run("dmsetup", "create", name, "--noudevrules", "--noudevsync", key=table)
    try:
        yield Side(f"/dev/mapper/{name}")
    finally:
        _run("dmsetup", "remove", "--noudevrules", "--noudevsync", name)


def compared(
    what: str, bound: float, one: AbstractContextManager[Side], other: AbstractContextManager[Side], turns: int = TURNS
) -> Iterator[Row]:
    """Each load on both sides, in turns."""
    with one as ours, other as theirs:
        for load in _LOADS:
            for side in (ours, theirs):
                side.busy.clear()
            series = side_by_side(turns, partial(ours.run, load), partial(theirs.run, load), warm_up=1)
            shown = (_shown(series[0], ours, load), _shown(series[1], theirs, load))
            yield Row(f"{load.what}: {what}", *shown, ratio(*series), bound)


def _shown(series: Sequence[float], side: Side, load: _Load) -> str:
    speed = load.bytes / _MIB / median(series)
    return f"{speed:.0f} MiB/s, {median(side.busy[1:]) * _GIB / load.bytes:.2f} core-s/GiB (n={len(series)})"


def _busy() -> float:
    """Seconds that all processors were not idle, since boot."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = [int(word) for word in file.readline().split()[1:9]]
    return sum(ticks for at, ticks in enumerate(fields) if at not in _IDLE) / _TICKS


def _run(*argv: str, key: str = "") -> str:
    return subprocess.run(argv, check=True, input=key, stdout=subprocess.PIPE, text=True, timeout=_STEP_SECONDS).stdout
