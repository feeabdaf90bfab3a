"""`luks-csi holder` and the descriptor that it hands on, with real block devices and mappings."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from csi_driver.backends.csipins import Pin, Pins, disk_of, fits
from csi_driver.host.boot import boot_id
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.handle import Handle
from csi_driver.host.passing import receive
from csi_driver.model.errors import Aborted

VOLUME, HOLDER, MAPPING = "pvc-1", "uid-1", "spike-of-holder"
SIZE = 32 << 20
PATIENCE = 60.0
Found = TypeVar("Found")
_LUKS_CSI = str(Path(sys.executable).with_name("luks-csi"))
_CARELESS = (
    "import csi_driver.backends.csiholding as holding; holding.reason_to_stay = lambda *_: None; "
    "from csi_driver.cli.main import main; main()"
)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    """A block device, and no mapping on it at the end."""
    disk = Path(os.environ.get("MACHINE_STATE", tmp_path), "holder.disk")
    with disk.open("wb") as file:
        file.truncate(SIZE)
    made = subprocess.run(["losetup", "--find", "--show", str(disk)], check=True, stdout=subprocess.PIPE, text=True)
    yield made.stdout.strip()
    if DeviceMapper().get(MAPPING) is not None:
        DeviceMapper().remove(MAPPING)
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)
    disk.unlink()


@pytest.fixture
def pins(tmp_path: Path) -> Pins:
    made = Pins(tmp_path / "holders", Files())
    made.prepare()
    return made


class Program:
    """The program, as a holder pod runs it."""

    def __init__(self, loop: str, pins: Pins, argv: Sequence[str] = (_LUKS_CSI,)) -> None:
        words = [f"--device={loop}", f"--folder={pins.socket(VOLUME).parent}"]
        words += [f"--volume-id={VOLUME}", f"--holder-id={HOLDER}", "--log-format=text"]
        self._pins = pins
        self.process = subprocess.Popen([*argv, "holder", *words], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def device(self) -> Handle:
        """What it hands on, once it does."""

        def look() -> tuple[Handle, dict[str, str]] | None:
            assert self.process.poll() is None, self.said()
            with suppress(Aborted):
                return receive(self._pins.socket(VOLUME), "the device")
            return None

        handle, words = wait(look)
        assert words == {"volume": VOLUME, "holder": HOLDER}
        return handle

    def said(self) -> str:
        """Of one that has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


def wait(look: Callable[[], Found | None]) -> Found:
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.fixture
def started(loop: str, pins: Pins) -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def start(argv: Sequence[str] = (_LUKS_CSI,)) -> Program:
        made.append(Program(loop, pins, argv))
        return made[-1]

    yield start
    for each in made:
        if each.process.poll() is None:
            each.kill()
        assert each.process.stderr is not None
        each.process.stderr.close()


def map_it(device: Handle) -> None:
    """As dm-crypt takes it: by the number of the descriptor."""
    table = f"0 {SIZE // 512} crypt aes-xts-plain64 {'00' * 64} 0 {device.major}:{device.minor} 0"
    subprocess.run(["dmsetup", "create", MAPPING, "--table", table], check=True)


def check_stays(program: Program) -> None:
    """It is told to end while a mapping is open on its device, and ends when that is closed."""
    with program.device() as device:
        map_it(device)
    program.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        assert program.process.poll() is None, "the holder ended under an open mapping"
        time.sleep(0.1)
    with program.device():
        pass  # it still hands it on
    DeviceMapper().remove(MAPPING)
    assert program.process.wait(PATIENCE) == 0
    assert "a mapping or a mount is on it" in program.said()


def test_a_holder_stays_under_an_open_mapping_and_ends_with_it(started: Callable[..., Program], pins: Pins) -> None:
    check_stays(started())
    assert not pins.socket(VOLUME).exists()


def test_a_holder_that_ends_when_it_is_told_to_is_noticed(started: Callable[..., Program]) -> None:
    with pytest.raises(AssertionError, match="the holder ended under an open mapping"):
        check_stays(started((sys.executable, "-c", _CARELESS)))


def test_a_mapping_outlives_a_killed_holder_and_the_next_one_hands_on_the_same_device(
    started: Callable[..., Program],
) -> None:
    first = started()
    with first.device() as device:
        number = device.number
        map_it(device)
        first.kill()
        with open(f"/dev/mapper/{MAPPING}", "r+b", buffering=0) as mapping:
            mapping.write(bytes(4096))
            os.fsync(mapping.fileno())
        os.close(os.open(device, os.O_RDWR))  # opened again by the descriptor, whose file is gone with the holder
    with pytest.raises(Aborted, match="nobody holds it"):
        receive(first._pins.socket(VOLUME), "the device")  # noqa: SLF001 - where it was
    with started().device() as device:
        assert device.number == number


def test_a_holder_stays_while_the_driver_has_the_device_attached(started: Callable[..., Program], pins: Pins) -> None:
    program = started()
    with program.device() as device:
        pin = Pin(
            volume_id=VOLUME, boot_id=boot_id(), major=device.major, minor=device.minor,
            disk=disk_of(device.number), holder=HOLDER, ticket="ticket",
        )  # fmt: skip
        pins.put(pin)
        assert fits(pin, device.number)
    program.process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert program.process.poll() is None
    pins.remove(VOLUME)
    assert program.process.wait(PATIENCE) == 0
    assert "the driver has it attached" in program.said()


def test_a_number_that_went_to_another_disk_fits_no_more(loop: str) -> None:
    with Handle(os.open(loop, os.O_RDONLY), loop) as device:
        number = device.number
        pin = Pin(
            volume_id=VOLUME, boot_id=boot_id(), major=number[0], minor=number[1], disk=disk_of(number),
            holder=HOLDER, ticket="ticket",
        )  # fmt: skip
    disk = subprocess.run(
        ["losetup", "--noheadings", "-O", "BACK-FILE", loop], check=True, capture_output=True, text=True
    )
    subprocess.run(["losetup", "--detach", loop], check=True)
    subprocess.run(["losetup", loop, disk.stdout.strip()], check=True)
    assert os.stat(loop).st_rdev == os.makedev(*number)
    assert not fits(pin, number)


def test_a_holder_without_its_device_says_so(tmp_path: Path) -> None:
    argv = [_LUKS_CSI, "holder", "--device", str(tmp_path / "nix"), "--folder", str(tmp_path), "--volume-id", VOLUME]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert f"the device {tmp_path}/nix of volume {VOLUME} cannot be opened" in done.stderr
