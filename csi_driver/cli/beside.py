"""Commands that work in the state directory beside its server, and not in an empty folder that is in its place."""

import click

from csi_driver.cli.serve import settings_params

PARAMS = settings_params("endpoint", "state_dir")


class BesideServer(click.Command):
    """A command with `PARAMS`: refused when the server at the endpoint had another state directory at that path."""

    def invoke(self, ctx: click.Context) -> object:
        """Look at the state directory, then run; the endpoint serves nothing else."""
        from csi_driver.host.files import Files
        from csi_driver.host.mounts import Mounts
        from csi_driver.volumes.statedir import StateDirectory

        mounts = Mounts()
        StateDirectory(
            ctx.params["state_dir"], ctx.params.pop("endpoint"), Files(), mounts, mounts, require_mount=False
        ).refuse_other()
        return super().invoke(ctx)
