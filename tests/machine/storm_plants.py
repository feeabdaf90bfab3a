"""`python -m tests.machine.storm_plants OPTION…`: a server whose programs find their device by name.

They do not hold it: when the server is killed before they have opened it, the loop device is free again, and the name
is that of whoever took it. The storm must go red (test_storm.py). The options are those of `luks-csi serve`.
"""

import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from csi_driver.host.commands import run_program
from csi_driver.host.workers import Workers
from csi_driver.volumes.driver import WARM
from tests.machine.canary_plants import serve_with

P = ParamSpec("P")
R = TypeVar("R")


class ForgetfulWorkers(Workers):
    """Leaves the descriptors behind that a program should hold."""

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if cast("object", function) is not run_program:
            return super().call(what, timeout, function, *args, **kwargs)
        by_name = tuple(str(word) for word in cast("tuple[object, ...]", args[0]))
        return super().call(what, timeout, cast("Callable[..., R]", function), by_name, **kwargs)


if __name__ == "__main__":
    serve_with(ForgetfulWorkers(WARM), sys.argv[1:])
