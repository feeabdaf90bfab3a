"""`luks-csi serve`: every setting by option or environment, checked before anything starts."""

import dataclasses
import os
from typing import Any

import click

from csi_driver.cli.loading import loading
from csi_driver.cli.logs import LEVELS, configure_logs
from csi_driver.cli.setting import (
    number,
    one_of,
    read_address,
    read_driver_name,
    read_folder,
    read_group,
    read_image,
    read_memory,
    read_name,
    read_node_id,
    read_path,
    read_some_endpoint,
    read_some_path,
    read_truth,
    seconds,
    setting,
)
from csi_driver.model.settings import Limits, LogFormat, Service, Settings
from csi_driver.model.sizes import read_size
from csi_driver.rpc.endpoint import endpoint_path

BACKENDS = ("csi", "loopfile", "lvm", "rbd")


def _read_services(text: str) -> frozenset[Service]:
    read = one_of(Service)
    return frozenset({Service.IDENTITY, *(Service(read(name.strip())) for name in text.split(","))})


def _read_log_format(text: str) -> LogFormat:
    return LogFormat(one_of(LogFormat)(text))


_levels = one_of(LEVELS)
_OPTIONS = (
    setting("--endpoint", "endpoint", endpoint_path, "SOCKET", Settings.endpoint, "Where to listen."),
    setting("--node-id", "node_id", read_node_id, "NAME", "", "This node; without it, the host's name."),
    setting("--driver-name", "driver_name", read_driver_name, "NAME", Settings.driver_name, "Its name in Kubernetes."),
    setting("--services", "services", _read_services, "LIST", ",".join(Service), "What to serve; identity always is."),
    setting("--state-dir", "state_dir", read_folder, "FOLDER", Settings.state_dir, "Where volumes and records live."),
    setting("--require-mount", "require_mount", read_truth, "true|false", "false", "Refuse to start unless the state "
            "directory is a mount of the node.", is_flag=False, flag_value="true"),
    setting("--kubelet-dir", "kubelet_dir", read_folder, "FOLDER", Settings.kubelet_dir, "Kubelet's own folder."),
    setting("--backend", "backend", one_of(BACKENDS), "NAME", Settings.backend, "What keeps the ciphertext."),
    setting("--volume-group", "volume_group", read_group, "NAME", "", "The LVM volume group of the backend lvm."),
    setting("--thin-pool-limit", "thin_pool_limit", number(1, 100), "PERCENT", Settings.thin_pool_limit, "How full a "
            "thin pool may be for new volumes and growth."),
    setting("--namespace", "namespace", read_name, "NAME", "", "Of the backend csi's objects; without it, the pod's."),
    setting("--holder-image", "holder_image", read_image, "IMAGE", "", "The container image of the holder pods of the "
            "backend csi; without it, that of the controller's own pod."),
    setting("--pod-name", "pod_name", read_name, "NAME", "", "The controller's own pod, whose image the holder pods of "
            "the backend csi have."),
    setting("--driver-below", "driver_below", read_name, "NAME", "", "The driver below the backend csi, whose limit of "
            "volumes of a node is ours too."),
    setting("--ceph-config", "ceph_config", read_path, "FILE", Settings.ceph_config, "The Ceph clusters of the backend "
            "rbd, as Ceph-CSI has them."),
    setting("--ceph-secret", "ceph_secret", read_some_path, "FOLDER", "", "Where a Secret with userID and userKey is "
            "mounted, for calls that bring none, if at all."),
    setting("--free-space-floor", "free_space_floor", read_size, "SIZE", "1Gi", "Space that new volumes leave free."),
    setting("--threads", "threads", number(1, 256), "NUMBER", Settings.threads, "Calls at work at once."),
    setting("--grace-seconds", "grace_seconds", seconds(0), "SECONDS", Settings.grace_seconds, "Time for calls in "
            "flight when the server is told to stop."),
    setting("--log-format", "log_format", _read_log_format, "|".join(LogFormat), Settings.log_format, "auto: text on a "
            "terminal, json else."),
    setting("--log-level", "log_level", _levels, "|".join(LEVELS), Settings.log_level, "The least to be told."),
    setting("--http-address", "http_address", read_address, "HOST:PORT", "", "Where to show /healthz, /readyz and "
            "/metrics, if at all."),
    setting("--kms-config", "kms_config", read_path, "FILE", Settings.kms_config, "The KMS configuration, by ids."),
    setting("--kms-programs", "kms_programs", read_folder, "FOLDER", Settings.kms_programs, "Programs that a KMS of "
            "type exec may be."),
    setting("--audit-file", "audit_file", read_some_path, "FILE", "", "Where each use of a key is told too, if at "
            "all."),
    setting("--addons-endpoint", "addons_endpoint", read_some_endpoint, "SOCKET", "", "Where to serve CSI-Addons, if "
            "at all."),
    setting("--format-seconds", "format_seconds", seconds(1), "SECONDS", Limits.format_seconds, "Limit of luksFormat "
            "and mkfs."),
    setting("--unlock-seconds", "unlock_seconds", seconds(1), "SECONDS", Limits.unlock_seconds, "Limit of one key "
            "derivation."),
    setting("--mount-seconds", "mount_seconds", seconds(1), "SECONDS", Limits.mount_seconds, "Limit of mount and "
            "umount."),
    setting("--pbkdf-memory-limit", "pbkdf_memory_kib", read_memory, "SIZE", f"{Limits.pbkdf_memory_kib}Ki", "The "
            "most memory that a key derivation may take."),
    setting("--unlocks-at-once", "unlocks_at_once", number(1, 64), "NUMBER", Limits.unlocks_at_once, "Key "
            "derivations at work at once."),
)  # fmt: skip


@click.command(params=list(_OPTIONS))
def serve(**options: Any) -> None:
    """Serve the CSI services on a unix socket until SIGTERM; every option can come from the environment too."""
    settings = settings_of(options)
    if settings.addons_endpoint == settings.endpoint:
        raise click.UsageError("--addons-endpoint and --endpoint name one socket; give each of them its own")
    if (settings.backend == "lvm") != bool(settings.volume_group):
        raise click.UsageError("--backend lvm and --volume-group belong together; give both or none of them")
    makes_holders = settings.backend == "csi" and Service.CONTROLLER in settings.services
    if makes_holders and Service.NODE in settings.services:
        raise click.UsageError("--backend csi has one controller and a server on each node; choose by --services")
    if makes_holders != bool(settings.holder_image or settings.pod_name):
        raise click.UsageError(
            "the controller of --backend csi, and no other server, has --holder-image, or --pod-name for the image of "
            "its own pod; give one of them there alone"
        )
    configure_logs(settings.log_format, settings.log_level)
    with loading():
        from csi_driver.cli.below import below
        from csi_driver.volumes.driver import Host, build_driver

    driver = build_driver(settings, Host(below=below))
    try:
        driver.start()
        with loading():
            from csi_driver.rpc.threads import listen_with_one_poller

            listen_with_one_poller()
            from csi_driver.rpc.server import driver_server, serve_until_told

        all_ended = serve_until_told(driver_server(driver), driver.warm_up)
    finally:
        driver.stop()
    if not all_ended:
        # Threads of calls that outlived the grace time would keep the interpreter; their workers hold the locks.
        os._exit(0)


def settings_of(options: dict[str, Any]) -> Settings:
    """The settings of a command line; its option names are fields of Settings and Limits."""
    names = {field.name for field in dataclasses.fields(Limits)}
    limits = Limits(**{name: value for name, value in options.items() if name in names})
    chosen = {name: value for name, value in options.items() if name not in names}
    return Settings(**chosen, limits=limits)


def settings_params(*fields: str) -> list[click.Parameter]:
    """Some of the options of `serve`: the same names, variables and defaults."""
    return [parameter for parameter in serve.params if parameter.name in fields]
