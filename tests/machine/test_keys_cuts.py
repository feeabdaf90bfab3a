"""A seeded handful of power cuts in changes of keys, and the proof that they turn red: fsyncs that were forgotten."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from csi_driver.host.files import Files
from csi_driver.host.handle import Handle
from csi_driver.host.workers import P, R, Workers
from csi_driver.luks import rekey
from csi_driver.luks.two_keys import Mover
from csi_driver.volumes.driver import WARM
from tests.machine.crash_plants import UnsyncedFiles
from tests.machine.keys_cuts import Result, record, run, try_states
from tests.machine.keys_jobs import JOBS, SIZE
from tests.machine.write_log import MOUNTED

_SEED = 5
_HANDFUL = ("passphrase", "key-of-kms", "volume-key", "encrypt")
_CONTENT = random.Random(_SEED).randbytes(SIZE)


def test_a_seeded_handful_of_power_cuts_loses_nothing(folder: Path, workers: Workers) -> None:
    result = Result()
    run(folder, workers, _HANDFUL, _SEED, 2, result)
    assert result.lost == []
    assert (result.jobs, result.cuts) == (len(_HANDFUL), 2 * len(_HANDFUL))


def found(folder: Path, workers: Workers, name: str, count: int, planted: Workers, files: Files | None = None) -> str:
    """What a run of that job shows that had a bug put into it; its states are looked at without."""
    result = Result()
    recording = record(folder, planted, JOBS[name], _CONTENT, files)
    try_states(recording, workers, name, _CONTENT, random.Random(_SEED), count, result)
    return " ".join(result.lost)


def test_a_record_that_is_not_synced_is_noticed(folder: Path, workers: Workers) -> None:
    assert "its work is not there" in found(folder, workers, "passphrase", 1, workers, UnsyncedFiles())


class _UnsyncedHeaders(Workers):
    """Headers are written, and nobody waits for the disk."""

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        planted = {rekey.write_prepared: _write_prepared, rekey.remove_passphrase: _remove_passphrase}
        chosen = cast("Callable[P, R]", planted.get(cast("Any", function), function))
        return super().call(what, timeout, chosen, *args, **kwargs)


def _write_prepared(*args: Any) -> None:
    with _unsynced():
        rekey.write_prepared(*args)


def _remove_passphrase(*args: Any) -> None:
    with _unsynced():
        rekey.remove_passphrase(*args)


@contextmanager
def _unsynced() -> Iterator[None]:
    sync, os.fsync = os.fsync, lambda fd: None  # noqa: ARG005 - its name is part of the type
    try:
        yield
    finally:
        os.fsync = sync


def test_a_header_that_is_not_synced_is_noticed(folder: Path, workers: Workers) -> None:
    planted = _UnsyncedHeaders(WARM)
    planted.start()
    try:
        assert found(folder, workers, "key-of-kms", 4, planted)
    finally:
        planted.stop()


def test_content_that_is_freed_before_its_copy_counts_is_noticed(
    folder: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, files = Mover.copy, Files()

    def careless(self: Mover, source: Handle, target: Handle, start: int, length: int) -> None:
        copy(self, source, target, start, length)
        self.let_go(source, start, length)
        for number in range(16):  # takes its time, so that the power goes then
            files.write(MOUNTED / "noise", b"%d" % number)

    with monkeypatch.context() as patched:
        patched.setattr(Mover, "copy", careless)
        recording = record(folder, workers, JOBS["encrypt"], _CONTENT)
    result = Result()
    try_states(recording, workers, "encrypt", _CONTENT, random.Random(_SEED), 8, result)
    assert "the content is another one" in " ".join(result.lost)
