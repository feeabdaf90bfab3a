"""`make keys-test`: key sources against real servers, then on real dm-crypt, in one summary line.

`python -m tests.keys.suite GUEST…`: what stands before a command that is to run where device-mapper is.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

LEAST = 560
"""Tests that there are: fewer mean that some were not run."""

_DEVICE_TESTS = ("tests/machine/test_keys.py", "tests/machine/test_rotation.py")
_LINE = re.compile(r"tests=(\d+) failed=(\d+) skipped=(\d+) seconds=(\d+)\s*")


@dataclass(frozen=True)
class Half:
    """What came of a part."""

    tests: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: int = 0
    ended_well: bool = False


def run(argv: Sequence[str]) -> Half:
    """Run a command that ends with the line of tests.counted, and show all else that it says."""
    found = Half()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if numbers := _LINE.fullmatch(line):
                tests, failed, skipped, seconds = map(int, numbers.groups())
                found = Half(tests, failed, skipped, seconds, ended_well=True)
            else:
                print(line, end="", flush=True)
    return replace(found, ended_well=found.ended_well and not running.returncode)


def summed_up(halves: Sequence[Half], least: int) -> tuple[str, bool]:
    """The summary line, and whether all is well."""
    tests, failed, skipped, seconds = (
        sum(getattr(half, name) for half in halves) for name in ("tests", "failed", "skipped", "seconds")
    )
    well = all(half.ended_well for half in halves) and not failed and not skipped and tests >= least
    return f"keys: tests={tests} failed={failed} skipped={skipped} seconds={seconds}", well


def main() -> int:
    """Run both; the exit code is 0 when all tests ran and none failed."""
    counted = (sys.executable, "-m", "tests.counted")
    line, well = summed_up([run([*counted, "tests/keys"]), run([*sys.argv[1:], *counted, *_DEVICE_TESTS])], LEAST)
    print(line, flush=True)
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
