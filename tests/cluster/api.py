"""A client of the apiserver for what tests do most, reading: an exec of kubectl costs a hundred times more."""

import http.client
import json
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from tests.cluster.commands import ClusterError

Json = dict[str, Any]

_DISCOVERY = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
_SECONDS = 30  # for one request


class ApiError(ClusterError):
    """The apiserver refused a request, with HTTP status `code`, or could not be reached: then `code` is 0."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class _Resource:
    path: str
    plural: str
    namespaced: bool


class Api:
    """The apiserver at `host`, seen as the user of the certificate in `context`.

    Kinds go by any of their names: `PersistentVolumeClaim`, `persistentvolumeclaims`, `pvc`.
    """

    def __init__(self, host: str, context: ssl.SSLContext) -> None:
        self._host = host
        self._context = context
        self._resources: dict[str, _Resource] = {}

    def raw(
        self, method: str, path: str, body: Any = None, *, content: str = "application/json", accept: str = "*/*"
    ) -> bytes:
        """One request; ApiError unless it succeeds."""
        connection = http.client.HTTPSConnection(self._host, 443, timeout=_SECONDS, context=self._context)
        try:
            connection.putrequest(method, path)
            data = b"" if body is None else json.dumps(body).encode()
            for name, value in (("Accept", accept), ("Content-Type", content), ("Content-Length", str(len(data)))):
                connection.putheader(name, value)
            connection.endheaders(data)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, f"{method} {path}: {error!r}") from None
        finally:
            connection.close()
        if response.status >= 300:
            try:
                message = json.loads(answer)["message"]
            except (ValueError, KeyError, TypeError):
                message = answer.decode(errors="replace").strip()
            raise ApiError(response.status, f"{method} {path}: {message} ({response.status})")
        return answer

    def _discover(self) -> None:
        self._resources = {}
        for root in ("/api", "/apis"):
            for group in json.loads(self.raw("GET", root, accept=_DISCOVERY))["items"]:
                name = group["metadata"].get("name", "")
                for version in group["versions"]:
                    base = f"/apis/{name}/{version['version']}" if name else f"/api/{version['version']}"
                    for found in version["resources"]:
                        plural = found["resource"]
                        resource = _Resource(base, plural, found["scope"] == "Namespaced")
                        names = [plural, found.get("singularResource", ""), *found.get("shortNames", [])]
                        for alias in (*names, found["responseKind"]["kind"].lower()):
                            self._resources.setdefault(alias, resource)

    def path(self, kind: str, name: str = "", namespace: str = "") -> str:
        """The path of an object, or of the collection without `name`; of all namespaces without `namespace`."""
        if kind.lower() not in self._resources:
            self._discover()
        if not (resource := self._resources.get(kind.lower())):
            raise ClusterError(f"The apiserver knows no kind {kind}.")
        scope = f"/namespaces/{quote(namespace)}" if resource.namespaced and namespace else ""
        return f"{resource.path}{scope}/{resource.plural}{f'/{quote(name)}' if name else ''}"

    def get(self, kind: str, name: str, namespace: str = "") -> Json:
        """One object; ApiError with code 404 if there is none."""
        found: Json = json.loads(self.raw("GET", self.path(kind, name, namespace)))
        return found

    def find(self, kind: str, name: str, namespace: str = "") -> Json | None:
        """One object, or None if there is none."""
        try:
            return self.get(kind, name, namespace)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def items(self, kind: str, namespace: str = "", *, labels: str = "", fields: str = "") -> list[Json]:
        """The objects of a kind, of one namespace or of all, that the selectors let through."""
        selectors = {"labelSelector": labels, "fieldSelector": fields}
        query = urlencode({name: value for name, value in selectors.items() if value})
        answer = json.loads(self.raw("GET", f"{self.path(kind, namespace=namespace)}?{query}"))
        # A list leaves out of its items what is the same in all.
        common = {"apiVersion": answer["apiVersion"], "kind": answer["kind"].removesuffix("List")}
        return [{**common, **item} for item in answer["items"]]

    def patch(self, kind: str, name: str, namespace: str, body: Json) -> Json:
        """Merge `body` into an object (RFC 7386)."""
        path = self.path(kind, name, namespace)
        answer: Json = json.loads(self.raw("PATCH", path, body, content="application/merge-patch+json"))
        return answer

    def create(self, body: Json, namespace: str = "") -> Json:
        namespace = namespace or body["metadata"].get("namespace", "")
        answer: Json = json.loads(self.raw("POST", self.path(body["kind"], namespace=namespace), body))
        return answer

    def delete(self, kind: str, name: str, namespace: str = "", **options: Any) -> None:
        """Ask for an object's deletion; absent is fine. `options` are those of DeleteOptions."""
        try:
            self.raw("DELETE", self.path(kind, name, namespace), options)
        except ApiError as error:
            if error.code != 404:
                raise
