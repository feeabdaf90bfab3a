"""`python -m tests.machine.canary_plants PLANT OPTION…`: a server that lets key bytes out in one way.

The canary must go red for each of them (test_canary.py). The options are those of `luks-csi serve`.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from csi_driver.cli.logs import configure_logs
from csi_driver.cli.serve import serve as command
from csi_driver.cli.serve import settings_of
from csi_driver.host.hardening import harden_process
from csi_driver.host.log import log
from csi_driver.host.syscalls import NUMBERS, libc
from csi_driver.host.workers import Workers
from csi_driver.model.errors import CommandFailed
from csi_driver.model.secret import Passphrase
from csi_driver.rpc.server import driver_server, serve_until_told
from csi_driver.volumes.driver import WARM, Host, build_driver

P = ParamSpec("P")
R = TypeVar("R")

KEY_NAME = "planted"
_BYTES = slice(4, 12)
"""What of a key leaks: as few bytes as a truncated message may hold."""


def _log_bytes(secret: bytes) -> None:
    log.debug("trying the key", start=secret[_BYTES].decode())


def _show_in_arguments(secret: bytes) -> None:
    subprocess.run(["sh", "-c", "sleep 0.2; :", "sh", secret[_BYTES].decode()], check=True)


def _show_in_environment(secret: bytes) -> None:
    subprocess.run(["sh", "-c", "sleep 0.2; :"], check=True, env={**os.environ, "KEY": secret.decode()})


def _leave_in_a_file(secret: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", delete=False) as file:
        file.write(secret.hex().encode())


def _quote_in_an_error(secret: bytes) -> None:
    if not secret.startswith(b"{"):  # what a program of a KMS is asked: without an answer there is no volume to watch
        raise CommandFailed(f"cryptsetup did not take {secret!r}")


def _keep_in_a_readable_key(secret: bytes) -> None:
    libc.syscall(NUMBERS["add_key"], b"user", KEY_NAME.encode(), secret, len(secret), -4)  # into @u


PLANTS: dict[str, Callable[[bytes], None]] = {
    "log": _log_bytes,
    "arguments": _show_in_arguments,
    "environment": _show_in_environment,
    "file": _leave_in_a_file,
    "error": _quote_in_an_error,
    "key": _keep_in_a_readable_key,
    "core": lambda _: None,  # this server does not harden itself
}


class LeakingWorkers(Workers):
    """Lets out the passphrase of every call that has one."""

    def __init__(self, leak: Callable[[bytes], None]) -> None:
        super().__init__(WARM)
        self._leak = leak

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        for value in args:
            if isinstance(value, Passphrase):
                self._leak(value.reveal())
        return super().call(what, timeout, function, *args, **kwargs)


def main(plant: str, options: list[str]) -> None:
    """Serve as `luks-csi serve` does, but for the plant."""
    if plant != "core":
        harden_process()
    serve_with(LeakingWorkers(PLANTS[plant]), options)


def serve_with(workers: Workers, options: list[str]) -> None:
    """Serve with workers that have a bug."""
    with command.make_context("serve", options) as context:
        settings = settings_of(context.params)
    configure_logs(settings.log_format, settings.log_level)
    driver = build_driver(settings, Host(workers=workers))
    driver.start()
    try:
        serve_until_told(driver_server(driver))
    finally:
        driver.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
