"""The KMS configuration, as Ceph-CSI has it: entries by id, from a file or, where there is none, from a ConfigMap.

It is read anew for each question, so that a change counts without a restart. An entry that is wrong is refused when it
is asked for, by its name; it does not disturb the others.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from csi_driver.host.files import read_file
from csi_driver.keys.base import Entry
from csi_driver.keys.fields import TYPE_FIELDS
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.model.errors import FailedPrecondition

CONFIG_MAP: Final = "csi-kms-connection-details"


class _NothingConfigured(FailedPrecondition):
    """There is no configuration, which is none that is wrong."""


class KmsConfig:
    """Finds entries in the file at `path`, else in the ConfigMap CONFIG_MAP of the driver's own namespace."""

    def __init__(self, path: Path, kubernetes: Kubernetes) -> None:
        self._path = path
        self._kubernetes = kubernetes

    def entry(self, kms_id: str) -> tuple[str, Entry]:
        """The type and the entry of that id.

        Raises FailedPrecondition when there is no such configuration or entry, or it cannot be read; Unavailable.
        """
        entries, place = self._read()
        found = entries.get(kms_id)
        if found is None:
            known = ", ".join(sorted(entries)) or "none"
            raise FailedPrecondition(
                f"there is no KMS {kms_id!r} in {place} (there is: {known}); add it or correct encryptionKMSID"
            )
        if isinstance(found, str):  # of the ConfigMap each value is a JSON text
            found = _decode(found.encode(), f"the entry {kms_id!r} in {place}")
        if not isinstance(found, dict):
            raise FailedPrecondition(f"the entry {kms_id!r} in {place} is no JSON object; correct it")
        for field in TYPE_FIELDS:
            if isinstance(kind := found.get(field), str) and kind:
                return kind, found
        raise FailedPrecondition(f"the entry {kms_id!r} in {place} does not say its {TYPE_FIELDS[0]}; add it")

    def ids(self) -> list[str]:
        """The ids of all entries, sorted; none where nothing is configured. Errors as `entry`."""
        try:
            return sorted(self._read()[0])
        except _NothingConfigured:
            return []

    def _read(self) -> tuple[Mapping[str, Any], str]:
        try:
            content = read_file(self._path)
        except FileNotFoundError:
            return self._config_map()
        except OSError as error:
            raise FailedPrecondition(
                f"the KMS configuration {self._path} cannot be read ({error.strerror}); correct its permissions"
            ) from None
        found = _decode(content, f"the KMS configuration {self._path}")
        if not isinstance(found, dict):
            raise FailedPrecondition(f"the KMS configuration {self._path} is no JSON object of entries by id")
        return found, str(self._path)

    def _config_map(self) -> tuple[Mapping[str, Any], str]:
        if not self._kubernetes.is_here:
            raise _NothingConfigured(
                f"no KMS is configured: there is no file {self._path}, and without a service account token no "
                f"ConfigMap can be read; mount the configuration there, as the components of deploy/kubernetes/kms do, "
                f"or name its place with --kms-config"
            )
        place = f"the ConfigMap {self._kubernetes.namespace}/{CONFIG_MAP}"
        found = self._kubernetes.config_map(self._kubernetes.namespace, CONFIG_MAP)
        if found is None:
            raise _NothingConfigured(f"no KMS is configured: there is neither a file {self._path} nor {place}")
        return found, place


def _decode(content: bytes, what: str) -> Any:
    try:
        return msgspec.json.decode(content)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors, and so is text that is no UTF-8
        raise FailedPrecondition(f"{what} is no JSON ({error}); correct it") from None
