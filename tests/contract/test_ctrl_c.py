"""Ctrl-C: a line at once, exit code 130, and the same command goes on; a second one ends it then and there."""

import hashlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.images.base import MIB
from tests.cli import run_cli

PROGRAM = Path(sys.executable).with_name("luks-csi")
SAID = "stopping at the next checkpoint; again stops now"
SIZE = 512 * MIB
SLOW = ("--encryption", "encrypt", "--passphrase-file", "key")
# Nice: on a busy machine it is the command that waits, and not who presses the keys.
_FOREGROUND = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's job in the background ignores it, and so would all below
os.setsid()
os.nice(15)
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where an image lies that takes a while to clone, and a key."""
    block = hashlib.sha256(b"disk").digest() * (MIB // 32)
    with (tmp_path / "disk.raw").open("wb") as disk:
        for number in range(SIZE // MIB):
            disk.write(number.to_bytes(8, "big") + block[8:])
    (tmp_path / "key").write_text("a passphrase")
    assert image(tmp_path, "import", "disk.raw", "disk").returncode == 0
    return tmp_path


def image(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, "image", *words, "--state-dir", folder / "state"],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@contextmanager
def on_a_terminal(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command as the foreground of a terminal, and the other end of that."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", _FOREGROUND, str(PROGRAM), "image", *words, "--state-dir", str(folder / "state")]
    process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)


def read_until(terminal: int, word: str) -> str:
    """What is to be seen up to that word; the end of the process ends it too."""
    seen = ""
    while word not in seen:
        assert select.select([terminal], [], [], 60)[0], seen
        try:
            seen += os.read(terminal, 4096).decode()
        except OSError:
            break
    return seen


def stopped(folder: Path, *presses: bytes) -> tuple[int, str]:
    """Press these while an image is being encrypted: exit code and what was to be seen from then on.

    On a machine that is slow here and quick there the command may have ended before: then it is tried again.
    """
    while True:
        with on_a_terminal(folder, "clone", "disk", "safe", *SLOW) as (process, terminal):
            read_until(terminal, "encrypting")
            seen = ""
            for press in presses:
                os.write(terminal, press)
                seen += read_until(terminal, SAID)
            seen += read_until(terminal, "no such word, but the end")
            code = process.wait(60)
        if code:
            return code, seen
        assert image(folder, "delete", "safe", "--yes").returncode == 0


def test_the_first_is_told_at_once_and_the_same_command_goes_on(folder: Path) -> None:
    code, seen = stopped(folder, b"\x03")
    assert code == 130
    assert f"{SAID}\r\n" in seen
    assert "luks-csi: encrypt of image disk was stopped by SIGINT" in seen
    assert "run it again to go on" in seen
    assert "safe" in run_cli("image", "list", "--state-dir", folder / "state").stdout
    done = image(folder, "clone", "disk", "safe", *SLOW)
    assert (done.returncode, done.stdout) == (0, "encrypted image safe of 512Mi is there\n")


def test_the_second_ends_it_and_nothing_is_lost(folder: Path) -> None:
    assert stopped(folder, b"\x03", b"\x03")[0] == 130
    assert image(folder, "clone", "disk", "safe", *SLOW).returncode == 0


def test_a_stop_by_sigterm_has_its_own_code_and_json_says_cancelled(folder: Path) -> None:
    words = [
        "nice",
        "-n",
        "15",
        str(PROGRAM),
        "image",
        "clone",
        "disk",
        "safe",
        *SLOW,
        "-o",
        "json",
        "--state-dir",
        f"{folder}/state",
    ]
    while True:
        with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and not list((folder / "state/images/new").glob("safe/*")):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        if process.returncode:
            break
        assert image(folder, "delete", "safe", "--yes").returncode == 0
    assert (process.returncode, out) == (143, "")
    assert err.splitlines()[-1].startswith('{"error":{"code":"CANCELLED","message":"encrypt of image disk was stopped')
    assert err.endswith('"exit_code":143}}\n')


def test_a_question_that_is_left_with_ctrl_c_ends_with_130(folder: Path) -> None:
    with on_a_terminal(folder, "delete", "disk") as (process, terminal):
        read_until(terminal, "[y/N]")
        while process.poll() is None:  # readline sleeps through one that comes while it begins
            os.write(terminal, b"\x03")
            time.sleep(0.1)
        assert process.wait(60) == 130
        assert "luks-csi: interrupted" in read_until(terminal, "interrupted")
    assert image(folder, "inspect", "disk").returncode == 0


def test_a_question_that_is_answered_with_no_ends_with_1(folder: Path) -> None:
    with on_a_terminal(folder, "delete", "disk") as (process, terminal):
        read_until(terminal, "[y/N]")
        os.write(terminal, b"n\n")
        assert "nothing was done" in read_until(terminal, "nothing was done")
        assert process.wait(60) == 1
    assert image(folder, "inspect", "disk").returncode == 0


def test_both_passphrases_of_reencrypt_are_typed(folder: Path) -> None:
    assert image(folder, "clone", "disk", "safe", *SLOW).returncode == 0
    typed = ("--encryption", "reencrypt", "--passphrase-file", "-", "--new-passphrase-file", "-")
    with on_a_terminal(folder, "clone", "safe", "other", *typed) as (process, terminal):
        for prompt, line in (
            ("Passphrase of image safe: ", b"a passphrase\n"),
            ("New passphrase of image other: ", b"another\n"),
            ("New passphrase of image other, again: ", b"another\n"),
        ):
            assert "passphrase\n" not in read_until(terminal, prompt)
            os.write(terminal, line)
        assert "encrypted image other of 512Mi is there" in read_until(terminal, "is there")
        assert process.wait(60) == 0
    (folder / "key").write_text("another")
    decrypt = ("--encryption", "decrypt", "--passphrase-file", "key")
    assert image(folder, "clone", "other", "plain", *decrypt).returncode == 0
