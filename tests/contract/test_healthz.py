"""/readyz tells what Probe tells, /healthz whether the server answers."""

import contextlib
import socket
import time
import urllib.error
import urllib.request
from http import HTTPStatus

import pytest

from csi_driver.rpc.http import HttpServer, Page
from tests.contract.serving import SECONDS, Run


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


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_server_whose_socket_is_gone_is_not_well(run: Run, path: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    cases = run(http_address=address)
    cases.driver.settings.endpoint.unlink()
    status, said = get(address, path)
    assert status == 503
    assert said != "ok\n"


def test_other_paths_are_not_found(run: Run) -> None:
    address = f"127.0.0.1:{free_port()}"
    run(http_address=address)
    assert get(address, "/")[0] == 404
    assert get(address, "/metrics")[0] == 200


def test_without_a_host_every_address_is_answered() -> None:
    port = free_port()
    hosts = ["127.0.0.1", *(["[::1]"] if socket.has_dualstack_ipv6() else [])]
    server = HttpServer(f":{port}", {"/healthz": lambda: Page(HTTPStatus.OK, b"ok\n")})
    server.start()
    try:
        assert [get(f"{host}:{port}") for host in hosts] == [(200, "ok\n") for _ in hosts]
    finally:
        server.stop()


def test_a_client_that_sends_nothing_keeps_nobody_waiting(run: Run) -> None:
    port = free_port()
    run(http_address=f"127.0.0.1:{port}")
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS):
        assert get(f"127.0.0.1:{port}")[0] == 200


def test_many_clients_that_send_nothing_are_kept_out(run: Run) -> None:
    port = free_port()
    run(http_address=f"127.0.0.1:{port}")
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=SECONDS)) for _ in range(17)
        ]
        assert silent[-1].recv(1) == b"", "one too many is sent away at once"
    deadline = time.monotonic() + SECONDS
    while True:  # their threads end by and by
        with contextlib.suppress(OSError):
            assert get(f"127.0.0.1:{port}")[0] == 200
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)
