"""Where an image may come from besides a file: a pipe, and servers that ask who is there."""

import base64
import contextlib
import gzip
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from click.testing import CliRunner

from csi_driver.cli.download_access import read_headers, read_source
from csi_driver.cli.main import luks_csi
from csi_driver.host.files import Files
from csi_driver.images.base import ImageFormat
from csi_driver.images.bring import Bringer, Meter
from csi_driver.images.checksum import Checksum
from csi_driver.images.destinations import Connector
from csi_driver.images.formats import check_source
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Import
from csi_driver.model.errors import DriverError, FailedPrecondition, InvalidArgument
from tests.cli import run_cli
from tests.image_builders import DISK, vhd_fixed
from tests.image_server import Handler, serving, status, usual
from tests.machine.image_lab import unmetered

SECRET = "Bearer kept-for-ourselves"


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def library(tmp_path: Path, told: list[str]) -> ImageLibrary:
    return ImageLibrary(tmp_path / "state" / "images", Connector(allow_local=True), warn=told.append)


def left(folder: Path) -> list[str]:
    return [path.name for path in (folder / "state" / "images" / "new").rglob("*") if not path.name.endswith(".lock")]


# --- a pipe ----------------------------------------------------------------------------------------------------------


def piped(library: ImageLibrary, content: bytes, **more: object) -> None:
    library.import_(Import("disk", "-", stream=io.BytesIO(content), **more), unmetered)  # type: ignore[arg-type]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_what_comes_through_a_pipe_is_an_image(
    library: ImageLibrary, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    packed = pack(DISK)  # once: gzip notes the second in it
    checksum = Checksum.parse(hashlib.sha256(packed).hexdigest())
    piped(library, packed, checksum=checksum)
    record = library.get("disk")
    assert library.file("disk").read_bytes() == DISK
    assert (record.provenance.source, record.provenance.checksum) == ("standard input", str(checksum))
    assert left(tmp_path) == []


def test_a_pipe_is_held_against_its_checksum_and_limit_and_leaves_nothing(
    library: ImageLibrary, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match="standard input has the checksum sha256:"):
        piped(library, DISK, checksum=Checksum.parse("0" * 64))
    with pytest.raises(InvalidArgument, match="more than the 65536 bytes that are allowed came by standard input"):
        piped(library, DISK, most_bytes=65536)
    with pytest.raises(InvalidArgument, match="is empty"):
        piped(library, b"")
    assert library.names() == []
    assert left(tmp_path) == []


class Broken(io.RawIOBase):
    """A pipe that breaks after its first piece."""

    def __init__(self) -> None:
        self._pieces = [DISK]

    def read(self, size: int = -1, /) -> bytes:
        if not self._pieces:
            raise OSError(5, "Input/output error")
        return self._pieces.pop()


def test_a_pipe_that_breaks_leaves_nothing(library: ImageLibrary, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="standard input cannot be read for image disk"):
        library.import_(Import("disk", "-", stream=cast("BinaryIO", Broken())), unmetered)
    assert left(tmp_path) == []


def test_the_command_reads_a_pipe(tmp_path: Path) -> None:
    arguments = ["image", "import", "-", "disk", "--state-dir", str(tmp_path / "state")]
    result = CliRunner().invoke(luks_csi, arguments, input=DISK)
    assert (result.exit_code, "image disk of" in result.output) == (0, True)
    assert ImageLibrary(tmp_path / "state" / "images").file("disk").read_bytes() == DISK


# --- what is taken with a word ---------------------------------------------------------------------------------------


def test_a_fixed_vhd_loses_its_footer_and_becomes_raw(library: ImageLibrary, tmp_path: Path, told: list[str]) -> None:
    path = tmp_path / "disk.vhd"
    path.write_bytes(vhd_fixed())
    checksum = Checksum.parse(hashlib.sha256(vhd_fixed()).hexdigest())
    record = library.import_(Import("disk", str(path), checksum), unmetered)
    assert (record.format, record.size, record.file_size) == (ImageFormat.RAW, len(DISK), len(DISK))
    assert library.file("disk").read_bytes() == DISK
    assert path.read_bytes() == vhd_fixed(), "the source stays as it is"
    piped(ImageLibrary(tmp_path / "other" / "images"), gzip.compress(vhd_fixed()))
    assert told == []


@pytest.mark.parametrize("call", ["write", "link", "rename", "remove", "sync_folder"])
def test_a_fixed_vhd_that_is_moved_in_is_whole_until_its_image_is(
    library: ImageLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "whole"
    path.write_bytes(vhd_fixed())
    wanted = Import("disk", str(path), Checksum.parse(hashlib.sha256(vhd_fixed()).hexdigest()), take=True)
    real, cuts = getattr(Files, call), 0
    while not library.names():
        left = cuts

        def dies(*arguments: object) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            real(*arguments)

        monkeypatch.setattr(Files, call, dies)  # killed at the first of these, then at the second, …
        with contextlib.suppress(KeyboardInterrupt):
            library.import_(wanted, unmetered)
        cuts += 1
        assert path.read_bytes() == vhd_fixed()
        assert cuts < 50
    monkeypatch.undo()
    assert cuts > 1
    assert library.file("disk").read_bytes() == DISK
    assert library.get("disk").file_size == len(DISK)


def test_a_warning_is_told_once(library: ImageLibrary, tmp_path: Path, told: list[str]) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(DISK[:-1])
    library.import_(Import("disk", str(path)), unmetered)
    assert [sentence.partition(",")[0] for sentence in told] == [f"image disk has {len(DISK) - 1} bytes"]
    result = CliRunner().invoke(luks_csi, ["image", "import", str(path), "disk", "--state-dir", str(tmp_path / "more")])
    assert result.exit_code == 0
    assert f"warning: image disk has {len(DISK) - 1} bytes" in result.stderr
    assert "warning" not in result.stdout


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("s3://bucket/disk.img", "https URL that is signed"),
        ("gs://bucket/disk.img", "https URL that is signed"),
        ("docker://quay.io/a/b:1", "container image"),
        ("file:///disk.img", "give the path without file:"),
        ("nfs://host/disk.img", "mount it"),
        ("scp://host/disk.img", "luks-csi image import - NAME"),
        ("FTP://host/disk.img", "are not fetched by ftp:"),
    ],
)
def test_each_scheme_that_people_try_has_its_sentence(source: str, sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        check_source(source)


# --- credentials -----------------------------------------------------------------------------------------------------


def guarded(wanted: str) -> Callable[[Handler], None]:
    """The usual answer to who sends `wanted`, else 401."""

    def answer(handler: Handler) -> None:
        (usual if handler.headers.get("Authorization") == wanted else status(401))(handler)

    return answer


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def files(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Options, and the Authorization that they send to 127.0.0.1."""
    header, netrc = folder / "headers", folder / "netrc"
    header.write_text(f"\nAuthorization: {SECRET}\nX-Other:  yes \n")
    netrc.write_text("machine other.example login a password b\nmachine 127.0.0.1 login user password pass\n")
    for name, entries in (("basic", ("username", "password")), ("cdi", ("accessKeyId", "secretKey"))):
        (folder / name).mkdir()
        for entry, value in zip(entries, ("user", "pass\n"), strict=True):
            (folder / name / entry).write_text(value)
    return {
        "headers": (["--header-file", str(header)], SECRET),
        "netrc": (["--netrc-file", str(netrc)], basic("user", "pass")),
        "basic": (["--credentials-dir", str(folder / "basic")], basic("user", "pass")),
        "cdi": (["--credentials-dir", str(folder / "cdi")], basic("user", "pass")),
    }


@pytest.mark.parametrize("kind", ["headers", "netrc", "basic", "cdi"])
def test_a_server_that_asks_for_credentials_gets_them_and_nothing_is_recorded(tmp_path: Path, kind: str) -> None:
    options, wanted = files(tmp_path)[kind]
    state = tmp_path / "state"
    with serving(DISK) as server:
        common = ["image", "import", server.url(), "disk", "--state-dir", str(state), "--allow-local"]
        server.answers = [guarded(wanted)]
        refused = CliRunner().invoke(luks_csi, common)
        assert isinstance(refused.exception, FailedPrecondition)
        assert "status 401; give credentials (--header-file" in str(refused.exception)
        server.answers = [guarded(wanted)]
        result = CliRunner().invoke(luks_csi, [*common, *options])
        assert result.exit_code == 0, result.output
        assert kind != "headers" or server.requests[-1]["x-other"] == "yes"
    kept = b"".join(path.read_bytes() for path in state.rglob("*.json"))
    for secret in (b"kept-for-ourselves", b"pass", wanted.encode()):
        assert secret not in kept.replace(b"passphrase", b"")
        assert secret.decode() not in result.output + repr(result)


def test_credentials_do_not_follow_to_another_server(library: ImageLibrary) -> None:
    with serving(DISK) as first, serving(DISK) as second:
        first.answers = [status(302, Location="/there"), status(302, Location=second.url("/here"))]
        library.import_(Import("disk", first.url(), headers={"Authorization": SECRET}), unmetered)
    assert [request.get("authorization") for request in first.requests] == [SECRET, SECRET]
    assert [request.get("authorization") for request in second.requests] == [None]


def test_credentials_are_in_no_repr() -> None:
    assert SECRET not in repr(Import("disk", "https://images.example/", headers={"Authorization": SECRET}))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("kept-for-ourselves", "line 1 of .* is no header"),
        ("A: b\nHost: kept-for-ourselves", "line 2 of .* sets Host"),
        ("Range: bytes=0-", "sets Range"),
        ("A b: kept-for-ourselves", "is no header"),
    ],
)
def test_a_header_file_that_is_none_is_told_and_not_repeated(tmp_path: Path, content: str, sentence: str) -> None:
    import click

    (tmp_path / "headers").write_text(content)
    with pytest.raises(click.ClickException, match=sentence) as caught:
        read_headers("https://images.example/", tmp_path / "headers", None, None)
    assert "kept-for-ourselves" not in str(caught.value)


def test_credentials_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    import click

    (tmp_path / "empty").mkdir()
    (tmp_path / "netrc").write_text("machine images.example\nlogon kept-for-ourselves")
    for url, netrc, folder, sentence in (
        ("https://images.example/", None, tmp_path / "empty", "expected username and password or accessKeyId and"),
        ("https://images.example/", tmp_path / "netrc", None, "cannot be read as a netrc file: line"),
        ("https://images.example/", tmp_path / "netrc", tmp_path / "empty", "exclude each other"),
        ("disk.img", None, tmp_path / "empty", "are for a download"),
    ):
        with pytest.raises(click.ClickException, match=sentence) as caught:
            read_headers(url, None, netrc, folder)
        assert "kept-for-ourselves" not in str(caught.value)
    (tmp_path / "netrc").write_text("machine other.example login a password b\n")
    assert read_headers("https://images.example/", None, tmp_path / "netrc", None) == {}


def test_a_signed_url_is_read_from_a_file_and_its_query_is_sent_and_never_kept(tmp_path: Path) -> None:
    query = "X-Amz-Credential=AKIA%2F20261128&X-Amz-Signature=kept-for-ourselves&e=a+b%20c"
    with serving(DISK) as server:
        (tmp_path / "url").write_text(f"{server.url('/disk.img')}?{query}\n")
        assert read_source(f"@{tmp_path / 'url'}").endswith(query)
        arguments = ["image", "import", f"@{tmp_path / 'url'}", "disk", "--state-dir", str(tmp_path / "state")]
        result = CliRunner().invoke(luks_csi, [*arguments, "--allow-local"])
        assert result.exit_code == 0, result.output
        assert server.requests[-1]["path"] == f"/disk.img?{query}"
        assert ImageLibrary(tmp_path / "state" / "images").get("disk").provenance.source == server.url("/disk.img")
        server.answers = [status(403)]
        refused = CliRunner().invoke(luks_csi, [*arguments[:3], "more", *arguments[4:], "--allow-local"])
        assert "a URL that is signed anew" in str(refused.exception)
    assert "kept-for-ourselves" not in result.output + str(refused.exception)
    assert not any(b"kept-for-ourselves" in path.read_bytes() for path in (tmp_path / "state").rglob("*.json"))


def test_a_file_without_a_url_is_told_and_not_repeated(tmp_path: Path) -> None:
    import click

    for content in (
        "kept-for-ourselves",
        "htps://h/disk.img?sig=kept-for-ourselves",
        "\nfile:///kept-for-ourselves",
        "",
    ):
        (tmp_path / "url").write_text(content)
        with pytest.raises(click.ClickException, match=r"no http\(s\) URL in its first line, .* is \./@") as caught:
            read_source(f"@{tmp_path / 'url'}")
        assert "kept-for-ourselves" not in str(caught.value)
    (tmp_path / "url").write_text("\n https://images.example/disk.img?a=b \n# mine\n")
    assert read_source(f"@{tmp_path / 'url'}") == "https://images.example/disk.img?a=b"


def test_what_a_download_is_refused_for_names_its_option(tmp_path: Path) -> None:
    with serving(DISK) as server:
        for options, sentence in (
            ((), "unless --allow-local is given"),
            (("--allow-local", "--limit", "1Ki"), "take a smaller image or raise --limit"),
        ):
            done = run_cli("image", "import", server.url(), "disk", "--state-dir", tmp_path / "state", *options)
            assert (done.exit_code, done.stdout) == (1, "")
            assert sentence in done.stderr


def test_a_server_that_fails_for_a_while_is_told(
    library: ImageLibrary, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi_driver.images.fetch.time.sleep", lambda _: None)
    with serving(DISK) as server:
        server.answers = [status(503)]
        library.import_(Import("disk", server.url()), unmetered)
    assert [sentence.partition("; ")[2] for sentence in told] == ["it is tried again in 10 s"]


def test_certificates_of_ones_own_are_a_file_of_pem(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("none")
    with pytest.raises(InvalidArgument, match=r"certificates in .*/ca cannot be used .*; expected PEM"):
        Connector(cacert=tmp_path / "ca")
    assert os.listdir(tmp_path) == ["ca"]


class Overtaken(Bringer):
    """The source is written anew by somebody, unpacked, after it was seen to be packed."""

    def _unwrapped(self, path: Path, folder: Path, wanted: Import, meter: Meter, where: str) -> Path:
        path.write_bytes(bytes(1 << 20))
        return super()._unwrapped(path, folder, wanted, meter, where)


def test_a_source_that_is_unpacked_by_somebody_meanwhile_stays_where_it_is(tmp_path: Path) -> None:
    source = tmp_path / "disk.gz"
    source.write_bytes(gzip.compress(bytes(1 << 20)))
    (tmp_path / "new").mkdir()
    bringer = Overtaken(Files(), Connector(), lambda _: None)
    with pytest.raises(FailedPrecondition, match="was changed while it was read"):
        bringer.bring(Import("disk", str(source), None, None, 1 << 30), tmp_path / "new", unmetered, "image disk")
    assert source.stat().st_size == 1 << 20
