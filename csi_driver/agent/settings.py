"""What an administrator can set of `luks-csi image-agent`; `csi_driver.cli.image_agent` gives each an option."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AgentSettings:
    """What an administrator can set. `address` is HOST:PORT where other agents reach this one, `listen` what it listens
    at; `account` is whose tokens are agents'. `rate` is in bytes a second, 0 without a limit.
    Files of Images that are gone stay for `leftover_seconds`.
    """

    node: str
    state_dir: Path
    address: str
    listen: tuple[str, int]
    tls_dir: Path
    token_file: Path
    account: str
    rate: int = 0
    jobs_at_once: int = 2
    allow_local: bool = False
    leftover_seconds: float = 3600.0
    audit_file: Path | None = None

    @property
    def images(self) -> Path:
        """The folder of the images."""
        return self.state_dir / "images"
