"""A real server over fake use cases, on a socket of its own."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from csi_driver.model.settings import Settings
from csi_driver.rpc.client import CsiClient
from csi_driver.rpc.endpoint import address_of
from csi_driver.rpc.server import driver_server
from tests.contract.serving import SECONDS, Gate, Run
from tests.fakes import FakeUseCases, fake_use_cases


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start a server; `settings` differ from the usual ones."""
    with contextlib.ExitStack() as servers:

        def start(**settings: object) -> FakeUseCases:
            usual = Settings(endpoint=tmp_path / "csi.sock", node_id="node-1", state_dir=tmp_path / "state")
            cases = fake_use_cases(tmp_path, replace(usual, **settings))  # type: ignore[arg-type]  # names as in Settings
            server = driver_server(cases.driver)
            server.start()
            servers.callback(server.stop)
            return cases

        yield start


@pytest.fixture
def cases(run: Run) -> FakeUseCases:
    return run()


@pytest.fixture
def client(cases: FakeUseCases) -> Iterator[CsiClient]:
    with CsiClient(cases.driver.settings.endpoint, timeout=SECONDS) as client:
        yield client


@pytest.fixture
def channel(cases: FakeUseCases) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address_of(cases.driver.settings.endpoint)) as channel:
        yield channel


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()
