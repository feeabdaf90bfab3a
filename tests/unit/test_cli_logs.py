"""How log lines look, in a process of their own: logging is set up once for each."""

import json
import os
import pty
import subprocess
import sys

import pytest

SECRET = "correct horse battery staple"
PREPARE = """
import logging
from csi_driver.host.log import log, request_id
from csi_driver.cli.logs import configure_logs
from csi_driver.model.settings import LogFormat
configure_logs(LogFormat({format!r}), {level!r})
"""


def lines(code: str, *, format: str = "auto", level: str = "info") -> list[str]:
    program = PREPARE.format(format=format, level=level) + code
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout == ""
    return found.stderr.splitlines()


def test_json_lines_where_nobody_looks() -> None:
    (line,) = lines("request_id.set('a-1'); log.info('call', seconds=0.5, path=set())")
    told = json.loads(line)
    assert told.pop("timestamp").endswith("Z")
    assert told == {"event": "call", "level": "info", "request_id": "a-1", "seconds": 0.5, "path": []}


def test_what_json_does_not_know_is_told_by_its_repr() -> None:
    (line,) = lines(
        f"from csi_driver.model.secret import Passphrase; log.info('x', key=Passphrase({SECRET.encode()!r}))"
    )
    assert json.loads(line)["key"] == "Passphrase(…)"
    assert SECRET not in line


def test_text_where_it_is_wanted() -> None:
    (line,) = lines("log.info('call', method='Probe')", format="text")
    assert "call" in line
    assert "method=Probe" in line
    assert "\x1b" not in line


def test_coloured_text_on_a_terminal() -> None:
    master, slave = pty.openpty()
    try:
        program = PREPARE.format(format="auto", level="info") + "log.info('call', method='Probe')"
        subprocess.run([sys.executable, "-c", program], stderr=slave, timeout=120, check=True)
        line = os.read(master, 4096).decode()
    finally:
        os.close(master)
        os.close(slave)
    assert "\x1b[" in line
    assert "Probe" in line


@pytest.mark.parametrize(
    ("level", "told"),
    [("debug", ["d", "i", "w", "e"]), ("info", ["i", "w", "e"]), ("warning", ["w", "e"]), ("error", ["e"])],
)
def test_levels(level: str, told: list[str]) -> None:
    found = lines("log.debug('d'); log.info('i'); log.warning('w'); log.error('e')", level=level)
    assert [json.loads(line)["event"] for line in found] == told


def test_libraries_are_told_in_the_same_form_without_the_text_of_exceptions() -> None:
    first, second = lines(f"""
library = logging.getLogger("some.library")
library.info("not this")
library.warning("this %s", 1)
try:
    raise ValueError({SECRET!r})
except ValueError as error:
    library.exception("failed: %s" % error)
""")
    assert json.loads(first)["event"] == "this 1"
    assert json.loads(first)["library"] == "some.library"
    assert json.loads(second)["kind"] == "ValueError"
    assert SECRET not in second


def test_a_reader_that_is_gone_fails_nothing() -> None:
    program = PREPARE.format(format="json", level="info") + "log.info('lost'); print('alive')"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        found = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writer, timeout=120, check=False
        )
    finally:
        os.close(writer)
    assert (found.returncode, found.stdout) == (0, b"alive\n")


def test_lines_of_many_threads_stay_whole() -> None:
    found = lines("""
import threading
def tell(number):
    for _ in range(50):
        log.info("long", number=number, more=["x" * 9000])
threads = [threading.Thread(target=tell, args=(number,)) for number in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
""")
    assert len(found) == 400
    assert {len(json.loads(line)["more"][0]) for line in found} == {9000}


HOSTILE = r"""
log.info("a\nb \x1b[31m", volume_id="\x1b[2Jv\u202e", path="caf\udce9", fields={"k\udce9": ["\x1b", "\udce9"]})
"""


def test_text_shows_escapes_written_out() -> None:
    (line,) = lines(HOSTILE, format="text")
    assert line.isprintable()
    for told in (r"a\nb \x1b[31m", r"volume_id=\x1b[2Jv\u202e", r"path=caf\xe9"):
        assert told in line


def test_json_tells_everything_as_it_was_but_what_has_no_encoding() -> None:
    (line,) = lines(HOSTILE, format="json")
    told = json.loads(line)
    assert (told["event"], told["volume_id"]) == ("a\nb \x1b[31m", "\x1b[2Jv\u202e")
    assert (told["path"], told["fields"]) == (r"caf\xe9", {r"k\xe9": ["\x1b", r"\xe9"]})


@pytest.mark.parametrize("format", ["json", "text"])
def test_no_text_of_a_request_makes_a_line_of_a_megabyte(format: str) -> None:
    (line,) = lines("log.info('call', volume_id='v' * (1 << 20))", format=format)
    assert len(line) < 4096
    assert "of 1048576 bytes" in line
