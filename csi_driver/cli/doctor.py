"""`luks-csi doctor`: what this node offers and lacks, and what to do; needs no server."""

from typing import Any

import click

from csi_driver.cli.output import OUTPUT_OPTION, Output, show_json, show_table
from csi_driver.cli.serve import settings_of, settings_params
from csi_driver.volumes.finding import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "red"}
_LOOKED_AT = (
    "state_dir",
    "kubelet_dir",
    "backend",
    "volume_group",
    "thin_pool_limit",
    "free_space_floor",
    "pbkdf_memory_kib",
    "unlocks_at_once",
    "kms_config",
    "kms_programs",
)


@click.command(params=[*settings_params(*_LOOKED_AT), OUTPUT_OPTION])
@click.pass_context
def doctor(context: click.Context, /, output: str, **settings: Any) -> None:
    """Look at this node: kernel, programs, folders, permissions, leftovers; and say what to do.

    The exit code is 1 when something is missing without which no volume can be staged.
    """
    from csi_driver.volumes.driver import build_driver

    driver = (context.obj or build_driver)(settings_of(settings))
    try:
        findings = driver.health.findings()
    finally:
        driver.stop()
    if output == Output.JSON:
        show_json(findings)
    else:
        show_table([(_mark(finding), finding.name, _text(finding)) for finding in findings], colours=_COLOURS)
    if any(finding.fatal and not finding.ok for finding in findings):
        context.exit(1)


def _mark(finding: Finding) -> str:
    if finding.ok:
        return "ok"
    return "FAIL" if finding.fatal else "warn"


def _text(finding: Finding) -> str:
    return finding.found if finding.ok else f"{finding.found}\n-> {finding.advice}"
