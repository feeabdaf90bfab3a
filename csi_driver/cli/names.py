"""Names that a shell completes: of volumes and images on this node. Whatever goes wrong, there are none."""

from collections.abc import Callable, Iterable
from pathlib import Path

import click

from csi_driver.model.errors import DriverError
from csi_driver.model.settings import Settings

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def complete_from(names: Callable[[click.Context], Iterable[str]]) -> Complete:
    """What an argument's `shell_complete` wants."""

    def complete(context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
        try:
            return [name for name in names(context) if name.startswith(begun)]
        except (DriverError, OSError):
            return []

    return complete


def _volumes(context: click.Context) -> Iterable[str]:
    from csi_driver.volumes.driver import build_driver
    from csi_driver.volumes.statedir import server_state_dir

    endpoint = Path(context.params.get("endpoint") or Settings.endpoint)
    folder = server_state_dir(endpoint, context.params.get("state_dir"), Settings.state_dir)
    return build_driver(Settings(state_dir=folder)).backend.ids()


def _images(context: click.Context) -> Iterable[str]:
    from csi_driver.images.library import ImageLibrary

    return ImageLibrary(Path(context.params.get("state_dir") or Settings.state_dir) / "images").names()


volume_names: Complete = complete_from(_volumes)
image_names: Complete = complete_from(_images)
