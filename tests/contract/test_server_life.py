"""How the server starts and stops, what it measures, and the command that runs it."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from csi_driver.model.errors import DeviceInUse, FailedPrecondition
from csi_driver.model.settings import Settings
from csi_driver.rpc.client import CsiClient, RemoteError
from csi_driver.rpc.server import driver_server
from tests.contract.serving import BLOCK, SECONDS, Gate, Run, code_of, in_background
from tests.fakes import FakeUseCases, fake_use_cases

# Start and stop


def test_the_socket_is_private_and_goes_with_the_server(tmp_path: Path) -> None:
    endpoint = tmp_path / "a b%#" / "csi.sock"
    cases = fake_use_cases(tmp_path, Settings(endpoint=endpoint, node_id="n", grace_seconds=1))
    server = driver_server(cases.driver)
    server.start()
    assert stat.S_IMODE(endpoint.stat().st_mode) == 0o600
    assert os.listdir(endpoint.parent) == ["csi.sock"]
    with CsiClient(endpoint, timeout=SECONDS) as client:
        assert client.node_id() == "n"
    assert server.stop() is True
    assert os.listdir(endpoint.parent) == []


def test_a_second_server_is_refused_and_the_first_goes_on(cases: FakeUseCases, client: CsiClient) -> None:
    with pytest.raises(DeviceInUse, match="another server answers"):
        driver_server(cases.driver).start()
    assert client.node_id() == "node-1"
    with CsiClient(cases.driver.settings.endpoint, timeout=SECONDS) as fresh:
        assert fresh.node_id() == "node-1"


def test_calls_in_flight_end_in_their_grace_time_and_no_new_one_begins(tmp_path: Path, gate: Gate) -> None:
    cases = fake_use_cases(tmp_path)
    cases.calls.then = gate
    server = driver_server(cases.driver)
    server.start()
    with CsiClient(tmp_path / "csi.sock", timeout=SECONDS) as client:
        call = in_background(lambda: client.unstage("v", Path("/s")))
        assert gate.entered.acquire(timeout=SECONDS)
        stop = in_background(server.stop)
        deadline = time.monotonic() + SECONDS
        while (tmp_path / "csi.sock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with CsiClient(tmp_path / "csi.sock", timeout=SECONDS) as late:
            assert code_of(late.node_id) == "UNAVAILABLE"
        gate.opened.set()
        assert call() is None
        assert stop() is True


def test_a_call_that_outlives_the_grace_time_is_cut_off(tmp_path: Path, gate: Gate) -> None:
    cases = fake_use_cases(tmp_path, Settings(endpoint=tmp_path / "csi.sock", node_id="n", grace_seconds=0.2))
    cases.calls.then = gate
    server = driver_server(cases.driver)
    server.start()
    with CsiClient(tmp_path / "csi.sock", timeout=SECONDS) as client:
        call = in_background(lambda: client.unstage("v", Path("/s")))
        assert gate.entered.acquire(timeout=SECONDS)
        assert server.stop() is False
        outcome = call()
        assert isinstance(outcome, RemoteError)
        assert outcome.code in {"CANCELLED", "UNAVAILABLE"}


def test_a_request_that_is_too_large_is_refused(client: CsiClient) -> None:
    assert code_of(lambda: client.create_volume("v", [BLOCK], 1, parameters={"p": "x" * (2 << 20)})) == (
        "RESOURCE_EXHAUSTED"
    )


# Metrics


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=SECONDS) as page:
        text: str = page.read().decode()
        return text


def test_metrics(run: Run) -> None:
    address = f"127.0.0.1:{free_port()}"
    cases = run(http_address=address)
    with CsiClient(cases.driver.settings.endpoint, timeout=SECONDS) as client:
        client.plugin_info()
        client.plugin_info()
        assert code_of(lambda: client.volume("v")) == "NOT_FOUND"
    text = scrape(address)
    assert 'luks_csi_rpc_duration_seconds_count{code="OK",method="GetPluginInfo"} 2.0' in text
    assert 'luks_csi_rpc_duration_seconds_count{code="NOT_FOUND",method="ControllerGetVolume"} 1.0' in text
    assert "luks_csi_open_mappings 3.0" in text
    assert "luks_csi_free_bytes 4096.0" in text
    assert "luks_csi_thin_pool_used_percent 61.0" in text
    assert "luks_csi_drifted_secrets 2.0" in text
    assert "# TYPE luks_csi_healed_file_systems_total counter" in text
    assert "luks_csi_healed_file_systems_total 0.0" in text
    assert "process_resident_memory_bytes" in text


def test_a_gauge_that_cannot_be_read_is_left_out(run: Run) -> None:
    def unknown() -> int:
        raise FailedPrecondition("no device-mapper")

    address = f"127.0.0.1:{free_port()}"
    cases = run(http_address=address)
    cases.health.mappings = unknown
    text = scrape(address)
    assert "luks_csi_open_mappings 3" not in text
    assert "luks_csi_free_bytes 4096.0" in text


def test_a_http_address_that_is_taken_is_told_in_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        cases = fake_use_cases(tmp_path, Settings(endpoint=tmp_path / "csi.sock", node_id="n", http_address=address))
        with pytest.raises(FailedPrecondition, match=f"HTTP address {address} cannot be used"):
            driver_server(cases.driver).start()
    assert not (tmp_path / "csi.sock").exists()


# The command


def luks_csi(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from csi_driver.cli.main import main; main()", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUKS_CSI_")}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def serve(tmp_path: Path, *more: str) -> "subprocess.Popen[str]":
    return luks_csi(
        *("serve", "--endpoint", f"unix://{tmp_path}/csi.sock", "--state-dir", str(tmp_path / "state")),
        *("--node-id", "node-1", "--free-space-floor", "0", *more),
    )


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    try:
        _, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait(SECONDS)
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_well_when_it_is_told_to(tmp_path: Path, number: signal.Signals) -> None:
    process = serve(tmp_path)
    try:
        with CsiClient(tmp_path / "csi.sock", timeout=SECONDS) as client:
            assert wait_for(client.node_id) == "node-1"
            assert stat.S_IMODE((tmp_path / "csi.sock").stat().st_mode) == 0o600
            assert core_limit(process.pid) == ("1", "1")
            process.send_signal(number)
            code, said = ended(process)
    finally:
        process.kill()
        process.wait(SECONDS)
    assert code == 0, said
    assert not (tmp_path / "csi.sock").exists()
    assert "Traceback" not in said
    assert '"event":"stopped"' in said


def test_a_killed_server_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    with contextlib.ExitStack() as processes, CsiClient(tmp_path / "csi.sock", timeout=SECONDS) as client:

        def start() -> "subprocess.Popen[str]":
            process = serve(tmp_path)
            processes.callback(process.communicate, timeout=SECONDS)
            processes.callback(process.kill)
            return process

        killed = start()
        wait_for(client.node_id)
        killed.kill()
        killed.wait(SECONDS)
        assert (tmp_path / "csi.sock").exists()
        start()
        assert wait_for(client.node_id) == "node-1"
        code, said = ended(serve(tmp_path))
        assert code == 1
        last = said.splitlines()[-1]
        assert last.startswith(f"luks-csi: another server answers on the endpoint {tmp_path}/csi.sock; ")
        assert client.node_id() == "node-1"


def test_a_bad_setting_is_refused_in_one_sentence() -> None:
    code, said = ended(luks_csi("serve", "--endpoint", "csi.sock"))
    assert code == 2
    assert len(said.splitlines()) == 1
    assert "'csi.sock'" in said


def wait_for(call: Callable[[], str]) -> str:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return call()
        except RemoteError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def core_limit(pid: int) -> tuple[str, str]:
    """The soft and hard limits of core dumps (proc(5))."""
    limit = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "core file" in line)
    return limit.split()[4], limit.split()[5]
