"""`make demo`: an encrypted volume from its creation to its end, by the real server on real dm-crypt.

Everything goes through the server's socket, as Kubernetes would do it. What is claimed is looked up elsewhere: in the
kernel, in the mount, in the bytes of the backing file.
"""

import contextlib
import hashlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from csi_driver import __version__
from csi_driver.host import blockdev
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.loop import LoopDevices
from csi_driver.rpc.client import CsiClient, RemoteError, RemoteVolume
from csi_driver.volumes.capability import AccessMode, Capability
from tests.machine import kernel
from tests.machine.leaks import Facts, clear, settled
from tests.machine.server import ServerProcess
from tests.machine.transcript import Transcript

_MIB = 1 << 20
_CHUNK = 4 * _MIB
_SIZE, _LARGER = 256 * _MIB, 512 * _MIB
_BLOCK_SIZE = 100 * _MIB + 512  # no round number: to the byte
_PATTERN_SIZE = 16 * _MIB
_CALL_SECONDS = 120.0
_COMMAND_SECONDS = 30
_MOUNT = Capability(AccessMode.SINGLE_NODE_WRITER, block=False)
_BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
_ENCRYPTED: Mapping[str, str] = {"encrypted": "true"}
_DUMP = ("Version", "UUID", "cipher", "Key", "PBKDF", "Time cost", "Memory", "offset")


class Demo:
    """The steps in their order, in `folder`; `parameters` are the StorageClass of the volumes."""

    def __init__(self, folder: Path, transcript: Transcript, parameters: Mapping[str, str] = _ENCRYPTED) -> None:
        self._folder = folder
        self._say = transcript
        self._parameters = parameters
        self._server = ServerProcess(folder, "--kubelet-dir", str(folder / "kubelet"))
        self._client = CsiClient(self._server.endpoint, _CALL_SECONDS)
        # A new line for each run: nothing older on the disk can hold it.
        self._line = f"A pod wrote this; it must not reach the disk. {secrets.token_hex(8)}".ljust(63).encode() + b"\n"
        self._pattern = self._line * (_PATTERN_SIZE // len(self._line))
        self._key, self._wrong = ({"CRYPTO_KEY_VALUE": secrets.token_urlsafe(12)} for _ in range(2))
        self._strong = {"CRYPTO_KEY_VALUE": secrets.token_hex(32)}
        self._before = Facts.now(folder)
        self.left = "nothing was looked at"

    def run(self) -> int:
        """Run to the end or to the first error; returns the exit code. Nothing stays, whatever happens."""
        say = self._say
        say.say(f"luks-csi {__version__} in {_machine()}; the lines with $ do the same by hand.")
        try:
            with self._client, self._told_errors():
                self._steps()
        finally:
            self._server.stop()  # with the call that was cut off, if there was one: its worker could open something
            clear(self._before, self._folder)
        checks = say.passed + len(say.failed)
        if say.failed:
            say.verdict(f"demo: {len(say.failed)} of {checks} checks FAILED: {'; '.join(say.failed)}")
            return 1
        say.verdict(f"demo: {checks} checks passed, {say.seconds:.1f} s, nothing left behind ({self.left})")
        return 0

    def _steps(self) -> None:
        with self._say.step("Start the server"):
            self._start()
        with self._say.step("Create an encrypted volume of 256 MiB"):
            volume = self._create()
        with self._say.step("Stage it: the first time formats it with LUKS2 and ext4"):
            self._stage(volume)
        with self._say.step("Publish it to a pod, write 16 MiB, look for them on the disk"):
            self._publish(volume)
            self._write(volume)
        with self._say.step("Look at the LUKS2 header"):
            self._look_at_header(volume)
        with self._say.step("Unpublish and unstage it: no key needed"):
            self._unstage(volume)
        with self._say.step("Stage it with a wrong key"):
            self._refuse(volume)
        with self._say.step("Stage it again with the right key"):
            self._restage(volume)
        with self._say.step("Enlarge it to 512 MiB while it is mounted: no key needed"):
            self._expand(volume)
        with self._say.step("A second one as a raw block device, its key 32 random bytes"):
            block = self._block()
        with self._say.step("Clean up"):
            self._clean_up(volume, block)

    def _start(self) -> None:
        self._say.command("serve &")
        self._server.start()
        info, node = self._client.plugin_info(), self._client.node_id()
        self._say.tell(f"{info.name} {info.version} on {node}, socket {self._server.endpoint}")
        mode = self._server.endpoint.stat().st_mode & 0o777
        self._say.check("it answers Probe, and only root may use its socket", oct(mode), "0o600")

    def _create(self) -> RemoteVolume:
        self._say.command("volume create demo --size 256Mi --encrypted")
        volume = self._client.create_volume("demo", [_MOUNT], _SIZE, parameters=self._parameters)
        disk, check = self._disk(volume), self._say.check
        check(f"a pod will see {_SIZE} bytes", volume.capacity_bytes, _SIZE)
        check("it is tagged encrypted=true", volume.context.get("encrypted"), "true")
        used = disk.stat().st_blocks * 512
        check("its backing file is still all holes: nothing is formatted before a node stages it", used, 0)
        return volume

    def _stage(self, volume: RemoteVolume) -> None:
        self._say.command("volume stage demo ./stage --passphrase-file key")
        self._stage_folder(volume).mkdir(parents=True)
        self._client.stage(volume, self._stage_folder(volume), _MOUNT, self._key)
        mapping = DeviceMapper().get(f"luks-{volume.id}")
        target = mapping.targets[0] if mapping else None
        cipher, key = target.params.split()[:2] if target else ("none", "none")
        self._say.check(
            f"the kernel maps it as /dev/mapper/luks-{volume.id}, through dm-crypt with aes-xts-plain64",
            (target.type if target else "no mapping", cipher),
            ("crypt", "aes-xts-plain64"),
        )
        size = mapping.size_bytes if mapping else 0
        self._say.check(f"the mapping has {_SIZE} bytes, the header not counted", size, _SIZE)
        kept = key.startswith(":64:logon:")
        self._say.check("the volume key is in the kernel's keyring, where no process can read it", kept, True)

    def _publish(self, volume: RemoteVolume) -> None:
        self._say.command("volume publish demo ./stage ./pod")
        self._client.publish(volume, self._stage_folder(volume), self._pod(volume), _MOUNT)

    def _write(self, volume: RemoteVolume) -> None:
        check = self._say.check
        with (self._pod(volume) / "data").open("wb") as file:
            file.write(self._pattern)
            file.flush()
            os.fsync(file.fileno())
        self._check_pattern(volume, "the pod reads back what it wrote")
        disk = self._disk(volume)
        size, lines = disk.stat().st_size, len(self._pattern) // len(self._line)
        plain = _first(disk, self._line)
        check(f"none of its {lines} lines is in the {size} bytes of the backing file", plain, None)
        mapped = Path(f"/dev/mapper/luks-{volume.id}")
        at = _first(mapped, self._line)
        check("the same search does find them in the open mapping", at is not None, True)
        if at is not None:
            for name, path, offset in (("mapping", mapped, at), ("disk", disk, at + size - _SIZE)):
                self._say.tell(f"{name:8}{offset:10}  {_hex(path, offset)}")

    def _look_at_header(self, volume: RemoteVolume) -> None:
        # Not the file: cryptsetup would wait for the lock on it, which the loop device holds while it is attached.
        device = next((loop.path for loop in LoopDevices().find(str(self._disk(volume)))), "(no loop device)")
        done = subprocess.run(
            ["cryptsetup", "luksDump", device], capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS
        )
        fields: dict[str, str] = {}
        for line in done.stdout.splitlines():
            name, _, value = line.strip().partition(":")
            fields.setdefault(name, value.strip())
        self._say.tell(f"cryptsetup luksDump {device}")
        for name in _DUMP:
            self._say.tell(f"  {name + ':':12}{fields.get(name, '')}")
        slots = [line for line in done.stdout.splitlines() if line.startswith("  ") and line.endswith(": luks2")]
        found = (fields.get("Version"), fields.get("PBKDF"), len(slots), done.stderr.strip())
        self._say.check("cryptsetup finds LUKS2 with one key slot, behind argon2id", found, ("2", "argon2id", 1, ""))

    def _unstage(self, volume: RemoteVolume) -> None:
        self._say.command("volume unpublish demo ./pod")
        self._say.command("volume unstage demo ./stage")
        self._client.unpublish(volume.id, self._pod(volume))
        self._client.unstage(volume.id, self._stage_folder(volume))
        self._check_closed(volume, "mapping, mounts, loop device and key are gone from the kernel")

    def _refuse(self, volume: RemoteVolume) -> None:
        self._say.command("volume stage demo ./stage --passphrase-file wrong-key")
        code, sentence = "OK", "it was staged"
        try:
            self._client.stage(volume, self._stage_folder(volume), _MOUNT, self._wrong)
        except RemoteError as error:
            code, sentence = error.code, str(error)
        self._say.tell(f"{sentence[0].upper()}{sentence[1:]}.")
        self._say.check("it is refused, with code UNAUTHENTICATED", code, "UNAUTHENTICATED")
        self._check_closed(volume, "and nothing of the attempt remains open, mounted or attached")

    def _restage(self, volume: RemoteVolume) -> None:
        self._say.command("volume stage demo ./stage --passphrase-file key")
        self._client.stage(volume, self._stage_folder(volume), _MOUNT, self._key)
        self._publish(volume)
        self._check_pattern(volume, f"all {len(self._pattern)} bytes of the pod are there")

    def _expand(self, volume: RemoteVolume) -> None:
        self._say.command("volume expand demo ./pod --size 512Mi")
        capacity = self._client.expand_volume(volume.id, _LARGER)
        self._client.expand_on_node(volume.id, self._pod(volume), capacity)
        mapping = DeviceMapper().get(f"luks-{volume.id}")
        size = mapping.size_bytes if mapping else 0
        self._say.check(f"the mapping has {_LARGER} bytes", size, _LARGER)
        room = os.statvfs(self._pod(volume))
        total = room.f_blocks * room.f_frsize
        self._say.check(f"the pod's file system has grown with it, to {total} bytes", total > _LARGER * 9 // 10, True)
        self._check_pattern(volume, "what the pod wrote is untouched")

    def _block(self) -> RemoteVolume:
        """Write the first and the last bytes of a block volume, and read them after it was closed and opened again."""
        check, client = self._say.check, self._client
        cheap = {"pbkdf": "pbkdf2", "pbkdfIterations": "1000"} if self._parameters.get("encrypted") == "true" else {}
        self._say.command(f"volume create block --block --size {_BLOCK_SIZE} --encrypted -p pbkdf=pbkdf2 "
                          "-p pbkdfIterations=1000")  # fmt: skip
        self._say.command("volume stage block ./stage-block --block --passphrase-file random-key")
        volume = client.create_volume("block", [_BLOCK], _BLOCK_SIZE, parameters={**self._parameters, **cheap})
        stage, pod = self._stage_folder(volume), self._pod(volume)
        stage.mkdir()
        client.stage(volume, stage, _BLOCK, self._strong)
        client.publish(volume, stage, pod, _BLOCK)
        size = blockdev.size_bytes(str(pod))
        check(f"the pod's device has {_BLOCK_SIZE} bytes, to the byte", size, _BLOCK_SIZE)
        ends, piece = (0, _BLOCK_SIZE - _MIB), self._pattern[:_MIB]
        descriptor = os.open(pod, os.O_WRONLY)
        for offset in ends:
            os.pwrite(descriptor, piece, offset)
        os.fsync(descriptor)
        os.close(descriptor)
        client.unpublish(volume.id, pod)
        client.unstage(volume.id, stage)
        client.stage(volume, stage, _BLOCK, self._strong)
        client.publish(volume, stage, pod, _BLOCK)
        with pod.open("rb", buffering=0) as device:
            same = all(os.pread(device.fileno(), _MIB, offset) == piece for offset in ends)
        check("its first and last MiB are there after it was closed and opened again", same, True)
        plain = _first(self._disk(volume), self._line)
        size = self._disk(volume).stat().st_size
        check(f"and no line of them is in the {size} bytes of its backing file", plain, None)
        return volume

    def _clean_up(self, *volumes: RemoteVolume) -> None:
        self._say.tell("unpublish and unstage both, as above")
        for volume in volumes:
            self._say.command(f"volume delete {volume.id}")
            self._client.unpublish(volume.id, self._pod(volume))
            self._client.unstage(volume.id, self._stage_folder(volume))
            self._client.delete_volume(volume.id)
        code = self._server.stop()
        gone = not self._server.endpoint.exists()
        self._say.check("told to stop, the server exits 0 and takes its socket away", (code, gone), (0, True))
        files = [path.name for path in (self._server.state_dir / "loopfile").glob("*/*")]
        self._say.check("the state directory holds no volume any more", files, [])
        left = settled(self._left)
        kinds = {"mappings": "mappings", "loops": "loop devices", "mounts": "mounts", "keys": "keys"}
        self.left = ", ".join(
            f"{words} {sum(line.startswith(f'{kind}:') for line in left)}" for kind, words in kinds.items()
        )
        self._say.check("the kernel holds nothing that was not there before", left, [])

    @contextlib.contextmanager
    def _told_errors(self) -> Iterator[None]:
        """An error ends the demo and is a check that failed; the server's last words help to see why."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told and cleaned up after
            self._say.failed.append(f"step {self._say.title} was cut short")
            sentence = str(error).partition("\n")[0]
            self._say.say(f"    {type(error).__name__}: {sentence}\n    The end of the server's log:")
            log = self._folder / "server.log"
            for line in log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []:
                self._say.say(f"      {line}")

    def _check_pattern(self, volume: RemoteVolume, statement: str) -> None:
        digest = hashlib.sha256((self._pod(volume) / "data").read_bytes()).hexdigest()
        wanted = hashlib.sha256(self._pattern).hexdigest()
        self._say.check(f"{statement} (sha256 {wanted[:12]}…)", digest, wanted)

    def _check_closed(self, volume: RemoteVolume, statement: str) -> None:
        mapping = DeviceMapper().get(f"luks-{volume.id}")
        loops = LoopDevices().find(str(self._disk(volume)))
        mounts = [mount.mount_point for mount in kernel.mounts() if mount.mount_point.startswith(f"{self._folder}/")]
        keys = settled(lambda: [line for line in self._left() if line.startswith("keys:")])
        found = [*([mapping.path] if mapping else []), *(loop.path for loop in loops), *mounts, *keys]
        self._say.check(statement, found, [])

    def _left(self) -> list[str]:
        """What the kernel holds since the beginning; the demo's own files are looked at elsewhere."""
        found = Facts.now(self._folder).more_than(self._before)
        return [line for line in found if not line.startswith("files:")]

    def _disk(self, volume: RemoteVolume) -> Path:
        return self._server.state_dir / "loopfile/volumes" / volume.id / "disk.img"

    def _stage_folder(self, volume: RemoteVolume) -> Path:
        return self._folder / "stage" / volume.id

    def _pod(self, volume: RemoteVolume) -> Path:
        return self._folder / "pods" / volume.id


def _first(path: Path, wanted: bytes) -> int | None:
    """Where `wanted` begins for the first time in a file or device, all of which is read if need be."""
    keep, offset, tail = len(wanted) - 1, 0, b""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            window = tail + piece
            if (found := window.find(wanted)) >= 0:
                return offset - len(tail) + found
            offset, tail = offset + len(piece), window[-keep:]
    return None


def _hex(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        found = file.read(16)
    return f"{found.hex(' ')}  |{''.join(chr(byte) if 32 <= byte < 127 else '.' for byte in found)}|"


def _machine() -> str:
    guest = "User Mode Linux" in Path("/proc/cpuinfo").read_text()
    return f"{'a user-mode Linux guest' if guest else 'this host'}, Linux {os.uname().release}"


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    state = os.environ.get("MACHINE_STATE", "/var/tmp")
    with tempfile.TemporaryDirectory(dir=state, prefix="demo-") as folder:
        return Demo(Path(folder), Transcript()).run()


if __name__ == "__main__":
    sys.exit(main())
