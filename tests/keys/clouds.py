"""Stand-ins for the key management services of clouds, in the test's own process: there is no server of them to have.

Each is written from its published interface and looks at what the official client sends, over TLS: method, path,
version, who asks, body. What is not as published is refused as such a service would, so that the test fails.
"""

import base64
import contextlib
import http.server
import json
import os
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c
import grpc
import jwt
from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.cloud import kms_v1

from tests.cluster.pki import Authority
from tests.keys.answers import Answer, status
from tests.keys.servers import HOST

_STOP_SECONDS = 10
_SERVICE = "google.cloud.kms.v1.KeyManagementService"


class RsaKey:
    """A private RSA key, as clouds want them; PEM texts."""

    def __init__(self) -> None:
        key = rsa.generate_private_key(65537, 2048)
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self.private = key.private_bytes(*form).decode()
        self.public = key.public_key()
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "luks-csi")])
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now)
        certificate = builder.not_valid_after(now + timedelta(days=1)).sign(key, hashes.SHA256())
        self.certificate = certificate.public_bytes(serialization.Encoding.PEM).decode()


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: list[str]
    query: dict[str, str]
    headers: Any
    body: bytes

    def form(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(self.body.decode()).items()}

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class HttpCloud:
    """A service over HTTPS and the one beside it that gives tokens; `fault`, `login_fault` answer in their place."""

    token = "a-token-that-nobody-may-see"
    media = "application/json"

    def __init__(self) -> None:
        self.address = ""
        self.asked: list[str] = []
        self.connections = 0
        self.fault: Answer | None = None
        self.login_fault: Answer | None = None

    def answer(self, request: Request) -> Answer:
        raise NotImplementedError

    def is_login(self, request: Request) -> bool:
        raise NotImplementedError

    def says(self, code: int, document: object = None, **headers: str) -> Answer:
        content = b"" if document is None else json.dumps(document).encode()
        return status(code, content, **{"Content-Type": self.media, **headers})

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        request = Request(handler.command, path, query, handler.headers, body)
        self.asked.append(f"{request.method} {parts.path}")
        fault = self.login_fault if self.is_login(request) else self.fault
        (fault or self.answer(request))(handler)


class Service(Protocol):
    """What `serving` serves, and tells where."""

    address: str
    connections: int

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        """Answer a request."""


Served = TypeVar("Served", bound=Service)


@contextmanager
def serving(cloud: Served, authority: Authority) -> Iterator[Served]:
    """The service at an address of this machine, with a certificate of the authority."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer goes out in one piece

        def setup(self) -> None:
            cloud.connections += 1
            super().setup()

        def do_GET(self) -> None:
            cloud.handle(self)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 - the module's own names

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that did not trust us, or that did not wait."""

    name = f"cloud-{uuid.uuid4().hex[:8]}"
    authority.issue(name, name, names=[f"IP:{HOST}"])
    server = Server((HOST, 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.file(f"{name}.crt"), authority.file(f"{name}.key"))
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    cloud.address = f"https://{HOST}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield cloud
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Kept:
    """A version of a secret."""

    version: str
    value: str
    tags: dict[str, str]
    enabled: bool = True


class AzureKeyVault(HttpCloud):
    """Azure Key Vault's secrets, with Microsoft Entra ID beside it (client credentials, by a certificate).

    https://learn.microsoft.com/rest/api/keyvault/secrets and
    https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow
    """

    tenant = "11111111-2222-3333-4444-555555555555"
    application = "66666666-7777-8888-9999-000000000000"

    def __init__(self) -> None:
        super().__init__()
        self.key = RsaKey()
        self.secrets: dict[str, list[Kept]] = {}
        self.deleted: dict[str, list[Kept]] = {}

    @property
    def certificate(self) -> str:
        """What the application shows: certificate and private key."""
        return self.key.certificate + self.key.private

    def is_login(self, request: Request) -> bool:
        return request.path[0] == self.tenant

    def answer(self, request: Request) -> Answer:
        if self.is_login(request):
            return self._login(request)
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            # The client compares the resource with the end of the address that it asked.
            resource = self.address.replace(HOST, HOST.partition(".")[2])
            challenge = f'Bearer authorization="{self.address}/{self.tenant}", resource="{resource}"'
            return self.says(401, None, **{"WWW-Authenticate": challenge})
        if request.path[0] != "secrets" or not request.query.get("api-version"):
            return self._refuses(400, "BadParameter")
        return self._secret(request, request.path[1].lower(), "".join(request.path[2:]))

    def _login(self, request: Request) -> Answer:
        base = f"{self.address}/{self.tenant}"
        if request.path[1:] == ["v2.0", ".well-known", "openid-configuration"]:
            found = {"issuer": f"{base}/v2.0", "token_endpoint": f"{base}/oauth2/v2.0/token"}
            return self.says(200, found | {"authorization_endpoint": f"{base}/oauth2/v2.0/authorize"})
        form = request.form()
        wanted = {"grant_type": "client_credentials", "client_id": self.application}
        wanted["client_assertion_type"] = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
        try:
            assertion = jwt.decode(
                form.get("client_assertion", ""), self.key.public, algorithms=["RS256", "PS256"],
                audience=f"{base}/oauth2/v2.0/token",
            )  # fmt: skip
        except jwt.InvalidTokenError:
            return self.says(401, {"error": "invalid_client", "error_description": "AADSTS700027: not its key"})
        if request.path[1:] != ["oauth2", "v2.0", "token"] or any(form.get(each) != wanted[each] for each in wanted):
            return self.says(400, {"error": "invalid_request", "error_description": "AADSTS900144"})
        if assertion["iss"] != self.application or not form["scope"].startswith("https://0.0.1:"):
            return self.says(400, {"error": "invalid_scope", "error_description": "AADSTS70011"})
        return self.says(200, {"token_type": "Bearer", "expires_in": 3600, "access_token": self.token})

    def _secret(self, request: Request, name: str, version: str) -> Answer:
        if not name.replace("-", "").isalnum() or len(name) > 127:
            return self._refuses(400, "BadParameter")
        kept = self.secrets.get(name, [])
        if request.method == "PUT":
            if name in self.deleted:
                return self._refuses(409, "Conflict", "ObjectIsDeletedButRecoverable")
            document = request.document()
            made = Kept(uuid.uuid4().hex, document["value"], document.get("tags") or {})
            self.secrets.setdefault(name, []).append(made)
            return self._bundle(name, made)
        found = next((each for each in reversed(kept) if version in ("", each.version)), None)
        if found is None:
            return self._refuses(404, "SecretNotFound")
        if request.method == "DELETE":
            self.deleted[name] = self.secrets.pop(name)
            return self._bundle(name, found, recoveryId=f"{self.address}/deletedsecrets/{name}")
        if not found.enabled:
            return self._refuses(403, "Forbidden", "SecretDisabled")
        return self._bundle(name, found)

    def _bundle(self, name: str, kept: Kept, **more: str) -> Answer:
        identifier = f"{self.address}/secrets/{name}/{kept.version}"
        document = {"id": identifier, "value": kept.value, "attributes": {"enabled": kept.enabled}, "tags": kept.tags}
        return self.says(200, document | more)

    def _refuses(self, code: int, word: str, inner: str = "") -> Answer:
        error: dict[str, Any] = {"code": word, "message": "as the test wants it"}
        return self.says(code, {"error": error | ({"innererror": {"code": inner}} if inner else {})})


@dataclass
class RootKey:
    """A root key of Key Protect: its versions, oldest first, and its state by NIST SP 800-57."""

    versions: list[tuple[str, bytes]] = field(default_factory=list)
    state: int = 1

    def __post_init__(self) -> None:
        self.rotate()

    def rotate(self) -> None:
        self.versions.append((str(uuid.uuid4()), os.urandom(32)))


class IbmKeyProtect(HttpCloud):
    """IBM Key Protect's wrapping, with IAM beside it (a token for an API key).

    https://cloud.ibm.com/apidocs/key-protect and https://cloud.ibm.com/apidocs/iam-identity-token-api
    """

    api_key = "an-api-key-that-nobody-may-see"
    instance = "an-instance"

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[str, RootKey] = {}
        moment = int(datetime.now(UTC).timestamp())
        claims = {"iat": moment, "exp": moment + 86400}
        self.token = jwt.encode(claims, "the signature is IAM's own affair; nobody here looks", "HS256")

    def root_key(self) -> str:
        made = str(uuid.uuid4())
        self.keys[made] = RootKey()
        return made

    def is_login(self, request: Request) -> bool:
        return request.path == ["identity", "token"]

    def answer(self, request: Request) -> Answer:
        if self.is_login(request):
            wanted = {"grant_type": "urn:ibm:params:oauth:grant-type:apikey", "apikey": self.api_key}
            form = request.form()
            if any(form.get(each) != wanted[each] for each in wanted):
                return self.says(400, {"errorCode": "BXNIM0415E", "errorMessage": "no such key"})
            return self.says(200, {"access_token": self.token, "token_type": "Bearer", "expires_in": 3600})
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return self.says(401, {"resources": [{"errorMsg": "Unauthorized"}]})
        if request.path[:3] != ["api", "v2", "keys"] or request.headers.get("Bluemix-Instance") != self.instance:
            return self.says(400, {"resources": [{"errorMsg": "Bad Request"}]})
        name, what = request.path[3], request.path[4:]
        key = self.keys.get(name)
        if key is None:
            return self.says(404, {"resources": [{"errorMsg": "Not Found"}]})
        if (request.method, what) == ("GET", ["metadata"]):
            return self.says(200, {"resources": [{"id": name, "state": key.state, "extractable": False}]})
        if key.state != 1:
            return self.says(410 if key.state == 5 else 409, {"resources": [{"errorMsg": "not in a state to do it"}]})
        media = f"application/vnd.ibm.kms.key_action_{what[-1]}+json"
        if request.method != "POST" or what[0] != "actions" or request.headers.get("Content-Type") != media:
            return self.says(400, {"resources": [{"errorMsg": "Bad Request"}]})
        try:
            return self.says(200, self._act(key, what[1], request.document()))
        except (ValueError, KeyError, InvalidTag):
            return self.says(422, {"resources": [{"errorMsg": "Unprocessable Entity"}]})

    def _act(self, key: RootKey, action: str, document: dict[str, Any]) -> dict[str, Any]:
        bound = json.dumps(document.get("aad", [])).encode()
        newest, material = key.versions[-1]
        if action == "wrap":
            plaintext = base64.b64decode(document["plaintext"], validate=True)
            return {"ciphertext": _sealed(newest, material, plaintext, bound), "keyVersion": {"id": newest}}
        version, plaintext = _opened(dict(key.versions), document["ciphertext"], bound)
        fresh = {"ciphertext": _sealed(newest, material, plaintext, bound)}
        if action == "rewrap":
            return fresh | {"keyVersion": {"id": version}, "rewrappedKeyVersion": {"id": newest}}
        found = {"plaintext": base64.b64encode(plaintext).decode(), "keyVersion": {"id": version}}
        return found | (fresh if version != newest else {})


def _sealed(version: str, material: bytes, plaintext: bytes, bound: bytes) -> str:
    nonce = os.urandom(12)
    whole = version.encode() + b" " + nonce + AESGCM(material).encrypt(nonce, plaintext, bound)
    return base64.b64encode(whole).decode()


def _opened(versions: dict[str, bytes], sealed: str, bound: bytes) -> tuple[str, bytes]:
    version, _, rest = base64.b64decode(sealed, validate=True).partition(b" ")
    material = versions[version.decode()]
    return version.decode(), AESGCM(material).decrypt(rest[:12], rest[12:], bound)


@dataclass
class GoogleKey:
    """A symmetric key of Cloud KMS: its versions from 1 on, and which of them are disabled or destroyed."""

    versions: list[bytes] = field(default_factory=lambda: [os.urandom(32)])
    closed: set[int] = field(default_factory=set)


class GoogleKms:
    """Google Cloud KMS, Encrypt and Decrypt over gRPC, with the published messages (`google-cloud-kms` has them).

    https://cloud.google.com/kms/docs/reference/rpc. Who asks shows a token that it signed itself, which is how Google
    wants it of service accounts (https://google.aip.dev/auth/4111).
    """

    account = "luks-csi@project.iam.example"

    def __init__(self) -> None:
        self.endpoint = ""
        self.key = RsaKey()
        self.keys: dict[str, GoogleKey] = {}
        self.asked: list[str] = []
        self.fault: Callable[[grpc.ServicerContext, Any], Any] | None = None
        self.change: Callable[[Any], None] = lambda _: None
        self.peers: set[str] = set()

    @property
    def credentials(self) -> str:
        """The key of the service account, as Google gives it out."""
        return json.dumps(
            {
                "type": "service_account",
                "project_id": "project",
                "private_key_id": "1",
                "private_key": self.key.private,
                "client_email": self.account,
                "client_id": "1",
                "token_uri": f"https://{HOST}:1/nobody-is-asked-for-a-token",
            }
        )

    def token(self) -> str:
        """A token as Google gives one out for another of somebody else's."""
        claims = {"iss": self.account, "scope": "https://www.googleapis.com/auth/cloud-platform"}
        return jwt.encode(claims, self.key.private, "RS256")

    def new_key(self) -> str:
        name = f"projects/project/locations/europe-west3/keyRings/csi/cryptoKeys/k{uuid.uuid4().hex[:8]}"
        self.keys[name] = GoogleKey()
        return name

    def serve(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.asked.append(method)
        self.peers.add(context.peer())
        told = dict(context.invocation_metadata() or ())
        try:
            scheme, _, token = str(told.get("authorization", "")).partition(" ")
            claims = jwt.decode(token, self.key.public, algorithms=["RS256"], options={"verify_aud": False})
        except jwt.InvalidTokenError:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not the account's")
        known = "https://www.googleapis.com/auth/cloud-platform", "https://cloudkms.googleapis.com/"
        if scheme != "Bearer" or claims["iss"] != self.account or claims.get("scope", claims.get("aud")) not in known:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not for this")
        if unquote(str(told.get("x-goog-request-params", ""))) != f"name={request.name}":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "nobody knows where this goes")
        if self.fault is not None:
            return self.fault(context, request)
        if request.name not in self.keys:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such key")
        bound = request.additional_authenticated_data
        self._compare(context, bound, request.additional_authenticated_data_crc32c)
        answer = getattr(self, f"_{method.lower()}")(self.keys[request.name], request, bound, context)
        self.change(answer)
        return answer

    def _encrypt(self, key: GoogleKey, request: Any, bound: bytes, context: grpc.ServicerContext) -> Any:
        self._compare(context, request.plaintext, request.plaintext_crc32c)
        number = len(key.versions)
        if number in key.closed:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the primary version is not enabled")
        ciphertext = base64.b64decode(_sealed(str(number), key.versions[-1], request.plaintext, bound))
        return kms_v1.EncryptResponse(
            name=f"{request.name}/cryptoKeyVersions/{number}",
            ciphertext=ciphertext,
            ciphertext_crc32c=google_crc32c.value(ciphertext),
            verified_plaintext_crc32c=True,
            verified_additional_authenticated_data_crc32c=True,
        )

    def _decrypt(self, key: GoogleKey, request: Any, bound: bytes, context: grpc.ServicerContext) -> Any:
        self._compare(context, request.ciphertext, request.ciphertext_crc32c)
        versions = {str(number): material for number, material in enumerate(key.versions, start=1)}
        try:
            number, plaintext = _opened(versions, base64.b64encode(request.ciphertext).decode(), bound)
        except (KeyError, ValueError, InvalidTag):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "decryption failed: check the name and the data")
        if int(number) in key.closed:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the version is not enabled")
        return kms_v1.DecryptResponse(
            plaintext=plaintext, plaintext_crc32c=google_crc32c.value(plaintext), used_primary=False
        )

    def _compare(self, context: grpc.ServicerContext, data: bytes, sent: Any) -> None:
        if sent != google_crc32c.value(data):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the checksum is not that of the data")


@contextmanager
def google(authority: Authority) -> Iterator[GoogleKms]:
    """Cloud KMS at an address of this machine, with a certificate of the authority."""
    cloud = GoogleKms()
    authority.issue("google", "google", names=[f"IP:{HOST}"])
    messages: dict[str, tuple[Any, Any]] = {
        "Encrypt": (kms_v1.EncryptRequest, kms_v1.EncryptResponse),
        "Decrypt": (kms_v1.DecryptRequest, kms_v1.DecryptResponse),
    }

    def handler(method: str) -> Any:
        asked, answered = messages[method]
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: cloud.serve(method, request, context),
            request_deserializer=asked.deserialize,
            response_serializer=answered.serialize,
        )

    server = grpc.server(ThreadPoolExecutor(16))
    handlers = {method: handler(method) for method in messages}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    pair = (Path(authority.file("google.key")).read_bytes(), Path(authority.file("google.crt")).read_bytes())
    port = server.add_secure_port(f"{HOST}:0", grpc.ssl_server_credentials([pair]))
    cloud.endpoint = f"{HOST}:{port}"
    server.start()
    try:
        yield cloud
    finally:
        server.stop(0).wait(_STOP_SECONDS)


@contextmanager
def failing(cloud: Any, **faults: Any) -> Iterator[None]:
    """A service that fails for a while: its attributes are these in the block."""
    with contextlib.ExitStack() as stack:
        for name, value in faults.items():
            stack.callback(setattr, cloud, name, getattr(cloud, name))
            setattr(cloud, name, value)
        yield
