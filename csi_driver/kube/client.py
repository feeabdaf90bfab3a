"""The Kubernetes API: objects as they are on the wire, errors as sentences.

lightkube does the talking: kubeconfig and tokens. Here is what it leaves open: no call without a name where a name is
meant (that would be the whole collection), no private key in /tmp, no credentials in errors, connections that notice
when the other end has gone silently, deletions only of what was seen, and watches that end: lightkube's own waits for
ever for a server that says nothing, begins anew without a listing, and cannot read an object with a U+0085 in it
(findings/lightkube-watch-silent-connection.sh, findings/lightkube-watch-next-line.sh).
"""

import contextlib
import functools
import random
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx2
import yaml
from lightkube import ALL_NS, ApiError, Client, KubeConfig
from lightkube.config.client_adapter import user_auth
from lightkube.core.exceptions import ConfigError
from lightkube.generic_resource import create_global_resource, create_namespaced_resource
from lightkube.models.authentication_v1 import TokenRequestSpec
from lightkube.models.meta_v1 import ObjectMeta, Status
from lightkube.resources.core_v1 import ServiceAccountToken
from lightkube.types import PatchType

from csi_driver.host.syscalls import error_name
from csi_driver.kube.kinds import Json, Kind
from csi_driver.kube.kubeconfig import sendable, token_of, trust, unusable, without_tls
from csi_driver.kube.refusals import told
from csi_driver.model.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from csi_driver.model.reading import convert, decode

if TYPE_CHECKING:
    from lightkube.config.kubeconfig import SingleConfig

_SECONDS: Final = 20.0
_ACCOUNT: Final = Kind("", "v1", "ServiceAccount", "serviceaccounts", namespaced=True)
_WATCH_SECONDS: Final = (300, 540)
"""How long one watch lasts, drawn, so that not all list at once for ever when all have begun at once."""
_SILENT_SECONDS: Final = 75.0
"""How long one may say nothing. About once a minute the API tells who has asked for it how far it is, where the kind
has changed at all since the API server began (its BOOKMARK events)."""
_NONE: Final[Mapping[str, str]] = {}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,252}")
"""Of objects. lightkube puts a name into the path as it is: a / in one, which an object of a user may name, would lead
to another object."""

# What lies between forgets a connection on which nothing comes: the kernel asks after half a minute.
_KEPT_ALIVE: Final = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30))


@dataclass(frozen=True)
class _Event:
    type: str
    object: Json = field(repr=False)


class Kube:
    """One client of the API; safe for many threads. What it cannot do raises Unavailable, PermissionDenied and those
    that each method names; the sentence says what was asked for.
    """

    def __init__(self, config: "SingleConfig") -> None:
        transport = httpx2.HTTPTransport(
            verify=trust(config), socket_options=list(_KEPT_ALIVE), limits=httpx2.Limits(max_connections=64)
        )
        config = without_tls(config._replace(user=sendable(config.user)))
        # Its overloads want a kind's class, known when the types are checked.
        self._client: Any = Client(
            config=config, timeout=httpx2.Timeout(_SECONDS), trust_env=False, transport=transport
        )
        decode(b"{}", Status)  # by one thread: see `csi_driver.model.reading`
        self._http = httpx2.Client(
            base_url=config.cluster.server, auth=user_auth(config.user), transport=transport, trust_env=False
        )

    @classmethod
    def of(cls, kubeconfig: Path | None = None) -> "Kube":
        """By a kubeconfig; without one by KUBECONFIG, by ~/.kube/config, or by the pod's service account.

        Raises FailedPrecondition where nothing of it can be used.
        """
        try:
            found = KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_env()
            config = found.get()
            if config is None:
                raise ConfigError("it names no current context")
            return cls(config)
        except (
            ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, httpx2.InvalidURL
        ) as error:  # fmt: skip
            raise FailedPrecondition(
                f"no way to the Kubernetes API ({unusable(error)}); give a kubeconfig, or run this in a pod with a "
                f"service account's token"
            ) from None

    @property
    def namespace(self) -> str:
        """That of the context, or the pod's own."""
        return str(self._client.namespace)

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None:
        """The object; None when it is not there, and when nothing can have such a name."""
        if not _is_name(name) or not _is_name(namespace or "none"):
            return None
        try:
            return self._ask(kind, name, lambda: self._client.get(_class_of(kind), name, **_within(kind, namespace)))
        except NotFound:
            return None

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] = _NONE, fields: Mapping[str, str] = _NONE
    ) -> tuple[list[Json], str]:
        """All of them, in one namespace or in all, and the version of the collection, from which a watch goes on."""

        def ask() -> tuple[list[Json], str]:
            found = self._client.list(
                _class_of(kind), **_within(kind, namespace or ALL_NS), labels=labels or None, fields=fields or None
            )
            return [dict(each) for each in found], str(found.resourceVersion)

        found: tuple[list[Json], str] = told(ask, kind, "")
        return found

    def watch(
        self,
        kind: Kind,
        version: str,
        namespace: str = "",
        labels: Mapping[str, str] = _NONE,
        fields: Mapping[str, str] = _NONE,
    ) -> Iterator[tuple[str, Json]]:
        """Changes after `version`: ADDED, MODIFIED or DELETED with the object. Ends by itself after some minutes, and
        when nothing was heard for more than one: list anew then.

        Raises Gone when `version` is too old.
        """
        within = _within(kind, namespace or ALL_NS)
        seconds = random.randint(*_WATCH_SECONDS)  # noqa: S311 - it is no secret
        asked = {
            "watch": "true", "resourceVersion": version, "timeoutSeconds": str(seconds),
            "allowWatchBookmarks": "true", "labelSelector": _selector(labels), "fieldSelector": _selector(fields),
        }  # fmt: skip
        events = self._events(_path(kind, within.get("namespace", ALL_NS)), {k: v for k, v in asked.items() if v})
        while True:
            event = told(functools.partial(next, events, None), kind, "")
            if event is None:
                return
            if event.type != "BOOKMARK":
                yield event.type, event.object

    def _events(self, path: str, asked: Mapping[str, str]) -> Iterator[_Event]:
        """What one watch tells. Raises what `told` knows."""
        limit = httpx2.Timeout(_SECONDS, read=_SILENT_SECONDS)
        with (
            contextlib.suppress(httpx2.ReadTimeout),
            self._http.stream("GET", path, params=asked, timeout=limit) as answer,
        ):
            _check_answer(answer)
            begun: list[bytes] = []
            for piece in answer.iter_bytes():
                *ends, rest = piece.split(b"\n")
                for end in ends:
                    event = decode(b"".join((*begun, end)), _Event)
                    begun.clear()
                    if event.type == "ERROR":
                        raise ApiError(status=convert(event.object, Status))
                    yield event
                begun.append(rest)

    def create(self, kind: Kind, thing: Json, namespace: str = "", *, dry_run: bool = False) -> Json:
        """Make an object, or with `dry_run` do all but that; what came of it.

        Raises AlreadyExists, InvalidArgument (it cannot be so, or a webhook or policy refuses it), NotFound (of the
        kind, or of the namespace), NamespaceGoing, ResourceExhausted (a quota), FailedPrecondition (PodSecurity, a
        LimitRange).
        """
        document = _class_of(kind)(apiVersion=kind.api_version, kind=kind.name, **thing)
        return self._ask(kind, "", lambda: self._client.create(document, dry_run=dry_run, **_within(kind, namespace)))

    def patch(self, kind: Kind, name: str, patch: Json, namespace: str = "", *, status: bool = False) -> Json:
        """Merge into an object, or into its status (RFC 7386); what came of it.

        With `metadata.resourceVersion` in the patch it raises Conflict if the object is no longer that one. Raises
        NotFound, and what refuses as `create` does.
        """
        _check_name(kind, name)
        res = _class_of(kind)
        return self._ask(
            kind,
            name,
            lambda: self._client.patch(
                res.Status if status else res, name, patch, patch_type=PatchType.MERGE, **_within(kind, namespace)
            ),
        )

    def delete(
        self, kind: Kind, name: str, namespace: str = "", *, grace_seconds: int | None = None, seen: Json | None = None
    ) -> None:
        """Ask for an object's deletion, with its own grace unless told; absent is fine.

        Raises Conflict where it is no more as it was `seen`, InvalidArgument where an admission refuses.
        """
        _check_name(kind, name)
        path = f"{_path(kind, _within(kind, namespace).get('namespace', ALL_NS))}/{name}"
        asked: Json = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if grace_seconds is not None:
            asked["gracePeriodSeconds"] = grace_seconds
        if seen is not None:
            asked["preconditions"] = {each: seen["metadata"][each] for each in ("uid", "resourceVersion")}
        with contextlib.suppress(NotFound):
            told(lambda: _check_answer(self._http.request("DELETE", path, json=asked, timeout=_SECONDS)), kind, name)

    def account_token(self, namespace: str, name: str, audience: str) -> str:
        """A token of a service account for an hour, made for that audience (TokenRequest).

        Raises NotFound, InvalidArgument.
        """
        _check_name(_ACCOUNT, name)
        _check_namespace(namespace)
        asked = ServiceAccountToken(
            metadata=ObjectMeta(),  # lightkube looks into it
            spec=TokenRequestSpec(audiences=[audience], expirationSeconds=3600),
        )
        made = told(lambda: self._client.create(asked, name, namespace=namespace), _ACCOUNT, f"{namespace}/{name}")
        return str(made.status.token)

    @property
    def own_token(self) -> str | None:
        """The bearer token of the kubeconfig's user, if that is what it has. Raises FailedPrecondition."""
        user = self._client.config.user
        if user is not None and user.token_file:
            try:
                return token_of(Path(user.token_file).read_text())
            except (OSError, UnicodeDecodeError) as error:
                why = error_name(error) if isinstance(error, OSError) else "it is no text"
                raise FailedPrecondition(
                    f"the token of the kubeconfig's user cannot be read from {user.token_file} ({why}); check that file"
                ) from None
        return user.token if user is not None else None

    def close(self) -> None:
        """Close the connections; a watch ends at the latest when it has been silent for too long."""
        self._http.close()
        self._client.close()

    def _ask(self, kind: Kind, name: str, ask: Any) -> Json:
        return dict(told(ask, kind, name))


def _check_answer(answer: httpx2.Response) -> None:
    """Raise ApiError where it refuses; what says so may be no API, and no JSON."""
    try:
        answer.raise_for_status()
    except httpx2.HTTPStatusError as error:
        answer.read()
        with contextlib.suppress(ValueError):
            raise ApiError(error.request, answer) from None
        raise


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def _check_name(kind: Kind, name: str) -> None:
    if not _is_name(name):
        raise InvalidArgument(f"no {kind} can have the name {name!r}; name another one")


def _check_namespace(namespace: str) -> None:
    if not _is_name(namespace):
        raise InvalidArgument(f"no namespace can have the name {namespace!r}; name another one")


def _within(kind: Kind, namespace: str) -> dict[str, str]:
    """The namespace as lightkube takes it."""
    if namespace not in ("", ALL_NS):
        _check_namespace(namespace)
    if kind.namespaced and not namespace:
        raise InvalidArgument(f"a {kind} without a namespace was asked for; name it")
    return {"namespace": namespace} if kind.namespaced else {}


def _path(kind: Kind, namespace: str) -> str:
    """Where its objects are, in one namespace or in all."""
    root = f"apis/{kind.api_version}" if kind.group else f"api/{kind.version}"
    return f"{root}/{kind.plural}" if namespace == ALL_NS else f"{root}/namespaces/{namespace}/{kind.plural}"


def _selector(wanted: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in wanted.items())


_making = threading.Lock()


@functools.cache
def _class_of(kind: Kind) -> Any:
    make = create_namespaced_resource if kind.namespaced else create_global_resource
    with _making:  # lightkube refuses the second of two threads that come at once
        return make(kind.group, kind.version, kind.name, kind.plural)
