"""What programs left behind when they ended, on the host or on a node."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class ClusterError(Exception):
    """Something of the cluster does not do what a test needs; one sentence, with what was seen on further lines."""


@dataclass(frozen=True)
class Output:
    """Exit code and output of a program or script."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """What it printed, without white space at both ends."""
        return self.stdout.decode(errors="replace").strip()

    @property
    def said(self) -> str:
        """All that it printed for people to read."""
        return "\n".join(filter(None, (self.text, self.stderr.decode(errors="replace").strip())))

    def checked(self, what: str) -> "Output":
        """Itself; ClusterError unless the exit code is 0."""
        if self.code:
            raise ClusterError(f"{what} ended with exit code {self.code}:\n{self.said}")
        return self


def run(
    argv: Sequence[str], *, timeout: float, stdin: bytes = b"", env: Mapping[str, str] | None = None, check: bool = True
) -> Output:
    """Run a program of the host; ClusterError if it takes longer than `timeout` seconds or, with `check`, fails."""
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, timeout=timeout, check=False, env={**os.environ, **(env or {})}
        )
    except subprocess.TimeoutExpired as error:
        said = b"\n".join(filter(None, (error.stdout, error.stderr))).decode(errors="replace")
        raise ClusterError(f"{' '.join(argv)} still ran after {timeout:g} s:\n{said}") from None
    output = Output(done.returncode, done.stdout, done.stderr)
    return output.checked(" ".join(argv)) if check else output
