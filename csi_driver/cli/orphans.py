"""`luks-csi orphans`: leftovers of killed calls, shown, and removed when told to."""

from pathlib import Path
from typing import Any

import click

from csi_driver.cli.beside import PARAMS, BesideServer
from csi_driver.cli.output import OUTPUT_OPTION, Output, confirm, show_json, show_table, show_text
from csi_driver.model.settings import Settings
from csi_driver.volumes.driver import Driver, build_driver


@click.group()
def orphans() -> None:
    """Show or remove what killed calls left in the state directory; needs no server."""


@orphans.command("list", cls=BesideServer, params=[*PARAMS, OUTPUT_OPTION])
def list_(output: str, **settings: Any) -> None:
    """List the leftovers."""
    found = _found(build_driver(Settings(**settings)))
    if output == Output.JSON:
        show_json([_document(path, removed=False) for path in found])
    else:
        _show(found)


@orphans.command("remove", cls=BesideServer, params=[*PARAMS, OUTPUT_OPTION])
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(output: str, *, yes: bool, **settings: Any) -> None:
    """Remove half-made and half-deleted volumes; what may still hold data is left alone.

    A volume that a call is at work on is left alone too: that ends the command, with exit code 1.
    """
    driver = build_driver(Settings(**settings))
    found = _found(driver)
    if found:
        confirm(f"Remove what killed calls left in {driver.settings.state_dir} ({len(found)})?", yes=yes)
    removed: list[str] = []
    try:
        for volume_id in sorted({Path(path).name for path in found}):
            with driver.locks.hold(volume_id):
                removed += driver.backend.remove_orphans(volume_id)
    except OSError as error:
        raise _unreadable(driver, error) from None
    kept = [path for path in found if path not in removed]
    if output == Output.JSON:
        show_json(
            [*(_document(path, removed=True) for path in removed), *(_document(path, removed=False) for path in kept)]
        )
    else:
        show_table([*(("removed", path) for path in removed), *(("kept", path) for path in kept)])
        if not found:
            show_text("no leftovers")


def _document(path: str, *, removed: bool) -> dict[str, str | bool]:
    """A leftover for programs: the one schema of that noun."""
    return {"path": path, "removed": removed}


def _found(driver: Driver) -> list[str]:
    try:
        return list(driver.backend.orphans())
    except OSError as error:
        raise _unreadable(driver, error) from None


def _show(found: list[str]) -> None:
    for path in found:
        show_text(path)
    if not found:
        show_text("no leftovers")


def _unreadable(driver: Driver, error: OSError) -> click.ClickException:
    return click.ClickException(
        f"the leftovers in {driver.settings.state_dir} cannot be looked at ({error.strerror}: {error.filename}); run "
        f"this as root, on the node, with the --state-dir of its server"
    )
