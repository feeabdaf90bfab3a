"""`luks-csi image upload`: a file of this machine becomes an Image of a cluster."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from csi_driver.cli.cluster import cluster
from csi_driver.cli.names import checked
from csi_driver.cli.output import OUTPUT_OPTION, Output, show_json, show_text, size_text
from csi_driver.cli.progress import ProgressLine
from csi_driver.host.syscalls import error_name
from csi_driver.images.checksum import Algorithm, Checksum, checksum_of
from csi_driver.images.requests import check_secret
from csi_driver.images.store import check_name
from csi_driver.model.errors import AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted, Unavailable

if TYPE_CHECKING:
    from csi_driver.kube.client import Kube

_POLL_SECONDS: Final = 0.5
_AWAITED_SECONDS: Final = 300.0
_MOVED_SECONDS: Final = 15.0
_AGAIN: Final = "; it is tried again"

Json = dict[str, Any]


@click.command("upload", params=[OUTPUT_OPTION])
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("name", callback=checked(check_name))
@click.option(
    "--checksum",
    metavar="DIGITS",
    callback=checked(Checksum.parse),
    help="SHA-512 or SHA-256 of the file: hexadecimal.",
)
@click.option("--secret", metavar="NAMESPACE/NAME", callback=checked(check_secret),
              help="The secret that opens an image which is encrypted already.")  # fmt: skip
@click.option("--copies", type=click.IntRange(1, 64), default=1, show_default=True, help="On so many nodes at least.")
@click.option("--kubeconfig", type=click.Path(exists=True, dir_okay=False, path_type=Path), envvar="KUBECONFIG",
              help="The way to the cluster; without it as kubectl finds it.")  # fmt: skip
@click.option("--namespace", default="luks-csi", show_default=True, help="Where luks-csi is installed.")
@click.option("--service-account", metavar="NAMESPACE/NAME",
              help="Upload as this one, by a token made for nothing else.")  # fmt: skip
@click.option("--address", metavar="HOST:PORT", help="Another way to the node's agent, such as a forwarded port.")
def upload(
    path: Path, name: str, checksum: str | None, secret: str | None, copies: int, kubeconfig: Path | None,
    namespace: str, service_account: str | None, address: str | None, output: str,
) -> None:  # fmt: skip
    """Upload the file at PATH as the Image NAME, and wait until it is ready.

    A command that was cut is gone on with by the same command; what another file was begun with, or made of, is refused
    by the checksum, which the Image gets. Who uploads may create images and update images/upload in the group
    images.luks.csi.internal.
    """
    kube = cluster(kubeconfig)
    from csi_driver.kube.kinds import IMAGE

    spec: Json = {"source": {"upload": {}}, "copies": copies}
    if secret:
        spec["secretRef"] = dict(zip(("namespace", "name"), secret.split("/"), strict=True))
    with _asked_once():
        there = kube.get(IMAGE, name)
        send = None
        if there is None or there.get("status", {}).get("phase") != "Ready":
            send = _Sending(kube, namespace, service_account, path, name)  # what is missing is told before it is made
        if there is not None:
            _check_alike(there, spec, name)
        wanted = Checksum.parse(checksum) if checksum else None
        found = _checksum(path, wanted, (there or {"spec": {}})["spec"].get("checksum"))
        if there is None:
            there = _made(kube, name, spec | {"checksum": found.digest})
        _check_of_file(there, there.get("status", {}), path, found, name)
        awaited = _wait(kube, name, "an agent that takes it", lambda status: bool(status.get("upload")))
        _check_of_file(there, awaited, path, found, name)
        if awaited["phase"] != "Ready":
            send = send or _Sending(kube, namespace, service_account, path, name)
            try:
                awaited = _sent(kube, name, awaited, address, functools.partial(send, found))
            except KeyboardInterrupt:
                raise click.Abort(f"the upload of image {name} was interrupted; the same command goes on") from None
    if output == Output.JSON:
        return show_json(awaited)
    kind = "encrypted image" if awaited.get("encrypted") else "image"
    return show_text(f"{kind} {name} of {size_text(awaited['virtualSize'])} is ready in the cluster")


class _Sending:
    """The way of a file to an agent. Raises what keeps it from going there, but for the agent's own refusals."""

    def __init__(self, kube: "Kube", namespace: str, service_account: str | None, path: Path, image: str) -> None:
        from csi_driver.kube.copies import AUDIENCE, AUTHORITY
        from csi_driver.kube.kinds import CONFIG_MAP

        if not path.stat().st_size:
            raise FailedPrecondition(f"{path} is empty; name an image with something in it")
        self._token = functools.partial(_token, kube, service_account, AUDIENCE)
        self._token()
        found = kube.get(CONFIG_MAP, AUTHORITY, namespace)
        if found is None:
            raise FailedPrecondition(
                f"there is no ConfigMap {AUTHORITY} in namespace {namespace}; name the namespace of luks-csi with "
                f"--namespace, and look whether its operator runs"
            )
        self._ca = found["data"]["ca.crt"]
        self._path = path
        self._image = image

    def __call__(self, checksum: Checksum, to: str) -> None:
        """Send it to the agent at that address, with a token of this moment. Errors as `Sender.send`."""
        from csi_driver.agent.sending import Sender

        with ProgressLine("uploading", self._path.stat().st_size) as line:
            Sender(to, self._ca, self._token(), self._image).send(self._path, checksum, line)


@contextlib.contextmanager
def _asked_once() -> Iterator[None]:
    """A controller tries again what the API could not do; a command does not."""
    try:
        yield
    except Unavailable as error:
        said = str(error)
        if not said.endswith(_AGAIN):
            raise
        what = "luks-csi's operator is up" if "webhook" in said else "that works"
        raise Unavailable(f"{said.removesuffix(_AGAIN)}; run the command again when {what}") from None


def _checksum(path: Path, wanted: Checksum | None, bound: str | None) -> Checksum:
    """That of the file, by the algorithm of `bound`, its Image's. Raises InvalidArgument unless it is `wanted`."""
    if bound is not None:
        algorithm = Checksum.parse(bound).algorithm
    else:
        algorithm = Algorithm.SHA256 if wanted is None else wanted.algorithm
    found = _read(path, algorithm)
    if wanted is not None:
        wanted.require(found if wanted.algorithm is algorithm else _read(path, wanted.algorithm), str(path))
    return found


def _read(path: Path, algorithm: Algorithm) -> Checksum:
    try:
        with path.open("rb", buffering=0) as file, ProgressLine("checking", path.stat().st_size) as line:
            return checksum_of(file.fileno(), algorithm, line)
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be read ({error_name(error)}); check it") from None


def _made(kube: "Kube", name: str, spec: Json) -> Json:
    """The Image; one that somebody has made at the same time is taken if it wants the same."""
    from csi_driver.kube.kinds import IMAGE

    try:
        return kube.create(IMAGE, {"metadata": {"name": name}, "spec": spec})
    except AlreadyExists:
        there = kube.get(IMAGE, name)
        if there is None:
            raise NotFound(f"the Image {name} was deleted meanwhile") from None
        _check_alike(there, spec, name)
        return there


def _check_alike(there: Json, spec: Json, name: str) -> None:
    """Raise AlreadyExists unless the Image that is there is an upload with that secret."""
    if any(there["spec"].get(key) != spec.get(key) for key in ("source", "secretRef")):
        raise AlreadyExists(
            f"the cluster has an Image {name} already that comes from something else; choose another name"
        )


def _check_of_file(image: Json, status: Json, path: Path, found: Checksum, name: str) -> None:
    """Raise AlreadyExists where an Image is, or is to be, of another file, and where nothing tells that it is of this.

    `found` is the file's checksum. An upload that is under way to an Image without a checksum is the agent's to judge.
    """
    bound, is_ready = image["spec"].get("checksum"), status.get("phase") == "Ready"
    of = Checksum.parse(bound) if bound else None
    if of is None and is_ready:
        # Of what came packed that is another one, and then nobody knows.
        of = Checksum(Algorithm.SHA256, status.get("checksum", ""))
    if of not in (None, found):
        is_it = "is" if is_ready else "is to be"
        raise AlreadyExists(
            f"the cluster has an Image {name} already, which {is_it} of a file with the checksum {of}, and {path} has "
            f"{found}; choose another name, or delete that Image"
        )


def _wait(kube: "Kube", name: str, what: str, enough: Callable[[Json], bool]) -> Json:
    """Until an Image is ready, or what there is of it is enough; its status. Raises FailedPrecondition if it failed."""
    from csi_driver.kube.kinds import IMAGE

    shown, end = "", time.monotonic() + _AWAITED_SECONDS
    while True:
        image = kube.get(IMAGE, name)
        if image is None:
            raise NotFound(f"the Image {name} was deleted meanwhile")
        status: Json = image.get("status", {})
        phase, message = status.get("phase", "Pending"), status.get("message", "no operator has looked at it yet")
        if phase == "Ready" or enough(status):
            return status
        if phase == "Failed":
            raise FailedPrecondition(f"image {name} was not made: {message}")
        if message != shown:
            shown, end = message, time.monotonic() + _AWAITED_SECONDS
        if time.monotonic() > end:
            raise FailedPrecondition(f"image {name} has waited too long for {what}: {message}")
        time.sleep(_POLL_SECONDS)


def _sent(kube: "Kube", name: str, awaited: Json, address: str | None, send: Callable[[str], None]) -> Json:
    """The status of the Image when it is ready; it is sent to the node that waits for it, and to the next if full."""
    full: set[str] = set()
    while "upload" in awaited:
        full.add(awaited["upload"]["node"])
        try:
            send(address or awaited["upload"]["address"])
        except ResourceExhausted:
            # Another node waits for it then, but a forwarded port leads to this one.
            if address or (other := _awaited_by_another(kube, name, full)) is None:
                raise
            awaited = other
        else:
            awaited = _wait(kube, name, "its end", lambda _: False)
    return awaited


def _awaited_by_another(kube: "Kube", name: str, full: set[str]) -> Json | None:
    """The status of the Image when a node that was not asked yet waits for the upload; None where none does."""
    from csi_driver.kube.kinds import IMAGE

    end = time.monotonic() + _MOVED_SECONDS
    while time.monotonic() < end:
        status: Json = (kube.get(IMAGE, name) or {}).get("status", {})
        if status.get("upload") and status["upload"]["node"] not in full:
            return status
        time.sleep(_POLL_SECONDS)
    return None


def _token(kube: "Kube", service_account: str | None, audience: str) -> str:
    if service_account:
        namespace, slash, name = service_account.partition("/")
        if not slash or not namespace or not name:
            raise click.BadParameter("must be NAMESPACE/NAME", param_hint="--service-account")
        return kube.account_token(namespace, name, audience)
    if (token := kube.own_token) is None:
        raise click.UsageError(
            "the kubeconfig has no bearer token that could be shown to the node's agent; name a service account that "
            "may update images/upload with --service-account NAMESPACE/NAME."
        )
    return token
