"""The volume_context of a volume: what Kubernetes keeps and shows of it. The record decides; the context only tells."""

from collections.abc import Mapping

from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.volume import VolumeRecord

ENCRYPTED = "encrypted"
BACKEND = "backend"
COPIES = "copies"


def volume_context(record: VolumeRecord, backend: str) -> dict[str, str]:
    """The context that CreateVolume returns."""
    context = {ENCRYPTED: _truth(record), BACKEND: backend}
    if record.parameters.replicas > 1:
        context[COPIES] = f"1 (numberOfReplicas {record.parameters.replicas} was asked for)"
    return context


def check_context(record: VolumeRecord, context: Mapping[str, str]) -> None:
    """Raise FailedPrecondition when context and record disagree about encryption."""
    told = context.get(ENCRYPTED)
    if told is not None and told != _truth(record):
        raise FailedPrecondition(
            f"the PersistentVolume of volume {record.id} says encrypted={told!r} and the volume's own record says "
            f"{_truth(record)!r}; the record decides, so correct the PersistentVolume"
        )


def _truth(record: VolumeRecord) -> str:
    return "true" if record.encryption is not None else "false"
