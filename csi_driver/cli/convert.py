"""`luks-csi volume encrypt` and `volume reencrypt`: a first volume key for a volume, and another one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from csi_driver.cli.beside import PARAMS, BesideServer
from csi_driver.cli.local import local_driver
from csi_driver.cli.names import volume_names
from csi_driver.cli.output import OUTPUT_OPTION, Output, confirm, show_json, show_text
from csi_driver.cli.progress import ProgressLine, tell_stopping
from csi_driver.cli.secret_files import SecretSource, secret_options
from csi_driver.cli.serve import settings_params
from csi_driver.keys.secret import SecretKey, read_secret
from csi_driver.model.sizes import read_some
from csi_driver.model.volume import VolumeRecord, is_volume_id

_LIMITS = ("format_seconds", "unlock_seconds", "mount_seconds", "pbkdf_memory_kib")
_PARAMS = [
    *PARAMS,
    *settings_params("free_space_floor", "kms_config", "kms_programs", "audit_file", *_LIMITS),
    OUTPUT_OPTION,
]


def _rate(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int | None:
    try:
        return read_some(text) if text is not None else None
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


rate_option = click.option(
    "--rate", metavar="SIZE", callback=_rate, help="The most bytes to move in a second, such as 50Mi."
)


@click.command(cls=BesideServer, params=[*_PARAMS])
@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@rate_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@secret_options
@click.pass_context
def reencrypt(
    context: click.Context, /, volume_id: str, rate: int | None, output: str, *, yes: bool, **given: Any
) -> None:
    """Give a volume another volume key, while it is in use or not; on its node, without a server.

    All of it is read, and written anew under the new key. Its passphrase stays, cipher and key size become those of its
    class. Ctrl-C stops it, and the same command goes on; it does after a crash too.
    """
    question = f"Encrypt all of volume {volume_id} anew?"
    with _converting(context, volume_id, rate, given, question, yes=yes) as (conversions, key, watch):
        done = conversions.reencrypt(volume_id, key, watch)
    _tell(done, output, f"volume {volume_id} has another volume key")


@click.command(cls=BesideServer, params=[*_PARAMS])
@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.option("--kms", "kms_id", metavar="ID", help="Its key is to be one of its own, by that KMS of --kms-config.")
@click.option("--generate-key", "generate", is_flag=True, help="Its key is to be one of its own, in a secret.")
@rate_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@secret_options
@click.pass_context
def encrypt(
    context: click.Context,
    /,
    volume_id: str,
    kms_id: str | None,
    rate: int | None,
    output: str,
    *,
    generate: bool,
    yes: bool,
    **given: Any,
) -> None:
    """Encrypt a plain volume where it lies, while it is not in use; on its node, without a server.

    What was encrypted is overwritten where it was, so there is no way back, and no room for a second copy is needed.
    Ctrl-C stops it, and the same command goes on; until it has ended the volume cannot be used.
    """
    if kms_id is not None and generate:
        raise click.UsageError("--kms and --generate-key exclude each other; give one of them.")
    question = f"Encrypt volume {volume_id}? It cannot be undone: have a backup, and its PersistentVolume at hand."
    is_own = kms_id is None and not generate
    with _converting(context, volume_id, rate, given, question, yes=yes, new=is_own) as (conversions, key, watch):
        done = conversions.encrypt(volume_id, key, kms_id, watch, generate=generate)
    _tell(done, output, f"volume {volume_id} is encrypted")


@contextmanager
def _converting(
    context: click.Context,
    volume_id: str,
    rate: int | None,
    given: dict[str, Any],
    question: str,
    *,
    yes: bool,
    new: bool = False,
) -> Iterator[tuple[Any, SecretKey, Any]]:
    from csi_driver.images.stopping import Stop, stop_signals
    from csi_driver.volumes.conversion import Watch

    if not is_volume_id(volume_id):
        raise click.BadParameter(f"{volume_id!r} is no id of a volume.", context)
    secret = SecretSource(given.pop("secret_dir"), given.pop("passphrase_file"))
    with local_driver(context, given) as driver:
        record = driver.backend.get(volume_id)  # before a question, or a lock, is made for what is not there
        confirm(question, yes=yes or record.conversion is not None)
        is_first = new and record.conversion is None  # what goes on is opened by it, which tells a mistake
        prompt = f"{'New passphrase' if is_first else 'Passphrase'} of volume {volume_id}"
        key = read_secret(secret.read(prompt, new=is_first))
        stop = Stop(tell_stopping)
        for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)  # stopped in the middle of a step, a volume in use would stand still
        with stop_signals(stop), ProgressLine(f"volume {volume_id}", record.capacity_bytes) as progress:
            yield driver.offline().conversions, key, Watch(progress, stop, rate)


def _tell(record: VolumeRecord, output: str, sentence: str) -> None:
    if output == Output.JSON:
        show_json(record)
    else:
        show_text(sentence)
