"""`make operator-test`: operator and agents at a real Kubernetes API, in one summary line."""

import sys

from tests.counted import run

LEAST = 170
"""Tests that there are: fewer mean that some were not run."""


def main() -> int:
    """The exit code is 0 when all tests ran and none failed."""
    count = run(["tests/operator"])
    print(f"operator: {count}", flush=True)
    return int(not count.is_green or len(count.ran) < LEAST)


if __name__ == "__main__":
    sys.exit(main())
