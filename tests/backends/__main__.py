"""`make backends-test`: the conformance suite of backends on real storage, in one summary line."""

import sys
from pathlib import Path

from tests import counted
from tests.backends.conftest import CHOSEN
from tests.backends.rigs import ON_REQUEST, RIGS

LEAST = 15
"""Tests of the suite on each backend: fewer mean that some were not run."""


def main() -> int:
    """Run them; the exit code is 0 when all of them ran and none failed."""
    chosen = [name for name in RIGS if name.startswith(CHOSEN) and (CHOSEN or name not in ON_REQUEST)]
    here = Path(__file__).parent
    of_lvm = ("test_lvm.py", "test_life.py", "test_move.py", "test_move_command.py", "test_move_kills.py")
    lvm = [here / name for name in of_lvm] if any(name.startswith("lvm") for name in chosen) else []
    of_rbd = ("test_rbd.py", "test_rbd_life.py", "test_rbd_adopt.py", "test_move_rbd.py")
    ceph = [here / name for name in of_rbd] if "rbd" in chosen else []
    count = counted.run([str(path) for path in (here / "test_conformance.py", *lvm, *ceph)])
    print(f"backends: {','.join(chosen)} {count}", flush=True)
    return int(not chosen or not count.is_green or len(count.ran) < LEAST * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
