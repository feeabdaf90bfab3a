"""The line that tells how far a long command is."""

import io
import os
import subprocess
import sys

from csi_driver.cli.progress import ProgressLine

MIB = 1 << 20


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_a_line_now_and_then() -> None:
    clock, stream = Clock(), io.StringIO()
    with ProgressLine("encrypting", 100 * MIB, stream, clock) as line:
        line(0)
        for second in range(1, 26):
            clock.now += 1
            line(second * 4 * MIB)
    assert stream.getvalue().splitlines() == [
        "encrypting:  40% of 100MiB, 4MiB/s, 0:15 left",
        "encrypting:  80% of 100MiB, 4MiB/s, 0:05 left",
        "encrypting: 100% of 100MiB, 4MiB/s",
    ]


def test_a_terminal_has_a_bar_that_is_written_over() -> None:
    clock, stream = Clock(), Terminal()
    with ProgressLine("reading", 8 * MIB, stream, clock) as line:
        line(0)
        clock.now += 2
        line(4 * MIB)
    first, second, third = stream.getvalue().split("\r\x1b[K")[1:]
    assert first == "reading: [........................]   0% of 8MiB, 0B/s"
    assert second == third.removesuffix("\n") == "reading: [############............]  50% of 8MiB, 2MiB/s, 0:02 left"


def test_what_an_earlier_process_did_is_not_in_the_rate() -> None:
    clock, stream = Clock(), io.StringIO()
    with ProgressLine("encrypting", 100 * MIB, stream, clock) as line:
        line(80 * MIB)
        clock.now += 10
        line(90 * MIB)
    assert stream.getvalue().splitlines()[0] == "encrypting:  90% of 100MiB, 1MiB/s, 0:10 left"


def test_an_empty_thing_is_done_at_once() -> None:
    stream = io.StringIO()
    with ProgressLine("encrypting", 0, stream, Clock()) as line:
        line(0)
    assert stream.getvalue() == "encrypting: 100% of 0B, 0B/s\n"


def test_nothing_is_said_of_what_did_not_begin() -> None:
    stream = io.StringIO()
    with ProgressLine("encrypting", 10, stream, Clock()):
        pass
    assert stream.getvalue() == ""


def test_of_an_unknown_total_only_what_is_done_is_told() -> None:
    clock, stream = Clock(), io.StringIO()
    with ProgressLine("downloading", None, stream, clock) as line:
        line(0)
        clock.now += 2
        line(4 * MIB)
    assert stream.getvalue() == "downloading: 4MiB, 2MiB/s\n"


def test_the_work_goes_on_where_nobody_reads_it() -> None:
    program = (
        "import sys\n"
        "from csi_driver.cli.progress import ProgressLine\n"
        "with ProgressLine('encrypting', 100) as line:\n"
        "    for done in range(100):\n"
        "        line(done)\n"
        "        line._show()\n"
        "print('done')"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writer, check=False, timeout=120
    )
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, b"done\n")
