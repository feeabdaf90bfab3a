"""What the parts of the cluster must agree on: addresses, folders, the names of environment variables."""

import os
from pathlib import Path

# Inside the namespaces. The first is the host's end of the bridge, the second the service of the apiserver.
HOST, SERVICE = "10.99.0.1", "10.96.0.1"
BRIDGE = "br0"

# All that lives as long as the cluster, in memory: the runner mounts a tmpfs of its own on a folder that every system
# has and hardly anybody works in. /dev/shm will not do: a guest covers it before it reads its first program.
MEMORY = Path("/media")
SCRATCH = MEMORY / "cluster"
LOGS = SCRATCH / "logs"

KUBERNETES_BIN, CSI_ADDONS_BIN, DISK = "KUBERNETES_BIN", "CSI_ADDONS_BIN", "CLUSTER_DISK"
CLUSTER_CEPH = "CLUSTER_CEPH"  # whether nodes have an image with Ceph's libraries
ROOT = Path(__file__).parents[2]


def binaries() -> Path:
    """The folder of the Kubernetes binaries."""
    return Path(os.environ[KUBERNETES_BIN]).absolute()


def node_address(number: int) -> str:
    return f"10.99.0.{10 + number}"


def pod_subnet(number: int) -> str:
    return f"10.88.{number}.0/24"
