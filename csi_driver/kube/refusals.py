"""What the Kubernetes API answers when it fails, as errors of ours: sentences that repeat nothing that was sent."""

import re
from http import HTTPStatus
from typing import Any, Final

import httpx2
import msgspec
from lightkube import ApiError
from lightkube.core.exceptions import ConfigError

from csi_driver.kube.kinds import Kind
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    CommandFailed,
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from csi_driver.model.text import one_line

_MOST_QUOTED: Final = 600
_TERMINATED: Final = "because it is being terminated"
_NO_RIGHT: Final = re.compile(r' cannot .* resource "')
"""What the API says of every lack of rights. Its admissions answer 403 too: quotas, PodSecurity, policies, webhooks."""
_OVER_QUOTA: Final = re.compile("(?:exceeded|insufficient) quota")
_POLICIES: Final = ("admission webhook", "ValidatingAdmissionPolicy")
"""What a cluster asks beside its own admissions; ours is one. Its refusals are of the object."""


class Gone(Aborted):
    """What was asked for lies too far back: list anew."""


class Conflict(Aborted):
    """Somebody else has changed the object meanwhile."""


class NamespaceGoing(FailedPrecondition):
    """The namespace of what was to be made is being deleted."""


def told(ask: Any, kind: Kind, name: str) -> Any:
    """The answer; its errors as ours."""
    what = f"{kind} {name}".strip()
    try:
        return ask()
    except ApiError as error:
        raise _refused(error, kind, name) from None
    except (httpx2.HTTPError, httpx2.StreamError, OSError, UnicodeEncodeError) as error:
        if isinstance(error, UnicodeEncodeError) or _is_header(error):
            raise FailedPrecondition(
                f"the Kubernetes API cannot be asked for {what}: the token that the kubeconfig's user has, or that its "
                f"plug-in gives, has characters that no header can have; it must be as it was given out"
            ) from None
        if isinstance(error, httpx2.HTTPStatusError) and error.response.status_code == HTTPStatus.NOT_FOUND:
            # Of an object that is not there it says so as an object of its own.
            raise FailedPrecondition(
                f"the Kubernetes API has no kind {kind} of {kind.api_version}, which {what} is; apply the "
                f"CustomResourceDefinitions of these manifests (crds.yaml) first"
            ) from None
        raise Unavailable(
            f"the Kubernetes API cannot be reached for {what} ({_broken(error)}); it is tried again"
        ) from None
    except msgspec.DecodeError as error:
        raise Unavailable(
            f"the Kubernetes API has sent for {what} what cannot be read ({error}); it is tried again"
        ) from None
    except UnicodeDecodeError:
        raise Unavailable(
            f"what the Kubernetes API has sent for {what} cannot be read, or the token file of the kubeconfig's user, "
            f"as it is no UTF-8; it is tried again"
        ) from None
    except ConfigError as error:
        raise FailedPrecondition(f"no credentials for the Kubernetes API ({one_line(str(error), 200)})") from None


def _is_header(error: Exception) -> bool:
    """Whether a header of ours was refused before it was sent; of those only the token comes from elsewhere."""
    return isinstance(error, httpx2.LocalProtocolError) and str(error).startswith("Illegal header")


def _broken(error: Exception) -> str:
    """What a connection's error says, without what was sent: a header, or an address that has a password in it."""
    if isinstance(error, httpx2.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return type(error).__name__ if isinstance(error, httpx2.LocalProtocolError) else one_line(str(error), 200)


def _refused(error: ApiError, kind: Kind, name: str) -> DriverError:
    code, reason = error.status.code or 0, error.status.reason or ""
    whole = error.status.message or f"HTTP {code}"
    said, is_policy = one_line(whole, _MOST_QUOTED), any(each in whole for each in _POLICIES)
    what = f"{kind} {name}".strip()
    if code == 404:
        return NotFound(f"there is no {what}: {said}")
    if code == 410:
        return Gone(f"the Kubernetes API has forgotten so old a version of {what}: {said}")
    if code == 409:
        return AlreadyExists(said) if reason == "AlreadyExists" else Conflict(f"{what} was changed meanwhile: {said}")
    if code == 403 and _TERMINATED in said:
        return NamespaceGoing(f"the namespace of {what} is being deleted: {said}")
    if code == 401 or (code == 403 and not is_policy and _NO_RIGHT.search(whole)):
        return PermissionDenied(f"the Kubernetes API refuses {what}: {said}; look at the role of this service account")
    if code == 403 and not is_policy and _OVER_QUOTA.search(whole):
        return ResourceExhausted(f"a quota leaves no room for {what}: {said}; raise that quota of its namespace")
    if code == 403 and not is_policy:
        return FailedPrecondition(
            f"the cluster does not admit {what}: {said}; change what it admits, or the role of this service account"
        )
    if code in (400, 403, 422):
        return InvalidArgument(f"{what} is refused: {said}")
    if code == 429 or code >= 500 or code == 0:
        return Unavailable(f"the Kubernetes API failed for {what}: {said}; it is tried again")
    return CommandFailed(f"the Kubernetes API answered {code} for {what}: {said}")
