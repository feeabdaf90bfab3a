"""What a child is asked for, by an Image and the objects that it names: secrets, certificates, other nodes."""

import base64
import binascii
import contextlib
from collections.abc import Callable

from csi_driver.agent.settings import AgentSettings
from csi_driver.agent.uploads import Uploads, limit_of
from csi_driver.agent.work import CloneWork, Download, Entries, Export, Pull, Request, Secret, Upload
from csi_driver.host.syscalls import error_name
from csi_driver.images.checkpoint import Operation
from csi_driver.images.credentials import PAIRS, authorization, pair_of
from csi_driver.kube.claims import volume_of
from csi_driver.kube.client import Kube
from csi_driver.kube.copies import State, state_of
from csi_driver.kube.kinds import CONFIG_MAP, IMAGE_COPY, IMAGE_LABEL, SECRET, Json, is_going, name_of, uid_of
from csi_driver.model.errors import FailedPrecondition


def is_made(copy: Json, image: Json) -> bool:
    """Whether it comes from the image's source, and not from another node: as long as none has a file of it."""
    has_file = "image" in copy.get("status", {}) or "checksum" in image.get("status", {})
    return bool(copy["spec"].get("make")) and not has_file


def is_download(copy: Json, image: Json, *, there: bool) -> bool:
    """Whether what is to be done for it takes as long as a server elsewhere likes."""
    return not there and is_made(copy, image) and "download" in image["spec"]["source"]


class Requests:
    """Makes requests; `images` tells an Image by its name.

    Raises FailedPrecondition where what an Image names is not there or not as it must be.
    """

    def __init__(
        self, kube: Kube, settings: AgentSettings, uploads: Uploads, images: Callable[[str], Json | None]
    ) -> None:
        self._kube = kube
        self._images = images
        self._settings = settings
        self._uploads = uploads

    def of(self, copy: Json, image: Json, *, there: bool) -> Request | None:
        """What the child is to do; None where an upload is to come first.

        A file that is `there` is only looked at; one that was there once, and is no more, comes from another node: made
        anew it would be another one.
        """
        spec, settings = image["spec"], self._settings
        name, uid = name_of(image), uid_of(image)
        work: Download | Upload | CloneWork | Export | Pull | None
        if there:
            work = Pull((), "", "")  # only its checksum is wanted
        elif is_made(copy, image):
            work = self._making(copy, image)
        else:
            work = self._pulling(name, uid, image.get("status", {}).get("checksum"))
        if work is None:
            return None
        reference = spec.get("newSecretRef") or spec.get("secretRef") or copy["spec"].get("secretRef")
        if isinstance(work, CloneWork) and work.encryption == Operation.DECRYPT:
            reference = None  # it opened the source
        is_first = copy["spec"].get("make") and "clone" not in spec["source"]
        return Request(
            folder=str(settings.images), name=name, owner=uid, allow_local=settings.allow_local, work=work,
            secret=f"{reference['namespace']}/{reference['name']}" if reference else None,
            opens=self._secret(reference) if is_first else None,
        )  # fmt: skip

    def _making(self, copy: Json, image: Json) -> Download | Upload | CloneWork | Export | None:
        spec = image["spec"]
        source, checksum = spec["source"], spec.get("checksum")
        limit = limit_of(image)
        if (download := source.get("download")) is not None:
            headers, ca = self._credentials(download)
            return Download(download["url"], checksum, limit, headers, ca)
        if "upload" in source:
            path = self._uploads.whole(name_of(image), uid_of(image))
            return None if path is None else Upload(str(path), checksum, limit)
        if "claim" in source:
            self._refuse_stale(copy, source["claim"])
            return Export(copy["spec"].get("volume", ""), str(self._settings.state_dir), limit, self._settings.rate)
        clone = source["clone"]
        if (cloned := self._images(clone["image"])) is None:
            raise FailedPrecondition(f"there is no image {clone['image']} any more, of which this one is to be made")
        operation = Operation(clone.get("encryption", Operation.IGNORE))
        first = self._secret(spec.get("secretRef"))
        second = self._secret(spec.get("newSecretRef"))
        return CloneWork(
            clone["image"],
            uid_of(cloned),
            operation,
            first if operation.decrypts else None,
            (second if operation.decrypts else first) if operation.encrypts else None,
            spec.get("sectorSize"),
        )

    def _refuse_stale(self, copy: Json, claim: Json) -> None:
        """The volume may have become another claim's since the operator has looked."""
        volume = volume_of(self._kube, claim["namespace"], claim["name"])
        handle = "" if isinstance(volume, str) else (volume["spec"].get("csi") or {}).get("volumeHandle")
        if handle != copy["spec"].get("volume"):
            why = volume if isinstance(volume, str) else "its claim has another volume now"
            raise FailedPrecondition(f"volume {copy['spec'].get('volume')} is not exported: {why}")

    def _pulling(self, name: str, uid: str, checksum: str | None) -> Pull:
        there, _ = self._kube.list(IMAGE_COPY, labels={IMAGE_LABEL: name})
        peers = tuple(
            copy["status"]["address"]
            for copy in there
            if copy["spec"]["imageUID"] == uid
            and copy["spec"]["node"] != self._settings.node
            and state_of(copy) is State.READY
            and not is_going(copy)
            and copy["status"].get("address")
        )
        if not peers:
            raise FailedPrecondition(f"no other node has image {name} now; it is pulled when one does")
        settings = self._settings
        try:
            token = settings.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise FailedPrecondition(
                f"the token by which agents know each other cannot be read from {settings.token_file} "
                f"({error_name(error) if isinstance(error, OSError) else 'it is no text'}); look at the volumes of the "
                f"node pod"
            ) from None
        return Pull(peers, str(settings.tls_dir / "ca.crt"), token, checksum)

    def _secret(self, reference: Json | None) -> Secret | None:
        """The entries that are text. Raises FailedPrecondition without the secret."""
        if reference is None:
            return None
        namespace, name = reference["namespace"], reference["name"]
        found = self._kube.get(SECRET, name, namespace)
        if found is None:
            raise FailedPrecondition(f"there is no secret {namespace}/{name}; make it, the image is made then")
        entries = {}
        for entry, value in (found.get("data") or {}).items():
            with contextlib.suppress(binascii.Error, UnicodeDecodeError):
                entries[entry] = base64.b64decode(value).decode()
        return Secret(f"{namespace}/{name}", entries)

    def _credentials(self, download: Json) -> tuple[Entries, str | None]:
        """The headers and the certificates of a download, from the objects that it names."""
        headers: Entries = {}
        if (secret := self._secret(download.get("credentialsRef"))) is not None:
            if (pair := pair_of(secret.entries)) is None:
                wanted = " or ".join(f"{user} and {password}" for user, password in PAIRS)
                raise FailedPrecondition(
                    f"the secret {secret.name} of credentialsRef has no credentials; expected {wanted}"
                )
            headers = authorization(*pair)
        reference = download.get("caConfigMapRef")
        if reference is None:
            return headers, None
        found = self._kube.get(CONFIG_MAP, reference["name"], reference["namespace"])
        texts = [text for text in ((found or {}).get("data") or {}).values() if "BEGIN CERTIFICATE" in text]
        if not texts:
            raise FailedPrecondition(
                f"the ConfigMap {reference['namespace']}/{reference['name']} of caConfigMapRef holds no certificates "
                f"(PEM); put them there"
            )
        return headers, "\n".join(texts)
