"""/readyz tells what Probe tells, /healthz whether the server answers."""

import contextlib
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

import pytest

from csi_driver.rpc.client import CsiClient
from csi_driver.rpc.http import HttpServer, Page
from csi_driver.rpc.server import ALIVE_SECONDS, READY_SECONDS
from tests.contract.serving import SECONDS, Gate, Run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get(address: str, path: str = "/healthz") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=SECONDS) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):
            return error.code, error.read().decode()


def test_it_is_ready_while_probe_is_well_and_says_why_not(run: Run) -> None:
    address = f"127.0.0.1:{free_port()}"
    cases = run(http_address=address)
    assert get(address, "/readyz") == (200, "ok\n")
    cases.health.blocked_by = "dm-crypt: it is not there; load it"
    assert get(address, "/readyz") == (503, "dm-crypt: it is not there; load it\n")
    assert get(address) == (200, "ok\n"), "a restart would mend nothing"
    cases.health.blocked_by = None
    assert get(address, "/readyz") == (200, "ok\n")


def test_a_kms_that_does_not_work_is_told_and_the_node_is_ready_all_the_same(run: Run, tmp_path: Path) -> None:
    address, config = f"127.0.0.1:{free_port()}", tmp_path / "kms.json"
    config.write_text('{"vault-1": {"encryptionKMSType": "abacus"}, "own": {"encryptionKMSType": "metadata"}}')
    cases = run(http_address=address, kms_config=config)
    cases.driver.kms_health.look()
    said = "KMS vault-1 does not work, open volumes go on; the log and `luks-csi keys check` tell why"
    assert get(address, "/readyz") == (200, f"ok\n{said}\n")
    assert get(address) == (200, "ok\n")
    up = [line for line in get(address, "/metrics")[1].splitlines() if line.startswith("luks_csi_kms_up")]
    assert up == ['luks_csi_kms_up{kms="vault-1"} 0.0'], "the other one waits for what a claim brings"
    cases.health.blocked_by = "dm-crypt: it is not there; load it"
    assert get(address, "/readyz") == (503, f"dm-crypt: it is not there; load it\n{said}\n")
    cases.health.blocked_by = None
    config.write_text("{}")
    cases.driver.kms_health.look()
    assert get(address, "/readyz") == (200, "ok\n")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_server_whose_socket_is_gone_is_not_well(run: Run, path: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    cases = run(http_address=address)
    cases.driver.settings.endpoint.unlink()
    status, said = get(address, path)
    assert status == 503
    assert said != "ok\n"


@pytest.mark.parametrize(("path", "seconds"), [("/healthz", ALIVE_SECONDS), ("/readyz", READY_SECONDS)])
def test_a_page_waits_for_the_server_for_as_long_as_kubelet_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, path: str, seconds: float
) -> None:
    address, waited = f"127.0.0.1:{free_port()}", list[float | None]()

    class Client(CsiClient):
        def __init__(self, endpoint: Path, timeout: float | None) -> None:
            waited.append(timeout)
            super().__init__(endpoint, timeout)

    run(http_address=address)
    monkeypatch.setattr("csi_driver.rpc.client.CsiClient", Client)
    assert get(address, path) == (200, "ok\n")
    assert waited == [seconds]


def test_other_paths_are_not_found(run: Run) -> None:
    address = f"127.0.0.1:{free_port()}"
    run(http_address=address)
    assert get(address, "/")[0] == 404
    assert get(address, "/metrics")[0] == 200


def test_without_a_host_every_address_is_answered() -> None:
    hosts = ["127.0.0.1", *(["[::1]"] if socket.has_dualstack_ipv6() else [])]
    port = free_port()
    with serving({}, address=f":{port}"):
        assert [get(f"{host}:{port}") for host in hosts] == [(200, "ok\n") for _ in hosts]


def test_slow_clients_keep_no_probe_waiting_and_the_oldest_goes_when_there_are_too_many() -> None:
    with serving({}, seconds_to_ask=10 * SECONDS) as address, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(address)) for _ in range(16)]
        for client in slow:
            client.sendall(b"G")
        assert get(address) == (200, "ok\n")
        slow += [stack.enter_context(connected(address)) for _ in range(64)]
        assert get(address) == (200, "ok\n")
        assert is_sent_away(slow[0])


def test_the_time_to_ask_is_one_for_the_whole_question() -> None:
    with serving({}, seconds_to_ask=0.2) as address, connected(address) as client:
        client.settimeout(0.01)
        deadline = time.monotonic() + SECONDS
        while not is_sent_away(client, b"G"):
            assert time.monotonic() < deadline, "each byte buys more time"


def test_a_client_that_sends_too_much_is_sent_away() -> None:
    with serving({}, seconds_to_ask=10 * SECONDS) as address, connected(address) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(b"GET /" + b"x" * (1 << 20))
        assert is_sent_away(client)


def test_health_is_answered_whatever_those_do_who_ask_for_metrics(gate: Gate) -> None:
    def metrics() -> Page:
        gate(None)
        return Page(HTTPStatus.OK, b"m" * (16 << 20))

    with serving({"/metrics": metrics}) as address, contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connected(address)) for _ in range(20)]
        for client in waiting:
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert gate.entered.acquire(timeout=SECONDS)
        assert get(address) == (200, "ok\n"), "their page is not made yet"
        gate.opened.set()
        assert [client.recv(15) for client in waiting] == [b"HTTP/1.1 200 OK"] * 20
        assert get(address) == (200, "ok\n"), "they do not read it"


def test_a_page_that_cannot_be_made_is_an_error_of_its_own() -> None:
    def broken() -> Page:
        raise KeyError("whatever it was given")

    with serving({"/metrics": broken}) as address:
        assert get(address, "/metrics") == (500, "it could not be made; the driver's log tells more\n")
        assert get(address) == (200, "ok\n")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (b"POST /healthz HTTP/1.1", b"501 Not Implemented"),
        (b"GET /healthz HTTP/9.9", b"400 Bad Request"),
        (b"GET /healthz", b"400 Bad Request"),
        (b"\0\xff\x1b[31m", b"400 Bad Request"),
        (b"GET /healthz?verbose HTTP/1.0", b"200 OK"),
        (b"GET /healthz/../metrics HTTP/1.1", b"404 Not Found"),
    ],
)
def test_odd_questions_are_answered_as_such(asked: bytes, told: bytes) -> None:
    with serving({}) as address, connected(address) as client:
        client.sendall(asked + b"\r\n\r\n")
        assert client.makefile("rb").readline() == b"HTTP/1.1 " + told + b"\r\n"


def test_clients_that_reset_leave_no_word_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    page = Page(HTTPStatus.OK, b"m" * (16 << 20))
    with serving({"/metrics": lambda: page}) as address:
        for asked in (b"GET /metrics HTTP/1.0\r\n\r\n", b"GET /metrics HTTP/1.0\r\n", b"GET /\x1b[31m") * 10:
            with connected(address) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(asked)
        assert get(address) == (200, "ok\n")
    assert capfd.readouterr().err == ""


@contextlib.contextmanager
def serving(
    pages: Mapping[str, Callable[[], Page]], address: str | None = None, seconds_to_ask: float = SECONDS
) -> Iterator[str]:
    address = address or f"127.0.0.1:{free_port()}"
    server = HttpServer(address, {"/healthz": lambda: Page(HTTPStatus.OK, b"ok\n"), **pages}, seconds_to_ask)
    server.start()
    try:
        yield address
    finally:
        server.stop()


def connected(address: str) -> socket.socket:
    host, _, port = address.partition(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


def is_sent_away(client: socket.socket, said: bytes = b"") -> bool:
    try:
        client.sendall(said)
        return client.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False
