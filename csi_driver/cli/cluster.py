"""The way of commands to a cluster; the libraries for it are an extra."""

from pathlib import Path
from typing import TYPE_CHECKING

from csi_driver.cli.loading import loading
from csi_driver.model.errors import FailedPrecondition

if TYPE_CHECKING:
    from csi_driver.kube.client import Kube


def cluster(kubeconfig: Path | None = None) -> "Kube":
    """A client of the Kubernetes API. Raises FailedPrecondition where libraries or kubeconfig are missing."""
    with loading():
        try:
            from csi_driver.kube.client import Kube
        except ModuleNotFoundError as error:
            raise FailedPrecondition(
                f"the Python package {error.name} is not installed; install luks-csi[operator], or use luks-csi's image"
            ) from None
    return Kube.of(kubeconfig)
