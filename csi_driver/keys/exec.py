"""KMS type `exec`: a program of the node that wraps and unwraps, for whatever has no type of its own (PKCS#11, say).

It gets a JSON object on standard input and answers with one on standard output (docs/kms.md). It runs in a worker, so
that the server forks nothing, and with an empty environment.
"""

import base64
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from csi_driver.host.workers import Workers
from csi_driver.keys.base import SECONDS, EntryReader, Wrapped
from csi_driver.model.errors import DeadlineExceeded, FailedPrecondition, KeyLost, PermissionDenied, Unavailable
from csi_driver.model.secret import Passphrase
from csi_driver.model.text import printable
from csi_driver.model.volume import KeyTrail

_LARGEST_ANSWER: Final = 64 * 1024
_MOST_QUOTED: Final = 200
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_GRACE: Final = 2.0
_FAILURES: Final = {3: KeyLost, 4: PermissionDenied, 5: Unavailable}
"""Exit codes that a program may tell its situation by; any other one is FailedPrecondition."""


class ExecWrapper:
    """Wraps by the program that the entry names, one of those in `folder`: an entry chooses, it brings none."""

    def __init__(self, reader: EntryReader, workers: Workers, folder: Path) -> None:
        self._where = reader.where
        self._workers = workers
        self._seconds = reader.seconds("timeoutSeconds", SECONDS)
        name = reader.text("program")
        if "/" in name or name.startswith("."):
            raise FailedPrecondition(
                f"the field program of {self._where} must be the name of a program in {folder}, without a path"
            )
        self._argv = [str(folder / name), *reader.texts("arguments")]

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        answer = self._ask("wrap", name, {"key": base64.b64encode(key.reveal()).decode()})
        text = answer.get("wrapped")
        if not isinstance(text, str) or not text:
            raise FailedPrecondition(f"the program of {self._where} gave no text as wrapped; correct it")
        return Wrapped(text, str(answer.get("key_id", "")), str(answer.get("key_version", "")))

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        told = {"wrapped": trail.wrapped, "key_id": trail.key_id, "key_version": trail.key_version}
        try:
            key = base64.b64decode(str(self._ask("unwrap", trail.name, told).get("key", "")), validate=True)
        except ValueError:
            key = b""
        if not key:
            raise FailedPrecondition(f"the program of {self._where} gave no key in base64; correct it")
        return Passphrase(key)

    def check(self) -> str:
        self._ask("check", "", {})
        return f"{self._argv[0]} answers"

    def close(self) -> None:
        """Nothing is open."""

    def _ask(self, operation: str, name: str, more: dict[str, str]) -> dict[str, Any]:
        request = Passphrase(msgspec.json.encode({"operation": operation, "name": name, **more}))
        with self._workers.session():
            code, output, said = self._workers.call(
                f"the program of {self._where}", self._seconds + _GRACE, run_program, self._argv, request, self._seconds
            )
        if code:
            words = f": {said}" if said else ""
            raise _FAILURES.get(code, FailedPrecondition)(
                f"the program {self._argv[0]} of {self._where} ended with code {code}{words}"
            )
        try:
            answer = msgspec.json.decode(output.reveal())
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors, and so is text that is no UTF-8
            answer = None
        if not isinstance(answer, dict):
            raise FailedPrecondition(f"the program {self._argv[0]} of {self._where} wrote no JSON object; correct it")
        return answer


def run_program(argv: list[str], request: Passphrase, seconds: float) -> tuple[int, Passphrase, str]:
    """Run it in a worker: exit code, standard output, and the last line of standard error, shortened.

    It has a session of its own, and what it has started there ends with it. Raises FailedPrecondition when it cannot be
    started or answers with too much, DeadlineExceeded.
    """
    with open(os.memfd_create("request", os.MFD_CLOEXEC), "r+b", buffering=0) as given:
        given.write(request.reveal())
        given.seek(0)
        try:
            process = subprocess.Popen(
                argv,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PATH": _PATH, "LC_ALL": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise FailedPrecondition(
                f"the program {argv[0]} cannot be started ({os.strerror(error.errno or 0)}); install it there, "
                f"executable"
            ) from None
    with process:
        try:
            output, said = _read(process, time.monotonic() + seconds)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the program {argv[0]} did not end within {seconds:g} s; look what it waits for"
            ) from None
        except OverflowError:
            raise FailedPrecondition(
                f"the program {argv[0]} wrote more than {_LARGEST_ANSWER} bytes; correct it"
            ) from None
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # which is still there: nobody has waited for it yet
    lines = said.decode(errors="replace").strip().splitlines()
    return process.returncode, Passphrase(output), printable(lines[-1][:_MOST_QUOTED]) if lines else ""


def _read(process: "subprocess.Popen[bytes]", end: float) -> tuple[bytes, bytes]:
    """What it writes until it ends: its standard output, and the last of its standard error.

    Others whom it has started may keep both open. Raises TimeoutError, OverflowError where the answer is too long.
    """
    output, said = bytearray(), bytearray()
    ended = os.pidfd_open(process.pid)
    with selectors.DefaultSelector() as selector, open(ended, "rb", buffering=0):
        selector.register(ended, selectors.EVENT_READ)
        for pipe, into in ((process.stdout, output), (process.stderr, said)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, into)
        is_running = True
        while is_running:
            if (left := end - time.monotonic()) <= 0:
                raise TimeoutError
            is_running = not any(key.data is None for key, _ in selector.select(left))
            for key in [each for each in selector.get_map().values() if each.data is not None]:
                if _drained(key.fd, key.data):
                    selector.unregister(key.fileobj)
                if len(output) > _LARGEST_ANSWER:
                    raise OverflowError
                del said[:-_LARGEST_ANSWER]
    return bytes(output), bytes(said)


def _drained(pipe: int, into: bytearray) -> bool:
    """Read what is in a pipe, within bounds; whether it is closed."""
    while len(into) <= 2 * _LARGEST_ANSWER:
        try:
            piece = os.read(pipe, _LARGEST_ANSWER)
        except BlockingIOError:
            return False
        into += piece
        if not piece:
            return True
    return False
