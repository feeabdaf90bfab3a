"""Typed reading is safe for threads, and nobody reads past it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import csi_driver

_FIRST_READERS = """
import sys, threading
from csi_driver.backends.records import RecordCodec
from csi_driver.model.volume import VolumeParameters, VolumeRecord

codec, begin = RecordCodec(), threading.Barrier(8)
record = VolumeRecord(id="data", name="data", capacity_bytes=1, parameters=VolumeParameters(), created="")
written = codec.encode(record)
sys.setswitchinterval(1e-6)

def read():
    begin.wait()
    assert codec.decode(written, "here").id == "data"

readers = [threading.Thread(target=read) for _ in range(8)]
for reader in readers: reader.start()
for reader in readers: reader.join()
"""


def test_many_may_be_the_first_to_read_a_record() -> None:
    for _ in range(20):
        ended = subprocess.run([sys.executable, "-c", _FIRST_READERS], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")


def _typed_reads(path: Path) -> Iterator[int]:
    """The lines of a module at which msgspec itself is told a type to read."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="msgspec"), attr="convert")):
                yield node.lineno
            case ast.Call(func=ast.Attribute(value=ast.Attribute(value=ast.Name(id="msgspec")), attr="decode")) if (
                len(node.args) > 1 or node.keywords
            ):
                yield node.lineno
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="msgspec")), attr="Decoder"):
                yield node.lineno


def test_everything_typed_is_read_in_one_place() -> None:
    root = Path(csi_driver.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if any(_typed_reads(path))}
    assert found == {"model/reading.py"}
