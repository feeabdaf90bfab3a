"""csi-sanity, as `make sanity` runs it."""

import pytest

from tests.machine import sanity


@pytest.mark.timeout(600)
def test_csi_sanity_fails_nowhere_and_skips_what_is_listed() -> None:
    assert sanity.main() == 0
