"""In which order, and how durably, a header is written: one copy of it is whole at any moment."""

import os
import stat
from pathlib import Path

import pytest

from csi_driver.host.handle import open_handle
from csi_driver.luks.header import parse
from csi_driver.luks.rekey import back_up_header, write_header
from tests import headers

SIZE = 4096


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Where was written to, and each fsync."""
    seen: list[object] = []
    pwrite, fsync = os.pwrite, os.fsync

    def note(descriptor: int, content: bytes, offset: int) -> int:
        seen.append(offset)
        return pwrite(descriptor, content, offset)

    def flush(descriptor: int) -> None:
        seen.append("fsync")
        fsync(descriptor)

    monkeypatch.setattr(os, "pwrite", note)
    monkeypatch.setattr(os, "fsync", flush)
    return seen


def test_a_key_slot_is_durable_before_a_header_names_it_and_one_copy_before_the_other(
    tmp_path: Path, steps: list[object]
) -> None:
    """Whatever a power cut leaves: no copy names a slot that is not there, and both are never half written at once."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(16 * SIZE))
    both = b"1" * SIZE + b"2" * SIZE
    with open_handle(str(disk), os.O_RDWR) as device:
        write_header("volume pvc-1", device, SIZE, both, {8 * SIZE: b"a" * SIZE, 4 * SIZE: b"b" * SIZE})
    assert steps == [8 * SIZE, 4 * SIZE, "fsync", 0, "fsync", SIZE, "fsync"]
    assert disk.read_bytes()[: 2 * SIZE] == both


def test_a_copy_of_a_header_is_durable_whole_and_for_root_only(tmp_path: Path, steps: list[object]) -> None:
    disk, copy = tmp_path / "disk.img", tmp_path / "header.luks2"
    area = headers.formatted()
    headers.write_sparse(disk, area)
    with open_handle(str(disk), os.O_RDONLY) as device:
        back_up_header("volume pvc-1", device, str(copy))
    assert steps[-1] == "fsync"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert parse(copy.read_bytes(), "the copy") == parse(area, "the header")
