"""The servers that are measured, ours, now or of another commit, and the bare one; and the client that calls them."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc

THREADS = 16
_START_SECONDS = 120
_STOP_SECONDS = 30
_CALL_SECONDS = 300
_POLL_SECONDS = 0.001
_LINES = 40  # of the log of a server that a benchmark has failed on
_WRITER = csi.VolumeCapability.AccessMode(mode=csi.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
CAPABILITY = csi.VolumeCapability(access_mode=_WRITER, mount=csi.VolumeCapability.MountVolume(fs_type="ext4"))


CHEAP: Mapping[str, str] = {"encrypted": "true", "pbkdf": "pbkdf2", "pbkdfIterations": "1000"}
"""A class for random keys."""


def _secrets(key: str) -> dict[str, str]:
    return {"CRYPTO_KEY_VALUE": key} if key else {}


def random_key() -> str:
    """32 random bytes of text."""
    return secrets.token_urlsafe(24)


class Running:
    """A server on a socket in `folder`, from its first answered Probe to the end of the block."""

    def __init__(self, folder: Path, argv: Sequence[str], tree: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.endpoint = folder / "csi.sock"
        self._argv = (*argv, str(self.endpoint))
        self._log = folder / "server.log"
        self._volumes: list[Volume] = []
        # Modules compiled beforehand, as in an installed package, though the tree may be read-only.
        self._environment = os.environ | {
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(folder.parent / "pycache"),
        }
        self._tree = tree
        if tree is not None:
            self._environment["PYTHONPATH"] = str(tree)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            state = self._process.poll()
            print(f"{self.endpoint} ({'running' if state is None else f'exit code {state}'}):", file=sys.stderr)
            print(*self._log.read_text(errors="replace").splitlines()[-_LINES:], sep="\n", file=sys.stderr, flush=True)
        for volume in self._volumes:
            # A benchmark that failed leaves some published or staged; of one that ended well none is.
            with suppress(grpc.RpcError):
                volume.unpublish()
                volume.unstage()
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def start(self) -> float:
        """Start it; returns the seconds from there to its first answer to a Probe."""
        started = time.perf_counter()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, cwd=self._tree, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        while not self._listens():
            if self._process.poll() is not None or time.perf_counter() - started > _START_SECONDS:
                raise RuntimeError(f"{self._argv} does not listen:\n{self._log.read_text(errors='replace')}")
            time.sleep(_POLL_SECONDS)
        self.client = Client(self.endpoint)
        self.client.probe()
        return time.perf_counter() - started

    def stop(self) -> None:
        """End it as Kubernetes does."""
        self.client.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_SECONDS)

    def restart(self) -> float:
        """End it and start it; returns what `start` does."""
        self.stop()
        return self.start()

    def new_volume(
        self, name: str, folder: Path, size: int, parameters: Mapping[str, str] = CHEAP, key: str | None = None
    ) -> "Volume":
        """Create a volume, and below `folder` the folder that kubelet would make to stage it.

        Its secret has `key`, by default a random one; "" is no secret.
        """
        key = random_key() if key is None else key
        made = self.client.create(name, size, parameters, key).volume
        volume = Volume(self, made.volume_id, folder, key, dict(made.volume_context))
        volume.staging_path.mkdir(parents=True, exist_ok=True)
        self._volumes.append(volume)
        return volume

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as caller, suppress(OSError):
            caller.connect(str(self.endpoint))
            return True
        return False


_SERVE = (str(Path(sys.executable).with_name("luks-csi")), "serve")


def our_server(
    folder: Path, tree: Path | None = None, options: Sequence[str] = (), program: Sequence[str] = _SERVE
) -> Running:
    """`luks-csi serve`, as it is installed; of another `tree` with its stubs built, where one is given."""
    return Running(
        folder,
        [
            *program, "--state-dir", str(folder / "state"), "--node-id", "bench", "--free-space-floor", "64Mi",
            "--threads", str(THREADS), "--log-format", "json", *options, "--endpoint",
        ],
        tree,
    )  # fmt: skip


def bare_server(folder: Path) -> Running:
    """`benchmarks.bare_server`."""
    return Running(folder, [sys.executable, "-m", "benchmarks.bare_server", str(THREADS)])


class Client:
    """Plain stubs: nothing between the clock and grpcio but what both servers need."""

    def __init__(self, endpoint: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{endpoint}", options=[("grpc.use_local_subchannel_pool", 1)])
        self._identity = csi_pb2_grpc.IdentityStub(self._channel)
        self.controller = csi_pb2_grpc.ControllerStub(self._channel)
        self.node = csi_pb2_grpc.NodeStub(self._channel)

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def probe(self) -> None:
        """Probe."""
        self._identity.Probe(csi.ProbeRequest(), timeout=_CALL_SECONDS)

    def create(
        self, name: str, size: int, parameters: Mapping[str, str] = CHEAP, key: str = ""
    ) -> csi.CreateVolumeResponse:
        """CreateVolume, encrypted; by default its key derivation is cheap, as is right for a random key."""
        request = csi.CreateVolumeRequest(
            name=name,
            capacity_range=csi.CapacityRange(required_bytes=size),
            volume_capabilities=[CAPABILITY],
            parameters=parameters,
            secrets=_secrets(key),
        )
        return self.controller.CreateVolume(request, timeout=_CALL_SECONDS)

    def delete(self, volume_id: str) -> None:
        """DeleteVolume."""
        self.controller.DeleteVolume(csi.DeleteVolumeRequest(volume_id=volume_id), timeout=_CALL_SECONDS)

    def page(self, entries: int, token: str = "") -> csi.ListVolumesResponse:
        """One page of ListVolumes."""
        request = csi.ListVolumesRequest(max_entries=entries, starting_token=token)
        return self.controller.ListVolumes(request, timeout=_CALL_SECONDS)


@dataclass(frozen=True)
class Volume:
    """A volume of a server, with the calls that kubelet makes for it; requests are made beforehand."""

    server: Running
    id: str
    folder: Path
    key: str = field(repr=False)
    context: Mapping[str, str]

    @property
    def staging_path(self) -> Path:
        """Where it is staged."""
        return self.folder / self.id / "stage"

    @property
    def target_path(self) -> Path:
        """Where it is published."""
        return self.folder / self.id / "target"

    def attach(self, node_id: str) -> None:
        """ControllerPublishVolume."""
        request = csi.ControllerPublishVolumeRequest(
            volume_id=self.id, node_id=node_id, volume_capability=CAPABILITY, volume_context=self.context
        )
        self.server.client.controller.ControllerPublishVolume(request, timeout=_CALL_SECONDS)

    def detach(self, node_id: str) -> None:
        """ControllerUnpublishVolume."""
        request = csi.ControllerUnpublishVolumeRequest(volume_id=self.id, node_id=node_id)
        self.server.client.controller.ControllerUnpublishVolume(request, timeout=_CALL_SECONDS)

    def stage(self) -> None:
        """NodeStageVolume."""
        request = csi.NodeStageVolumeRequest(
            volume_id=self.id,
            staging_target_path=str(self.staging_path),
            volume_capability=CAPABILITY,
            secrets=_secrets(self.key),
            volume_context=self.context,
        )
        self.server.client.node.NodeStageVolume(request, timeout=_CALL_SECONDS)

    def unstage(self) -> None:
        """NodeUnstageVolume."""
        request = csi.NodeUnstageVolumeRequest(volume_id=self.id, staging_target_path=str(self.staging_path))
        self.server.client.node.NodeUnstageVolume(request, timeout=_CALL_SECONDS)

    def publish(self) -> None:
        """NodePublishVolume."""
        request = csi.NodePublishVolumeRequest(
            volume_id=self.id,
            staging_target_path=str(self.staging_path),
            target_path=str(self.target_path),
            volume_capability=CAPABILITY,
            volume_context=self.context,
        )
        self.server.client.node.NodePublishVolume(request, timeout=_CALL_SECONDS)

    def unpublish(self) -> None:
        """NodeUnpublishVolume."""
        request = csi.NodeUnpublishVolumeRequest(volume_id=self.id, target_path=str(self.target_path))
        self.server.client.node.NodeUnpublishVolume(request, timeout=_CALL_SECONDS)

    def publish_and_unpublish(self) -> None:
        """What a pod that starts and ends costs."""
        self.publish()
        self.unpublish()

    def stats(self) -> None:
        """NodeGetVolumeStats of the staged volume."""
        request = csi.NodeGetVolumeStatsRequest(volume_id=self.id, volume_path=str(self.staging_path))
        self.server.client.node.NodeGetVolumeStats(request, timeout=_CALL_SECONDS)

    def delete(self) -> None:
        """DeleteVolume."""
        self.server.client.delete(self.id)


def for_bare(bare: Running, volume: Volume) -> Volume:
    """The same staged volume for the bare server, at a target of its own."""
    twin = _BareVolume(bare, volume.id, volume.folder, volume.key, volume.context)
    twin.target_path.mkdir()
    return twin


class _BareVolume(Volume):
    @property
    def target_path(self) -> Path:
        return self.folder / self.id / "bare-target"
