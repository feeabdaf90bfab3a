"""The real server on a played cluster, controller and node in one: python -m tests.backends.csi_server RIG.

RIG is `csi` or `csi-direct`; behind it come the options of `luks-csi serve`. Holder pods come and go with
ControllerPublishVolume and its reverse, as ever.
"""

import sys
from collections.abc import Sequence

from csi_driver.cli.logs import configure_logs
from csi_driver.cli.serve import serve, settings_of
from csi_driver.rpc.server import driver_server, serve_until_told
from csi_driver.volumes.driver import Host, build_driver
from tests.backends.csirig import CsiRig
from tests.backends.directrig import DirectRig


def main(words: Sequence[str]) -> None:
    """Serve until SIGTERM."""
    make = {"csi": CsiRig, "csi-direct": DirectRig}[words[0]]
    settings = settings_of(serve.make_context("serve", [*words[1:], "--backend=csi"]).params)
    configure_logs(settings.log_format, settings.log_level)
    host = Host()
    with make(settings.state_dir.parent / "played", host.workers) as rig:
        driver = build_driver(settings, Host(workers=host.workers, backend=rig.plain(settings.topology_key)))
        try:
            driver.start()
            serve_until_told(driver_server(driver), driver.warm_up)
        finally:
            driver.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
