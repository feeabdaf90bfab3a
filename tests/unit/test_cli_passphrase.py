"""A passphrase that is typed: without echo, a new one twice, an empty one told."""

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest

TYPED = """
import sys
from pathlib import Path
from csi_driver.cli.secret_files import SecretSource
try:
    for prompt, new in (%s):
        print(SecretSource(None, Path("-")).read(prompt, new=new)["CRYPTO_KEY_VALUE"])
except Exception as error:
    print(error.format_message())
"""


def typed(prompts: str, *lines: str) -> tuple[str, str]:
    """What the process said on standard output, and what was to be seen on the terminal while `lines` were typed."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", TYPED % prompts],
        stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, start_new_session=True, text=True,
    ) as process:  # fmt: skip
        seen = ""
        for line in lines:
            while not seen.endswith(": ") or termios.tcgetattr(theirs)[3] & termios.ECHO:
                seen += os.read(ours, 1000).decode()
            os.write(ours, f"{line}\n".encode())
            seen += os.read(ours, 1000).decode()
        said, _ = process.communicate(timeout=120)
    os.close(theirs)
    os.close(ours)
    return said, seen


OLD, NEW = '("Passphrase", False),', '("New passphrase", True),'


@pytest.mark.parametrize(
    ("prompts", "lines", "said"),
    [
        (OLD, ("horse",), "horse\n"),
        (NEW, ("horse", "horse"), "horse\n"),
        (OLD + NEW, ("horse", "mule", "mule"), "horse\nmule\n"),
        (NEW, ("horse", "house"), "the two passphrases differ; nothing was done, type the same one twice\n"),
        (OLD, ("",), "the passphrase is empty; type one\n"),
        (NEW, ("",), "the passphrase is empty; type one\n"),
    ],
)
def test_it_is_asked_for(prompts: str, lines: Sequence[str], said: str) -> None:
    heard, seen = typed(prompts, *lines)
    assert heard == said
    assert not [line for line in lines if line and line in seen]
    assert seen.count("again") == prompts.count("True") * (lines != ("",))


@pytest.mark.parametrize("closed", ["0<&-", "0<&- 1>&- 2>&-"])
def test_a_closed_standard_input_is_an_empty_one(closed: str) -> None:
    program = Path(sys.executable).with_name("luks-csi")
    command = f"{program} recover /dev/null name --passphrase-file - {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert closed != "0<&-" or "the passphrase on standard input is empty" in done.stderr
