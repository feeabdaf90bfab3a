"""`make bench`: prints the table; exits 1 when a bound is missed.

`python -m benchmarks [GROUP…]` measures some groups of rows only. Root and device-mapper are needed; $MACHINE_STATE, or
the temporary directory, is where the volumes are. The group `before` wants $BENCH_BASE too.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import backends, before, calls, data, keys, many, restart, scale, staging
from benchmarks.table import Row, table

_GROUPS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    "staging": staging.rows,
    "calls": calls.rows,
    "scale": scale.rows,
    "many": many.rows,
    "restart": restart.rows,
    "before": before.rows,
    "keys": keys.rows,
    "data": data.rows,
    "backends": backends.rows,
    "backends-data": backends.data_rows,
    "backends-many": backends.many_rows,
}
_APART = {"keys", "data", "backends", "backends-data", "backends-many"}
"""Measured when named alone: `make bench-keys`, `make bench-data`, `make bench-backends`."""


def main(names: Sequence[str]) -> int:
    """Measure the groups of these names, or all; returns the exit code."""
    if unknown := set(names) - set(_GROUPS):
        print(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(_GROUPS)}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("MACHINE_STATE"), prefix="bench-") as folder:
        for name in names or [name for name in _GROUPS if name not in _APART]:
            own = Path(folder, name)
            own.mkdir()
            for row in _GROUPS[name](own):
                print(f"{name}: {row.what}: {row.cells()[3]}", file=sys.stderr, flush=True)
                rows.append(row)
    for line in table(rows):
        print(line)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
