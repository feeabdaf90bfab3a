"""Where downloads may go: addresses, names, redirects, certificates, URLs."""

import os
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from csi_driver.images.destinations import Connector, SocketAddress, parse_url, refusal
from csi_driver.images.fetch import fetch
from csi_driver.model.errors import InvalidArgument, Unavailable
from tests.image_server import ImageServer, cut, serving, sha512, status
from tests.unit.test_image_fetch import CONTENT, LOCAL, MIB, get, ranges


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1", "loopback"),
        ("127.8.9.10", "loopback"),
        ("0.0.0.0", "unspecified"),  # noqa: S104  # connecting to it reaches this host
        ("0.1.2.3", "unspecified"),
        ("169.254.1.1", "link-local"),
        ("169.254.169.254", "metadata"),
        ("100.100.100.200", "metadata"),
        ("168.63.129.16", "metadata"),
        ("192.0.0.192", "metadata"),
        ("224.0.0.1", "multicast"),
        ("255.255.255.255", "reserved"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("ff02::1", "multicast"),
        ("fd00:ec2::254", "metadata"),
        ("fd00:ec2::23", "metadata"),
        ("fd00:c1::a9fe:a9fe", "metadata"),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", "Teredo"),
        ("fd20:ce::254", "metadata"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:169.254.169.254", "metadata"),
        ("::127.0.0.1", "loopback"),
        ("::ffff:0:127.0.0.1", "loopback"),
        ("64:ff9b::127.0.0.1", "loopback"),
        ("64:ff9b::a9fe:a9fe", "metadata"),
        ("64:ff9b:1::8.8.8.8", "NAT64"),
        ("2002:7f00:1::", "loopback"),
        ("93.184.215.14", None),
        ("10.1.2.3", None),
        ("192.168.1.1", None),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", None),
        ("fd12:3456::1", None),
        ("::ffff:93.184.215.14", None),
        ("64:ff9b::93.184.215.14", None),
    ],
)
def test_addresses_that_are_refused(address: str, reason: str | None) -> None:
    found = refusal(address)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0", "[::1]", "[::ffff:127.0.0.1]", "[::]"],
)
def test_this_host_is_not_downloaded_from_however_it_is_written(tmp_path: Path, host: str) -> None:
    with serving(CONTENT) as server:
        with pytest.raises(InvalidArgument, match=r"leads to .*(loopback|unspecified) address: refused"):
            fetch(f"http://{host}:{server.port}/image", tmp_path / "a", 4 * MIB, Connector())
        assert server.requests == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bad", ["127.0.0.1", "::1", "169.254.169.254"])
def test_one_refused_address_among_good_ones_refuses_the_name(tmp_path: Path, bad: str) -> None:
    connector = Connector(resolve=lambda _host, port: [("93.184.215.14", port), (bad, port)])
    with pytest.raises(InvalidArgument, match=rf"http://images\.example/a leads to {bad}, a .*: refused"):
        fetch("http://images.example/a", tmp_path / "a", MIB, connector)


def test_the_address_that_was_judged_is_the_one_connected_to(tmp_path: Path) -> None:
    asked: list[str] = []
    with serving(CONTENT) as server:

        def rebinding(host: str, _port: int) -> Sequence[SocketAddress]:
            asked.append(host)
            return [("127.0.0.1", server.port)] if len(asked) == 1 else [("169.254.169.254", 80)]

        connector = Connector(allow_local=True, resolve=rebinding)
        fetch("http://images.example/a", tmp_path / "a", 4 * MIB, connector, retries=0)
    assert asked == ["images.example"], "one question per connection"
    assert server.requests[0]["host"] == "images.example"


def test_a_name_that_leads_elsewhere_at_the_retry_is_judged_again(tmp_path: Path) -> None:
    answers: list[list[SocketAddress]] = [[], [("127.0.0.1", 80)]]
    connector = Connector(resolve=lambda _host, _port: answers.pop(0))
    with pytest.raises(InvalidArgument, match=r"leads to 127\.0\.0\.1"):
        fetch("http://images.example/a", tmp_path / "a", MIB, connector, backoff_seconds=0)
    assert answers == []


class AsIfPublic(Connector):
    """Strict, but for 127.0.0.1, where the test's server stands."""

    def __init__(self) -> None:
        super().__init__(judge=lambda address: None if address == "127.0.0.1" else refusal(address))


@pytest.mark.parametrize("host", ["127.0.0.2", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "0.0.0.0"])  # noqa: S104
def test_a_redirect_to_a_refused_address_is_not_followed(tmp_path: Path, host: str) -> None:
    with serving(CONTENT) as server:
        get(server, tmp_path / "good", connector=AsIfPublic())
        server.answers = [status(302, Location=f"http://{host}:{server.port}/latest/meta-data")]
        with pytest.raises(InvalidArgument, match=r"^http://.*/latest/meta-data leads to .* address: refused"):
            get(server, tmp_path / "bad", connector=AsIfPublic())
    assert [request["path"] for request in server.requests] == ["/image", "/image"]
    assert os.listdir(tmp_path) == ["good"]


def test_redirects_are_followed_with_the_range(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        hops = [status(code, Location=f"/hop{code}") for code in (301, 302, 303, 307)]
        server.answers = [*hops, status(308, Location=server.url("/end?x=1&y=%20z")), cut(5000)]
        server.answers += [status(302, Location="../other path")]
        get(server, tmp_path / "a.img", expected=sha512(CONTENT))
    assert [request["path"] for request in server.requests[:6]] == [
        *("/image", "/hop301", "/hop302", "/hop303", "/hop307"),
        "/end?x=1&y=%20z",
    ]
    assert [request["path"] for request in server.requests[6:]] == ["/image", "/other%20path"]
    assert ranges(server)[6:] == ["bytes=5000-"] * 2


def test_the_sixth_redirect_is_refused(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        server.answers = [status(302, Location="/image")] * 6
        with pytest.raises(InvalidArgument, match=r"more than 5 redirects"):
            get(server, tmp_path / "a.img")
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://images.example/a", "http://", "http://user:geheim@h/", "http://h:99999/", "", "//"],
)
def test_redirects_to_what_is_no_http_url_are_refused(tmp_path: Path, location: str) -> None:
    with serving(CONTENT) as server:
        server.answers = [status(302, Location=location)] * 6
        with pytest.raises(InvalidArgument, match=r"redirects to somewhere that is no usable|to nowhere|more than 5"):
            get(server, tmp_path / "a.img")
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and self-signed certificate of images.example."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-batch"),
            *("-subj", "/CN=images.example", "-addext", "subjectAltName=DNS:images.example"),
            *("-days", "2", "-keyout", path, "-out", f"{path}.crt"),
        ],
        check=True,
        capture_output=True,
    )
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


def served_by(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=f"{certificate}.crt")


def named(server: ImageServer, tls: ssl.SSLContext | None = None) -> Connector:
    """Every name leads to the server."""
    return Connector(allow_local=True, tls=tls, resolve=lambda _host, _port: [("127.0.0.1", server.port)])


def test_https_is_fetched_resumed_and_never_left_for_http(tmp_path: Path, certificate: Path) -> None:
    path = tmp_path / "a.img"
    with serving(CONTENT, served_by(certificate)) as server:
        connector = named(server, trusting(certificate))
        server.answers = [cut(5000)]
        fetch("https://images.example/a", path, 4 * MIB, connector, backoff_seconds=0)
        assert path.read_bytes() == CONTENT
        assert ranges(server) == [None, "bytes=5000-"]
        assert server.requests[0]["host"] == "images.example"
        server.answers = [status(302, Location="http://images.example/a")]
        with pytest.raises(InvalidArgument, match=r"redirects to http://images\.example/a, from https to unprotected"):
            fetch("https://images.example/a", path, 4 * MIB, connector, backoff_seconds=0)
    assert len(server.requests) == 3


def test_a_file_of_certificates_is_trusted_in_the_place_of_the_systems(tmp_path: Path, certificate: Path) -> None:
    with serving(CONTENT, served_by(certificate)) as server:
        connector = Connector(
            allow_local=True,
            cacert=Path(f"{certificate}.crt"),
            resolve=lambda _host, _port: [("127.0.0.1", server.port)],
        )
        fetch("https://images.example/a", tmp_path / "a", 4 * MIB, connector, retries=0)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_certificates_are_verified_and_not_tried_again(tmp_path: Path, certificate: Path) -> None:
    with serving(CONTENT, served_by(certificate)) as server:
        with pytest.raises(InvalidArgument, match=r"certificate of images\.example does not hold \(self.signed"):
            fetch("https://images.example/a", tmp_path / "a", 4 * MIB, named(server))
        with pytest.raises(InvalidArgument, match=r"certificate of other\.example does not hold \(Hostname mismatch"):
            fetch("https://other.example/a", tmp_path / "a", 4 * MIB, named(server, trusting(certificate)))
        assert server.requests == []
    with serving(CONTENT) as server, pytest.raises(Unavailable, match=r"could not be connected to .*SSL"):
        fetch("https://images.example/a", tmp_path / "a", 4 * MIB, named(server, trusting(certificate)), retries=0)


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("http://images.example", "http://images.example/"),
        ("HTTPS://Images.Example:443/A.img?x=1#part", "https://images.example/A.img?x=1"),
        ("http://images.example:8080/a b/é", "http://images.example:8080/a%20b/%C3%A9"),
        ("http://bücher.example/a%20b", "http://xn--bcher-kva.example/a%20b"),
        ("http://[2001:db8::1]:81/a", "http://[2001:db8::1]:81/a"),
    ],
)
def test_urls_that_are_understood(url: str, parsed: str) -> None:
    assert parse_url(url).url == parsed


@pytest.mark.parametrize(
    "url",
    [
        *("", "images.example/a", "file:///etc/passwd", "ftp://images.example/a", "json:{}", "http://", "http:///a"),
        *("http://h:0/", "http://h:x/", "http://h:65536/", "http://[::1/", "http://u:geheim@h/", "http://geheim@h/"),
        *("http://h/\r\nX: y", "http://h\n/", "http://" + "a" * 64 + "/", "http://a..b/"),
    ],
)
def test_urls_that_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^the image's URL ") as caught:
        fetch(url, tmp_path / "a", MIB, LOCAL)
    assert "geheim" not in str(caught.value)
    assert os.listdir(tmp_path) == []
