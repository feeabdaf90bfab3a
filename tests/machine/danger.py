"""`make danger`: what lost data or let keys out in the field, on real device-mapper, in one summary line."""

import sys
import time
from pathlib import Path

import pytest

LEAST = 332
"""Tests that there are: fewer mean that some were not run."""

_HERE = Path(__file__).parent


class Count:
    """Counts the tests that ran and those that failed, set-up and clean-up (leaks) included."""

    def __init__(self) -> None:
        self.ran: set[str] = set()
        self.failed: set[str] = set()
        self.skipped: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped:
            self.skipped.add(report.nodeid)
        if report.when == "call":
            self.ran.add(report.nodeid)


def main() -> int:
    """Run them all; the exit code is 0 when all of them ran and none failed."""
    count, started = Count(), time.monotonic()
    files = [str(path) for path in sorted(_HERE.glob("test_danger*.py"))]
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", *files], plugins=[count])
    print(
        f"tests={len(count.ran)} failed={len(count.failed)} skipped={len(count.skipped)} "
        f"seconds={time.monotonic() - started:.0f}",
        flush=True,
    )
    return int(bool(code or count.failed or count.skipped or len(count.ran) < LEAST))


if __name__ == "__main__":
    sys.exit(main())
