"""`luks-csi volume`: volumes by hand, through the socket of a server as Kubernetes would."""

import functools
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from csi_driver.cli.check import check
from csi_driver.cli.output import OUTPUT_OPTION, Output, about, confirm, show_json, show_table, show_text, size_text
from csi_driver.cli.record import accept_record, read_record, record_rows
from csi_driver.cli.secret_files import read_secrets, secret_options
from csi_driver.cli.serve import read_size
from csi_driver.model.errors import DriverError
from csi_driver.model.settings import Settings
from csi_driver.rpc.endpoint import endpoint_path
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.parameters import FILE_SYSTEMS

if TYPE_CHECKING:
    from csi_driver.rpc.client import CsiClient, RemoteVolume

Function = TypeVar("Function", bound=Callable[..., object])
Connect = Callable[[Path], "CsiClient"]

_ANSWER_SECONDS = 5.0
_MODES = {
    "RWO": AccessMode.SINGLE_NODE_WRITER,
    "RWOP": AccessMode.SINGLE_NODE_SINGLE_WRITER,
    "ROX": AccessMode.MULTI_NODE_READER_ONLY,
    "RWX": AccessMode.MULTI_NODE_MULTI_WRITER,
    **{mode.name: mode for mode in AccessMode},
}


@click.group()
def volume() -> None:
    """Create, stage, publish, enlarge and remove volumes by hand.

    Each command but accept-record and check is one call of the Container Storage Interface to the server at --endpoint.
    Secrets come from files or standard input only.
    """


volume.add_command(accept_record)
volume.add_command(check)


def connect(endpoint: Path) -> "CsiClient":
    """A client of the server at the socket. Raises ClickException when nobody answers there."""
    from csi_driver.rpc.client import CsiClient

    reason = None
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(_ANSWER_SECONDS)
        try:
            peer.connect(str(endpoint))
        except FileNotFoundError:
            reason = "there is no such socket; start a server with `luks-csi serve` or name its socket with --endpoint"
        except ConnectionRefusedError:
            reason = "its server has ended; start one with `luks-csi serve`"
        except PermissionError:
            reason = f"user {os.geteuid()} may not use it; run this as root"
        except OSError as error:
            reason = f"{error.strerror or error}; look at the server's log"
    if reason is not None:
        raise click.ClickException(f"no server can be reached at {endpoint}: {reason}")
    return CsiClient(endpoint)


def _size(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int:
    try:
        return read_size(text) if text is not None else 0
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _endpoint(_context: click.Context, _parameter: click.Parameter, text: str) -> Path:
    try:
        return endpoint_path(text)
    except DriverError as error:
        raise click.BadParameter(str(error)) from None


def _path(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Path | None:
    return Path(os.path.abspath(text)) if text is not None else None


def _parameters(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not given or not name or name in found:
            raise click.BadParameter(f"{text!r} must be NAME=VALUE, each name once.")
        found[name] = value
    return found


_ENDPOINT_OPTION = click.Option(
    ["--endpoint"],
    metavar="SOCKET",
    envvar="LUKS_CSI_ENDPOINT",
    show_envvar=True,
    default=str(Settings.endpoint),
    show_default=True,
    callback=_endpoint,
    help="Where the server listens.",
)


def _command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command of the group: its function gets a client first; what the server refuses ends it with exit code 1."""

    def make(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(context: click.Context, /, endpoint: Path, **arguments: Any) -> None:
            from csi_driver.rpc.client import RemoteError

            secrets = {}
            if "secret_dir" in arguments:
                secrets = {"secrets": read_secrets(arguments.pop("secret_dir"), arguments.pop("passphrase_file"))}
            reach: Connect = context.obj or connect
            try:
                with reach(endpoint) as client:
                    function(client, **arguments, **secrets)
            except RemoteError as error:
                raise click.ClickException(f"{error} ({error.code})") from None

        made = volume.command(name)(click.pass_context(run))
        made.params += [_ENDPOINT_OPTION, OUTPUT_OPTION]
        return made

    return make


def _capability_options(function: Function) -> Function:
    """How the volume is used; `_capability` takes them."""
    options = (
        click.option("--block", is_flag=True, help="As a raw block device, without a file system."),
        click.option("--fs-type", type=click.Choice(FILE_SYSTEMS), help="File system; else the volume's own."),
        click.option("--mount-option", "mount_options", multiple=True, metavar="OPTION", help="May be repeated."),
        click.option("--access-mode", type=click.Choice(list(_MODES)), default="RWO", show_default=True, metavar="MODE",
                     help="RWO, RWOP, or a name of the CSI specification."),
    )  # fmt: skip
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), function)


def _capability(*, block: bool, fs_type: str | None, mount_options: tuple[str, ...], access_mode: str) -> Capability:
    if block and (fs_type or mount_options):
        raise click.UsageError("--block leaves no room for --fs-type or --mount-option; a raw device has neither.")
    return Capability(mode=_MODES[access_mode], block=block, fs_type=fs_type, mount_flags=mount_options)


@_command("list")
def list_(client: "CsiClient", output: str) -> None:
    """List the volumes that the server knows."""
    found = list(client.volumes())
    if output == Output.JSON:
        return show_json([_plain(each) for each in found])
    if not found:
        return show_text("no volumes")
    rows = [
        (each.id, size_text(each.capacity_bytes), each.context.get("encrypted", "?"), each.context.get("backend", "?"),
         _place(each))
        for each in found
    ]  # fmt: skip
    return show_table(rows, ("VOLUME", "CAPACITY", "ENCRYPTED", "BACKEND", "PLACE"))


@_command("show")
@click.argument("volume_id", metavar="VOLUME")
@click.option("--state-dir", envvar="LUKS_CSI_STATE_DIR", show_envvar=True, default=str(Settings.state_dir),
              show_default=True, metavar="FOLDER", type=click.Path(path_type=Path),
              help="The server's own folder, for what is recorded of the volume.")  # fmt: skip
def show(client: "CsiClient", volume_id: str, state_dir: Path, output: str) -> None:
    """Show a volume: what the server tells and, on its node, what is recorded there."""
    found = client.volume(volume_id)
    record, source = read_record(found.id, state_dir)
    if output == Output.JSON:
        return show_json({**_plain(found), "record": record, "record_source": source})
    rows = [
        ("volume", found.id),
        ("capacity", f"{size_text(found.capacity_bytes)} ({found.capacity_bytes} bytes)"),
        *sorted(found.context.items()),
        ("place", _place(found)),
        ("record", source),
        *(record_rows(record) if record else ()),
    ]
    return show_table(rows)


@_command("create")
@click.argument("name")
@click.option("--size", required=True, callback=_size, metavar="SIZE", help="At least so large: bytes, or 512Mi, 1Gi.")
@click.option("--limit", callback=_size, metavar="SIZE", help="At most so large.")
@click.option("--encrypted", is_flag=True, help="Short for --parameter encrypted=true.")
@click.option("--parameter", "-p", "parameters", multiple=True, callback=_parameters, metavar="NAME=VALUE",
              help="A parameter as in a StorageClass; may be repeated.")  # fmt: skip
@_capability_options
@secret_options
def create(
    client: "CsiClient",
    name: str,
    size: int,
    limit: int,
    parameters: dict[str, str],
    secrets: dict[str, str],
    output: str,
    *,
    encrypted: bool,
    **usage: Any,
) -> None:
    """Create a volume, or find the one of that name; what is encrypted is formatted when it is first staged."""
    if encrypted and parameters.setdefault("encrypted", "true") != "true":
        raise click.UsageError("--encrypted and --parameter encrypted=… disagree; leave one of them out.")
    made = client.create_volume(
        name, [_capability(**usage)], size, limit_bytes=limit, parameters=parameters, secrets=secrets
    )
    kind = "encrypted volume" if made.context.get("encrypted") == "true" else "volume, not encrypted,"
    _tell(output, f"{kind} {made.id} of {size_text(made.capacity_bytes)} is there", _plain(made))


@_command("delete")
@click.argument("volume_id", metavar="VOLUME")
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(client: "CsiClient", volume_id: str, output: str, *, yes: bool) -> None:
    """Delete a volume and all that is in it."""
    found = client.volume(volume_id)  # the call itself forgives a wrong id, as Kubernetes wants; people mistype
    size = size_text(found.capacity_bytes)
    confirm(f"Delete volume {found.id} ({size}) and all data in it?", yes=yes)
    client.delete_volume(found.id)
    _tell(output, f"volume {found.id} is deleted", {"volume_id": found.id})


@_command("stage")
@click.argument("volume_id", metavar="VOLUME")
@click.argument("path", callback=_path)
@_capability_options
@secret_options
def stage(client: "CsiClient", volume_id: str, path: Path, secrets: dict[str, str], output: str, **usage: Any) -> None:
    """Open a volume on this node and mount it at PATH, a folder that is made if it is not there."""
    wanted, found = _capability(**usage), client.volume(volume_id)
    with _folder(path):
        client.stage(found, path, wanted, secrets)
    _tell(output, f"volume {volume_id} is staged at {path}", {"volume_id": volume_id, "staging_target_path": str(path)})


@_command("unstage")
@click.argument("volume_id", metavar="VOLUME")
@click.argument("path", callback=_path)
def unstage(client: "CsiClient", volume_id: str, path: Path, output: str) -> None:
    """Unmount a volume from PATH, where it was staged, and close it; needs no key."""
    client.unstage(volume_id, path)
    _tell(output, f"volume {volume_id} is closed", {"volume_id": volume_id, "staging_target_path": str(path)})


@_command("publish")
@click.argument("volume_id", metavar="VOLUME")
@click.argument("staging_path", callback=_path)
@click.argument("target_path", callback=_path)
@click.option("--read-only", is_flag=True, help="Without the right to write.")
@_capability_options
def publish(
    client: "CsiClient",
    volume_id: str,
    staging_path: Path,
    target_path: Path,
    output: str,
    *,
    read_only: bool,
    **usage: Any,
) -> None:
    """Show a volume that is staged at STAGING_PATH at TARGET_PATH as well, as to a pod."""
    client.publish(client.volume(volume_id), staging_path, target_path, _capability(**usage), read_only=read_only)
    facts = {"volume_id": volume_id, "staging_target_path": str(staging_path), "target_path": str(target_path)}
    _tell(output, f"volume {volume_id} is published at {target_path}", facts)


@_command("unpublish")
@click.argument("volume_id", metavar="VOLUME")
@click.argument("target_path", callback=_path)
def unpublish(client: "CsiClient", volume_id: str, target_path: Path, output: str) -> None:
    """Take a volume away from TARGET_PATH, where it was published; it stays staged."""
    client.unpublish(volume_id, target_path)
    facts = {"volume_id": volume_id, "target_path": str(target_path)}
    _tell(output, f"volume {volume_id} is no longer at {target_path}", facts)


@_command("expand")
@click.argument("volume_id", metavar="VOLUME")
@click.argument("path", callback=_path, required=False)
@click.option("--size", required=True, callback=_size, metavar="SIZE", help="The new capacity, at least.")
@secret_options
def expand(
    client: "CsiClient", volume_id: str, path: Path | None, size: int, secrets: dict[str, str], output: str
) -> None:
    """Enlarge a volume, while it is in use if PATH tells where it is staged or published; needs no key as a rule."""
    capacity = client.expand_volume(volume_id, size)
    if path is not None:
        capacity = client.expand_on_node(volume_id, path, size, secrets)
    where = f"at {path} too" if path is not None else "give PATH to enlarge it where it is staged"
    facts = {"volume_id": volume_id, "capacity_bytes": capacity, "node_expanded": path is not None}
    _tell(output, f"volume {volume_id} has {size_text(capacity)}; {where}", facts)


@_command("stats")
@click.argument("volume_id", metavar="VOLUME")
@click.argument("path", callback=_path)
def stats(client: "CsiClient", volume_id: str, path: Path, output: str) -> None:
    """Tell how full a volume is that is staged or published at PATH."""
    counts = client.usage(volume_id, path)
    if output == Output.JSON:
        return show_json({"volume_id": volume_id, "volume_path": str(path), "usage": counts})
    rows = []
    for count in counts:
        in_words = about if count.unit == "bytes" else str
        used = count.used or 0
        known = count.unit != "bytes" or used or count.available
        rows.append(
            (
                count.unit,
                in_words(count.total),
                *((in_words(used), in_words(count.available or 0), f"{100 * used / count.total:.0f}%") if known else
                  ("-", "-", "-")),
            )
        )  # fmt: skip
    return show_table(rows, ("", "TOTAL", "USED", "AVAILABLE", "USED%"))


def _plain(found: "RemoteVolume") -> dict[str, Any]:
    """A volume by the field names of csi.proto."""
    return {
        "volume_id": found.id,
        "capacity_bytes": found.capacity_bytes,
        "volume_context": dict(found.context),
        "accessible_topology": dict(found.topology),
    }


def _place(found: "RemoteVolume") -> str:
    return ", ".join(f"{key}={value}" for key, value in found.topology.items()) or "anywhere"


def _tell(output: str, sentence: str, facts: dict[str, Any]) -> None:
    if output == Output.JSON:
        show_json(facts)
    else:
        show_text(sentence)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """The staging path, which CSI lets the caller make; one that was made goes away again if staging fails."""
    try:
        path.mkdir(mode=0o750)
    except FileExistsError:
        yield
        return
    except OSError as error:
        raise click.ClickException(f"the folder {path} cannot be made: {error.strerror}") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise
