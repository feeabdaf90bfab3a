"""Who may have a copy of an image, and who may upload one: Kubernetes decides, by the token that a request brings."""

import hashlib
import threading
import time
from typing import Final

from csi_driver.kube.client import Kube
from csi_driver.kube.copies import AUDIENCE
from csi_driver.kube.kinds import IMAGE, TOKEN_REVIEW
from csi_driver.kube.users import User, may
from csi_driver.model.errors import PermissionDenied, Unauthenticated

_KEPT_SECONDS: Final = 30.0
_MOST_KEPT: Final = 256


class Access:
    """Asks the API. `account` is the user name of the agents' service account."""

    def __init__(self, kube: Kube, account: str) -> None:
        self._kube = kube
        self._account = account
        self._known: dict[bytes, tuple[float, User]] = {}
        self._guard = threading.Lock()

    def check_agent(self, token: str) -> None:
        """Raise PermissionDenied unless the token is an agent's, made for agents."""
        user = self._user(token, [AUDIENCE])
        if user.name != self._account:
            raise PermissionDenied(f"{user.name} is no agent; a copy of an image goes to agents alone")

    def check_upload(self, token: str, image: str) -> None:
        """Raise PermissionDenied unless the token's user may upload the image: `update` of `images/upload`.

        The token may be made for agents (audience images.luks.csi.internal), or for the API itself.
        """
        try:
            user = self._user(token, [AUDIENCE])
        except Unauthenticated:
            user = self._user(token, [])
        if not may(self._kube, user, "update", IMAGE, image, subresource="upload"):
            raise PermissionDenied(
                f"{user.name} may not upload image {image}; a role must allow update of images/upload in "
                f"{IMAGE.group} for it"
            )

    def _user(self, token: str, audiences: list[str]) -> User:
        key = hashlib.sha256(f"{audiences}{token}".encode()).digest()
        now = time.monotonic()
        with self._guard:
            at, user = self._known.get(key, (0.0, None))
        if user is not None and now - at < _KEPT_SECONDS:
            return user
        spec = {"token": token} | ({"audiences": audiences} if audiences else {})
        status = self._kube.create(TOKEN_REVIEW, {"spec": spec}).get("status", {})
        if not status.get("authenticated") or not set(audiences) <= {*status.get("audiences", ())}:
            raise Unauthenticated("the token is not valid, or not made for this; take a new one")
        user = User.of(status["user"])
        with self._guard:
            if len(self._known) >= _MOST_KEPT:
                self._known.clear()
            self._known[key] = now, user
        return user
