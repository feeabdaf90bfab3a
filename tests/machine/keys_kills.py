"""`make keys-kills`: the fault suite, of what changes keys and of volumes whose key a KMS wraps alone.

Every step fails, or the server is killed before, during and after it; the volume must open with its recorded key and
hold its data each time. SEED and COUNT as in `make faults`.
"""

import os
import random
import sys
import time
from collections.abc import Sequence

from tests.machine.fault_points import Point
from tests.machine.faults import cases_of, lab

LEAST_POINTS = 40


def of_keys(points: Sequence[Point]) -> list[Point]:
    """Those of this suite."""
    return [point for point in points if point.call == "rotate" or point.scenario == "kms"]


def main() -> int:
    """Run it; the exit code is 0 when nothing was lost or leaked."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 100_000)
    count = int(os.environ.get("COUNT") or 0)
    started = time.monotonic()
    with lab(seed=seed) as tried:
        points = of_keys(tried.record())
        chosen = random.Random(seed).sample(points, min(count, len(points))) if count else points
        result = tried.try_all(cases_of(chosen))
    print(
        f"keys: points={len(chosen)} cases={result.cases} kills={result.kills} busy={result.busy} "
        f"lost={len(result.lost)} leaked={len(result.leaked)} seconds={time.monotonic() - started:.0f} seed={seed}"
    )
    return 0 if not (result.lost or result.leaked) and len(points) >= LEAST_POINTS else 1


if __name__ == "__main__":
    sys.exit(main())
