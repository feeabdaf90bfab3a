"""The sandbox of qemu-nbd with a shell as its program."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from csi_driver.images.qemu import program_files
from csi_driver.images.sandbox import NO_SANDBOX, Sandbox

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

WHERE = "image a"


def in_sandbox(
    script: str,
    image: Path,
    *,
    cpu_seconds: int = 10,
    files: tuple[str, ...] = (),
    descriptor: int = 0,
    program: str = "/bin/sh",
) -> tuple[int, str]:
    """Run a shell script in a sandbox; returns its exit code and the end of what it wrote.

    The image comes by a descriptor of `descriptor` or more.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)
    with ours, theirs, image.open("rb") as opened, os.fdopen(fcntl.fcntl(opened, fcntl.F_DUPFD, descriptor)) as file:
        sandbox = Sandbox(
            control=theirs.fileno(),
            image=file.fileno(),
            parent=os.getpid(),
            argv=(program, "-c", script),
            environment={},
            files=(*program_files(program, WHERE), *files),
            connections=1,
            memory=1 << 30,
            cpu_seconds=cpu_seconds,
        )
        with subprocess.Popen(
            [sys.executable, "-m", "csi_driver.images.sandbox", sandbox.encode()],
            pass_fds=(sandbox.control, sandbox.image),
        ):
            theirs.close()
            _, descriptors, _, _ = socket.recv_fds(ours, 4096, 1)
            answer = json.loads(ours.recv(16384))
            for client in descriptors:
                os.close(client)
    return answer["code"], answer["said"]


def test_a_program_in_the_sandbox_can_write_nowhere_and_reads_the_image(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_text("the image\n")
    script = "read line < /image; echo $line; echo x > /new; echo x >> /image; echo x > /bin/sh; echo x > /dev/null"
    code, said = in_sandbox(script, image)
    assert code != 0
    assert said.splitlines()[0] == "the image"
    assert said.count("Read-only file system") == 3
    assert said.count("cannot create") == 4, said
    assert image.read_text() == "the image\n"


def test_a_program_has_none_of_its_callers_descriptors(tmp_path: Path) -> None:
    """Above the limit of open files too, where a caller has many."""
    (tmp_path / "image").write_text("the image\n")
    script = "read line <&200 && echo $line"  # a number that dash cannot take
    code, said = in_sandbox(script, tmp_path / "image", descriptor=200, program="/bin/bash")
    assert (code, said) == (1, "/bin/bash: line 1: 200: Bad file descriptor\n")


def test_a_program_that_burns_its_processor_time_is_killed(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    assert in_sandbox("while :; do :; done", tmp_path / "image", cpu_seconds=1) == (-signal.SIGKILL, "")


def test_a_program_that_talks_without_end_is_cut_to_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; echo last words"
    code, said = in_sandbox(script, tmp_path / "image")
    assert code == 0
    assert len(said) <= 4096
    assert said.endswith("last words\n")


def test_a_sandbox_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    code, said = in_sandbox(":", tmp_path / "image", files=("/no/such/library",))
    assert code == NO_SANDBOX
    assert "open_tree: No such file or directory" in said
