"""`luks-csi register`, with a test in the place of kubelet."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from csi_driver.model.settings import Settings
from csi_driver.rpc import pluginregistration_pb2 as registration
from csi_driver.rpc import pluginregistration_pb2_grpc
from csi_driver.rpc.endpoint import address_of
from csi_driver.rpc.server import central_server
from tests.contract.serving import SECONDS

NAME = "luks.csi.internal"


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one: the names of sockets are bounded."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def registry(folder: Path) -> Path:
    made = folder / "kubelet" / "plugins_registry"
    made.mkdir(parents=True)
    return made


@contextmanager
def driver(folder: Path) -> Iterator[None]:
    server = central_server(Settings(endpoint=folder / "csi.sock"))
    server.start()
    try:
        yield
    finally:
        server.stop()


@contextmanager
def register(folder: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", "from csi_driver.cli.main import main; main()", "register"]
    settings = [f"--endpoint={folder / 'csi.sock'}", f"--kubelet-dir={folder / 'kubelet'}", "--log-format=json"]
    with subprocess.Popen([*command, *settings, *options], stderr=subprocess.PIPE, text=True) as process:
        limit = threading.Timer(2 * SECONDS, process.kill)
        limit.start()
        try:
            yield process
        finally:
            process.terminate()
            process.wait()
            limit.cancel()


@contextmanager
def kubelet(registry: Path) -> Iterator[pluginregistration_pb2_grpc.RegistrationStub]:
    socket = registry / f"{NAME}-reg.sock"
    until(socket.exists)
    with grpc.insecure_channel(address_of(socket)) as channel:
        yield pluginregistration_pb2_grpc.RegistrationStub(channel)


def test_kubelet_is_told_who_the_driver_is_and_where(folder: Path, registry: Path) -> None:
    with driver(folder), register(folder, "--kubelet-endpoint=/plugins/csi.sock"), kubelet(registry) as stub:
        info = stub.GetInfo(registration.InfoRequest(), timeout=SECONDS)
        assert (info.type, info.name, info.endpoint) == ("CSIPlugin", NAME, "/plugins/csi.sock")
        assert list(info.supported_versions) == ["1.0.0"]
        assert stat.S_IMODE((registry / f"{NAME}-reg.sock").stat().st_mode) == 0o600


def test_it_says_that_it_is_registered_and_ends_when_told(folder: Path, registry: Path) -> None:
    with driver(folder), register(folder) as process:
        with kubelet(registry) as stub:
            assert stub.GetInfo(registration.InfoRequest(), timeout=SECONDS).endpoint == str(folder / "csi.sock")
            for _ in range(2):  # kubelet asks anew when it starts anew
                status = registration.RegistrationStatus(plugin_registered=True)
                stub.NotifyRegistrationStatus(status, timeout=SECONDS)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 0
    assert said.count('"registered"') == 2
    assert os.listdir(registry) == []


def test_a_refusal_of_kubelet_is_told_and_ends_it(folder: Path, registry: Path) -> None:
    with driver(folder), register(folder) as process:
        with kubelet(registry) as stub:
            status = registration.RegistrationStatus(plugin_registered=False, error="no such node")
            stub.NotifyRegistrationStatus(status, timeout=SECONDS)
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 1
    assert "no such node" in said
    assert os.listdir(registry) == []


def test_it_waits_for_the_driver_and_stays_when_that_restarts(folder: Path, registry: Path) -> None:
    with register(folder) as process:
        assert process.stderr is not None
        assert "waiting for the driver" in process.stderr.readline()
        assert os.listdir(registry) == []
        with driver(folder), kubelet(registry) as stub:
            assert stub.GetInfo(registration.InfoRequest(), timeout=SECONDS).name == NAME
        with driver(folder), kubelet(registry) as stub:
            assert stub.GetInfo(registration.InfoRequest(), timeout=SECONDS).name == NAME
        assert process.poll() is None


def test_it_can_be_told_to_stop_while_it_waits(folder: Path) -> None:
    with register(folder) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.terminate()
        assert process.wait(SECONDS) == 0


def test_a_socket_that_a_killed_one_left_is_replaced(folder: Path, registry: Path) -> None:
    with driver(folder):
        with register(folder) as process, kubelet(registry):
            process.kill()
        assert os.listdir(registry) == [f"{NAME}-reg.sock"]
        left = (registry / f"{NAME}-reg.sock").stat().st_ino
        with register(folder):
            until(lambda: (registry / f"{NAME}-reg.sock").stat().st_ino != left)
            with kubelet(registry) as stub:
                assert stub.GetInfo(registration.InfoRequest(), timeout=SECONDS).name == NAME


def test_a_folder_that_is_not_there_is_told(folder: Path) -> None:
    (folder / "kubelet").write_text("a file")
    with driver(folder), register(folder) as process:
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 1
    assert said.startswith("luks-csi: ") or "\nluks-csi: " in said
    assert "cannot be made" in said
