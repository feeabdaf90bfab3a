"""Certificates of agents and webhooks: who signs, when they are renewed, and whose are left alone."""

import base64
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from csi_driver.kube.copies import AGENTS, AUTHORITY
from csi_driver.kube.kinds import CONFIG_MAP, MUTATING, SECRET, VALIDATING
from csi_driver.model.errors import FailedPrecondition
from csi_driver.operator.certificates import AGENT_SECRET, OPERATOR_SECRET, WEBHOOKS, Certificates
from tests.operator_fakes import FakeApi

_NAMESPACE = "luks-csi"


class Clock:
    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def certificates(api: FakeApi, clock: Clock) -> Certificates:
    return Certificates(api, _NAMESPACE, clock)


def entries(api: FakeApi, name: str) -> dict[str, str]:
    found = api.get(SECRET, name, _NAMESPACE)
    assert found is not None
    return {entry: base64.b64decode(value).decode() for entry, value in found["data"].items()}


def certificate(text: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(text.encode())


def test_agents_and_operator_have_certificates_of_one_authority(api: FakeApi, certificates: Certificates) -> None:
    certificates.reconcile("all")
    authority = certificate(entries(api, AUTHORITY)["tls.crt"])
    for name, dns in ((AGENT_SECRET, AGENTS), (OPERATOR_SECRET, "luks-csi-operator.luks-csi.svc")):
        found = entries(api, name)
        signed = certificate(found["tls.crt"])
        signed.verify_directly_issued_by(authority)
        names = signed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [dns]
        assert certificate(found["ca.crt"]) == authority
    published = api.get(CONFIG_MAP, AUTHORITY, _NAMESPACE)
    assert published is not None
    assert published["data"] == {"ca.crt": entries(api, AUTHORITY)["tls.crt"]}


def test_what_is_well_is_not_written_again(api: FakeApi, certificates: Certificates) -> None:
    certificates.reconcile("all")
    api.written()
    assert certificates.reconcile("all") > 0
    assert api.written() == []


def test_a_certificate_is_renewed_when_two_thirds_of_its_life_are_over(
    api: FakeApi, certificates: Certificates, clock: Clock
) -> None:
    certificates.reconcile("all")
    before = {name: entries(api, name) for name in (AUTHORITY, AGENT_SECRET, OPERATOR_SECRET)}
    clock.now += timedelta(days=59)
    certificates.reconcile("all")
    assert {name: entries(api, name) for name in before} == before
    clock.now += timedelta(days=2)
    certificates.reconcile("all")
    assert entries(api, AUTHORITY) == before[AUTHORITY]
    for name in (AGENT_SECRET, OPERATOR_SECRET):
        assert entries(api, name)["tls.crt"] != before[name]["tls.crt"]


def test_an_authority_that_is_renewed_stays_trusted_until_it_expires(
    api: FakeApi, certificates: Certificates, clock: Clock
) -> None:
    certificates.reconcile("all")
    old = entries(api, AUTHORITY)["tls.crt"]
    clock.now += timedelta(days=2500)
    certificates.reconcile("all")
    new = entries(api, AUTHORITY)["tls.crt"]
    assert new != old
    found = entries(api, AGENT_SECRET)
    assert found["ca.crt"] == new + old
    certificate(found["tls.crt"]).verify_directly_issued_by(certificate(new))
    clock.now += timedelta(days=1200)
    certificates.reconcile("all")
    assert entries(api, AGENT_SECRET)["ca.crt"] == new


def test_somebody_elses_secret_is_used_and_left_alone(api: FakeApi, certificates: Certificates) -> None:
    other = Certificates(made := FakeApi(), _NAMESPACE)
    other.reconcile("all")
    theirs = made.get(SECRET, OPERATOR_SECRET, _NAMESPACE)
    assert theirs is not None
    api.put(SECRET, {"metadata": {"name": OPERATOR_SECRET}, "data": theirs["data"]}, _NAMESPACE)
    webhooks = {"metadata": {"name": WEBHOOKS}, "webhooks": [{"name": "a", "clientConfig": {"caBundle": "theirs"}}]}
    api.put(VALIDATING, webhooks)
    certificates.reconcile("all")
    found = api.get(SECRET, OPERATOR_SECRET, _NAMESPACE)
    assert found is not None
    assert found["data"] == theirs["data"]
    kept = api.get(VALIDATING, WEBHOOKS)
    assert kept is not None
    assert kept["webhooks"] == webhooks["webhooks"]
    assert isinstance(certificates.context(), ssl.SSLContext)


@pytest.mark.parametrize("says", [True, False], ids=["with ca.crt", "without"])
def test_who_uploads_is_told_whom_the_agents_certificate_is_of(
    api: FakeApi, certificates: Certificates, *, says: bool
) -> None:
    other = Certificates(made := FakeApi(), _NAMESPACE)
    other.reconcile("all")
    theirs = made.get(SECRET, AGENT_SECRET, _NAMESPACE)
    assert theirs is not None
    data = {name: value for name, value in theirs["data"].items() if says or name != "ca.crt"}
    api.put(SECRET, {"metadata": {"name": AGENT_SECRET}, "data": data}, _NAMESPACE)
    for _ in range(2):
        certificates.reconcile("all")
        trusted, published = (each.get(CONFIG_MAP, AUTHORITY, _NAMESPACE) for each in (made, api))
        assert trusted is not None
        assert published is not None
        assert (published["data"] == trusted["data"]) is says


def test_the_api_is_told_whom_to_trust(api: FakeApi, certificates: Certificates) -> None:
    service = {"name": "luks-csi-operator", "namespace": _NAMESPACE}
    for kind in (MUTATING, VALIDATING):
        hooks = [{"name": name, "clientConfig": {"service": service}} for name in ("a", "b")]
        api.put(kind, {"metadata": {"name": WEBHOOKS}, "webhooks": hooks})
    certificates.reconcile("all")
    bundle = base64.b64encode(entries(api, AUTHORITY)["tls.crt"].encode()).decode()
    for kind in (MUTATING, VALIDATING):
        found = api.get(kind, WEBHOOKS)
        assert found is not None
        assert [each["clientConfig"] for each in found["webhooks"]] == [{"service": service, "caBundle": bundle}] * 2


def test_what_was_made_by_a_clock_that_was_ahead_is_replaced(
    api: FakeApi, certificates: Certificates, clock: Clock
) -> None:
    right = clock.now
    clock.now += timedelta(days=10)
    certificates.reconcile("all")
    clock.now = right
    certificates.reconcile("all")
    for name in (AUTHORITY, AGENT_SECRET, OPERATOR_SECRET):
        assert certificate(entries(api, name)["tls.crt"]).not_valid_before_utc < right
    signed = certificate(entries(api, AGENT_SECRET)["tls.crt"])
    signed.verify_directly_issued_by(certificate(entries(api, AUTHORITY)["tls.crt"]))


def test_what_was_deleted_is_made_anew_within_a_minute_and_an_old_authority_trusted_no_more(
    api: FakeApi, certificates: Certificates
) -> None:
    assert certificates.reconcile("all") <= 60
    old = entries(api, AGENT_SECRET)
    api.lose(SECRET, AGENT_SECRET, _NAMESPACE)
    certificates.reconcile("all")
    assert entries(api, AGENT_SECRET)["tls.key"] != old["tls.key"]
    api.lose(SECRET, AUTHORITY, _NAMESPACE)
    certificates.reconcile("all")
    published = api.get(CONFIG_MAP, AUTHORITY, _NAMESPACE)
    assert published is not None
    authority = entries(api, AUTHORITY)["tls.crt"]
    assert authority != old["ca.crt"]
    assert published["data"]["ca.crt"] == entries(api, AGENT_SECRET)["ca.crt"] == authority


def test_a_damaged_secret_is_told_by_its_name(api: FakeApi, certificates: Certificates) -> None:
    data = {entry: base64.b64encode(b"nothing").decode() for entry in ("tls.crt", "tls.key")}
    api.put(SECRET, {"metadata": {"name": AUTHORITY}, "data": data}, _NAMESPACE)
    with pytest.raises(FailedPrecondition, match=r"luks-csi-image-ca, .* cannot be read; delete the one"):
        certificates.reconcile("all")
    with pytest.raises(FailedPrecondition, match="no certificate yet"):
        certificates.context()
    assert "nothing" not in repr(certificates)


@pytest.mark.parametrize("key", [b"damaged", b"\xff"])
@pytest.mark.parametrize("name", [AUTHORITY, OPERATOR_SECRET, AGENT_SECRET])
def test_a_key_that_cannot_be_used_is_told_with_its_secret(
    api: FakeApi, certificates: Certificates, name: str, key: bytes
) -> None:
    certificates.reconcile("all")
    api.change(SECRET, name, {"data": {"tls.key": base64.b64encode(key).decode()}}, _NAMESPACE)
    if name == AUTHORITY:
        api.lose(SECRET, AGENT_SECRET, _NAMESPACE)  # which is to be signed
    said = f"key or certificate of the secret {name} cannot be used; delete it, it is made anew"
    with pytest.raises(FailedPrecondition, match=said):
        certificates.reconcile("all")
    assert certificates.error == said
    api.lose(SECRET, name, _NAMESPACE)
    certificates.reconcile("all")
    assert certificates.error == ""


def test_what_nobody_foresaw_is_told_without_its_text(api: FakeApi, certificates: Certificates) -> None:
    def fail(_call: object) -> None:
        raise ValueError("SECRET")

    certificates.reconcile("all")
    api.before = fail
    with pytest.raises(ValueError, match="SECRET"):
        certificates.reconcile("all")
    assert certificates.error == "ValueError; look at the log"
