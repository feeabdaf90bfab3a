"""KMS type `exec`: a program of the node that wraps and unwraps, for whatever has no type of its own (PKCS#11, say).

It gets a JSON object on standard input and answers with one on standard output (docs/kms.md). It runs in a worker, so
that the server forks nothing, and with an empty environment.
"""

import base64
import os
import subprocess
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
        except (msgspec.DecodeError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise FailedPrecondition(f"the program {self._argv[0]} of {self._where} wrote no JSON object; correct it")
        return answer


def run_program(argv: list[str], request: Passphrase, seconds: float) -> tuple[int, Passphrase, str]:
    """Run it in a worker: exit code, standard output, and the last line of standard error, shortened.

    Raises FailedPrecondition when it cannot be started, DeadlineExceeded.
    """
    try:
        done = subprocess.run(
            argv,
            input=request.reveal(),
            capture_output=True,
            timeout=seconds,
            check=False,
            env={"PATH": _PATH, "LC_ALL": "C.UTF-8"},
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(
            f"the program {argv[0]} did not end within {seconds:g} s; look what it waits for"
        ) from None
    except OSError as error:
        raise FailedPrecondition(
            f"the program {argv[0]} cannot be started ({os.strerror(error.errno or 0)}); install it there, executable"
        ) from None
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    said = printable(lines[-1][:_MOST_QUOTED]) if lines else ""
    return done.returncode, Passphrase(done.stdout[:_LARGEST_ANSWER]), said
