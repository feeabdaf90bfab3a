"""`python -m tests.machine.storm_plants GATE OPTION…`: a server whose programs find their device by name.

They do not hold it, and wait at the gate, as on a busy node: when the server is killed before they have opened it, the
loop device is free again, and the name is that of whoever took it. The options are those of `luks-csi serve`.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar, cast

from csi_driver.host.commands import run_program
from csi_driver.host.workers import Workers
from csi_driver.volumes.driver import WARM
from tests.machine.canary_plants import serve_with
from tests.worker_tasks import run_when_told

P = ParamSpec("P")
R = TypeVar("R")


class ForgetfulWorkers(Workers):
    """Leaves the descriptors behind that a program should hold."""

    def __init__(self, gate: str) -> None:
        super().__init__(WARM)
        self._gate = gate

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if cast("object", function) is not run_program:
            return super().call(what, timeout, function, *args, **kwargs)
        by_name = tuple(str(word) for word in cast("tuple[object, ...]", args[0]))
        late = cast("Callable[..., R]", partial(run_when_told, self._gate))
        return super().call(what, timeout, late, by_name, **kwargs)


if __name__ == "__main__":
    serve_with(ForgetfulWorkers(sys.argv[1]), sys.argv[2:])
