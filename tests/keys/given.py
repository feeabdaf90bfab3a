"""Key sources that a test has made, in the place of what a configuration says."""

from pathlib import Path

from csi_driver.host.workers import Workers
from csi_driver.keys.audit import Audit
from csi_driver.keys.base import KeyRequest, KeySource
from csi_driver.keys.config import KmsConfig
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.keys.sources import KeySources
from csi_driver.model.errors import FailedPrecondition

NOWHERE = Path("/nonexistent")


class GivenSources(KeySources):
    """Sources by the ids of a configuration that is not there."""

    def __init__(self, audit: Path | None = None, **given: KeySource) -> None:
        nobody = Kubernetes("", "")
        super().__init__(KmsConfig(NOWHERE, nobody), nobody, Workers(()), NOWHERE, Audit(audit))
        self.given = given

    def _source(self, kms_id: str | None, request: KeyRequest) -> tuple[str, KeySource]:
        if kms_id not in self.given:
            raise FailedPrecondition(f"there is no KMS {kms_id!r}")
        return "given", self.given[kms_id]
