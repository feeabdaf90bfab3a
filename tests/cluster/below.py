"""A small CSI driver for raw block volumes, below ours: files of a folder that every node sees, shown by loop devices.

    python -m tests.cluster.below controller SOCKET FOLDER KIND
    python -m tests.cluster.below node SOCKET FOLDER KIND NODE

KIND is `attached`, with PUBLISH_UNPUBLISH_VOLUME and STAGE_UNSTAGE_VOLUME, `plain`, with neither, or `staged`, with the
second alone. In FOLDER each volume is a file; `<volume>.node` says which node it is attached to, and `told` has a line
for each device that was taken away while something was on it.
"""

import contextlib
import os
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import grpc

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc

KINDS = {"attached": "attached.below.test", "plain": "plain.below.test"}
"""Those that are installed in the cluster."""
_NAMES = {**KINDS, "staged": "staged.below.test"}
MOST_VOLUMES = 60
_Plugin, _Controller, _Node = csi.PluginCapability, csi.ControllerServiceCapability, csi.NodeServiceCapability


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


class Identity(csi_pb2_grpc.IdentityServicer):
    """Who it is."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def GetPluginInfo(
        self, request: csi.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginInfoResponse:
        return csi.GetPluginInfoResponse(name=_NAMES[self._kind], vendor_version="1")

    def GetPluginCapabilities(
        self, request: csi.GetPluginCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginCapabilitiesResponse:
        service = _Plugin.Service(type=_Plugin.Service.CONTROLLER_SERVICE)
        expansion = _Plugin.VolumeExpansion(type=_Plugin.VolumeExpansion.ONLINE)
        return csi.GetPluginCapabilitiesResponse(
            capabilities=[_Plugin(service=service), _Plugin(volume_expansion=expansion)]
        )

    def Probe(self, request: csi.ProbeRequest, context: grpc.ServicerContext) -> csi.ProbeResponse:
        return csi.ProbeResponse()


class _Volumes(csi_pb2_grpc.ControllerServicer):
    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._kind = kind

    def ControllerGetCapabilities(
        self, request: csi.ControllerGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.ControllerGetCapabilitiesResponse:
        kinds = [_Controller.RPC.CREATE_DELETE_VOLUME, _Controller.RPC.EXPAND_VOLUME]
        if self._kind == "attached":
            kinds.append(_Controller.RPC.PUBLISH_UNPUBLISH_VOLUME)
        return csi.ControllerGetCapabilitiesResponse(
            capabilities=[_Controller(rpc=_Controller.RPC(type=kind)) for kind in kinds]
        )

    def CreateVolume(self, request: csi.CreateVolumeRequest, context: grpc.ServicerContext) -> csi.CreateVolumeResponse:
        if request.parameters.get("only") == "files" and any(
            each.HasField("block") for each in request.volume_capabilities
        ):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "block volumes are not supported here")
        size = -(-request.capacity_range.required_bytes // 4096) * 4096
        with (self._folder / request.name).open("ab") as file:
            file.truncate(max(size, file.seek(0, os.SEEK_END)))
        return csi.CreateVolumeResponse(volume=csi.Volume(volume_id=request.name, capacity_bytes=size))

    def DeleteVolume(self, request: csi.DeleteVolumeRequest, context: grpc.ServicerContext) -> csi.DeleteVolumeResponse:
        if (self._folder / f"{request.volume_id}.node").exists():
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it is attached")
        (self._folder / request.volume_id).unlink(missing_ok=True)
        return csi.DeleteVolumeResponse()

    def ControllerPublishVolume(
        self, request: csi.ControllerPublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerPublishVolumeResponse:
        place = self._folder / f"{request.volume_id}.node"
        if place.exists() and place.read_text() != request.node_id:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"it is attached to {place.read_text()}")
        place.write_text(request.node_id)
        return csi.ControllerPublishVolumeResponse(publish_context={"on": request.node_id})

    def ControllerUnpublishVolume(
        self, request: csi.ControllerUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerUnpublishVolumeResponse:
        place = self._folder / f"{request.volume_id}.node"
        if place.exists() and place.read_text() == request.node_id:
            place.unlink()
        return csi.ControllerUnpublishVolumeResponse()

    def ControllerExpandVolume(
        self, request: csi.ControllerExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerExpandVolumeResponse:
        size = -(-request.capacity_range.required_bytes // 4096) * 4096
        file = self._folder / request.volume_id
        os.truncate(file, max(size, file.stat().st_size))
        return csi.ControllerExpandVolumeResponse(capacity_bytes=size, node_expansion_required=True)


class Devices(csi_pb2_grpc.NodeServicer):
    """Loop devices of a node."""

    def __init__(self, folder: Path, kind: str, node: str) -> None:
        self._folder = folder
        self._kind = kind
        self._node = node

    def NodeGetInfo(self, request: csi.NodeGetInfoRequest, context: grpc.ServicerContext) -> csi.NodeGetInfoResponse:
        return csi.NodeGetInfoResponse(node_id=self._node, max_volumes_per_node=MOST_VOLUMES)

    def NodeGetCapabilities(
        self, request: csi.NodeGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.NodeGetCapabilitiesResponse:
        kinds = [_Node.RPC.EXPAND_VOLUME]
        if self._kind != "plain":
            kinds.append(_Node.RPC.STAGE_UNSTAGE_VOLUME)
        return csi.NodeGetCapabilitiesResponse(capabilities=[_Node(rpc=_Node.RPC(type=kind)) for kind in kinds])

    def NodeStageVolume(
        self, request: csi.NodeStageVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeStageVolumeResponse:
        if self._kind == "attached" and request.publish_context.get("on") != self._node:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"attached to {dict(request.publish_context)}")
        self._show(request.volume_id)
        return csi.NodeStageVolumeResponse()

    def NodeUnstageVolume(
        self, request: csi.NodeUnstageVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeUnstageVolumeResponse:
        self._take_away(request.volume_id)
        return csi.NodeUnstageVolumeResponse()

    def NodePublishVolume(
        self, request: csi.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodePublishVolumeResponse:
        target = Path(request.target_path)
        device = self._show(request.volume_id)
        target.touch()
        if not os.path.exists(target) or not target.is_block_device():
            _run("mount", "--bind", device, str(target))
        return csi.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi.NodeUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeUnpublishVolumeResponse:
        target = Path(request.target_path)
        if f" {target} " in Path("/proc/self/mountinfo").read_text():
            _run("umount", str(target))
        target.unlink(missing_ok=True)
        if self._kind == "plain":
            self._take_away(request.volume_id)
        return csi.NodeUnpublishVolumeResponse()

    def NodeExpandVolume(
        self, request: csi.NodeExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeExpandVolumeResponse:
        # hostfs does not see that the host has lengthened a file that is open here.
        size = -(-request.capacity_range.required_bytes // 4096) * 4096
        os.truncate(self._folder / request.volume_id, size)
        for device in self._shown(request.volume_id):
            _run("losetup", "--set-capacity", device)
        return csi.NodeExpandVolumeResponse(capacity_bytes=request.capacity_range.required_bytes)

    def _shown(self, volume_id: str) -> list[str]:
        return _run("losetup", "--noheadings", "-O", "NAME", "-j", str(self._folder / volume_id)).split()

    def _show(self, volume_id: str) -> str:
        if shown := self._shown(volume_id):
            return shown[0]
        # Another node has written to it meanwhile.
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return _run("losetup", "--find", "--show", str(self._folder / volume_id))

    def _take_away(self, volume_id: str) -> None:
        for device in self._shown(volume_id):
            with contextlib.suppress(OSError):
                if on_top := os.listdir(f"/sys/block/{os.path.basename(device)}/holders"):
                    with (self._folder / "told").open("a") as told:
                        told.write(f"{self._node}: {device} of {volume_id} was taken away from under {on_top}\n")
            _run("losetup", "--detach", device)


def main(role: str, socket: str, folder: str, kind: str, node: str = "") -> None:
    """Serve until the process is ended."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    csi_pb2_grpc.add_IdentityServicer_to_server(Identity(kind), server)
    if role == "controller":
        csi_pb2_grpc.add_ControllerServicer_to_server(_Volumes(Path(folder), kind), server)
    else:
        csi_pb2_grpc.add_NodeServicer_to_server(Devices(Path(folder), kind, node), server)
    server.add_insecure_port(f"unix://{socket}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(*sys.argv[1:])
