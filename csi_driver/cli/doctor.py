"""`luks-csi doctor`: what this node offers and lacks, and what to do; needs no server."""

from collections.abc import Sequence
from typing import Any

import click

from csi_driver.cli.cluster import cluster
from csi_driver.cli.output import OUTPUT_OPTION, Output, show_json, show_table
from csi_driver.cli.serve import settings_of, settings_params
from csi_driver.model.settings import Settings
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
@click.option("--cluster", "namespace", is_flag=False, flag_value="luks-csi", metavar="NAMESPACE",
              help="Look at a cluster instead, by the kubeconfig, where luks-csi is in that namespace.")  # fmt: skip
@click.option("--driver-name", default=Settings.driver_name, show_default=True, help="Its name there.")
@click.pass_context
def doctor(context: click.Context, /, output: str, namespace: str | None, driver_name: str, **settings: Any) -> None:
    """Look at this node: kernel, programs, folders, permissions, leftovers; and say what to do.

    With --cluster at a cluster: whose names and kinds these are, agents, and whether the API reaches the operator.
    The exit code is 1 when something is missing without which no volume can be staged, or no image made.
    """
    findings = _of_cluster(namespace, driver_name) if namespace else _of_node(context, settings)
    if output == Output.JSON:
        show_json(findings)
    else:
        show_table([(_mark(finding), finding.name, _text(finding)) for finding in findings], colours=_COLOURS)
    if any(finding.fatal and not finding.ok for finding in findings):
        context.exit(1)


def _of_node(context: click.Context, settings: dict[str, Any]) -> Sequence[Finding]:
    from csi_driver.volumes.driver import build_driver

    driver = (context.obj or build_driver)(settings_of(settings))
    try:
        return driver.health.findings()
    finally:
        driver.stop()


def _of_cluster(namespace: str, driver_name: str) -> Sequence[Finding]:
    kube = cluster()
    from csi_driver.operator.cluster_health import ClusterHealth

    return ClusterHealth(kube, namespace, driver_name).findings()


def _mark(finding: Finding) -> str:
    if finding.ok:
        return "ok"
    return "FAIL" if finding.fatal else "warn"


def _text(finding: Finding) -> str:
    return finding.found if finding.ok else f"{finding.found}\n-> {finding.advice}"
