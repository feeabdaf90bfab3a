"""How the drivers below the backend csi are called by what is built here."""

from contextlib import AbstractContextManager
from pathlib import Path

from csi_driver.backends.csidirect import Call, NodeBelow
from csi_driver.backends.csipins import Direct


def below(kubelet_dir: Path) -> Call:
    """Calls of the drivers that the kubelet with that folder knows; gRPC is loaded with the first one."""

    def call(volume_id: str, direct: Direct, seconds: float) -> AbstractContextManager[NodeBelow]:
        from csi_driver.rpc.below import calling

        return calling(kubelet_dir, volume_id, direct, seconds)

    return call
