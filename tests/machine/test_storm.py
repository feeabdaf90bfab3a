"""A seeded two minutes of `make storm`, and the proof that it turns red: a program that does not hold its device."""

import contextlib
import os
import random
import signal
import sys
import threading
from pathlib import Path

import pytest

from csi_driver.host.loop import LoopDevices
from csi_driver.rpc.client import CsiClient, RemoteError
from tests.machine.node import EXT4, MIB, SECRET
from tests.machine.processes import has_ended, wait_for
from tests.machine.server import ServerProcess
from tests.machine.storm import storm
from tests.machine.storm_bystander import Bystander
from tests.machine.storm_chaos import Keeper
from tests.machine.storm_model import Ledger

_SEED = "7"
_CALLS = 2000


@pytest.mark.timeout(1500)
def test_a_seeded_storm_loses_mixes_and_leaks_nothing_and_leaves_nothing_stuck() -> None:
    ledger = storm(_SEED, _CALLS)
    assert ledger.findings == Ledger().findings
    assert ledger.calls >= _CALLS
    assert ledger.counts["kills"] > _CALLS // 200
    assert ledger.counts["records"] > _CALLS // 100


def test_a_server_that_ends_by_itself_is_noticed(folder: Path) -> None:
    ledger = Ledger()
    keeper = Keeper(ServerProcess(folder), ledger)
    keeper.start()
    assert keeper.ready.wait(60)
    os.kill(keeper.pid, signal.SIGSEGV)
    wait_for(lambda: ledger.findings["stuck"] or None, "what the keeper tells", 60)
    keeper.stop()
    assert len(ledger.findings["stuck"]) == 1


def test_a_program_that_does_not_hold_its_device_is_noticed(folder: Path) -> None:
    """The storm's server is killed while it waits, the storm's bystander takes the number, and its bytes change."""
    gate, ledger = folder / "gate", Ledger()
    program = (sys.executable, "-m", "tests.machine.storm_plants", str(gate))
    server = ServerProcess(folder, program=program)
    server.start()
    with CsiClient(server.endpoint, 600) as client:
        volume = client.create_volume("pvc-1", [EXT4], 16 * MIB, parameters={}, secrets=SECRET)
        (folder / "stage").mkdir()

        def stage() -> None:
            with contextlib.suppress(RemoteError):  # it is killed
                client.stage(volume, folder / "stage", EXT4, SECRET)

        call = threading.Thread(target=stage)
        call.start()
        waits = Path(f"{gate}.waits")
        wait_for(waits.exists, "the program that waits", 60)
        disk = server.state_dir / "loopfile/volumes/pvc-1/disk.img"
        (loop,) = LoopDevices().find(str(disk))
        server.kill()
        call.join()
    wait_for(lambda: LoopDevices().info(loop.path) is None, "the number to be free", 60)
    bystander = Bystander(folder / "bystander", ledger, random.Random(_SEED))
    with LoopDevices().attach(str(folder / "bystander"), autoclear=True) as taken:
        assert taken.name == loop.path, "another number was free"
        worker = int(waits.read_text())
        gate.touch()
        wait_for(lambda: has_ended(worker), "the end of the orphan", 60)
    bystander.start()
    bystander.stop()
    assert ledger.findings["foreign"]
