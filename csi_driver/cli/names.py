"""Names and other words of a command line: completed by a shell, where whatever goes wrong is no name, and checked."""

from collections.abc import Callable, Iterable
from pathlib import Path

import click

from csi_driver.cli.words import for_people
from csi_driver.model.errors import DriverError, InvalidArgument
from csi_driver.model.settings import Settings

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def checked(check: Callable[[str], object]) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    """What a parameter's `callback` wants: a word that `check` refuses is a command line that cannot be right."""

    def callback(_context: click.Context, _parameter: click.Parameter, word: str | None) -> str | None:
        try:
            if word is not None:
                check(word)
        except InvalidArgument as error:
            raise click.BadParameter(for_people(str(error))) from None
        return word

    return callback


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
