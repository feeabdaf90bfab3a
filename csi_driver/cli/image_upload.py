"""`luks-csi image upload`: a file of this machine becomes an Image of a cluster."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from csi_driver.cli.cluster import cluster
from csi_driver.cli.names import checked
from csi_driver.cli.output import OUTPUT_OPTION, Output, show_json, show_text, size_text
from csi_driver.cli.progress import ProgressLine
from csi_driver.images.checksum import Checksum
from csi_driver.images.requests import check_secret
from csi_driver.images.store import check_name
from csi_driver.model.errors import AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted

if TYPE_CHECKING:
    from csi_driver.kube.client import Kube

_POLL_SECONDS: Final = 0.5
_AWAITED_SECONDS: Final = 300.0
_MOVED_SECONDS: Final = 15.0

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

    A command that was cut is gone on with by the same command. Who uploads may create images and update images/upload
    in the group images.luks.csi.internal.
    """
    kube = cluster(kubeconfig)
    from csi_driver.agent.sending import Sender
    from csi_driver.kube.copies import AUDIENCE, AUTHORITY
    from csi_driver.kube.kinds import CONFIG_MAP

    spec: Json = {"source": {"upload": {}}, "copies": copies}
    if checksum:
        spec["checksum"] = Checksum.parse(checksum).digest
    if secret:
        spec["secretRef"] = dict(zip(("namespace", "name"), secret.split("/"), strict=True))
    _wanted(kube, name, spec)
    awaited = _wait(kube, name, "an agent that takes it", lambda status: bool(status.get("upload")))
    if awaited["phase"] != "Ready":
        found = kube.get(CONFIG_MAP, AUTHORITY, namespace)
        if found is None:
            raise FailedPrecondition(
                f"there is no ConfigMap {AUTHORITY} in namespace {namespace}; name the namespace of luks-csi with "
                f"--namespace, and look whether its operator runs"
            )
        token = _token(kube, service_account, AUDIENCE)

        def send(to: str) -> None:
            with ProgressLine("uploading", path.stat().st_size) as line:
                Sender(to, found["data"]["ca.crt"], token, name).send(path, line)

        try:
            awaited = _sent(kube, name, awaited, address, send)
        except KeyboardInterrupt:
            raise click.Abort(f"the upload of image {name} was interrupted; the same command goes on") from None
    if output == Output.JSON:
        return show_json(awaited)
    kind = "encrypted image" if awaited.get("encrypted") else "image"
    return show_text(f"{kind} {name} of {size_text(awaited['virtualSize'])} is ready in the cluster")


def _wanted(kube: "Kube", name: str, spec: Json) -> None:
    """Make the Image; one that an earlier call has made is taken if it wants the same."""
    from csi_driver.kube.kinds import IMAGE

    try:
        kube.create(IMAGE, {"metadata": {"name": name}, "spec": spec})
    except AlreadyExists:
        there = (kube.get(IMAGE, name) or {"spec": {}})["spec"]
        if any(there.get(key) != spec.get(key) for key in ("source", "checksum", "secretRef")):
            raise AlreadyExists(
                f"the cluster has an Image {name} already that comes from something else; choose another name"
            ) from None


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
