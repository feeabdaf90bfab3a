"""`luks-csi volume`: volumes by hand, through the socket of a server as Kubernetes would."""

from collections.abc import Mapping
from typing import Any

import click

from csi_driver.cli.adopt import adopt
from csi_driver.cli.check import check
from csi_driver.cli.convert import encrypt, reencrypt
from csi_driver.cli.manifest import manifest
from csi_driver.cli.move import move
from csi_driver.cli.names import volume_names
from csi_driver.cli.node_view import Seen
from csi_driver.cli.output import Output, confirm, show_json, show_table, show_text, size_text
from csi_driver.cli.record import accept_record, record_rows
from csi_driver.cli.recover import restore_header
from csi_driver.cli.remote import (
    Remote,
    capability_options,
    command,
    document,
    is_encrypted,
    read_capability,
    size_option,
)
from csi_driver.cli.secret_files import SecretSource, secret_options
from csi_driver.cli.volume_use import COMMANDS
from csi_driver.model.errors import DeviceInUse, NotFound
from csi_driver.model.volume import volume_id_for


@click.group()
def volume() -> None:
    """Create, stage, publish, enlarge and remove volumes by hand.

    A volume is staged once, which opens and mounts it, and then published to as many places as want to see it. Each
    command but accept-record, adopt, check, encrypt, move, reencrypt and restore-header is a call of the Container
    Storage Interface to the server at --endpoint. Secrets come from files or standard input only.
    """


volume.add_command(accept_record)
volume.add_command(adopt)
volume.add_command(check)
volume.add_command(encrypt)
volume.add_command(move)
volume.add_command(reencrypt)
volume.add_command(restore_header)
for name, function in COMMANDS.items():
    command(volume, name)(function)
command(volume, "manifest", prints_json=True)(manifest)


def _parameters(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not given or not name or name in found:
            raise click.BadParameter(f"{text!r} must be NAME=VALUE, each name once.")
        found[name] = value
    return found


def _name(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    """Kubernetes makes names of its own; a person's would be hashed, and nobody would find the volume again."""
    if volume_id_for(name) != name:
        raise click.BadParameter(
            f"{name!r} cannot be a volume's name here; use at most 64 small letters, digits, - and ., with a letter or "
            f"digit first"
        )
    return name


@command(volume, "list")
def list_(remote: Remote) -> None:
    """List the volumes that the server knows, where each is staged and published on this node, and how it is."""
    found = [(each, remote.look(each.id)) for each in remote.client.volumes()]
    if remote.output == Output.JSON:
        return show_json([document(each, seen) for each, seen in found])
    if not found:
        return show_text("no volumes")
    rows = [
        (each.id, size_text(each.capacity_bytes), "yes" if is_encrypted(each) else "no", _state(seen), _where(seen))
        for each, seen in found
    ]
    return show_table(rows, ("VOLUME", "CAPACITY", "ENCRYPTED", "STATE", "WHERE AND HOW"))


@command(volume, "show")
@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
def show(remote: Remote, volume_id: str) -> None:
    """Show a volume: what the server tells and, on its node, where it is, how it is and what is recorded."""
    found = remote.client.volume(volume_id)
    seen = remote.look(found.id)
    if remote.output == Output.JSON:
        return show_json(document(found, seen))
    condition = seen.condition
    rows = [
        ("volume", found.id),
        ("capacity", f"{size_text(found.capacity_bytes)} ({found.capacity_bytes} bytes)"),
        *sorted(found.context.items()),
        ("place", "\n".join(map(_place, found.topologies)) or "anywhere"),
        *((("given to", ", ".join(found.published)),) if found.published else ()),
        *((("staged at", condition.staged_at or "-"),) if condition else ()),
        *((("published at", "\n".join(condition.published_at) or "-"),) if condition else ()),
        ("health", condition.health if condition else f"not seen: {seen.unseen}"),
        ("record", seen.source),
        *(record_rows(seen.record) if seen.record else ()),
    ]
    return show_table(rows)


@command(volume, "create")
@click.argument("name", callback=_name)
@size_option("--size", required=True, meaning="At least so large: bytes, or 512Mi, 1Gi, 1G.")
@size_option("--limit", meaning="At most so large.")
@click.option("--encrypted", is_flag=True, help="Short for --parameter encrypted=true.")
@click.option("--parameter", "-p", "parameters", multiple=True, callback=_parameters, metavar="NAME=VALUE",
              help="A parameter as in a StorageClass; may be repeated.")  # fmt: skip
@capability_options
@secret_options
def create(
    remote: Remote,
    name: str,
    size: int,
    limit: int,
    parameters: dict[str, str],
    secret: SecretSource,
    *,
    encrypted: bool,
    **usage: Any,
) -> None:
    """Create a volume, or find the one of that name; what is encrypted is formatted when it is first staged."""
    if encrypted and parameters.setdefault("encrypted", "true") != "true":
        raise click.UsageError("--encrypted and --parameter encrypted=… disagree; leave one of them out.")
    if secret.is_given and parameters.get("encrypted") != "true":
        raise click.UsageError(
            "a passphrase protects nothing in a volume that is not encrypted; add --encrypted, or leave the passphrase "
            "out."
        )
    made = remote.client.create_volume(
        name, [read_capability(**usage)], size, limit_bytes=limit, parameters=parameters, secrets=secret.read()
    )
    kind = "encrypted volume" if is_encrypted(made) else "volume, not encrypted,"
    remote.tell(f"{kind} {made.id} of {size_text(made.capacity_bytes)} is there", made)


@command(volume, "delete")
@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(remote: Remote, volume_id: str, *, yes: bool) -> None:
    """Delete a volume that is not staged, and all that is in it."""
    found = remote.client.volume(volume_id)  # the call itself forgives a wrong id, as Kubernetes wants; people mistype
    # The call itself unstages what nobody has published, as Kubernetes may have lost the stage: a person may be in it.
    seen = remote.look(found.id)
    if seen.condition is not None and not seen.condition.is_closed:
        where = f"staged at {seen.condition.staged_at}" if seen.condition.staged_at else "open"
        raise DeviceInUse(
            f"volume {found.id} is {where} on this node; end what uses it and unstage it (luks-csi volume unstage) "
            f"before it is deleted"
        )
    unseen = f" Whether it is in use cannot be seen here: {seen.unseen}." if seen.condition is None else ""
    confirm(f"Delete volume {found.id} ({size_text(found.capacity_bytes)}) and all data in it?{unseen}", yes=yes)
    remote.client.delete_volume(found.id)
    remote.tell(f"volume {found.id} is deleted", found)


@command(volume, "detach")
@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.argument("node_id", metavar="NODE")
@click.option("--yes", is_flag=True, help="Do not ask.")
def detach(remote: Remote, volume_id: str, node_id: str, *, yes: bool) -> None:
    """Take a volume back from a node that it was given to, where nothing else does it.

    Behind a cluster that was lost, say: a volume of Ceph that was in use belongs to its node until then. A node that
    has it open is fenced off first: what runs there loses the volume. Where Kubernetes knows the volume, end its pods
    instead.
    """
    found = remote.client.volume(volume_id)
    if node_id not in found.published:
        has = f"node {' and '.join(found.published)} has it" if found.published else "no node has it"
        raise NotFound(f"volume {found.id} was not given to node {node_id}: {has}")
    confirm(f"Take volume {found.id} from node {node_id}? If it is in use there, its user is fenced off.", yes=yes)
    remote.client.detach(found.id, node_id)
    remote.tell(f"volume {found.id} is no longer given to node {node_id}", remote.client.volume(found.id))


def _place(topology: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in topology.items())


def _state(seen: Seen) -> str:
    condition = seen.condition
    if condition is None:
        return "unknown"
    if condition.healthy is None:
        return "closed"
    if not condition.healthy:
        return "SICK"
    return "published" if condition.published_at else "staged"


def _where(seen: Seen) -> str:
    condition = seen.condition
    if condition is None:
        return f"not seen: {seen.unseen}"
    if condition.healthy is None:
        return "-"
    lines = [] if condition.healthy else [condition.health]
    return "\n".join([*lines, *str(condition).split(", ")])
