"""`make danger`: what lost data or let keys out in the field, on real device-mapper, in one summary line."""

import sys
from pathlib import Path

from tests import counted

LEAST = 332
"""Tests that there are: fewer mean that some were not run."""

_HERE = Path(__file__).parent


def main() -> int:
    """Run them all; the exit code is 0 when all of them ran and none failed."""
    count = counted.run([str(path) for path in sorted(_HERE.glob("test_danger*.py"))])
    print(count, flush=True)
    return int(not count.is_green or len(count.ran) < LEAST)


if __name__ == "__main__":
    sys.exit(main())
