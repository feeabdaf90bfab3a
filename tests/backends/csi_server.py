"""The real server on a played cluster, controller and node in one: python -m tests.backends.csi_server RIG.

RIG is `csi` or `csi-direct`; behind it come the options of `luks-csi serve`. Holder pods come and go with
ControllerPublishVolume and its reverse, as ever. With `played FOLDER` it is the cluster of `tests.backends.played`, and
they come and go with NodeStageVolume and its reverse.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from csi_driver.backends.base import Backend
from csi_driver.cli.logs import configure_logs
from csi_driver.cli.serve import serve, settings_of
from csi_driver.host.workers import Workers
from csi_driver.model.settings import Settings
from csi_driver.rpc.server import driver_server, serve_until_told
from csi_driver.volumes.driver import Host, build_driver
from tests.backends.csirig import CsiRig
from tests.backends.directrig import DirectRig
from tests.backends.played import whole_far_backend


@contextmanager
def _backend(rig: str, settings: Settings, workers: Workers) -> Iterator[Backend]:
    folder = settings.state_dir.parent / "played"
    with {"csi": CsiRig, "csi-direct": DirectRig}[rig](folder, workers) as made:
        yield made.plain(settings.topology_key)


def main(words: Sequence[str]) -> None:
    """Serve until SIGTERM."""
    rig, *options = words
    place = Path(options.pop(0)) if rig == "played" else None
    settings = settings_of(serve.make_context("serve", [*options, "--backend=csi"]).params)
    configure_logs(settings.log_format, settings.log_level)
    host = Host()
    made: AbstractContextManager[Backend] = (
        _backend(rig, settings, host.workers)
        if place is None
        else nullcontext(whole_far_backend(place, settings.topology_key))
    )
    with made as backend:
        driver = build_driver(settings, Host(workers=host.workers, backend=backend))
        try:
            driver.start()
            serve_until_told(driver_server(driver), driver.warm_up)
        finally:
            driver.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
