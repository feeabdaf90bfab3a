"""`luks-csi image`: VM images on this node; needs no server."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import click

from csi_driver.cli.beside import PARAMS, BesideServer
from csi_driver.cli.download_access import download_options, read_headers, read_source
from csi_driver.cli.image_upload import upload
from csi_driver.cli.local import local_driver
from csi_driver.cli.names import checked, image_names, volume_names
from csi_driver.cli.output import OUTPUT_OPTION, Output, about, confirm, show_json, show_table, show_text, size_text
from csi_driver.cli.progress import ProgressMeter, tell_stopping
from csi_driver.cli.secret_files import SecretSource, new_secret_options, secret_options
from csi_driver.cli.serve import settings_params
from csi_driver.images.bring import is_url
from csi_driver.images.checkpoint import Operation
from csi_driver.images.checksum import Checksum
from csi_driver.images.destinations import Connector
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import MOST_BYTES, Clone, Import, check_secret
from csi_driver.images.store import ImageRecord, Provenance, check_name
from csi_driver.keys.audit import Audit
from csi_driver.keys.secret import read_secret
from csi_driver.luks.formats import SECTOR_SIZES
from csi_driver.luks.header_metadata import Argon2id, Keyslot, Pbkdf2
from csi_driver.model.errors import DriverError, NotFound
from csi_driver.model.sizes import read_some
from csi_driver.model.volume import LuksIdentity, is_volume_id

_PARAMS = (*PARAMS, OUTPUT_OPTION)
_NAME, _SECRET = checked(check_name), checked(check_secret)


@click.group()
def image() -> None:
    """Import VM images, clone them plain, encrypted or decrypted, and look at them; needs no server."""


@image.command("import", cls=BesideServer, params=[*_PARAMS])
@click.argument("source")
@click.argument("name", callback=_NAME)
@click.option("--checksum", metavar="DIGITS", callback=checked(Checksum.parse),
              help="SHA-512 or SHA-256 of the file as it lies there: hexadecimal.")  # fmt: skip
@click.option("--secret", metavar="NAMESPACE/NAME", callback=_SECRET,
              help="The secret that opens an image which is encrypted already.")  # fmt: skip
@click.option("--limit", default=size_text(MOST_BYTES), show_default=True, metavar="SIZE", help="At most so large.")
@click.option("--allow-local", is_flag=True, help="Download from loopback, link-local and metadata addresses too.")
@download_options
def import_(
    source: str, name: str, checksum: str | None, secret: str | None, limit: str, output: str, *, allow_local: bool,
    state_dir: Path, header_file: Path | None, netrc_file: Path | None, credentials_dir: Path | None,
    cacert: Path | None,
) -> None:  # fmt: skip
    """Bring the image at SOURCE in as NAME: a file, an http(s) URL, @FILE with such a URL in it, or - for a pipe.

    Raw, iso, qcow2, vmdk, vhdx, vhd, vdi, LUKS2 and LUKS1, also as .gz, .xz, .zst, or alone in a .zip, .tar or .ova. A
    cut download is gone on with by the same command.
    """
    if source == "-" and sys.stdin.isatty():
        raise click.UsageError("- reads the image from standard input, which is a terminal; pipe the image in.")
    url = read_source(source)
    if cacert is not None and not is_url(url):
        raise click.UsageError("--cacert is for a download; leave it out.")
    wanted = Import(
        name, url, Checksum.parse(checksum) if checksum else None, secret, _size(limit),
        sys.stdin.buffer if source == "-" else None, read_headers(url, header_file, netrc_file, credentials_dir),
    )  # fmt: skip
    library = _library(state_dir, Connector(allow_local=allow_local, cacert=cacert))
    _tell(output, library, library.import_(wanted, ProgressMeter()))


@image.command("import-volume", cls=BesideServer, params=[*_PARAMS, *settings_params("pbkdf_memory_kib")])
@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.argument("name", callback=_NAME)
@click.option("--secret", metavar="NAMESPACE/NAME", callback=_SECRET,
              help="To be recorded: the secret that opens the volume.")  # fmt: skip
@click.pass_context
def import_volume(
    context: click.Context, /, volume_id: str, name: str, secret: str | None, output: str, **given: Any
) -> None:
    """Bring the content of a VOLUME of this node in as NAME; an encrypted one stays encrypted, and no key is needed.

    The volume must not be staged, and stays closed until the end. A command that was cut is gone on with by the same
    command.
    """
    from csi_driver.volumes.export import Export

    if not is_volume_id(volume_id):
        raise click.BadParameter(f"{volume_id!r} is no id of a volume.", context)
    library = _library(given["state_dir"])
    with local_driver(context, given) as driver:
        wanted = Export(volume_id, name, secret)
        record = driver.offline().exports.export(wanted, library, ProgressMeter(), tell_stopping)
    _tell(output, library, record)


@image.command("clone", cls=BesideServer, params=[*_PARAMS, *settings_params("audit_file")])
@click.argument("source", shell_complete=image_names, callback=_NAME)
@click.argument("name", callback=_NAME)
@click.option("--encryption", type=click.Choice([each.value for each in Operation]), default=Operation.IGNORE.value,
              show_default=True, help="ignore copies as it is; reencrypt gives another key.")  # fmt: skip
@click.option("--sector-size", type=click.Choice([str(size) for size in SECTOR_SIZES]), default=None,
              help="Of an encrypted result, 512 unless given; a VM sees blocks of this size.")  # fmt: skip
@click.option("--secret", metavar="NAMESPACE/NAME", callback=_SECRET,
              help="To be recorded: the secret that opens the result.")  # fmt: skip
@click.option("--verify", is_flag=True, help="Read the result back from the disk and compare.")
@secret_options
@new_secret_options
def clone(
    source: str, name: str, encryption: str, sector_size: str | None, secret: str | None, output: str, *,
    verify: bool, state_dir: Path, audit_file: Path | None, secret_dir: Path | None, passphrase_file: Path | None,
    new_secret_dir: Path | None, new_passphrase_file: Path | None,
) -> None:  # fmt: skip
    """Make the image NAME of the image SOURCE.

    The secret is the result's for encrypt and the source's for decrypt; reencrypt takes a new one beside it. A command
    that was cut is gone on with by the same command.
    """
    operation = Operation(encryption)
    first, second = SecretSource(secret_dir, passphrase_file), SecretSource(new_secret_dir, new_passphrase_file)
    _check_secrets(operation, first, second)
    key = new_key = None
    if operation.decrypts:
        key = read_secret(first.read(f"Passphrase of image {source}"))
    if operation.encrypts:
        new_key = read_secret(
            (second if operation.decrypts else first).read(f"New passphrase of image {name}", new=True)
        )
    size = int(sector_size) if sector_size else None
    wanted = Clone(source, name, operation, key, new_key, secret, size, verify)
    library = _library(state_dir, audit_file=audit_file)
    _tell(output, library, library.clone(wanted, ProgressMeter()))


def _check_secrets(operation: Operation, first: SecretSource, second: SecretSource) -> None:
    """Tell what is missing or too much in the words of the command line. Raises UsageError."""
    options = "--passphrase-file FILE, - to type it, or with --secret-dir FOLDER"
    if not (operation.decrypts or operation.encrypts) and (first.is_given or second.is_given):
        raise click.UsageError(f"{operation} takes no passphrase; leave it out.")
    if not (operation.decrypts and operation.encrypts) and second.is_given:
        raise click.UsageError(f"{operation} takes one passphrase: --passphrase-file or --secret-dir.")
    if (operation.decrypts or operation.encrypts) and not first.is_given:
        whose = "the source" if operation.decrypts else "the result"
        raise click.UsageError(f"{operation} needs the passphrase of {whose}; give it with {options}.")
    if operation.decrypts and operation.encrypts and not second.is_given:
        raise click.UsageError(
            f"{operation} needs the new passphrase too; give it with --new-passphrase-file FILE, - to type it, or with "
            f"--new-secret-dir FOLDER."
        )
    if first.is_stdin and second.is_stdin and not sys.stdin.isatty():
        raise click.UsageError(
            "Only one passphrase can come from a standard input that is no terminal; put the other one into a file."
        )


@image.command("list", cls=BesideServer, params=[*_PARAMS])
def list_(output: str, state_dir: Path) -> None:
    """List the images."""
    library = _library(state_dir)
    found = [_look(library, name) for name in sorted({*library.names(), *library.unfinished()})]
    if output == Output.JSON:
        show_json(found)
    elif not found:
        show_text(f"no images in {state_dir / 'images'}")
    else:
        show_table([_row(each) for each in found], ("IMAGE", "STATE", "FORMAT", "SIZE", "ENCRYPTED", "FROM"))
    if any(each.state is State.DAMAGED for each in found):
        raise click.exceptions.Exit(1)


image.add_command(upload)


class State(StrEnum):
    """How far an image is."""

    READY = "ready"
    UNFINISHED = "unfinished"
    DAMAGED = "damaged"


@dataclass(frozen=True, kw_only=True)
class Document:
    """An image for programs: the one schema of that noun. Sizes in bytes; None is what is not known of it.

    `error` tells why one is damaged. `key_slots` has what opening each slot of an encrypted one takes.
    """

    name: str
    state: State
    error: str | None = None
    format: str | None = None
    size: int | None = None
    file_size: int | None = None
    luks: LuksIdentity | None = None
    key_slots: Mapping[str, Mapping[str, str | int]] | None = None
    secret: str | None = None
    created: str | None = None
    provenance: Provenance | None = None
    file: str | None = None


def _document(library: ImageLibrary, record: ImageRecord) -> Document:
    """A complete image. Errors as `ImageLibrary.header`."""
    slots = library.header(record.name).keyslots if record.luks else {}
    return Document(
        name=record.name,
        state=State.READY,
        format=record.format,
        size=record.size,
        file_size=record.file_size,
        luks=record.luks,
        key_slots={number: _slot(slot) for number, slot in slots.items()},
        secret=record.secret,
        created=record.created,
        provenance=record.provenance,
        file=str(library.file(record.name)),
    )


def _look(library: ImageLibrary, name: str) -> Document:
    """Whatever there is of that name: of one damaged image the others are fine."""
    try:
        return _document(library, library.get(name))
    except NotFound:
        return Document(name=name, state=State.UNFINISHED)
    except DriverError as error:
        return Document(name=name, state=State.DAMAGED, error=str(error))


def _row(found: Document) -> tuple[str, ...]:
    if found.provenance is None or found.size is None:
        goes_on = "the command that made it goes on with it, luks-csi image delete removes it"
        return found.name, found.state, "-", "-", "-", found.error or goes_on
    encrypted = "yes" if found.luks else "no"
    came = f"{found.provenance.operation} from {found.provenance.source}"
    return found.name, found.state, str(found.format), size_text(found.size), encrypted, came


@image.command("inspect", cls=BesideServer, params=[*_PARAMS])
@click.argument("name", shell_complete=image_names, callback=_NAME)
def inspect(name: str, output: str, state_dir: Path) -> None:
    """Show an image: format, sizes, where it comes from and, if it is encrypted, what its header says."""
    library = _library(state_dir)
    record = library.get(name)
    found, file = _document(library, record), library.file(name)
    if output == Output.JSON:
        return show_json(found)
    slots = found.key_slots or {}
    rows = [
        ("image", record.name),
        ("format", record.format),
        ("size", f"{size_text(record.size)} ({record.size} bytes)"),
        ("file", f"{file}, {record.file_size} bytes, {about(file.stat().st_blocks * 512)}B on the disk"),
        ("created", record.created),
        ("by", f"{record.provenance.operation} from {record.provenance.source}"),
    ]
    if record.provenance.checksum:
        rows.append(("checksum", record.provenance.checksum))
    if record.luks:
        rows += [
            ("encryption", f"{record.format.upper()} {record.luks.uuid}"),
            ("cipher", f"{record.luks.cipher}, {record.luks.key_bits}-bit key"),
            ("sector size", str(record.luks.sector_size)),
            ("data offset", size_text(record.luks.data_offset)),
            *((f"key slot {number}", _slot_text(slot)) for number, slot in slots.items()),
            ("secret", record.secret or "not recorded"),
        ]
    return show_table(rows)


@image.command("delete", cls=BesideServer, params=[*_PARAMS])
@click.argument("name", shell_complete=image_names, callback=_NAME)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--owned", is_flag=True, help="Also this node's copy of an Image object.")
def delete(name: str, output: str, state_dir: Path, *, yes: bool, owned: bool) -> None:
    """Delete an image, or what a cut command has left of it."""
    confirm(f"Delete image {name}?", yes=yes)
    library = _library(state_dir)
    found = _look(library, name)
    library.delete(name, owned=owned)
    if output == Output.JSON:
        return show_json(found)
    return show_text(f"image {name} is deleted")


@image.command("export", cls=BesideServer, params=[*_PARAMS])
@click.argument("name", shell_complete=image_names, callback=_NAME)
@click.argument("path", type=click.Path(path_type=Path))
def export(name: str, path: Path, output: str, state_dir: Path) -> None:
    """Copy an image's file, as it is, to a new file at PATH; one that is encrypted stays so."""
    library = _library(state_dir)
    library.export(name, path.absolute(), ProgressMeter())
    if output == Output.JSON:
        return show_json(_look(library, name))
    return show_text(f"image {name} is at {path}")


def _slot(slot: Keyslot) -> dict[str, str | int]:
    """What opening a key slot takes, in the words of LUKS2; memory in KiB."""
    kdf = slot.kdf
    if isinstance(kdf, Pbkdf2):
        return {"pbkdf": "pbkdf2", "hash": kdf.hash, "iterations": kdf.iterations}
    name = "argon2id" if isinstance(kdf, Argon2id) else "argon2i"
    return {"pbkdf": name, "hash": slot.af.hash, "time": kdf.time, "memory": kdf.memory, "cpus": kdf.cpus}


def _slot_text(slot: Mapping[str, str | int]) -> str:
    if slot["pbkdf"] == "pbkdf2":
        return f"pbkdf2, {slot['hash']}, {slot['iterations']} iterations"
    return f"{slot['pbkdf']}, {slot['time']} passes over {about(int(slot['memory']) << 10)}B"


def _library(state_dir: Path, connector: Connector | None = None, audit_file: Path | None = None) -> ImageLibrary:
    def warn(told: str) -> None:
        show_text(f"warning: {told}", err=True)

    return ImageLibrary(Path(state_dir) / "images", connector, tell_stopping, warn, Audit(audit_file))


def _size(text: str) -> int:
    try:
        return read_some(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--limit") from None


def _tell(output: str, library: ImageLibrary, record: ImageRecord) -> None:
    if output == Output.JSON:
        return show_json(_look(library, record.name))
    kind = "encrypted image" if record.luks else "image"
    return show_text(f"{kind} {record.name} of {size_text(record.size)} is there")
