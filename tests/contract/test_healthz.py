"""/healthz tells what kubelet's Probe would be told."""

import contextlib
import socket
import urllib.error
import urllib.request
from http import HTTPStatus

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


def test_it_is_well_while_probe_is_and_says_why_not(run: Run) -> None:
    address = f"127.0.0.1:{free_port()}"
    cases = run(http_address=address)
    assert get(address) == (200, "ok\n")
    cases.health.blocked_by = "dm-crypt: it is not there; load it"
    assert get(address) == (503, "dm-crypt: it is not there; load it\n")
    cases.health.blocked_by = None
    assert get(address) == (200, "ok\n")


def test_a_server_whose_socket_is_gone_is_not_well(run: Run) -> None:
    address = f"127.0.0.1:{free_port()}"
    cases = run(http_address=address)
    cases.driver.settings.endpoint.unlink()
    status, said = get(address)
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
