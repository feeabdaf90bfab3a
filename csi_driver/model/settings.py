"""What an administrator can set; `csi_driver.cli.serve` gives each a flag and an environment variable."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

MIB = 1 << 20


class Service(StrEnum):
    """A CSI service of the server."""

    IDENTITY = "identity"
    CONTROLLER = "controller"
    NODE = "node"


class LogFormat(StrEnum):
    """How log lines look."""

    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds and costs. `format` covers luksFormat and mkfs, `unlock` one key derivation."""

    format_seconds: float = 300.0
    unlock_seconds: float = 120.0
    mount_seconds: float = 120.0
    pbkdf_memory_kib: int = 64 * 1024
    unlocks_at_once: int = 4


@dataclass(frozen=True)
class Settings:
    """Settings of `luks-csi serve`; sizes in bytes, times in seconds."""

    endpoint: Path = Path("/run/luks-csi/csi.sock")
    node_id: str = ""
    driver_name: str = "luks.csi.internal"
    services: frozenset[Service] = frozenset(Service)
    state_dir: Path = Path("/var/lib/luks-csi")
    require_mount: bool = False
    kubelet_dir: Path = Path("/var/lib/kubelet")
    backend: str = "loopfile"
    volume_group: str = ""
    thin_pool_limit: int = 80
    namespace: str = ""
    holder_image: str = ""
    pod_name: str = ""
    driver_below: str = ""
    ceph_config: Path = Path("/etc/ceph-csi-config/config.json")
    ceph_secret: Path | None = None
    free_space_floor: int = 1024 * MIB
    threads: int = 16
    grace_seconds: float = 20.0
    log_format: LogFormat = LogFormat.AUTO
    log_level: str = "info"
    http_address: str | None = None
    kms_config: Path = Path("/etc/ceph-csi-encryption-kms-config/config.json")
    kms_programs: Path = Path("/usr/lib/luks-csi/kms")
    audit_file: Path | None = None
    addons_endpoint: Path | None = None
    limits: Limits = Limits()

    @property
    def holders_dir(self) -> Path:
        """Where, on each node, the backend csi and its holder pods meet: beside the socket that kubelet calls."""
        return self.kubelet_dir / "plugins" / self.driver_name / "holders"

    @property
    def topology_key(self) -> str:
        """The topology key under which a volume names its node."""
        return f"topology.{self.driver_name}/node"
