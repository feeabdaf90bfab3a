"""The least that a CSI server in Python can be: sync grpcio, the same stubs, mount(2) and umount(2), nothing else.

No check, no lock, no record, no log: what publishing and Probe cost above this is what our care costs.
`python -m benchmarks.bare_server THREADS SOCKET`
"""

import ctypes
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc

_MS_BIND = 0x1000
_libc = ctypes.CDLL(None, use_errno=True)


class _Identity(csi_pb2_grpc.IdentityServicer):
    def Probe(self, request: csi.ProbeRequest, context: grpc.ServicerContext) -> csi.ProbeResponse:
        return csi.ProbeResponse(ready=BoolValue(value=True))


class _Node(csi_pb2_grpc.NodeServicer):
    def NodePublishVolume(
        self, request: csi.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodePublishVolumeResponse:
        source, target = request.staging_target_path.encode(), request.target_path.encode()
        _check(_libc.mount(source, target, None, ctypes.c_ulong(_MS_BIND), None))
        return csi.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi.NodeUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeUnpublishVolumeResponse:
        _check(_libc.umount2(request.target_path.encode(), 0))
        return csi.NodeUnpublishVolumeResponse()


def main(threads: int, path: str) -> None:
    """Serve until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if os.path.exists(path):
        os.unlink(path)
    server = grpc.server(ThreadPoolExecutor(threads))
    csi_pb2_grpc.add_IdentityServicer_to_server(_Identity(), server)
    csi_pb2_grpc.add_NodeServicer_to_server(_Node(), server)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    signal.sigwait({signal.SIGTERM})
    server.stop(grace=1).wait()


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
