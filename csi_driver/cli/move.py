"""`luks-csi volume move`: a closed volume to the backend of another driver of its node."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from csi_driver.cli.beside import PARAMS, BesideServer
from csi_driver.cli.convert import rate_option
from csi_driver.cli.local import local_driver
from csi_driver.cli.names import volume_names
from csi_driver.cli.output import OUTPUT_OPTION, Output, confirm, show_json, show_text
from csi_driver.cli.progress import ProgressMeter, tell_stopping
from csi_driver.cli.serve import settings_params
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.settings import Settings
from csi_driver.model.volume import VolumeParameters, VolumeRecord, is_volume_id

if TYPE_CHECKING:
    from csi_driver.volumes.driver import Driver

_FOLDER = click.Path(file_okay=False, path_type=Path, resolve_path=True)
_PARAMS = settings_params("free_space_floor", "thin_pool_limit", "format_seconds", "mount_seconds")


def _given(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> Mapping[str, str]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [name for name, equals, value in pairs if not (name and equals and value)]:
        raise click.BadParameter(f"{wrong[0]!r} must be NAME=VALUE.")
    return {name: value for name, _, value in pairs}


@click.command(cls=BesideServer, params=[*PARAMS, *_PARAMS, OUTPUT_OPTION])
@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.option("--to-state-dir", "to", required=True, metavar="FOLDER", type=_FOLDER, help="The state directory of the "
              "driver that is to have it.")  # fmt: skip
@click.option("--to-thin-pool", "thin_pool", metavar="NAME", help="The thin pool that it is to be in, of a driver with "
              "--backend lvm; without it it has extents of its own.")  # fmt: skip
@click.option("--to-parameter", "parameters", metavar="NAME=VALUE", multiple=True, callback=_given, help="A parameter "
              "of the class that it is to be of, of a driver with --backend rbd: clusterID and pool; if wanted "
              "dataPool, imageFeatures, mapOptions, mounter.")  # fmt: skip
@click.option("--to-secret-dir", "secret_dir", metavar="FOLDER", type=_FOLDER, help="A Secret with userID and userKey, "
              "as a folder, for a driver with --backend rbd that has none of its own.")  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep the old copy, marked as one that cannot be used, until it is deleted.")
@click.option("--undo", is_flag=True, help="Give up a move that was cut: remove what was copied; the volume stays.")
@rate_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def move(
    context: click.Context,
    /,
    volume_id: str,
    to: Path,
    thin_pool: str | None,
    parameters: Mapping[str, str],
    secret_dir: Path | None,
    rate: int | None,
    output: str,
    *,
    keep: bool,
    undo: bool,
    yes: bool,
    **given: Any,
) -> None:
    """Move a volume that is not staged to another backend; on its node, as root, beside the servers.

    Two drivers take part, each known by its state directory: --state-dir is that of the driver which has the volume,
    --to-state-dir that of the one which is to have it. The server of the latter must have been started there once; its
    backend and volume group are known from that.

    For instance "luks-csi volume move data --to-state-dir /var/lib/luks-csi-lvm". To Ceph it goes with "--to-parameter
    clusterID=ID --to-parameter pool=NAME".

    The ciphertext is copied as it is, holes stay holes, and it is read back and compared before it counts. No key is
    needed, and header, UUID and passphrase stay. Ctrl-C stops it, and the same command goes on; it does after a crash
    too. Until the end the volume can be staged where it was, which makes what was copied worthless.
    """
    if not is_volume_id(volume_id):
        raise click.BadParameter(f"{volume_id!r} is no id of a volume.", context)
    if undo and (keep or thin_pool or rate):
        raise click.UsageError("--undo moves nothing: leave --keep, --to-thin-pool and --rate out.")
    with local_driver(context, given) as driver:
        there = _other(context, driver, to, secret_dir)
        place = _place(there.backend.name, thin_pool, parameters)
        record = driver.backend.get(volume_id)  # before a question is asked about what is not there
        if undo:
            confirm(f"Give the move of volume {volume_id} up, and remove what was copied to {to}?", yes=yes)
            record = driver.offline().moves.undo(volume_id, there.offline().moves.here, place)
            _tell(record, output, f"volume {volume_id} stays where it was")
            return
        question = f"Move volume {volume_id} to {to} ({there.backend.name})"
        confirm(f"{question}{'' if keep else ', and remove it here'}?", yes=yes or record.move is not None)
        moved = _moved(driver, there, volume_id, place, rate, keep=keep)
    _tell(moved, output, f"volume {moved.id} is in {to} ({there.backend.name})")


def _moved(
    driver: "Driver", there: "Driver", volume_id: str, place: VolumeParameters | None, rate: int | None, *, keep: bool
) -> VolumeRecord:
    from csi_driver.images.stopping import Stop, stop_signals
    from csi_driver.volumes.move import MoveRequest
    from csi_driver.volumes.move_copy import Onlooker

    def tell(sentence: str) -> None:
        show_text(sentence, err=True)

    stop = Stop(tell_stopping)
    with stop_signals(stop):
        onlooker = Onlooker(ProgressMeter(), tell, stop, rate)
        moves, other = driver.offline().moves, there.offline().moves.here
        return moves.move(MoveRequest(volume_id, place, keep), other, onlooker)


def _place(backend: str, thin_pool: str | None, parameters: Mapping[str, str]) -> VolumeParameters | None:
    """Where it is to lie, by what was given; None where nothing was. Raises InvalidArgument, UsageError."""
    from csi_driver.volumes import ceph_parameters
    from csi_driver.volumes.parameters import read_parameters

    known = ceph_parameters.READERS if backend == "rbd" else {}
    if other := sorted(set(parameters) - set(known)):
        told = f"it takes {', '.join(known)}" if known else "it takes none"
        raise click.UsageError(
            f"--to-parameter {other[0]} says nothing of where the backend {backend} puts it; {told}."
        )
    if thin_pool is not None and backend != "lvm":
        raise click.UsageError(
            f"--to-thin-pool says nothing of where the backend {backend} puts it; leave it out, or name the state "
            f"directory of a driver with a volume group."
        )
    if thin_pool is not None:
        return VolumeParameters(thin_pool=thin_pool)
    return read_parameters(parameters, backend) if parameters else None


def _other(context: click.Context, driver: "Driver", to: Path, secret_dir: Path | None) -> "Driver":
    """The driver with that state directory, at work in the same worker processes. Raises FailedPrecondition."""
    from csi_driver.cli.below import below
    from csi_driver.volumes.driver import Host, build_driver

    if not (to / "identity").is_file():
        raise FailedPrecondition(
            f"{to} is no state directory that a server of this node has had; start the server of the driver that is to "
            f"have the volume there (luks-csi serve --state-dir {to} …), which makes it"
        )
    settings = dataclasses.replace(
        driver.settings, state_dir=to, backend=Settings.backend, volume_group="", ceph_secret=secret_dir
    )
    if context.obj is not None:
        return context.obj(settings)  # type: ignore[no-any-return]
    return build_driver(settings, Host(workers=driver.workers, below=below))


def _tell(record: VolumeRecord, output: str, sentence: str) -> None:
    if output == Output.JSON:
        show_json(record)
    else:
        show_text(sentence)
