"""QemuReader with the real qemu-nbd in its real sandbox."""

import contextlib
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi_driver.host.syscalls import check, libc
from csi_driver.images.base import MIB, Extent, ImageFormat
from csi_driver.images.qemu import PROGRAM, QemuReader, program_files
from csi_driver.model.errors import DeviceUnreadable, FailedPrecondition, InvalidArgument
from tests.image_builders import DISK, vhd, vhd_footer

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists(PROGRAM), reason="needs qemu-utils"),
]

WHERE = "image a"
SIZE = 6 * MIB
HOLE = Extent(MIB, 4 * MIB, zero=True)
KINDS = {
    "qcow2": (ImageFormat.QCOW2, ["-O", "qcow2"]),
    "qcow2 of version 2": (ImageFormat.QCOW2, ["-O", "qcow2", "-o", "compat=0.10"]),
    "qcow2 in zlib": (ImageFormat.QCOW2, ["-c", "-O", "qcow2"]),
    "qcow2 in zstd": (ImageFormat.QCOW2, ["-c", "-O", "qcow2", "-o", "compression_type=zstd"]),
    "vmdk monolithicSparse": (ImageFormat.VMDK, ["-O", "vmdk", "-o", "subformat=monolithicSparse"]),
    "vmdk streamOptimized": (ImageFormat.VMDK, ["-O", "vmdk", "-o", "subformat=streamOptimized"]),
    "vhdx": (ImageFormat.VHDX, ["-O", "vhdx"]),
    "vhd": (ImageFormat.VHD, ["-O", "vpc", "-o", "subformat=dynamic,force_size"]),
    "vdi": (ImageFormat.VDI, ["-O", "vdi"]),
}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk: 1 MiB of data, 4 MiB of nothing, 1 MiB of data less one sector."""
    path = tmp_path_factory.mktemp("images") / "disk.raw"
    draw = random.Random(2)
    with path.open("wb") as file:
        file.write(draw.randbytes(MIB // 2) * 2)
        file.seek(5 * MIB)
        file.write(draw.randbytes(MIB - 512))
        file.truncate(SIZE)
    return path


@pytest.fixture(scope="module")
def qcow2(content: Path) -> Path:
    return converted(content, "qcow2")


def converted(source: Path, kind: str) -> Path:
    target = source.with_name(kind.replace(" ", "-"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", *KINDS[kind][1], source, target], check=True)
    target.chmod(0o600)
    return target


@contextlib.contextmanager
def opened(
    path: Path, image_format: ImageFormat = ImageFormat.QCOW2, connections: int = 2, timeout: float = 20.0
) -> Iterator[QemuReader]:
    with contextlib.closing(
        QemuReader(str(path), image_format, WHERE, connections=connections, timeout=timeout)
    ) as reader:
        yield reader


def read(reader: QemuReader, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    reader.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def children(pid: int) -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{entry}/stat").read_text()
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry))
    return found


_BEFORE: set[int] = set()


@pytest.fixture(autouse=True)
def _others() -> None:
    """Servers that other tests of this run have, which are no wardens."""
    _BEFORE.clear()
    _BEFORE.update(children(os.getpid()))


def wardens() -> list[int]:
    return [pid for pid in children(os.getpid()) if pid not in _BEFORE]


def processes() -> tuple[int, int]:
    """Pids of the one warden of this process, and of its program."""
    (warden,) = wardens()
    (program,) = children(warden)
    return warden, program


def gone_now(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def gone(pid: int) -> bool:
    for _ in range(200):
        if gone_now(pid):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("creator", [b"vpc ", b"win ", b"vbox", b"qemu"])
def test_the_size_of_a_vhd_is_the_one_in_bytes_whoever_made_it(tmp_path: Path, creator: bytes) -> None:
    """For some makers qemu takes the geometry by itself, which leaves out the end of the disk."""
    path = tmp_path / "disk.vhd"
    path.write_bytes(vhd(footer=vhd_footer(creator=creator)))
    with opened(path, ImageFormat.VHD) as reader:
        assert reader.size == len(DISK)
        assert read(reader, 0, reader.size) == DISK


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_reads_as_the_disk_that_it_was_made_from(content: Path, kind: str) -> None:
    with opened(converted(content, kind), KINDS[kind][0]) as reader:
        assert reader.size == SIZE
        assert read(reader, 0, SIZE) == content.read_bytes()
        position = 0
        for extent in reader.extents():
            assert extent.offset == position
            assert not extent.zero or read(reader, extent.offset, extent.length) == bytes(extent.length)
            position += extent.length
        assert position == SIZE
        zeros = sum(extent.length for extent in reader.extents() if extent.zero)
        known = {"vhdx": 0, "vhd": 2 * MIB}  # blocks of 2 MiB
        assert zeros == known.get(kind, HOLE.length), "qemu knows the holes of all but vhdx"


def test_extents_of_a_qcow2_are_its_data_and_its_holes(qcow2: Path) -> None:
    with opened(qcow2) as reader:
        assert list(reader.extents()) == [
            Extent(0, MIB, zero=False),
            HOLE,
            Extent(5 * MIB, MIB, zero=False),
        ]


def test_many_threads_read_at_once_more_than_there_are_connections(content: Path, qcow2: Path) -> None:
    expected = content.read_bytes()
    draw = random.Random(3)
    places = [(draw.randrange(SIZE - MIB), draw.randrange(1, MIB)) for _ in range(100)]
    with opened(qcow2, connections=3) as reader, ThreadPoolExecutor(8) as pool:
        for (offset, length), found in zip(places, pool.map(lambda place: read(reader, *place), places), strict=True):
            assert found == expected[offset : offset + length]


def test_a_large_sparse_disk_has_its_whole_size_in_extents(tmp_path: Path) -> None:
    path = tmp_path / "sparse.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "10G"], check=True)
    with opened(path) as reader:
        assert reader.size == 10 << 30
        assert [extent.zero for extent in reader.extents()] == [True] * len(list(reader.extents()))
        assert sum(extent.length for extent in reader.extents()) == 10 << 30


def test_a_read_past_the_end_is_an_error_and_the_reader_goes_on(content: Path, qcow2: Path) -> None:
    with opened(qcow2) as reader:
        with pytest.raises(DeviceUnreadable, match=f"image a cannot be read at byte {SIZE - 512} of {SIZE}"):
            read(reader, SIZE - 512, 1024)
        assert read(reader, 0, 512) == content.read_bytes()[:512]


def test_the_reader_outlives_the_thread_that_opened_it(qcow2: Path) -> None:
    readers: list[QemuReader] = []
    thread = threading.Thread(
        target=lambda: readers.append(QemuReader(str(qcow2), ImageFormat.QCOW2, WHERE, connections=1))
    )
    thread.start()
    thread.join()
    with contextlib.closing(readers[0]):
        time.sleep(0.1)
        assert len(read(readers[0], 0, MIB)) == MIB


OPENED_AND_CLOSED = """
import os, sys
from csi_driver.images.base import ImageFormat
from csi_driver.images.qemu import QemuReader
QemuReader(sys.argv[1], ImageFormat.QCOW2, "image a").close()  # what is loaded once stays
before = os.listdir("/proc/self/fd")
QemuReader(sys.argv[1], ImageFormat.QCOW2, "image a").close()
assert os.listdir("/proc/self/fd") == before
"""


def test_closing_leaves_no_descriptor(qcow2: Path) -> None:
    """In a process of its own: servers and clients of other tests close theirs when they like."""
    subprocess.run([sys.executable, "-c", OPENED_AND_CLOSED, str(qcow2)], check=True, timeout=60)


def test_closing_ends_all_and_leaves_nothing(qcow2: Path) -> None:
    reader = QemuReader(str(qcow2), ImageFormat.QCOW2, WHERE)
    warden, program = processes()
    reader.close()
    assert not os.path.exists(f"/proc/{warden}")
    assert gone(program)
    reader.close()
    with pytest.raises(DeviceUnreadable):
        read(reader, 0, 512)


def test_qemu_nbd_sees_the_image_and_its_libraries_and_nothing_else(qcow2: Path) -> None:
    with opened(qcow2):
        _, program = processes()
        root = f"/proc/{program}/root"
        found = {os.path.join(folder, name)[len(root) :] for folder, _, names in os.walk(root) for name in names}
        assert found == {"/image", *program_files(PROGRAM, WHERE)}
        mounts = Path(f"/proc/{program}/mountinfo").read_text().splitlines()
        assert len(mounts) == 1 + len(found)
        assert all(line.split(" ")[5].startswith("ro,nosuid,nodev") for line in mounts)
        assert next(line.split(" ")[5] for line in mounts if " /image " in line).startswith("ro,nosuid,nodev,noexec")
        for namespace in ("mnt", "net", "pid", "ipc"):
            assert os.readlink(f"/proc/{program}/ns/{namespace}") != os.readlink(f"/proc/self/ns/{namespace}")
        assert Path(f"/proc/{program}/net/dev").read_text().count(":") == 1, "only the loopback, which is down"
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{program}/status").read_text().splitlines())
        assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"
        assert status["NSpid"].split()[-1] == "1"
        assert not status["Groups"].strip()
        for limit, most in (
            (resource.RLIMIT_AS, 1 << 30),
            (resource.RLIMIT_CPU, 600 + qcow2.stat().st_size // (128 << 10)),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_NOFILE, 34),
            (resource.RLIMIT_CORE, 1),
        ):
            assert limits(program, limit) == (most, most)
        environment = Path(f"/proc/{program}/environ").read_text().split("\0")
        assert {entry.split("=")[0] for entry in environment if not entry.startswith("MALLOC_")} == {
            "LC_ALL", "LISTEN_FDS", "LISTEN_PID", "",
        }  # fmt: skip
        descriptors = {os.readlink(f"/proc/{program}/fd/{number}") for number in (0, 1, 2, 3)}
        assert {name.split(":")[0] for name in descriptors} == {"/dev/null", "pipe", "socket"}


def test_qemu_nbd_has_a_user_of_its_own_where_the_file_system_can_map_owners(qcow2: Path) -> None:
    name = subprocess.run(["stat", "-f", "-c", "%T", qcow2], capture_output=True, text=True, check=True).stdout.strip()
    if name not in {"ext2/ext3", "xfs", "btrfs"}:
        pytest.skip(f"not every kernel maps the owners of {name}")
    with opened(qcow2):
        _, program = processes()
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{program}/status").read_text().splitlines())
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(0x4C554B53)}


def limits(pid: int, limit: int) -> tuple[int, int]:
    names = {
        resource.RLIMIT_AS: "Max address space",
        resource.RLIMIT_CPU: "Max cpu time",
        resource.RLIMIT_FSIZE: "Max file size",
        resource.RLIMIT_NOFILE: "Max open files",
        resource.RLIMIT_CORE: "Max core file size",
    }
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith(names[limit]):
            soft, hard = line[26:].split()[:2]
            return int(soft), int(hard)
    raise AssertionError(names[limit])


def test_where_a_file_system_knows_no_id_mapping_the_owner_reads_without_capabilities(
    content: Path, qcow2: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ramfs"
    folder.mkdir()
    check(libc.mount(b"ramfs", os.fsencode(folder), b"ramfs", 0, b"mode=0700"), "mount")
    try:
        image = folder / "image"
        image.write_bytes(qcow2.read_bytes())
        image.chmod(0o600)
        with opened(image) as reader:
            _, program = processes()
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{program}/status").read_text().splitlines())
            assert set(status["Uid"].split()) == {"0"}
            assert {status[f"Cap{name}"] for name in ("Prm", "Eff", "Bnd")} == {"0" * 16}
            assert read(reader, 0, MIB) == content.read_bytes()[:MIB]
    finally:
        check(libc.umount2(os.fsencode(folder), 0), "umount2")


def test_a_killed_parent_takes_all_with_it_even_while_a_fork_of_it_lives(qcow2: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from csi_driver.images.qemu import QemuReader\n"
        "from csi_driver.images.base import ImageFormat\n"
        "reader = QemuReader(sys.argv[1], ImageFormat.QCOW2, 'image a')\n"
        "if fork := os.fork():\n"
        "    print(fork, flush=True)\n"
        "time.sleep(30)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, qcow2], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        fork = int(parent.stdout.readline())
        try:
            (warden,) = set(children(parent.pid)) - {fork}
            (program,) = children(warden)
            parent.kill()
            assert gone(warden)
            assert gone(program)
            assert not gone_now(fork), "it holds the control socket open"
        finally:
            parent.kill()
            os.kill(fork, signal.SIGKILL)


def test_a_killed_warden_takes_qemu_nbd_with_it(qcow2: Path) -> None:
    with opened(qcow2) as reader:
        warden, program = processes()
        os.kill(warden, signal.SIGKILL)
        assert gone(program)
        with pytest.raises(DeviceUnreadable, match="image a cannot be read"):
            read(reader, 0, 512)


def test_a_killed_qemu_nbd_is_named_by_its_signal(qcow2: Path) -> None:
    with opened(qcow2) as reader:
        _, program = processes()
        os.kill(program, signal.SIGKILL)
        for _ in range(3):  # on each connection, and again on a broken one
            with pytest.raises(DeviceUnreadable, match="image a cannot be read: qemu-nbd was ended by signal 9"):
                read(reader, 0, 512)


def test_a_qemu_nbd_that_hangs_is_given_up_in_time(qcow2: Path) -> None:
    with opened(qcow2, timeout=1.5) as reader:
        _, program = processes()
        os.kill(program, signal.SIGSTOP)
        with pytest.raises(DeviceUnreadable, match=r"gave no answer within 1\.5 s"):
            read(reader, 0, 512)
    assert gone(program)


def test_what_qemu_nbd_refuses_is_an_image_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise"
    path.write_bytes(b"QFI\xfb" + random.Random(4).randbytes(1 << 16))
    with pytest.raises(InvalidArgument, match=r"image a cannot be read as qcow2: qemu-nbd ended with exit code 1: "):
        QemuReader(str(path), ImageFormat.QCOW2, WHERE)
    assert wardens() == []


def test_a_backing_file_is_out_of_reach(tmp_path: Path, content: Path) -> None:
    path = tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", content, "-F", "raw", path], check=True)
    with pytest.raises(InvalidArgument, match="No such file or directory"):
        QemuReader(str(path), ImageFormat.QCOW2, WHERE)


def test_a_vmdk_extent_that_names_another_file_is_out_of_reach(tmp_path: Path) -> None:
    path = tmp_path / "flat.vmdk"
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        'createType="monolithicFlat"\nRW 1 FLAT "/etc/passwd" 0\nddb.adapterType = "ide"\n'
    )
    with pytest.raises(InvalidArgument, match="No such file or directory"):
        QemuReader(str(path), ImageFormat.VMDK, WHERE)


@pytest.mark.parametrize("image_format", [ImageFormat.RAW, ImageFormat.LUKS2])
def test_what_is_read_as_it_is_needs_no_qemu_nbd(qcow2: Path, image_format: ImageFormat) -> None:
    with pytest.raises(InvalidArgument, match=f"image a is {image_format} and needs no qemu-nbd"):
        QemuReader(str(qcow2), image_format, WHERE)


def test_a_program_that_is_not_installed_is_named_with_its_package(qcow2: Path) -> None:
    with pytest.raises(FailedPrecondition, match="install the package qemu-utils"):
        QemuReader(str(qcow2), ImageFormat.QCOW2, WHERE, program="/usr/bin/no-such-program")


def test_others_than_root_are_refused(qcow2: Path) -> None:
    script = (
        "import os, sys\n"
        "from csi_driver.images.qemu import QemuReader\n"
        "from csi_driver.images.base import ImageFormat\n"
        "os.seteuid(65534)\n"
        "try:\n"
        "    QemuReader(sys.argv[1], ImageFormat.QCOW2, 'image a')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", script, qcow2], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("FailedPrecondition image a can only be read by root")


def test_a_reader_whose_sandbox_cannot_be_made_names_the_cause() -> None:
    # A memfd lies on no mount that could be shown in the sandbox.
    descriptor = os.memfd_create("image")
    try:
        os.pwrite(descriptor, struct.pack(">4sI", b"QFI\xfb", 3) + bytes(1024), 0)
        with pytest.raises(FailedPrecondition, match=r"no sandbox could be made for qemu-nbd \(open_tree: "):
            QemuReader(f"/proc/self/fd/{descriptor}", ImageFormat.QCOW2, WHERE)
    finally:
        os.close(descriptor)
