"""The threads of calls, and how grpcio uses them."""

import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc
from csi_driver.rpc.threads import CallThreads, listen_with_one_poller

_PATIENCE = 60


@pytest.fixture
def threads() -> Iterator[CallThreads]:
    made = CallThreads(2, "call")
    yield made
    made.shutdown()


class Held:
    """A call that stands still until it is let go."""

    def __init__(self, threads: CallThreads) -> None:
        self.begun, self.let_go, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.thread = ""
        threads.submit(self.run).add_done_callback(lambda _: self.ended.set())

    def run(self) -> None:
        self.thread = threading.current_thread().name
        self.begun.set()
        assert self.let_go.wait(_PATIENCE)

    def end(self) -> str:
        """Let it go; the thread that it was in."""
        self.let_go.set()
        assert self.ended.wait(_PATIENCE)
        return self.thread


def _submit_for_ever(threads: CallThreads) -> None:
    while True:
        threads.submit(print)


def _wait_free(threads: CallThreads) -> None:
    """Until a thread waits: one tells of the end of a call before it does."""
    while not threads.free:
        threading.Event().wait(0.001)


def test_a_call_that_follows_another_has_its_thread(threads: CallThreads) -> None:
    for _ in range(20):
        held = Held(threads)
        assert held.begun.wait(_PATIENCE)
        first = held.end()
        _wait_free(threads)
        assert first == "call_0"


def test_more_calls_than_threads_wait_and_are_all_done(threads: CallThreads) -> None:
    held = [Held(threads) for _ in range(5)]
    assert held[0].begun.wait(_PATIENCE)
    assert held[1].begun.wait(_PATIENCE)
    assert not any(each.begun.is_set() for each in held[2:])
    assert {each.end() for each in held} == {"call_0", "call_1"}


def test_what_nobody_began_is_dropped_and_what_was_begun_is_waited_for() -> None:
    threads = CallThreads(1, "call")
    begun, waiting = Held(threads), Held(threads)
    assert begun.begun.wait(_PATIENCE)
    ending = threading.Thread(target=threads.shutdown, kwargs={"cancel_futures": True})
    ending.start()
    with pytest.raises(RuntimeError):
        _submit_for_ever(threads)
    assert ending.is_alive()
    begun.end()
    ending.join(_PATIENCE)
    assert not ending.is_alive()
    assert not waiting.begun.is_set()


def test_nothing_of_a_call_is_kept_by_a_thread_that_waits(threads: CallThreads) -> None:
    class Request:
        """Has secrets."""

    request = Request()
    kept, ended = weakref.ref(request), threading.Event()
    threads.submit(repr, request).add_done_callback(lambda _: ended.set())
    del request
    assert ended.wait(_PATIENCE)
    _wait_free(threads)
    gc.collect()
    assert kept() is None


def test_an_error_that_nobody_was_told_is_logged_and_ends_no_thread(
    threads: CallThreads, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()
    with caplog.at_level(logging.ERROR):
        threads.submit(lambda: 1 // 0).add_done_callback(lambda _: ended.set())
        assert ended.wait(_PATIENCE)
    assert "ZeroDivisionError" in caplog.text
    _wait_free(threads)
    held = Held(threads)
    assert held.begun.wait(_PATIENCE)
    assert held.end() == "call_0"


def test_who_asks_late_is_told_at_once(threads: CallThreads) -> None:
    ended, late = threading.Event(), threading.Event()
    outcome = threads.submit(ended.set)
    assert ended.wait(_PATIENCE)
    _wait_free(threads)
    outcome.add_done_callback(lambda _: late.set())
    assert late.is_set()


def test_a_thread_that_cannot_be_begun_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = CallThreads(2, "call")

    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", full)
        with pytest.raises(RuntimeError, match="can't start"):
            threads.submit(print)
    held = Held(threads)
    assert held.begun.wait(_PATIENCE)
    assert held.end() == "call_0"
    threads.shutdown()


class Identity(csi_pb2_grpc.IdentityServicer):
    """Says in which thread it answers."""

    def GetPluginInfo(
        self, request: csi.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginInfoResponse:
        return csi.GetPluginInfoResponse(name=threading.current_thread().name)


def test_grpcio_does_its_calls_in_them(tmp_path: Path) -> None:
    threads = CallThreads(2, "call")
    assert isinstance(threads, ThreadPoolExecutor), "grpcio takes no other for a service of its own"
    server = grpc.server(threads, maximum_concurrent_rpcs=2)  # counts on being told of each end
    csi_pb2_grpc.add_IdentityServicer_to_server(Identity(), server)
    server.add_insecure_port(f"unix:{tmp_path}/socket")
    server.start()
    try:
        with grpc.insecure_channel(f"unix:{tmp_path}/socket") as channel:
            stub = csi_pb2_grpc.IdentityStub(channel)
            names = {stub.GetPluginInfo(csi.GetPluginInfoRequest(), timeout=_PATIENCE).name for _ in range(10)}
    finally:
        server.stop(0).wait()
        threads.shutdown()
    assert names <= {"call_0", "call_1"}


_SERVES = """
import grpc
from csi_driver.rpc.threads import listen_with_one_poller
listen_with_one_poller()
from concurrent.futures import ThreadPoolExecutor
server = grpc.server(ThreadPoolExecutor(1))
server.add_insecure_port("unix:socket")
server.start()
server.stop(0).wait()
"""


def test_this_grpcio_knows_the_other_poller(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    done = subprocess.run(
        [sys.executable, "-c", _SERVES], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120
    )
    assert not done.stderr, "it tells of an experiment that it does not know"


def test_who_chooses_the_poller_himself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_EXPERIMENTS", "mine")
    listen_with_one_poller()
    assert os.environ["GRPC_EXPERIMENTS"] == "mine"
