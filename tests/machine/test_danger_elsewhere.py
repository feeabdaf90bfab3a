"""What no storage but files can do is refused."""

import pytest

from csi_driver.model.errors import FailedPrecondition
from tests.machine.node import VOLUME, Node, fingerprint
from tests.machine.test_conversion import reencrypt

REFUSED = rf"{VOLUME} cannot be moved to another volume key: the backend \w+ has no"


def test_a_move_to_another_volume_key_is_refused_and_changes_nothing(used: Node) -> None:
    """In use or not: there is no storage beside a volume's own."""
    before, record = fingerprint(used.disk()), used.record()
    with pytest.raises(FailedPrecondition, match=REFUSED):
        reencrypt(used)
    assert (fingerprint(used.disk()), used.record()) == (before, record)
    used.stage()
    with pytest.raises(FailedPrecondition, match=REFUSED):
        reencrypt(used)
    assert used.record() == record
    assert used.read() == "precious"
    used.unstage()
