"""Services of clouds that fail: each situation its class, in one sentence, with nothing secret in it."""

import base64
import http.server
import json
import logging
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import msgspec
import pytest
import stamina

from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.model.errors import FailedPrecondition, KeyLost, PermissionDenied, Unavailable
from csi_driver.model.volume import KeyTrail
from tests.cluster.pki import Authority
from tests.keys import clouds
from tests.keys.answers import Answer, status, truncated, until
from tests.keys.conftest import Make
from tests.keys.test_types import NAME, REQUEST, Case

pytestmark = pytest.mark.usefixtures("trusted")

SECRET = "a-text-of-the-server-that-nobody-may-see"
OF_GRPC = re.compile(r"[EWI]\d{4} [\d:.]+ +\d+ \w+\.cc:\d+\] ")
"""What gRPC's own library says on standard error, of a channel of an earlier test too, which tries again by itself."""
NAMESPACE = "luks-csi"


class Secrets(Kubernetes):
    """The API of a cluster that has one secret."""

    def __init__(self, **entries: str) -> None:
        super().__init__("", "")
        self.entries = entries

    namespace = NAMESPACE

    def secret(self, namespace: str, name: str) -> dict[str, str]:
        assert namespace == NAMESPACE
        return self.entries


@dataclass
class Cloud:
    """A service, an entry of the configuration for it, and how it fails."""

    kind: str
    service: Any
    fields: dict[str, str]
    secret: dict[str, str]
    make: Make
    hidden: tuple[str, ...]
    fail: Callable[[str], AbstractContextManager[None]]
    wrong: dict[str, dict[str, str]] = field(default_factory=dict)

    def case(self, **fields: str) -> Case:
        secret = self.secret | {name: fields.pop(name) for name in list(fields) if name in self.secret}
        found = {"encryptionKMSType": self.kind, **self.fields, **fields}
        return Case(self.make(Secrets(**secret), **found), self.kind)


def refusing(code: int) -> Answer:
    """Refuses and says again all that was sent, as a service may."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        said = f"{SECRET} {handler.headers.get('Authorization')}"
        document = {"error": {"code": said, "message": said}, "errorMessage": said, "resources": [{"errorMsg": said}]}
        status(code, json.dumps(document).encode(), **{"Content-Type": "application/json"})(handler)

    return answer


def http_failures(cloud: clouds.HttpCloud, released: threading.Event) -> Callable[[str], AbstractContextManager[None]]:
    page = status(200, f"<html>{SECRET}".encode(), **{"Content-Type": "text/html"})
    broken = status(200, f'{{"value": "{SECRET}'.encode(), **{"Content-Type": "application/json"})
    other = status(200, b"[]", **{"Content-Type": "application/json"})
    away = status(307, b"", Location="https://127.0.0.1:1/elsewhere")
    faults: dict[str, dict[str, Answer]] = {
        "unauthorised": {"fault": refusing(401)},
        "forbidden": {"fault": refusing(403)},
        "login refused": {"login_fault": refusing(401)},
        "login refused by 400": {"login_fault": refusing(400)},
        "too many": {"fault": refusing(429)},
        "broken": {"fault": refusing(500)},
        "away": {"fault": refusing(503)},
        "slow": {"fault": until(released)},
        "truncated": {"fault": truncated},
        "a page": {"fault": page},
        "no json": {"fault": broken},
        "another document": {"fault": other},
        "somewhere else": {"fault": away},
        "too many logins": {"login_fault": refusing(429)},
        "login broken": {"login_fault": refusing(503)},
        "login slow": {"login_fault": until(released)},
        "login truncated": {"login_fault": truncated},
        "login a page": {"login_fault": page},
    }
    return lambda what: clouds.failing(cloud, **faults[what])


def google_failures(
    cloud: clouds.GoogleKms, released: threading.Event
) -> Callable[[str], AbstractContextManager[None]]:
    def refusing(code: grpc.StatusCode) -> Callable[[grpc.ServicerContext, Any], Any]:
        def fault(context: grpc.ServicerContext, request: Any) -> Any:
            told = dict(context.invocation_metadata() or ())
            context.abort(code, f"{SECRET} {told['authorization']!r} {request!r}")

        return fault

    def slow(*_: Any) -> None:
        released.wait(60)

    def change(**members: Any) -> Callable[[Any], None]:
        def changed(answer: Any) -> None:
            for name, value in members.items():
                if name in type(answer).meta.fields:
                    setattr(answer, name, value)

        return changed

    codes = grpc.StatusCode
    faults: dict[str, dict[str, Any]] = {
        "unauthorised": {"fault": refusing(codes.UNAUTHENTICATED)},
        "forbidden": {"fault": refusing(codes.PERMISSION_DENIED)},
        "too many": {"fault": refusing(codes.RESOURCE_EXHAUSTED)},
        "broken": {"fault": refusing(codes.INTERNAL)},
        "away": {"fault": refusing(codes.UNAVAILABLE)},
        "slow": {"fault": slow},
        "truncated": {"change": change(ciphertext=b"short", plaintext=b"short")},
        "sent truncated": {"change": change(verified_plaintext_crc32c=False, plaintext_crc32c=1)},
        "name damaged": {"change": change(verified_additional_authenticated_data_crc32c=False, plaintext_crc32c=1)},
    }
    return lambda what: clouds.failing(cloud, **faults[what])


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set when what was slow may go on."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def azure(azure_service: clouds.AzureKeyVault, sources: Make, released: threading.Event) -> Cloud:
    service = azure_service
    fields = {"AZURE_VAULT_URL": service.address, "AZURE_CLIENT_ID": service.application}
    fields |= {"AZURE_TENANT_ID": service.tenant, "AZURE_AUTHORITY_HOST": service.address}
    hidden = (service.key.private, service.key.private.splitlines()[3], service.token)
    fail = http_failures(service, released)
    return Cloud("azure-kv", service, fields, {"CLIENT_CERT": service.certificate}, sources, hidden, fail)


@pytest.fixture
def ibm(ibm_service: clouds.IbmKeyProtect, sources: Make, released: threading.Event) -> Cloud:
    service = ibm_service
    fields = {"IBM_KP_SERVICE_INSTANCE_ID": service.instance, "IBM_KP_BASE_URL": service.address}
    fields["IBM_KP_TOKEN_URL"] = f"{service.address}/identity/token"
    secret = {"IBM_KP_SERVICE_API_KEY": service.api_key, "IBM_KP_CUSTOMER_ROOT_KEY": service.root_key()}
    fail = http_failures(service, released)
    return Cloud("ibmkeyprotect", service, fields, secret, sources, (service.api_key, service.token), fail)


@pytest.fixture
def gcp(google_service: clouds.GoogleKms, sources: Make, released: threading.Event, authority: Authority) -> Cloud:
    service = google_service
    fields = {"secretName": "google", "keyName": service.new_key(), "endpoint": service.endpoint}
    fields["endpointCA"] = Path(authority.certificate).read_text()
    hidden = (service.key.private.splitlines()[3],)
    fail = google_failures(service, released)
    return Cloud("gcp-kms", service, fields, {"credentials.json": service.credentials}, sources, hidden, fail)


@pytest.fixture(params=["azure", "ibm", "gcp"])
def cloud(request: pytest.FixtureRequest) -> Cloud:
    found: Cloud = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def at_once() -> Iterator[None]:
    """What is tried again is tried without a pause."""
    stamina.set_testing(True, attempts=3)
    yield
    stamina.set_testing(False)


HTTP = {
    "unauthorised": (PermissionDenied, r"refuses .HTTP 401"),
    "forbidden": (PermissionDenied, r"refuses .HTTP 403"),
    "login refused": (PermissionDenied, "gives no token for"),
    "login refused by 400": (PermissionDenied, "gives no token for"),
    "too many": (Unavailable, r"overloaded or broken .HTTP 429"),
    "broken": (Unavailable, r"overloaded or broken .HTTP 500"),
    "away": (Unavailable, r"overloaded or broken .HTTP 503"),
    "slow": (Unavailable, "did not answer in time"),
    "truncated": (Unavailable, "broke off|cannot be read"),
    "a page": (Unavailable, "cannot be read|no JSON"),
    "no json": (Unavailable, "cannot be read|no JSON"),
    "another document": (Unavailable, "cannot be read"),
    "somewhere else": (FailedPrecondition, "does not take the request .HTTP 307"),
    "too many logins": (Unavailable, "overloaded or broken .HTTP 429"),
    "login broken": (Unavailable, "overloaded or broken .HTTP 503"),
    "login slow": (Unavailable, "did not answer in time"),
    "login truncated": (Unavailable, "broke off|cannot be read"),
    "login a page": (Unavailable, "cannot be read"),
}
GOOGLE = {
    "unauthorised": (PermissionDenied, "does not take the credentials"),
    "forbidden": (PermissionDenied, "refuses"),
    "too many": (Unavailable, "is overloaded"),
    "broken": (Unavailable, "is broken"),
    "away": (Unavailable, "cannot be reached"),
    "slow": (Unavailable, "did not answer in time"),
    "truncated": (Unavailable, "damaged on the way"),
    "sent truncated": (Unavailable, "damaged on the way"),
    "name damaged": (Unavailable, "damaged on the way"),
}
EACH = [("azure", what) for what in HTTP] + [("ibm", what) for what in HTTP] + [("gcp", what) for what in GOOGLE]


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("operation", ["create", "fetch", "rewrap", "check"])
@pytest.mark.parametrize(("where", "what"), EACH)
def test_each_fault_has_its_class_and_tells_nothing_secret(
    where: str,
    what: str,
    operation: str,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cloud: Cloud = request.getfixturevalue(where)
    kind, words = (GOOGLE if where == "gcp" else HTTP)[what]
    made = cloud.case()
    trail = made.create()
    key = made.fetch(trail).decode()
    seconds = {"timeoutSeconds": "0.3"} if "slow" in what else {}
    case = cloud.case(**seconds)  # which has logged in nowhere yet
    calls: dict[str, Callable[[], object]] = {
        "create": lambda: case.create(f"{NAME}.fault"),
        "fetch": lambda: case.fetch(trail),
        "rewrap": lambda: case.sources.rewrap(trail, REQUEST),
        "check": case.check,
    }
    if (where, operation) == ("azure", "rewrap"):
        calls["rewrap"] = lambda: case.sources.destroy(trail, REQUEST, "test")  # it wraps nothing
        if what in ("a page", "another document"):
            words = f"{words}|$^"
    caplog.set_level(logging.DEBUG)
    with cloud.fail(what), pytest.raises(kind, match=words) as caught:
        calls[operation]()
    said = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    for hidden in (SECRET, key, *cloud.hidden):
        assert hidden not in said
    assert f"KMS kms ({cloud.kind})" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("at_once")
def test_what_passes_by_itself_is_asked_again_and_no_more_than_that(cloud: Cloud) -> None:
    case = cloud.case()
    trail = case.create()
    before = len(cloud.service.asked)
    with cloud.fail("broken"), pytest.raises(Unavailable):
        case.fetch(trail)
    again = [each for each in cloud.service.asked[before:] if "token" not in each and "openid" not in each]
    assert len(again) == 3
    before = len(cloud.service.asked)
    with cloud.fail("forbidden"), pytest.raises(PermissionDenied):
        case.fetch(trail)
    assert len([each for each in cloud.service.asked[before:] if "token" not in each and "openid" not in each]) == 1
    assert case.fetch(trail)


@pytest.mark.usefixtures("once")
def test_a_certificate_that_is_not_trusted_is_told(
    cloud: Cloud,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    other = {"endpointCA": Path(Authority(tmp_path / "pki").certificate).read_text()} if cloud.kind == "gcp-kms" else {}
    with pytest.raises(FailedPrecondition, match=r"TLS connection to KMS kms .* failed"):
        cloud.case(**other).create()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    said = "".join(capfd.readouterr()).splitlines()
    assert [line for line in said if not OF_GRPC.match(line)] == []


ADDRESSES = {"azure-kv": "AZURE_VAULT_URL", "ibmkeyprotect": "IBM_KP_BASE_URL", "gcp-kms": "endpoint"}


@pytest.mark.usefixtures("once")
def test_a_certificate_of_another_name_is_told(cloud: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    name = ADDRESSES[cloud.kind]
    with pytest.raises(FailedPrecondition, match=r"TLS connection to KMS kms .* failed"):
        cloud.case(**{name: cloud.fields[name].replace("127.0.0.1", "localhost")}).create()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.usefixtures("once")
def test_nobody_there_is_told(cloud: Cloud) -> None:
    address = "127.0.0.1:1" if cloud.kind == "gcp-kms" else "https://127.0.0.1:1"
    with pytest.raises(Unavailable, match="cannot be reached"):
        cloud.case(**{ADDRESSES[cloud.kind]: address}).create()


def test_eight_threads_ask_by_one_client(cloud: Cloud) -> None:
    case = cloud.case()
    trails = {}

    def use(number: int) -> bytes:
        trails[number] = case.create(f"{NAME}.{number}")
        return case.fetch(trails[number])

    with ThreadPoolExecutor(8) as threads:
        keys = list(threads.map(use, range(24)))
    assert len(set(keys)) == 24
    assert [case.fetch(trails[number]) for number in range(24)] == keys


def test_a_connection_serves_many_calls(cloud: Cloud) -> None:
    case = cloud.case()
    trail = case.create()

    def connections() -> int:
        return len(cloud.service.peers) if cloud.kind == "gcp-kms" else int(cloud.service.connections)

    case.fetch(trail)
    before, logins = connections(), sum("token" in each for each in cloud.service.asked)
    for _ in range(5):
        case.fetch(trail)
    assert connections() == before
    assert sum("token" in each for each in cloud.service.asked) == logins


def test_a_fresh_key_says_by_what_it_is_wrapped_or_where_it_is_kept(azure: Cloud, ibm: Cloud, gcp: Cloud) -> None:
    kept = azure.case().create()
    assert kept.key_version == azure.service.secrets[kept.key_id][-1].version
    assert azure.service.secrets[kept.key_id][-1].tags == {"luks-csi-volume": NAME}
    wrapped = ibm.case().create()
    root = ibm.secret["IBM_KP_CUSTOMER_ROOT_KEY"]
    assert (wrapped.key_id, wrapped.key_version) == (root, ibm.service.keys[root].versions[-1][0])
    wrapped = gcp.case().create()
    assert (wrapped.key_id, wrapped.key_version) == (gcp.fields["keyName"], "1")


def test_a_new_version_of_a_key_wraps_anew_and_the_old_one_still_unwraps(ibm: Cloud, gcp: Cloud) -> None:
    for cloud in (ibm, gcp):
        case = cloud.case()
        trail = case.create()
        if cloud is ibm:
            cloud.service.keys[trail.key_id].rotate()
        else:
            cloud.service.keys[trail.key_id].versions.append(bytes(range(32)))
        fresh = case.sources.rewrap(trail, REQUEST)
        assert fresh.key_id == trail.key_id
        assert fresh.key_version != trail.key_version
        assert fresh.wrapped != trail.wrapped
        assert case.fetch(fresh) == case.fetch(trail)


def test_another_key_in_the_entry_unwraps_by_the_recorded_one_and_wraps_anew_by_its_own(ibm: Cloud, gcp: Cloud) -> None:
    trail = ibm.case().create()
    other = ibm.case(IBM_KP_CUSTOMER_ROOT_KEY=ibm.service.root_key())
    fresh = other.sources.rewrap(trail, REQUEST)
    assert fresh.key_id != trail.key_id
    assert other.fetch(fresh) == other.fetch(trail)
    trail = gcp.case().create()
    other = gcp.case(keyName=gcp.service.new_key())
    fresh = other.sources.rewrap(trail, REQUEST)
    assert fresh.key_id != trail.key_id
    assert other.fetch(fresh) == other.fetch(trail)


def lost(case: Case, trail: KeyTrail, words: str) -> None:
    with pytest.raises(KeyLost, match=words) as caught:
        case.fetch(trail)
    assert "KMS kms" in str(caught.value)


def test_a_key_that_is_gone_or_closed_is_lost(azure: Cloud, ibm: Cloud, gcp: Cloud) -> None:
    case, service = azure.case(), azure.service
    trail = case.create(f"{NAME}.closed")
    service.secrets[trail.key_id][-1].enabled = False
    lost(case, trail, "SecretDisabled")
    service.secrets[trail.key_id][-1].enabled = True
    lost(case, msgspec.structs.replace(trail, key_version="0" * 32), "in version 0")
    lost(case, msgspec.structs.replace(trail, name="pvc-2"), "has no secret")
    service.secrets[trail.key_id][-1].value = ""
    lost(case, trail, "is empty")
    case.sources.destroy(trail, REQUEST, "test")
    lost(case, trail, "has no secret")
    case, service = ibm.case(), ibm.service
    trail = case.create()
    states: list[tuple[Any, str]] = [(2, "disabled"), (3, "deactivated"), (5, "destroyed"), ([1], "unknown state")]
    for state, said in states:
        service.keys[trail.key_id].state = state
        lost(case, trail, r"cannot use the root key .HTTP 4")
        with pytest.raises(KeyLost, match=said):
            case.check()
    lost(case, msgspec.structs.replace(trail, key_id="another"), "HTTP 404")
    case, service = gcp.case(), gcp.service
    trail = case.create()
    service.keys[trail.key_id].closed.add(1)
    lost(case, trail, "disabled, destroyed")
    with pytest.raises(KeyLost, match="disabled, destroyed"):
        case.check()
    lost(case, msgspec.structs.replace(trail, key_id=gcp.fields["keyName"] + "x"), "has no such key")


def test_a_damaged_or_foreign_key_is_lost(ibm: Cloud, gcp: Cloud) -> None:
    for cloud in (ibm, gcp):
        case = cloud.case()
        trail = case.create()
        for wrong in ("", "no base64!", "luks-csi:", trail.wrapped[:-8], "QUJD", "luks-csi:QUJD"):
            lost(case, msgspec.structs.replace(trail, wrapped=wrong), "restore the record")
            with pytest.raises(KeyLost, match="restore the record"):
                case.sources.rewrap(msgspec.structs.replace(trail, wrapped=wrong), REQUEST)
        lost(case, msgspec.structs.replace(trail, name="pvc-2"), "of another volume")


def test_names_of_keys_never_become_one_secret(azure: Cloud) -> None:
    case = azure.case()
    names = ("Pvc-1.x.1", "pvc-1.x.1", "pvc-1-x-1", "pvc-1.x-1", "p" * 127, "p" * 128, "p" * 128 + ".1")
    trails = [case.create(name) for name in names]
    assert len({trail.key_id.lower() for trail in trails}) == len(names)
    assert len({case.fetch(trail) for trail in trails}) == len(names)
    assert [trail.key_id for trail in trails if trail.key_id == trail.name] == ["pvc-1-x-1", "p" * 127]


def test_what_a_cut_call_left_in_azure_is_used(azure: Cloud) -> None:
    case = azure.case()
    assert case.create(f"{NAME}.cut") == case.create(f"{NAME}.cut")


def test_a_deleted_secret_keeps_its_name(azure: Cloud) -> None:
    case = azure.case()
    trail = case.create(f"{NAME}.deleted")
    case.sources.destroy(trail, REQUEST, "test")
    with pytest.raises(FailedPrecondition, match="keeps a deleted secret of the key's name"):
        case.create(trail.name)


def test_a_newer_version_in_azure_does_not_take_the_recorded_ones_place(azure: Cloud) -> None:
    case = azure.case()
    trail = case.create(f"{NAME}.version")
    key = case.fetch(trail)
    azure.service.secrets[trail.key_id].append(clouds.Kept("f" * 32, "somebody else's", {}))
    assert case.fetch(trail) == key


def test_a_key_of_ceph_csi_in_azure_is_found(azure: Cloud) -> None:
    handle = "0001-0009-rook-ceph-0000000000000002-b0285c97-a0ce-11eb-8c66-0242ac110002"
    azure.service.secrets[handle] = [clouds.Kept("a" * 32, "of Ceph-CSI", {})]
    trail = KeyTrail(kms_id="kms", type="azure-kv", name=handle)
    assert azure.case().fetch(trail) == b"of Ceph-CSI"


def test_a_key_of_ceph_csi_in_key_protect_is_unwrapped_and_wrapped_anew(ibm: Cloud) -> None:
    """Its passphrase went out as if it were base64, and its ciphertext is kept in base64 once more."""
    passphrase = "b2YgQ2VwaC1DU0kgaXRzZWxmISE="
    root = ibm.secret["IBM_KP_CUSTOMER_ROOT_KEY"]
    document = {"plaintext": passphrase, "aad": ["handle"]}
    made = ibm.service._act(ibm.service.keys[root], "wrap", document)  # noqa: SLF001 - as if it had asked
    wrapped = base64.b64encode(made["ciphertext"].encode()).decode()
    trail = KeyTrail(kms_id="kms", type="ibmkeyprotect", name="handle", wrapped=wrapped)
    case = ibm.case()
    assert case.fetch(trail) == passphrase.encode()
    ibm.service.keys[root].rotate()
    fresh = case.sources.rewrap(trail, REQUEST)
    assert fresh.wrapped != wrapped
    assert case.fetch(fresh) == passphrase.encode()


def test_key_protects_answers_are_read_whatever_type_they_say(ibm: Cloud) -> None:
    with clouds.failing(ibm.service, media="application/vnd.ibm.kms.key_action+json"):
        case = ibm.case()
        trail = case.create()
        assert case.fetch(trail) == case.fetch(case.sources.rewrap(trail, REQUEST))
        case.check()


@pytest.mark.usefixtures("at_once")
def test_a_failed_login_at_ibm_makes_nobody_sleep(ibm: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    from ibm_cloud_sdk_core.token_managers import token_manager

    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        raise AssertionError("it sleeps")

    monkeypatch.setattr(token_manager, "time", SimpleNamespace(time=token_manager.time.time, sleep=sleep))
    case = ibm.case()
    with ibm.fail("login broken"), ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(case.create) for _ in range(8)]:
            with pytest.raises(Unavailable, match="IAM is overloaded"):
                done.result()
    case.create()
    assert slept == []


@pytest.mark.parametrize(
    ("where", "fields", "words"),
    [
        ("azure", {"AZURE_VAULT_URL": ""}, "lacks the field AZURE_VAULT_URL"),
        ("azure", {"AZURE_CLIENT_ID": ""}, "lacks the field AZURE_CLIENT_ID"),
        ("azure", {"AZURE_TENANT_ID": ""}, "lacks the field AZURE_TENANT_ID"),
        ("azure", {"CLIENT_CERT": ""}, "secret luks-csi/ceph-csi-azure-credentials .* lacks the field CLIENT_CERT"),
        ("azure", {"CLIENT_CERT": SECRET}, "CLIENT_CERT in its secret must be PEM"),
        ("azure", {"AZURE_TENANT_ID": "no tenant/"}, "tenant or the authority"),
        ("azure", {"AZURE_AUTHORITY_HOST": "http://x"}, "tenant or the authority"),
        ("azure", {"AZURE_VAULT_URL": "http://127.0.0.1"}, "AZURE_VAULT_URL .* must be an https address alone"),
        ("azure", {"AZURE_VAULT_URL": f"https://user:{SECRET}@x"}, "must be an https address alone"),
        ("azure", {"timeoutSeconds": "soon"}, "timeoutSeconds"),
        ("ibm", {"IBM_KP_SERVICE_INSTANCE_ID": ""}, "lacks the field IBM_KP_SERVICE_INSTANCE_ID"),
        (
            "ibm",
            {"IBM_KP_SERVICE_API_KEY": ""},
            "secret luks-csi/ceph-csi-kp-.* lacks the field IBM_KP_SERVICE_API_KEY",
        ),
        ("ibm", {"IBM_KP_CUSTOMER_ROOT_KEY": ""}, "lacks the field IBM_KP_CUSTOMER_ROOT_KEY"),
        ("ibm", {"IBM_KP_TOKEN_URL": "https://iam.example/else"}, "IBM_KP_TOKEN_URL .* must end with"),
        ("ibm", {"IBM_KP_BASE_URL": "kms.example"}, "no http or https URL"),
        ("ibm", {"IBM_KP_SERVICE_API_KEY": f'"{SECRET}"'}, "API key or an address .* quotation mark"),
        ("gcp", {"keyName": ""}, "lacks the field keyName"),
        (
            "gcp",
            {"keyName": "projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1"},
            "keyName .* version",
        ),
        ("gcp", {"credentials.json": ""}, r"secret luks-csi/google .* lacks the field credentials\.json"),
        ("gcp", {"credentials.json": SECRET}, "no key of a service account"),
        ("gcp", {"credentials.json": "[]"}, "no key of a service account"),
        ("gcp", {"credentials.json": '{"type": "service_account"}'}, "no key of a service account"),
        ("gcp", {"timeoutSeconds": "0"}, "timeoutSeconds"),
        ("gcp", {"endpoint": "https://kms.example"}, "endpoint .* must be a host"),
        ("gcp", {"endpointCA": "no certificate"}, "CA certificate for KMS kms .* is none"),
    ],
)
def test_what_is_wrong_in_an_entry_or_its_secret_is_told_by_its_name(
    where: str, fields: dict[str, str], words: str, request: pytest.FixtureRequest
) -> None:
    cloud: Cloud = request.getfixturevalue(where)
    with pytest.raises(FailedPrecondition, match=words) as caught:
        cloud.case(**fields).create()
    assert "KMS kms" in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_credentials_of_the_surroundings_serve_google(
    gcp: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "google.json"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(place))
    case = gcp.case(secretName="")
    with pytest.raises(FailedPrecondition, match="names no secret and the driver's container has no credentials"):
        case.create()
    place.write_text(gcp.service.credentials)
    assert case.fetch(case.create())


@pytest.mark.usefixtures("once")
def test_a_workload_identity_serves_google(
    gcp: Cloud, ibm_service: clouds.IbmKeyProtect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of the cluster is given for one of Google's; the place of IBM's tokens stands for the server of that."""
    identity, place = tmp_path / "token", tmp_path / "google.json"
    identity.write_text(SECRET)
    information = {"type": "external_account", "audience": "//iam.googleapis.com/a-pool/providers/cluster"}
    information |= {"subject_token_type": "urn:ietf:params:oauth:token-type:jwt"}
    information |= {"token_url": f"{ibm_service.address}/identity/token"}
    place.write_text(json.dumps({**information, "credential_source": {"file": str(identity)}}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(place))
    monkeypatch.setattr("google.auth._exponential_backoff.time", SimpleNamespace(sleep=lambda _: None))
    given = {"access_token": gcp.service.token(), "token_type": "Bearer", "expires_in": 3600}
    given["issued_token_type"] = "urn:ietf:params:oauth:token-type:access_token"
    case = gcp.case(secretName="")
    for fault, kind in ((refusing(400), PermissionDenied), (refusing(503), Unavailable), (truncated, Unavailable)):
        with clouds.failing(ibm_service, login_fault=fault), pytest.raises(kind, match="Google gives no token") as told:
            case.create()
        assert SECRET not in "".join(traceback.format_exception(told.value))
    with clouds.failing(ibm_service, login_fault=ibm_service.says(200, given)):
        assert case.fetch(case.create())


def test_nothing_secret_is_shown(azure: Cloud, ibm: Cloud, gcp: Cloud) -> None:
    from csi_driver.keys.azure import Account
    from csi_driver.keys.gcp import Account as GoogleAccount
    from csi_driver.keys.ibm import Instance

    shown = (
        Account("https://v", "t", "a", SECRET),
        Instance("https://v", "https://t", "i", "k", SECRET),
        GoogleAccount("k", SECRET),
    )
    assert SECRET not in repr(shown)
    with ExitStack() as stack:
        for cloud in (azure, ibm, gcp):
            case = cloud.case()
            stack.callback(case.sources.close)
            case.create(f"{NAME}.shown")
            _, source = case.sources._source("kms", REQUEST)  # noqa: SLF001 - what could be shown
            for hidden in cloud.hidden:
                assert hidden not in repr(source)
                assert hidden not in repr(vars(source))
