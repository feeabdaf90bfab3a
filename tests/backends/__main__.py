"""`make backends-test`: the conformance suite of backends on real storage, in one summary line."""

import sys
import time
from pathlib import Path

import pytest

from tests.backends.conftest import CHOSEN
from tests.backends.rigs import RIGS
from tests.machine.danger import Count

LEAST = 17
"""Tests of the suite on each backend: fewer mean that some were not run."""


def main() -> int:
    """Run them; the exit code is 0 when all of them ran and none failed."""
    chosen = [name for name in RIGS if name.startswith(CHOSEN)]
    count, started = Count(), time.monotonic()
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", str(Path(__file__).parent)], plugins=[count])
    print(
        f"backends: {','.join(chosen)} tests={len(count.ran)} failed={len(count.failed)} "
        f"skipped={len(count.skipped)} seconds={time.monotonic() - started:.0f}",
        flush=True,
    )
    return int(bool(code or not chosen or count.failed or len(count.ran) < LEAST * len(chosen)))


if __name__ == "__main__":
    sys.exit(main())
