"""What is said when the kernel does not map an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from csi_driver.backends.rbddevices import MappedVolumes, Pin
from csi_driver.backends.rbderrors import CephMissing
from csi_driver.host.files import Files
from csi_driver.host.krbd import MappedImages
from csi_driver.model.errors import CommandFailed, DriverError, FailedPrecondition

PIN = Pin(fsid="f", namespace="", pool_number=1, image_id="1f", image="csi-vol-v.0123456789")


MISSING = CephMissing("rbd map failed: rbd: map failed: (2) No such file or directory")
"""Where the module is not there, and where the image is not."""
REFUSED = CommandFailed("rbd: unknown map option 'foo'")


class Pool:
    """One whose images cannot be mapped."""

    def __init__(self, error: DriverError) -> None:
        self._error = error

    def map(self, image: str, options: Sequence[str]) -> str:
        assert (image, options) == (PIN.image, ())
        raise self._error


@pytest.mark.parametrize(
    ("bus", "raised", "error", "said"),
    [
        (".", MISSING, CephMissing, "No such file or directory"),
        ("none", REFUSED, CommandFailed, "unknown map option"),
        (
            "none",
            MISSING,
            FailedPrecondition,
            r"volume v\.0123456789 cannot be mapped: .* is not loaded .*; run 'modprobe rbd'",
        ),
    ],
)
def test_a_module_that_is_not_loaded_is_told_from_an_image_that_is_not_there(
    tmp_path: Path, bus: str, raised: DriverError, error: type[DriverError], said: str
) -> None:
    workers: Any = None
    volumes = MappedVolumes(tmp_path, Files(), workers, MappedImages(str(tmp_path / bus)), 1)
    volumes.prepare()
    pool: Any = Pool(raised)
    with pytest.raises(error, match=said):
        volumes.map("v.0123456789", pool, PIN, ())
