"""The use cases of images, and the catalog: what is visible when, and what is refused before any work."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest
from click.testing import Result

from csi_driver.cli.image import Document
from csi_driver.host import ofdlock
from csi_driver.host.files import Files
from csi_driver.images.base import MIB, Progress
from csi_driver.images.checkpoint import Operation
from csi_driver.images.checksum import Checksum
from csi_driver.images.destinations import Connector
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Clone, Import
from csi_driver.images.store import ImageRecord, ImageStore
from csi_driver.keys.secret import SecretKey, read_secret
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    DeviceInUse,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from tests.cli import run_cli
from tests.image_server import serving
from tests.machine.image_lab import unmetered
from tests.small_folder import in_a_small_folder
from tests.volume_images import SECRET as CHEAP
from tests.volume_images import encrypted_image

CONTENT = b"".join(hashlib.sha512(b"%d" % number).digest() for number in range(20_000))
SECRET = {"CRYPTO_KEY_VALUE": "a passphrase", "CRYPTO_PBKDF": "pbkdf2"}


@pytest.fixture
def library(tmp_path: Path) -> ImageLibrary:
    return ImageLibrary(tmp_path / "state" / "images", Connector(allow_local=True))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path


def key(**entries: str) -> SecretKey:
    return read_secret(SECRET | entries)


def bring(library: ImageLibrary, path: Path | str, name: str = "disk", **more: object) -> ImageRecord:
    return library.import_(Import(name, str(path), **more), unmetered)  # type: ignore[arg-type]


def clone(library: ImageLibrary, source: str, name: str, operation: Operation, **more: object) -> ImageRecord:
    return library.clone(Clone(source, name, operation, **more), unmetered)  # type: ignore[arg-type]


def left(library_folder: Path) -> list[str]:
    """Files of what is unfinished or being removed."""
    return sorted(
        str(path.relative_to(library_folder))
        for kind in ("new", "trash")
        for path in (library_folder / kind).rglob("*")
        if not path.name.endswith(".lock")
    )


# --- import ----------------------------------------------------------------------------------------------------------


def test_a_download_that_was_refused_is_not_taken_for_another_one(library: ImageLibrary, tmp_path: Path) -> None:
    """What another URL brought must never be recorded as this one, under a checksum that nobody has checked."""
    with serving(gzip.compress(bytes(MIB))) as server:
        with pytest.raises(InvalidArgument, match="more than the 65536 bytes"):
            bring(library, server.url("/a"), most_bytes=65536)
        server.content = gzip.compress(CONTENT)
        checksum = Checksum.parse(hashlib.sha512(server.content).hexdigest())
        record = bring(library, server.url("/b"), checksum=checksum)
    assert library.file("disk").read_bytes() == CONTENT
    assert record.provenance.checksum == str(checksum)
    assert left(tmp_path / "state" / "images") == []


@pytest.mark.parametrize("other", ["url", "checksum"])
def test_a_whole_download_of_a_cut_call_serves_that_call_alone(
    library: ImageLibrary, tmp_path: Path, other: str
) -> None:
    """The first call was killed while it unpacked: the download is whole and nothing else is."""
    first, packed = gzip.compress(b"\0another image" * 5000), gzip.compress(CONTENT)
    checksums = [Checksum.parse(hashlib.sha256(each).hexdigest()) for each in (first, packed)]
    places = ("/a", "/b") if other == "url" else ("/a", "/a")
    with serving(first) as server:
        bring(library, server.url(places[0]), checksum=checksums[0])
        folder = tmp_path / "state" / "images"
        library.delete("disk")
        asked = f"{server.url(places[0])} {checksums[0]}"
        (folder / "new" / "disk").mkdir()
        whole = folder / "new" / "disk" / f"download-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
        whole.write_bytes(first)
        seen = len(server.requests)
        server.content = packed
        bring(library, server.url(places[1]), checksum=checksums[1])
        assert len(server.requests) == seen + 1
    assert library.file("disk").read_bytes() == CONTENT
    assert left(folder) == []


def test_a_write_through_a_mapping_while_it_is_copied_is_noticed(library: ImageLibrary, raw: Path) -> None:
    """A page that is dirty already takes more writes without a new mtime: the import fsyncs first."""
    with raw.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:

        def meter(what: str, total: int | None) -> AbstractContextManager[Progress]:
            mapping[1] ^= 1
            return unmetered(what, total)

        mapping[0] ^= 1
        with pytest.raises(FailedPrecondition, match="was changed or removed while it was read"):
            library.import_(Import("disk", str(raw)), meter)
    assert library.names() == []


def test_what_is_refused_is_not_copied_first(library: ImageLibrary, raw: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def meter(what: str, total: int | None) -> AbstractContextManager[Progress]:
        said.append(what)
        return unmetered(what, total)

    with pytest.raises(InvalidArgument, match="4096"):
        library.import_(Import("disk", str(raw), most_bytes=4096), meter)
    assert said == []
    assert left(tmp_path / "state" / "images") == []


def test_an_image_that_cryptsetup_made_with_its_own_costs_can_be_used(library: ImageLibrary, tmp_path: Path) -> None:
    """luksFormat chooses Argon2 memory by the machine; more than volumes may take."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(17 * MIB)
    costs = ("--pbkdf", "argon2id", "--pbkdf-memory", "131072", "--pbkdf-force-iterations", "4")
    subprocess.run(
        ["cryptsetup", "luksFormat", "-q", "--type", "luks2", *costs, "--key-file", "-", str(image)],
        input=b"a passphrase", check=True, timeout=60,
    )  # fmt: skip
    assert bring(library, image, secret="vms/key").luks is not None
    assert library.header("disk").keyslots
    assert clone(library, "disk", "plain", Operation.DECRYPT, key=key()).size == MIB
    with pytest.raises(Unauthenticated, match="opens no key slot of image disk"):
        clone(library, "disk", "other", Operation.DECRYPT, key=key(CRYPTO_KEY_VALUE="wrong"))


def test_the_passphrase_that_a_secret_had_before_opens_an_image_too(
    library: ImageLibrary, raw: Path, tmp_path: Path
) -> None:
    raw.write_bytes(CONTENT[:MIB])
    bring(library, encrypted_image(raw, tmp_path / "sealed").file, "safe")
    bring(library, raw, "plain")
    right = CHEAP["CRYPTO_KEY_VALUE"]
    changed = key(CRYPTO_KEY_VALUE="a new one", CRYPTO_KEY_VALUE_PREVIOUS=right)
    clone(library, "safe", "opened", Operation.DECRYPT, key=changed)
    assert library.file("opened").read_bytes() == CONTENT[:MIB]
    library.prove("safe", changed)
    library.prove("safe", key(CRYPTO_KEY_VALUE=right))
    library.prove("plain", changed)  # there is nothing to prove
    with pytest.raises(Unauthenticated, match="opens no key slot of image safe"):
        library.prove("safe", key(CRYPTO_KEY_VALUE="x", CRYPTO_KEY_VALUE_PREVIOUS="y"))


@pytest.mark.parametrize("secret", ["my passphrase by mistake", "name", "a/b/c", "A/b", "/", "a/"])
def test_a_secret_that_is_no_name_is_refused_and_not_repeated(library: ImageLibrary, raw: Path, secret: str) -> None:
    with pytest.raises(InvalidArgument, match="NAMESPACE/NAME") as caught:
        bring(library, raw, secret=secret)
    assert secret not in str(caught.value) or len(secret) < 7
    assert library.names() == []


def test_a_relative_path_is_recorded_as_a_whole_one(
    library: ImageLibrary, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(raw.parent)
    assert bring(library, raw.name).provenance.source == str(raw)


def test_what_comes_out_leaves_room_for_others(tmp_path: Path) -> None:
    """A stream of unknown length stops before the disk is full."""
    packed = tmp_path / "bomb.gz"
    packed.write_bytes(gzip.compress(os.urandom(200 * 1024)))
    script = (
        "import os, sys; from pathlib import Path\n"
        "from csi_driver.images.room import check_room\n"
        "Path('full').write_bytes(bytes(248 * 1024))\n"
        "try: check_room(os.open('.', os.O_RDONLY), 'to unpack image x')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    assert in_a_small_folder(tmp_path, script).startswith(f"{ResourceExhausted.__name__} no space is left to unpack")


# --- clone -----------------------------------------------------------------------------------------------------------


def test_a_qcow2_whose_disk_is_encrypted_is_not_encrypted_again(
    library: ImageLibrary, raw: Path, tmp_path: Path
) -> None:
    """Record and data decide, and the data is what the VM sees, not the file."""
    bring(library, raw)
    clone(library, "disk", "safe", Operation.ENCRYPT, new_key=key())
    packed = tmp_path / "safe.qcow2"
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(library.file("safe")), str(packed)]
    subprocess.run(command, check=True, timeout=60)
    bring(library, packed, "packed")
    if os.geteuid():
        pytest.skip("qemu-nbd is locked up by root only")
    with pytest.raises(FailedPrecondition, match="its disk begins like LUKS"):
        clone(library, "packed", "twice", Operation.ENCRYPT, new_key=key())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"secret": "vms/key"}, "the result of ignore is not encrypted, so no secret can be named"),
        ({"sector_size": 4096}, "ignore makes no new encryption, so it takes no sector size"),
        ({"secret": "no name"}, "NAMESPACE/NAME"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    library: ImageLibrary, raw: Path, more: dict[str, object], words: str
) -> None:
    bring(library, raw)
    with pytest.raises(InvalidArgument, match=words):
        clone(library, "disk", "copy", Operation.IGNORE, **more)
    assert library.names() == ["disk"]


def test_a_secret_without_a_passphrase_can_be_put_right(library: ImageLibrary, raw: Path) -> None:
    bring(library, raw)
    with pytest.raises(FailedPrecondition, match="the secret for image copy holds neither CRYPTO_KEY_VALUE nor"):
        clone(library, "disk", "copy", Operation.ENCRYPT, new_key=SecretKey(None))
    assert library.names() == ["disk"]


# --- what is visible -------------------------------------------------------------------------------------------------


class Dies(Files):
    """Stops for good at one call."""

    def __init__(self, call: str, nth: int = 1) -> None:
        self._call = call
        self._left = nth

    def _step(self, call: str) -> None:
        if call == self._call:
            self._left -= 1
            if not self._left:
                raise KeyboardInterrupt

    def write(self, path: Path, content: bytes) -> None:
        self._step("write")
        super().write(path, content)

    def link(self, source: Path, target: Path) -> None:
        self._step("link")
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._step("remove")
        super().remove(path)


@pytest.mark.parametrize("call", ["write", "link", "rename", "remove"])
def test_a_finish_that_is_cut_keeps_what_was_made_or_shows_it_whole(
    library: ImageLibrary, raw: Path, tmp_path: Path, call: str
) -> None:
    folder = tmp_path / "state" / "images"
    record = msgspec.structs.replace(bring(library, raw), name="again")
    store = ImageStore(folder, Dies(call))
    made = store.begin("again") / "part"
    made.write_bytes(CONTENT)
    checkpoint = made.with_name("checkpoint.json")
    checkpoint.write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        store.finish(record, made)
    if call == "remove":  # behind the moment that makes it visible
        assert library.file("again").read_bytes() == CONTENT
        with pytest.raises(AlreadyExists):
            bring(library, raw, "again")
        assert sorted(os.listdir(library.file("again").parent)) == ["image", "record.json"]
        return
    assert library.names() == ["disk"]
    assert library.unfinished() == ["again"]
    assert made.read_bytes() == CONTENT
    assert checkpoint.exists()
    whole = ImageStore(folder, Files())
    assert whole.begin("again") == made.parent
    whole.finish(record, made)
    assert library.file("again").read_bytes() == CONTENT
    assert os.stat(library.file("again")).st_nlink == 1
    assert left(folder) == []


def test_export_leaves_a_file_alone_that_appears_meanwhile(library: ImageLibrary, raw: Path, tmp_path: Path) -> None:
    bring(library, raw)
    out = tmp_path / "out.raw"

    def meter(what: str, total: int | None) -> AbstractContextManager[Progress]:
        out.write_text("somebody's")
        return unmetered(what, total)

    with pytest.raises(AlreadyExists, match="has appeared meanwhile"):
        library.export("disk", out, meter)
    assert out.read_text() == "somebody's"
    out.unlink()
    library.export("disk", out, unmetered)
    assert out.read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out.raw"]


def test_a_removal_that_was_cut_is_told_of_and_ends(library: ImageLibrary, raw: Path, tmp_path: Path) -> None:
    bring(library, raw)
    folder = tmp_path / "state" / "images"
    (folder / "ready" / "disk").rename(folder / "trash" / "disk")
    assert library.unfinished() == ["disk"]
    bring(library, raw)
    assert left(folder) == []
    assert library.unfinished() == []


@pytest.mark.parametrize("reverse", [False, True])
def test_a_removal_for_an_object_that_was_cut_is_gone_on_with(
    library: ImageLibrary, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, reverse: bool
) -> None:
    folder, listed, real = tmp_path / "state" / "images", os.listdir, Files.remove
    monkeypatch.setattr("csi_driver.host.files.os.listdir", lambda path: sorted(listed(path), reverse=reverse))

    def cut(_folder: Path) -> tuple[Path, ImageRecord]:
        (_folder / "part").write_bytes(b"half")
        (_folder / "zero").write_bytes(b"half")
        raise Unavailable("cut")

    def leave_half() -> None:
        with pytest.raises(Unavailable):
            library.receive("disk", "uid-disk", cut)

    def leave_whole() -> None:
        bring(library, raw, owner="uid-disk")

    for leave in (leave_half, leave_whole):
        for removals in range(4):
            leave()
            left_to_go = removals

            def dies(files: Files, path: Path) -> None:
                nonlocal left_to_go
                if not left_to_go:
                    raise KeyboardInterrupt
                left_to_go -= 1
                real(files, path)

            monkeypatch.setattr(Files, "remove", dies)
            with contextlib.suppress(KeyboardInterrupt):
                library.drop("disk", "uid-disk")
            monkeypatch.setattr(Files, "remove", real)
            if library.owned():
                library.drop("disk", "uid-another")
                assert library.owned() == {"disk": "uid-disk"}
            library.drop("disk", "uid-disk")
            assert left(folder) == []
            assert (library.names(), library.unfinished()) == ([], [])


def test_what_is_read_is_not_deleted_and_the_reader_is_named(library: ImageLibrary, raw: Path, tmp_path: Path) -> None:
    refused = []

    def meter(what: str, total: int | None) -> AbstractContextManager[Progress]:
        with pytest.raises(DeviceInUse) as told:
            library.delete("disk")
        refused.append((what, str(told.value)))
        return unmetered(what, total)

    bring(library, raw)
    library.clone(Clone("disk", "copy"), meter)
    library.export("disk", tmp_path / "out", meter)
    assert [what for what, _ in refused] == ["copying", "exporting"]
    rest = "and was not deleted; delete it when that has ended, or stop that first"
    assert [said for _, said in refused] == [
        f"image disk is being read for image copy {rest}",
        f"image disk is being read for the file {tmp_path}/out {rest}",
    ]
    assert sorted(path.name for path in library.file("copy").parent.iterdir()) == ["image", "record.json"]
    assert library.file("copy").read_bytes() == (tmp_path / "out").read_bytes() == CONTENT
    library.delete("disk")


def test_only_who_reads_this_very_image_is_named(library: ImageLibrary, raw: Path, tmp_path: Path) -> None:
    """Two drivers of a node may have an image of one name each."""
    other = ImageStore(tmp_path / "other", Files())
    bring(library, raw)
    bring(ImageLibrary(tmp_path / "other"), raw)
    ours = ImageStore(library.file("disk").parents[2], Files())
    with (
        other.reading("disk", "the other one"),
        ours.reading("disk", "this one"),
        pytest.raises(DeviceInUse, match="is being read for this one and was not deleted"),
    ):
        library.delete("disk")


def test_a_source_that_is_another_owners_is_not_cloned(library: ImageLibrary, raw: Path) -> None:
    """By hand, say, under the name of an Image that is gone."""
    bring(library, raw)
    with pytest.raises(NotFound, match="the image disk of this node is not the Image of that name"):
        library.clone(Clone("disk", "copy", owner="uid-copy", source_owner="uid-disk"), unmetered)
    assert library.names() == ["disk"]
    library.clone(Clone("disk", "copy", owner="uid-copy"), unmetered)
    library.clone(Clone("copy", "again", owner="uid-again", source_owner="uid-copy"), unmetered)


def test_what_a_killed_clone_has_left_keeps_nobody_from_deleting_its_source(library: ImageLibrary, raw: Path) -> None:
    bring(library, raw)
    folder = library.file("disk").parents[2]
    killed = f"""
import os, signal
from pathlib import Path
from csi_driver.host.files import Files
from csi_driver.images.store import ImageStore
with ImageStore(Path({str(folder)!r}), Files()).reading("disk", "image killed"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", killed], check=False, timeout=120)

    def meter(what: str, total: int | None) -> AbstractContextManager[Progress]:
        with pytest.raises(DeviceInUse, match="is being read for image copy and was not deleted"):
            library.delete("disk")
        return unmetered(what, total)

    library.clone(Clone("disk", "copy"), meter)
    library.delete("disk")


def test_an_image_that_is_being_deleted_is_not_begun_with(library: ImageLibrary, raw: Path) -> None:
    bring(library, raw)
    with library.file("disk").open("r+b") as file:
        assert ofdlock.try_claim(file.fileno())
        with pytest.raises(Aborted, match="image disk is being deleted"):
            library.clone(Clone("disk", "copy"), unmetered)
    assert library.unfinished() == []


# --- the command -----------------------------------------------------------------------------------------------------


Command = Callable[..., Result]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    def run(*words: str, stdin: str | None = None) -> Result:
        return run_cli("image", *words, "--state-dir", tmp_path / "state", stdin=stdin)

    return run


def test_the_list_has_what_is_unfinished_and_what_is_damaged(
    library: ImageLibrary, raw: Path, command: Command
) -> None:
    bring(library, raw)
    bring(library, raw, "other")
    folder = library.file("other").parent
    (folder / "record.json").write_text("{")
    (folder.parents[1] / "new" / "half").mkdir()
    done = command("list")
    assert done.exit_code == 1
    lines = [re.split("  +", line) for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [line[:5] for line in lines] == [
        ["IMAGE", "STATE", "FORMAT", "SIZE", "ENCRYPTED"],
        ["disk", "ready", "raw", "1250Ki", "no"],
        ["half", "unfinished", "-", "-", "-"],
        ["other", "damaged", "-", "-", "-"],
    ]
    done = command("list", "-o", "json")
    assert done.exit_code == 1
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert {name: each["state"] for name, each in found.items()} == {
        "disk": "ready", "half": "unfinished", "other": "damaged",
    }  # fmt: skip
    assert "record.json cannot be read" in found["other"]["error"]


def test_an_image_that_is_unfinished_is_told_as_that(library: ImageLibrary, raw: Path, command: Command) -> None:
    bring(library, raw)
    (library.file("disk").parents[2] / "new" / "half").mkdir()
    for words in (("inspect", "half"), ("clone", "half", "copy"), ("export", "half", "out")):
        done = command(*words)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith("luks-csi: image half is unfinished; run the command that makes it again")


def test_every_command_that_tells_of_an_image_has_its_one_schema(
    library: ImageLibrary, raw: Path, tmp_path: Path, command: Command
) -> None:
    bring(library, raw, "first")
    every = {
        "import": (str(raw), "disk"),
        "clone": ("disk", "sealed", "--encryption", "encrypt", "--passphrase-file", "-"),
        "list": (),
        "inspect": ("sealed",),
        "export": ("sealed", str(tmp_path / "out")),
        "delete": ("sealed", "--yes"),
    }
    for word, arguments in every.items():
        done = command(word, *arguments, "-o", "json", stdin="a passphrase")
        found = json.loads(done.stdout)
        for each in found if word == "list" else [found]:
            assert list(each) == [field.name for field in dataclasses.fields(Document)], word
            assert each["state"] == "ready"
            assert (each["key_slots"] == {}) == (each["luks"] is None) == (each["name"] != "sealed")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ignore", "--passphrase-file", "-"), "ignore takes no passphrase"),
        (("encrypt",), "encrypt needs the passphrase of the result; give it with --passphrase-file FILE"),
        (("decrypt",), "decrypt needs the passphrase of the source"),
        (("encrypt", "--passphrase-file", "-", "--new-passphrase-file", "-"), "encrypt takes one passphrase"),
        (("encrypt", "--new-passphrase-file", "-"), "encrypt takes one passphrase"),
        (("reencrypt", "--passphrase-file", "-"), "reencrypt needs the new passphrase too"),
        (
            ("reencrypt", "--passphrase-file", "-", "--new-passphrase-file", "-"),
            "Only one passphrase can come from a standard input that is no terminal",
        ),
    ],
)
def test_a_passphrase_that_is_missing_or_too_much_is_told_by_its_option(
    command: Command, words: tuple[str, ...], said: str
) -> None:
    done = command("clone", "disk", "copy", "--encryption", *words, stdin="a passphrase")
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("import", "x", "Disk"), "'Disk' cannot be an image's name"),
        (("import-volume", "v", "Disk"), "'Disk' cannot be an image's name"),
        (("clone", "Disk", "copy"), "'Disk' cannot be an image's name"),
        (("clone", "disk", "a b"), "'a b' cannot be an image's name"),
        (("inspect", "../disk"), "'../disk' cannot be an image's name"),
        (("export", "Disk", "out"), "'Disk' cannot be an image's name"),
        (("delete", "Disk", "--yes"), "'Disk' cannot be an image's name"),
        (("import", "x", "disk", "--checksum", "abc"), "a checksum of 3 characters"),
        (("import", "x", "disk", "--secret", "kept-for-ourselves"), "must be named as NAMESPACE/NAME, with one slash"),
        (
            ("clone", "disk", "copy", "--secret", "kept-for-ourselves"),
            "must be named as NAMESPACE/NAME, with one slash",
        ),
        (("import", "x", "disk", "--cacert", __file__), "--cacert is for a download"),
    ],
)
def test_a_command_line_that_cannot_be_right_ends_with_2(command: Command, words: tuple[str, ...], said: str) -> None:
    done = command(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert "kept-for-ourselves" not in done.stderr


def test_a_folder_that_is_not_there_or_holds_no_passphrase_is_told(
    library: ImageLibrary, raw: Path, command: Command, tmp_path: Path
) -> None:
    bring(library, raw)
    (tmp_path / "secret").mkdir()
    done = command("clone", "disk", "copy", "--encryption", "encrypt", "--secret-dir", str(tmp_path / "secret"))
    assert (done.exit_code, "holds neither CRYPTO_KEY_VALUE nor" in done.stderr) == (1, True)
    done = command("export", "disk", str(tmp_path / "none" / "out"))
    assert done.exit_code == 1
    assert f"there is no folder {tmp_path / 'none'}; make it" in done.stderr


def test_a_secret_for_what_is_not_encrypted_is_refused_before_it_is_copied(library: ImageLibrary, raw: Path) -> None:
    def meter(what: str, total: int | None) -> AbstractContextManager[Progress]:
        raise AssertionError(what, total)

    with pytest.raises(InvalidArgument, match="is not encrypted, but a secret was named for it"):
        library.import_(Import("disk", str(raw), secret="vms/key"), meter)


def test_a_size_limit_of_nothing_is_refused(command: Command) -> None:
    assert "at least one byte" in command("import", "x", "disk", "--limit", "0").stderr


def test_a_state_directory_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    library = ImageLibrary(tmp_path / "state" / "images")
    for call in (library.names, lambda: bring(library, tmp_path / "state")):
        with pytest.raises(FailedPrecondition, match=r"^the images in .* cannot be used \(.*\); run this as root"):
            call()


def test_an_image_of_an_object_is_not_taken_for_one_by_hand(tmp_path: Path) -> None:
    library = ImageLibrary(tmp_path / "images")
    source = tmp_path / "disk.raw"
    source.write_bytes(CONTENT)
    record = library.import_(Import("disk", str(source), take=True, owner="uid-1"), unmetered)
    assert (record.owner, os.stat(library.file("disk")).st_ino) == ("uid-1", source.stat().st_ino)
    library.drop("disk", "uid-2")
    with pytest.raises(FailedPrecondition, match=r"copy of the Image object with the uid uid-1.*kubectl delete image"):
        library.delete("disk")
    assert library.names() == ["disk"]
    library.drop("disk", "uid-1")
    library.drop("disk", "uid-1")
    assert library.names() == []
    library.import_(Import("disk", str(source), owner="uid-1"), unmetered)
    library.delete("disk", owned=True)
    assert library.names() == []
    assert source.exists()


def test_a_file_that_is_moved_in_is_named_by_its_image(tmp_path: Path) -> None:
    """Whoever uploaded it knows no path of the node."""
    source = tmp_path / "disk.raw"
    source.write_bytes(CONTENT)
    library, checksum = ImageLibrary(tmp_path / "images"), Checksum.parse("0" * 64)
    for take, where in ((True, "image disk"), (False, str(source))):
        with pytest.raises(InvalidArgument, match=f"^{re.escape(where)} has the checksum sha256:"):
            library.import_(Import("disk", str(source), checksum, take=take), unmetered)
    assert source.exists()


def test_an_unfinished_image_goes_on_for_its_owner_alone(tmp_path: Path) -> None:
    library = ImageLibrary(tmp_path / "images")

    def cut(folder: Path) -> tuple[Path, ImageRecord]:
        (folder / "part").write_bytes(b"half")
        raise Unavailable("cut")

    with pytest.raises(Unavailable):
        library.receive("disk", "uid-1", cut)
    source = tmp_path / "disk.raw"
    source.write_bytes(CONTENT)
    with pytest.raises(AlreadyExists, match="was begun for the Image object with the uid uid-1"):
        library.import_(Import("disk", str(source)), unmetered)
    library.drop("disk", "uid-2")
    assert library.unfinished() == ["disk"]
    made = library.import_(Import("other", str(source)), unmetered)

    def whole(folder: Path) -> tuple[Path, ImageRecord]:
        assert (folder / "part").read_bytes() == b"half"
        (folder / "whole").write_bytes(source.read_bytes())
        return folder / "whole", made

    found = library.receive("disk", "uid-1", whole)
    assert (found.name, found.owner, found.file_size) == ("disk", "uid-1", len(CONTENT))
    assert library.file("disk").read_bytes() == source.read_bytes()
    assert sorted(path.name for path in library.file("disk").parent.iterdir()) == ["image", "record.json"]
    assert library.checksum("disk", unmetered).digest == hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.parametrize("left", [(), (".owner.new",)])
def test_who_was_killed_before_it_said_for_whom_leaves_nothing_in_the_way(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    library, source, folder = ImageLibrary(tmp_path / "images"), tmp_path / "disk.raw", tmp_path / "images/new/disk"
    source.write_bytes(CONTENT)

    def leave() -> None:
        folder.mkdir(parents=True)
        for name in left:
            (folder / name).write_bytes(b"uid-")

    leave()
    library.drop("disk", "uid-1")
    assert library.unfinished() == []
    leave()
    assert library.import_(Import("disk", str(source), owner="uid-1"), unmetered).owner == "uid-1"
    leave()
    library.drop("disk", "uid-2")
    assert library.get("disk").owner == "uid-1", "what is whole is another's"
    assert not folder.exists()
