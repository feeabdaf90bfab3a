"""What is asked of a volume that is taken down meanwhile."""

from pathlib import Path
from typing import Any, cast

import pytest

from csi_driver.model.errors import NotFound
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.usage import Usages


class Mounted:
    """A volume that was mounted everywhere when it was looked at."""

    is_open = True
    number = None

    def of(self, _volume_id: str) -> "Mounted":
        return self

    def mount_at(self, _path: str) -> object:
        return self


def test_a_volume_that_goes_while_it_is_counted_is_not_there(tmp_path: Path) -> None:
    usages = Usages(cast("Any", None), cast("Presences", Mounted()))
    with pytest.raises(NotFound, match=r"was taken down at .* while it was looked at"):
        usages.of("pvc-1", str(tmp_path / "gone"))
