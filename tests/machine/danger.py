"""`make danger`: what lost data or let keys out in the field, on real device-mapper, in one summary line.

BACKEND says what the volumes lie in. What is not for all kinds of storage is told with its reason before that line.
"""

import sys
from pathlib import Path

from tests import counted
from tests.machine.places import BACKEND, OF_FILES, REASONS

LEAST = {"loopfile": 332, "rbd": 310, "csi": 290}.get(BACKEND, 290)
"""Tests that there are: fewer mean that some were not run."""

_HERE = Path(__file__).parent


def main() -> int:
    """Run them all; the exit code is 0 when all of them ran, but for those with a known reason, and none failed."""
    count = counted.run([str(path) for path in sorted(_HERE.glob("test_danger*.py"))])
    for reason, tests in sorted(count.reasons.items()):
        print(f"skipped {tests}: {reason}")
    print(f"backend={BACKEND} {count}", flush=True)
    is_known = not OF_FILES and set(count.reasons) <= set(REASONS.values())
    is_green = not (count.code or count.failed) if is_known else count.is_green
    return int(not is_green or len(count.ran) < LEAST)


if __name__ == "__main__":
    sys.exit(main())
