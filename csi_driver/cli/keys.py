"""`luks-csi keys`: where the keys of volumes come from, and new ones for them; on their node, beside its server."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from csi_driver.cli.beside import PARAMS, BesideServer
from csi_driver.cli.local import local_driver
from csi_driver.cli.names import volume_names
from csi_driver.cli.output import OUTPUT_OPTION, Output, confirm, show_json, show_table, show_text
from csi_driver.cli.secret_files import SecretSource, new_secret_options, secret_options
from csi_driver.cli.serve import settings_params
from csi_driver.keys.generated import PREFIX
from csi_driver.keys.ledger import KeyEntry
from csi_driver.keys.secret import read_secret
from csi_driver.keys.sources import GENERATED
from csi_driver.model.errors import DriverError
from csi_driver.model.times import recorded
from csi_driver.model.volume import KeyTrail, VolumeRecord, is_volume_id
from csi_driver.volumes.driver import Driver
from csi_driver.volumes.keys import SHARED, UnnamedKeys, shares_key
from csi_driver.volumes.rekey import Rekeyed
from csi_driver.volumes.rotation import schedule

_LIMITS = ("format_seconds", "unlock_seconds", "mount_seconds", "pbkdf_memory_kib")
_PARAMS = [
    *PARAMS,
    *settings_params("kms_config", "kms_programs", "audit_file", *_LIMITS),
    OUTPUT_OPTION,
]

_VERDICTS = {True: "ok", False: "FAIL", None: "-"}


@click.group()
def keys() -> None:
    """Show where the keys of volumes come from, and change them; on the volumes' node, without a server."""


@keys.command("status", cls=BesideServer, params=[*_PARAMS])
@click.argument("volume_ids", metavar="[VOLUME…]", nargs=-1, shell_complete=volume_names)
@click.pass_context
def status(context: click.Context, /, volume_ids: tuple[str, ...], output: str, **given: Any) -> None:
    """Show of each encrypted volume where its key comes from, since when it counts, when the next is due.

    Also which key of a KMS wraps it, and a change under way.
    """
    documents, failed = [], False
    warnings: list[str] = []
    with local_driver(context, given) as driver:
        for each in volume_ids or driver.backend.ids():
            try:
                record = driver.backend.get(each)
                if record.encryption is not None or record.conversion is not None:
                    documents.append(_document(record) | {"by_request": _by_request(driver, record)})
                warnings += [SHARED.format(record.id)] * shares_key(record)
            except DriverError as error:
                failed = True
                show_text(str(error), err=True)
        if not (failed or volume_ids):
            warnings += _left_told(driver)
    if output == Output.JSON:
        show_json(documents)
    elif documents:
        rows = [(*(str(one[name] or "-") for name in _COLUMNS), _due(one)) for one in documents]
        show_table(rows, ("VOLUME", "KMS", "TYPE", "KEY", "VERSION", "CHANGE", "SINCE", "NEXT"))
    elif not failed:
        show_text("no encrypted volumes")
    _warn(warnings)
    if failed:
        context.exit(1)


@keys.command("check", cls=BesideServer, params=[*_PARAMS])
@click.pass_context
def check(context: click.Context, /, output: str, **given: Any) -> None:
    """Ask each KMS of the configuration whether it works; the exit code is 1 when one does not."""
    with local_driver(context, given) as driver:
        found = driver.sources.checked()
    if output == Output.JSON:
        show_json(
            [
                {"kms": one.kms_id, "ok": one.works, "found": one.found, "unknown_fields": one.unknown_fields}
                for one in found
            ]
        )
    elif found:
        show_table([(_VERDICTS[one.works], one.kms_id, one.found) for one in found])
    else:
        show_text("no KMS is configured")
    _warn(
        [
            f"the KMS {one.kms_id} has fields that nobody reads: {', '.join(one.unknown_fields)}; correct the KMS "
            f"configuration, or take them out"
            for one in found
            if one.unknown_fields
        ]
    )
    if any(one.works is False for one in found):
        context.exit(1)


@keys.command("rotate", cls=BesideServer, params=[*_PARAMS])
@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.option("--yes", is_flag=True, help="Do not ask.")
@secret_options
@new_secret_options
@click.pass_context
def rotate(context: click.Context, /, volume_id: str, output: str, *, yes: bool, **given: Any) -> None:
    """Give a volume another key, while it is in use or not: of its KMS, or a new passphrase for the one it has.

    The old one's key slot goes when the new one was proven to open the volume. The data is not encrypted anew.
    """
    secret, new = _secrets(given)
    confirm(f"Give volume {volume_id} another key?", yes=yes)
    with local_driver(context, given) as driver:
        present = read_secret(secret.read(f"Passphrase of volume {volume_id}"))
        fresh = read_secret(new.read(f"New passphrase of volume {volume_id}", new=True)).passphrase
        done = _under_lock(driver, volume_id, lambda: driver.rekeying.rotate(volume_id, present, fresh))
    _tell(done, output, f"volume {volume_id} has another key", f"volume {volume_id} has the new passphrase already")


@keys.command("rewrap", cls=BesideServer, params=[*_PARAMS])
@click.argument("volume_ids", metavar="[VOLUME…]", nargs=-1, shell_complete=volume_names)
@click.option("--all", "every", is_flag=True, help="All volumes of this node whose key a KMS wraps.")
@secret_options
@click.pass_context
def rewrap(context: click.Context, /, volume_ids: tuple[str, ...], output: str, *, every: bool, **given: Any) -> None:
    """Wrap the keys of volumes anew, by the newest key of their KMS; the volumes may be in use.

    One that fails is told and does not keep the others from it; the exit code is 1 then.
    """
    if every is bool(volume_ids):
        raise click.UsageError("Name volumes, or all of them with --all.")
    secret, _ = _secrets(given)
    failed = False
    documents = []
    with local_driver(context, given) as driver:
        present = read_secret(secret.read("Passphrase of the KMS"))
        for each in volume_ids or driver.backend.ids():
            try:
                if every and driver.backend.get(each).key is None:
                    continue
                done = _under_lock(driver, each, lambda each=each: driver.rekeying.rewrap(each, present))  # type: ignore[misc]
            except (DriverError, OSError) as error:
                failed = True
                said = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
                documents.append({"volume": each, "changed": False, "error": said})
                continue
            documents.append({"volume": each, "changed": done.changed, "error": None})
    if output == Output.JSON:
        show_json(documents)
    elif not documents:
        show_text("no KMS wraps the key of a volume here")
    for one in documents if output != Output.JSON else ():
        how = "is wrapped anew" if one["changed"] else "was wrapped by the newest key already"
        show_text(f"volume {one['volume']}: {one['error'] or f'its key {how}'}", err=bool(one["error"]))
    if failed:
        context.exit(1)


@keys.command("leftovers", cls=BesideServer, params=[*_PARAMS])
@click.argument("names", metavar="[KEY…]", nargs=-1)
@click.option("--destroy", is_flag=True, help="Have their KMS destroy them: those that are named, or all.")
@click.option("--forget", is_flag=True, help="List those that are named no more, and ask no KMS.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def leftovers(
    context: click.Context,
    /,
    names: tuple[str, ...],
    output: str,
    *,
    destroy: bool,
    forget: bool,
    yes: bool,
    **given: Any,
) -> None:
    """Show the keys that a KMS keeps for no volume: of one that is gone, or that was not made to its end.

    A volume that is being made at this moment has one too. With --destroy the exit code is 1 when one is still there.
    With --forget one stays in its KMS, if it is there: for a KMS that is gone for good, or a key of which nobody can
    tell whether a volume has it, as the storage that knew is gone for good.
    """
    if forget and (destroy or not names):
        raise click.UsageError("--forget is for keys that are named, and without --destroy.")
    with local_driver(context, given) as driver:
        found = [entry for entry in _left(driver, forget=forget) if not names or entry.key.name in names]
        if absent := set(names) - {entry.key.name for entry in found}:
            raise click.ClickException(f"no KMS keeps {', '.join(sorted(absent))} for nothing")
        gone: set[str] = set()
        if found and destroy:
            confirm(f"Destroy {len(found)} keys for good?", yes=yes)
            gone = _ended(driver, found, driver.keys.destroy_left)
        elif found and forget:
            confirm(f"Forget {len(found)} keys, and never destroy what their KMS has of them?", yes=yes)
            gone = _ended(driver, found, driver.keys.forget_left, forget=True)
        _warn(_untold(driver.keys.unnamed(driver.backend)))
    _show_left(found, gone, output, "destroyed" if destroy else "forgotten" if forget else "")
    if (destroy or forget) and len(gone) < len(found):
        context.exit(1)


def _ended(
    driver: Driver, found: Sequence[KeyEntry], end: Callable[[KeyEntry], bool], *, forget: bool = False
) -> set[str]:
    """The names of those that `end` has ended, each under its volume's lock and if it is left still."""
    gone = set()
    for entry in found:
        with driver.locks.hold(entry.volume):
            if entry in _left(driver, forget=forget) and end(entry):
                gone.add(entry.key.name)
    return gone


def _show_left(found: Sequence[KeyEntry], gone: set[str], output: str, ended: str) -> None:
    if output == Output.JSON:
        ends = ("destroyed", "forgotten")
        show_json([_leftover(each) | {end: end == ended and each.key.name in gone for end in ends} for each in found])
    elif found:
        now = [(ended if entry.key.name in gone else "kept",) * bool(ended) for entry in found]
        show_table(
            [(*_leftover(entry).values(), *end) for entry, end in zip(found, now, strict=True)],
            ("VOLUME", "KMS", "TYPE", "KEY", "LEFT BY", *("NOW",) * bool(ended)),
        )
    else:
        show_text("no KMS keeps a key for nothing")


def _warn(sentences: Sequence[str]) -> None:
    for each in sentences:
        show_text(f"warning: {each}", err=True)


def _left_told(driver: Driver) -> list[str]:
    unnamed = driver.keys.unnamed(driver.backend)
    count = len(unnamed.left)
    told = [f"a KMS keeps {count} keys for nothing; look at them with `luks-csi keys leftovers`"] * bool(count)
    return told + _untold(unnamed)


def _left(driver: Driver, *, forget: bool = False) -> list[KeyEntry]:
    """What can be destroyed, or forgotten: that is for those too of which nobody can tell."""
    unnamed = driver.keys.unnamed(driver.backend)
    return [*unnamed.left, *(entry for entry, _ in unnamed.untold if forget)]


def _untold(unnamed: UnnamedKeys) -> list[str]:
    return [
        f"nobody can tell whether volume {entry.volume} has the key {entry.key.name} of its KMS ({error}); if its "
        f"storage is gone for good, name the key to `luks-csi keys leftovers --forget`"
        for entry, error in unnamed.untold
    ]


def _leftover(entry: KeyEntry) -> dict[str, str]:
    """A key that is left, for programs: the one schema of that noun."""
    return {
        "volume": entry.volume,
        "kms": entry.key.kms_id or "-",
        "type": entry.key.type,
        "key": entry.key.name,
        "left_by": "deletion" if entry.leaving else "creation",
    }


_COLUMNS = ("volume", "kms", "type", "key", "key_version", "change", "since")


def _document(record: VolumeRecord) -> dict[str, str | bool | None]:
    """Where a volume's key comes from and how old it is, for programs: the one schema of that noun."""
    trail, planned = record.key, schedule(record)
    return {
        "volume": record.id,
        "kms": trail.kms_id if trail else None,
        "type": trail.type if trail else "secret",
        "key": _key(trail) if trail else None,
        "key_version": trail.key_version if trail else None,
        "change": _change(record),
        "since": record.key_since or record.created,
        "next": recorded(datetime.fromtimestamp(planned.due, UTC)) if planned else None,
    }


def _key(trail: KeyTrail) -> str:
    """What to look for, or to back up, in its KMS."""
    if trail.type == GENERATED:
        return f"{trail.key_id}/{PREFIX}{trail.name}"
    return trail.key_id or trail.name


def _change(record: VolumeRecord) -> str | None:
    if record.conversion is not None:
        return f"volume key, {record.percent_moved} %"
    return record.rekey.phase.value if record.rekey else None


def _by_request(driver: Driver, record: VolumeRecord) -> bool:
    """Whether a key whose time has come waits for a request: its KMS is asked for no other."""
    planned = schedule(record)
    if planned is None or record.key is None or time.time() < planned.due:
        return False
    return driver.keys.needs_request(record, record.key)


def _due(document: dict[str, str | bool | None]) -> str:
    return "by request" if document["by_request"] else str(document["next"] or "-")


def _tell(done: Rekeyed, output: str, changed: str, unchanged: str) -> None:
    if output == Output.JSON:
        show_json(_document(done.record) | {"changed": done.changed})
    else:
        show_text(changed if done.changed else unchanged)


def _secrets(given: dict[str, Any]) -> tuple[SecretSource, SecretSource]:
    secret = SecretSource(given.pop("secret_dir"), given.pop("passphrase_file"))
    return secret, SecretSource(given.pop("new_secret_dir", None), given.pop("new_passphrase_file", None))


def _under_lock(driver: Driver, volume_id: str, call: Callable[[], Rekeyed]) -> Rekeyed:
    if not is_volume_id(volume_id):
        raise click.ClickException(f"{volume_id!r} is no volume's id")
    driver.backend.get(volume_id)  # before a lock is made for what is not there
    with driver.locks.hold(volume_id):
        return call()
