"""`python -m tests.counted PATH…`: tests by pytest, and how many ran, failed and were skipped, in one line."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest


@dataclass
class Count:
    """Counts the tests that ran and those that failed, set-up and clean-up included; `code` is pytest's own.

    `reasons` has how many were skipped for each.
    """

    ran: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    code: int = 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped:
            self.skipped.add(report.nodeid)
            said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons[said.removeprefix("Skipped: ")] += 1
        if report.when == "call" and not report.skipped:
            self.ran.add(report.nodeid)

    @property
    def is_green(self) -> bool:
        """Whether all of them ran, and none failed."""
        return not (self.code or self.failed or self.skipped)

    def __str__(self) -> str:
        return f"tests={len(self.ran)} failed={len(self.failed)} skipped={len(self.skipped)} seconds={self.seconds:.0f}"


_ENDED = ("-o", "faulthandler_timeout=1800", "-o", "faulthandler_exit_on_timeout=true")
"""A test that its own limit of time does not end, or whose clean-up hangs, tells where it is and ends all."""


def run(paths: Sequence[str]) -> Count:
    """Run the tests there."""
    count, started = Count(), time.monotonic()
    count.code = pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", *_ENDED, *paths], plugins=[count])
    count.seconds = time.monotonic() - started
    return count


def main() -> int:
    count = run(sys.argv[1:])
    print(count, flush=True)
    return int(not count.is_green)


if __name__ == "__main__":
    sys.exit(main())
