"""`make shell`: a terminal in the guest, with a host name, a disk, Ctrl-C and luks-csi; or a script from elsewhere."""

import os
import pty
import select
import subprocess
import sys
import termios

import pytest

from tests.machine.guest import missing

SHELL = [sys.executable, "-m", "tests.machine.shell"]

PROMPT = "root@guest:~# "

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class Typist:
    """Sits at one end of a terminal; what is read to a word is not read again."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._left = ""

    def type(self, line: str) -> None:
        os.write(self._terminal, f"{line}\r".encode())

    def read_until(self, word: str) -> str:
        while word not in self._left:
            assert select.select([self._terminal], [], [], 120)[0], f"no {word!r} in {self._left!r}"
            self._left += os.read(self._terminal, 4096).decode(errors="replace")
        seen, _, self._left = self._left.partition(word)
        return seen

    def press_until(self, key: bytes, word: str) -> None:
        """Press a key; again only where long nothing came of it, as each throws away what is typed behind it."""
        while word not in self._left:
            os.write(self._terminal, key)
            while word not in self._left and select.select([self._terminal], [], [], 20)[0]:
                self._left += os.read(self._terminal, 4096).decode(errors="replace")
        self.read_until(word)


def test_a_terminal_is_a_terminal_there_and_is_given_back_as_it_was() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 132))
    before = termios.tcgetattr(theirs)
    typist = Typist(ours)
    with subprocess.Popen(SHELL, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        try:
            assert "luks-csi serve" in typist.read_until(PROMPT)
            typist.type("stty size; hostname; luks-csi --version; touch here; ls")
            seen = typist.read_until(PROMPT)
            assert "\r50 132\r\nguest\r\nluks-csi " in seen
            assert "\r\nhere" in seen
            typist.type("read -p 'say: ' answer; echo got $answer")
            typist.read_until("\rsay: ")
            typist.type("some words")
            assert "got some words" in typist.read_until(PROMPT)
            typist.type("echo begun; sleep 1000")
            typist.read_until("\rbegun")
            typist.press_until(b"\x03", PROMPT)
            typist.type("exit 7")
            typist.read_until("exit\r\n")
            assert process.wait(60) == 7
        finally:
            process.kill()
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_a_script_on_standard_input_is_run_with_luks_csi_and_a_disk() -> None:
    script = "luks-csi --version && touch $PWD/written && echo $LUKS_CSI_STATE_DIR && exit 5\n"
    done = subprocess.run(SHELL, input=script, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 5, done.stderr
    version, folder = done.stdout.splitlines()
    assert version.startswith("luks-csi ")
    assert folder == "/mnt/state/luks-csi"
