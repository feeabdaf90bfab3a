"""The commands of `luks-csi volume` for a volume in use: stage, unstage, publish, unpublish, expand, stats.

Kubernetes repeats calls and so CSI forgives a path or id that means nothing. People mistype: here it is told to them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import click

from csi_driver.cli.names import volume_names
from csi_driver.cli.output import Output, about, show_json, show_table, size_text
from csi_driver.cli.remote import (
    Remote,
    absolute,
    capability_options,
    is_encrypted,
    read_capability,
    size_option,
)
from csi_driver.cli.secret_files import SecretSource, read_for_volume, secret_options
from csi_driver.model.errors import FailedPrecondition, NotFound
from csi_driver.model.volume import EncryptionState
from csi_driver.volumes.condition import Condition

_FORMATTED: Final = (EncryptionState.CLONING, EncryptionState.ENCRYPTED)


@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.argument("path", callback=absolute)
@capability_options
@secret_options
def stage(remote: Remote, volume_id: str, path: Path, secret: SecretSource, **usage: Any) -> None:
    """Open a volume on this node and mount it at PATH, a folder that is made if it is not there.

    The first time formats it: a passphrase that is typed is asked for twice then.
    """
    wanted, found = read_capability(**usage), remote.client.volume(volume_id)
    record = remote.look(found.id).record
    new = record is None or record.encryption not in _FORMATTED  # where nobody knows, a slip must not pass
    required = record is None or record.key is None  # a KMS has the key of the others
    secrets = read_for_volume(secret, found.id, encrypted=is_encrypted(found), required=required, new=new)
    with _folder(path):
        remote.client.stage(found, path, wanted, secrets)
    remote.tell(f"volume {found.id} is staged at {path}", found)


@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.argument("path", callback=absolute)
def unstage(remote: Remote, volume_id: str, path: Path) -> None:
    """Unmount a volume from PATH, where it was staged, and close it; needs no key."""
    condition = _condition(remote, volume_id)
    if not condition.is_staged_at(str(path)):
        raise NotFound(f"volume {volume_id} is not staged at {path}: it is {condition}; nothing was done")
    remote.client.unstage(volume_id, path)
    _tell(remote, f"volume {volume_id} is closed", volume_id)


@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.argument("staging_path", callback=absolute)
@click.argument("target_path", callback=absolute)
@click.option("--read-only", is_flag=True, help="Without the right to write.")
@capability_options
def publish(
    remote: Remote, volume_id: str, staging_path: Path, target_path: Path, *, read_only: bool, **usage: Any
) -> None:
    """Show a volume that is staged at STAGING_PATH at TARGET_PATH as well, as to a pod."""
    found = remote.client.volume(volume_id)
    remote.client.publish(found, staging_path, target_path, read_capability(**usage), read_only=read_only)
    remote.tell(f"volume {volume_id} is published at {target_path}", found)


@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.argument("target_path", callback=absolute)
def unpublish(remote: Remote, volume_id: str, target_path: Path) -> None:
    """Take a volume away from TARGET_PATH, where it was published; it stays staged."""
    condition = _condition(remote, volume_id)
    if not condition.is_published_at(str(target_path)):
        raise NotFound(f"volume {volume_id} is not published at {target_path}: it is {condition}; nothing was done")
    remote.client.unpublish(volume_id, target_path)
    _tell(remote, f"volume {volume_id} is no longer at {target_path}", volume_id)


@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.argument("path", callback=absolute, required=False)
@size_option("--size", required=True, meaning="The new capacity, at least: bytes, or 512Mi, 1Gi, 1G.")
@secret_options
def expand(remote: Remote, volume_id: str, path: Path | None, size: int, secret: SecretSource) -> None:
    """Enlarge a volume; needs no key as a rule.

    One that is in use grows at once if PATH tells where it is staged or published. Any other grows when it is staged
    the next time.
    """
    found = remote.client.volume(volume_id)
    if path is not None and not (condition := _condition(remote, volume_id)).is_at(str(path)):
        raise NotFound(
            f"volume {volume_id} is neither staged nor published at {path}: it is {condition}; nothing was enlarged"
        )
    secrets = read_for_volume(secret, found.id, encrypted=is_encrypted(found), required=False)
    capacity = remote.client.expand_volume(volume_id, size)
    if path is not None:
        capacity = remote.client.expand_on_node(volume_id, path, size, secrets)
    where = (
        f"at {path} too" if path is not None else "where it is staged give PATH, else the next stage lets it be seen"
    )
    _tell(remote, f"volume {volume_id} has {size_text(capacity)}; {where}", volume_id)


@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.argument("path", callback=absolute)
def stats(remote: Remote, volume_id: str, path: Path) -> None:
    """Tell how full a volume is that is staged or published at PATH."""
    counts = remote.client.usage(volume_id, path)
    if remote.output == Output.JSON:
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


def _condition(remote: Remote, volume_id: str) -> Condition:
    """Where the volume is. One that the server does not know is told of by it, unless something is left of it here."""
    condition = remote.look(volume_id).require(volume_id)
    if condition.is_closed:
        remote.client.volume(volume_id)
    return condition


def _tell(remote: Remote, sentence: str, volume_id: str) -> None:
    from csi_driver.rpc.client import RemoteError, RemoteVolume

    try:
        found = remote.client.volume(volume_id)
    except RemoteError:
        found = RemoteVolume(volume_id, 0, {})  # taken down without its record
    remote.tell(sentence, found)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """The staging path, which CSI lets the caller make; one that was made goes away again if staging fails."""
    try:
        path.mkdir(mode=0o750)
    except FileExistsError:
        yield
        return
    except OSError as error:
        raise FailedPrecondition(f"the folder {path} cannot be made: {error.strerror}") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


COMMANDS: Final[Mapping[str, Callable[..., None]]] = {
    "stage": stage,
    "unstage": unstage,
    "publish": publish,
    "unpublish": unpublish,
    "expand": expand,
    "stats": stats,
}
