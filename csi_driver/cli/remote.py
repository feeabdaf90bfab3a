"""What the commands of `luks-csi volume` share: the way to the server and to what this node shows, how both tell."""

import functools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from csi_driver.cli.node_view import Seen, see
from csi_driver.cli.output import OUTPUT_OPTION, Output, show_json, show_text
from csi_driver.cli.secret_files import SecretSource
from csi_driver.model.errors import DriverError, Unavailable
from csi_driver.model.settings import Settings
from csi_driver.model.sizes import read_some
from csi_driver.rpc.endpoint import endpoint_path
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.parameters import FILE_SYSTEMS

if TYPE_CHECKING:
    from csi_driver.rpc.client import CsiClient, RemoteVolume

Function = TypeVar("Function", bound=Callable[..., object])

_ANSWER_SECONDS = 5.0
_MODES = {
    "RWO": AccessMode.SINGLE_NODE_WRITER,
    "RWOP": AccessMode.SINGLE_NODE_SINGLE_WRITER,
    "ROX": AccessMode.MULTI_NODE_READER_ONLY,
    "RWX": AccessMode.MULTI_NODE_MULTI_WRITER,
    **{mode.name: mode for mode in AccessMode},
}


def connect(endpoint: Path) -> "CsiClient":
    """A client of the server at the socket. Raises Unavailable when nobody answers there."""
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
        raise Unavailable(f"no server can be reached at {endpoint}: {reason}")
    return CsiClient(endpoint)


@dataclass(frozen=True)
class Reach:
    """The ways to a server and to the node; tests put theirs here."""

    connect: "Callable[[Path], CsiClient]" = connect
    see: Callable[[str, Path, Path | None], Seen] = see


@dataclass(frozen=True)
class Remote:
    """A server, and the node as its person sees it."""

    client: "CsiClient"
    look: Callable[[str], Seen]
    output: str

    def tell(self, sentence: str, found: "RemoteVolume") -> None:
        """What was done: a sentence for people, the volume as it is now for programs."""
        if self.output == Output.JSON:
            show_json(document(found, self.look(found.id)))
        else:
            show_text(sentence)


def document(found: "RemoteVolume", seen: Seen) -> dict[str, Any]:
    """A volume for programs: the one schema of that noun. What the server tells has the field names of csi.proto."""
    condition = seen.condition
    return {
        "volume_id": found.id,
        "capacity_bytes": found.capacity_bytes,
        "volume_context": dict(found.context),
        "accessible_topology": [dict(each) for each in found.topologies],
        "published_node_ids": list(found.published),
        "staged_at": condition.staged_at if condition else None,
        "published_at": list(condition.published_at) if condition else None,
        "healthy": condition.healthy if condition else None,
        "health": condition.health if condition else f"not seen: {seen.unseen}",
        "record": seen.record,
        "record_source": seen.source,
    }


def is_encrypted(found: "RemoteVolume") -> bool:
    """Whether the server says so."""
    return found.context.get("encrypted") == "true"


def size_option(*names: str, required: bool = False, meaning: str) -> Callable[[Function], Function]:
    """An option that takes a size, in bytes to the command; 0 where it is not given."""

    def read(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int:
        try:
            return read_some(text) if text is not None else 0
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return click.option(*names, required=required, callback=read, metavar="SIZE", help=meaning)


def absolute(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Path | None:
    """A path from where the user stands."""
    return Path(os.path.abspath(text)) if text is not None else None


def _endpoint(_context: click.Context, _parameter: click.Parameter, text: str) -> Path:
    try:
        return endpoint_path(text)
    except DriverError as error:
        raise click.BadParameter(str(error)) from None


_OPTIONS = (
    click.Option(
        ["--endpoint"], metavar="SOCKET", envvar="LUKS_CSI_ENDPOINT", show_envvar=True, default=str(Settings.endpoint),
        show_default=True, callback=_endpoint, help="Where the server listens.",
    ),
    click.Option(
        ["--state-dir"], metavar="FOLDER", envvar="LUKS_CSI_STATE_DIR", show_envvar=True,
        type=click.Path(path_type=Path), help="The server's own folder; without it, the one that it remembers.",
    ),
    OUTPUT_OPTION,
)  # fmt: skip


def command(
    group: click.Group, name: str, *, prints_json: bool = False
) -> Callable[[Callable[..., None]], click.Command]:
    """A command of the group: its function gets a Remote first; what the server refuses ends it with exit code 1.

    One that prints JSON in any case leaves no choice of that.
    """

    def make(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(context: click.Context, /, endpoint: Path, state_dir: Path | None, **arguments: Any) -> None:
            output = arguments.pop("output", Output.JSON)
            if "secret_dir" in arguments:
                source = SecretSource(arguments.pop("secret_dir"), arguments.pop("passphrase_file"))
                arguments["secret"] = source
            reach: Reach = context.obj or Reach()
            with reach.connect(endpoint) as client:
                remote = Remote(client, lambda volume_id: reach.see(volume_id, endpoint, state_dir), output)
                function(remote, **arguments)

        made = group.command(name)(click.pass_context(run))
        made.params += [each for each in _OPTIONS if not (prints_json and each is OUTPUT_OPTION)]
        return made

    return make


def capability_options(function: Function) -> Function:
    """How the volume is used; `read_capability` takes them."""
    options = (
        click.option("--block", is_flag=True, help="As a raw block device, without a file system."),
        click.option("--fs-type", type=click.Choice(FILE_SYSTEMS), help="File system; else the volume's own."),
        click.option("--mount-option", "mount_options", multiple=True, metavar="OPTION", help="May be repeated."),
        click.option("--access-mode", type=click.Choice(list(_MODES)), default="RWO", show_default=True, metavar="MODE",
                     help="RWO, RWOP, or a name of the CSI specification."),
    )  # fmt: skip
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), function)


def read_capability(
    *, block: bool, fs_type: str | None, mount_options: tuple[str, ...], access_mode: str
) -> Capability:
    """What `capability_options` say. Raises UsageError."""
    if block and (fs_type or mount_options):
        raise click.UsageError("--block leaves no room for --fs-type or --mount-option; a raw device has neither.")
    return Capability(mode=_MODES[access_mode], block=block, fs_type=fs_type, mount_flags=mount_options)
