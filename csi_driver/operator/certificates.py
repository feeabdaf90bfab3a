"""The certificates of agents and webhooks: an authority of our own in a secret, and what it signs, renewed in time.

A secret of these names that somebody else makes (cert-manager, say; without our label) is used as it is. An authority
that is renewed stays trusted beside its successor until it expires.
"""

import base64
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver.host.inmemory import in_memory
from csi_driver.host.log import log
from csi_driver.kube.copies import AGENTS, AUTHORITY
from csi_driver.kube.kinds import CONFIG_MAP, MANAGED_BY, MANAGER, MUTATING, SECRET, VALIDATING, Json, Kind
from csi_driver.kube.refusals import Conflict
from csi_driver.model.errors import AlreadyExists, DriverError, FailedPrecondition
from csi_driver.operator.standing import Api

AGENT_SECRET: Final = "luks-csi-image-agents"
OPERATOR_SECRET: Final = "luks-csi-operator"
WEBHOOKS: Final = "luks-csi-images"
"""The name of our webhook configurations."""

_AUTHORITY_LIFE: Final = timedelta(days=3650)
_LIFE: Final = timedelta(days=90)
_BACK: Final = timedelta(minutes=10)  # for clocks that are behind
_LOOK_SECONDS: Final = 60.0  # who deletes a secret to have it made anew waits for that
_PREVIOUS: Final = "previous.crt"
_TLS: Final = "kubernetes.io/tls"


@dataclass(frozen=True)
class Signed:
    """A certificate and its key, as PEM."""

    certificate: str
    key: str

    def __repr__(self) -> str:
        return "Signed(...)"


class Certificates:
    """Makes and renews them in `namespace`; `reconcile` looks after all, again and again."""

    def __init__(self, api: Api, namespace: str, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._api = api
        self._namespace = namespace
        self._clock = clock
        self._guard = threading.Lock()
        self._shown: dict[str, tuple[Signed, ssl.SSLContext]] = {}
        self.error = "not looked at yet"
        """Why not all of them are in place, "" when they are."""

    def reconcile(self, _name: str) -> float:
        """Look at all of them; seconds until the next look."""
        try:
            self._reconcile()
        except Exception as error:  # its text may quote anything
            self.error = str(error) if isinstance(error, DriverError) else f"{type(error).__name__}; look at the log"
            raise
        self.error = ""
        return _LOOK_SECONDS

    def _reconcile(self) -> None:
        authority, bundle = self._authority()
        self._publish(self._others_authority(AGENT_SECRET) or bundle)
        self._serving(AGENT_SECRET, AGENTS, authority, bundle)
        ours = self._serving(OPERATOR_SECRET, f"{OPERATOR_SECRET}.{self._namespace}.svc", authority, bundle)
        if ours:
            for kind in (MUTATING, VALIDATING):
                self._trust(kind, bundle)

    def context(self) -> ssl.SSLContext:
        """What the operator's own server shows. Raises FailedPrecondition while there is no certificate."""
        with self._guard:
            if OPERATOR_SECRET not in self._shown:
                raise FailedPrecondition("the operator has no certificate yet; it is being made")
            return self._shown[OPERATOR_SECRET][1]

    def _authority(self) -> tuple[Signed, str]:
        """The authority, and all that are to be trusted."""
        found = self._read(AUTHORITY)
        now = self._clock()
        data = found[1] if found else {}
        current = _signed_of(data)
        trusted = data.get(_PREVIOUS, "")
        if current is None or _is_due(_certificate(current.certificate), now):
            trusted = current.certificate if current else ""
            current = _make_authority(now)
            entries = {"tls.crt": current.certificate, "tls.key": current.key} | (
                {_PREVIOUS: trusted} if trusted else {}
            )
            self._write(AUTHORITY, entries, found[0] if found else None)
            log.info("certificate authority made", namespace=self._namespace)
        if trusted and _certificate(trusted).not_valid_after_utc < now:
            trusted = ""
        return current, current.certificate + trusted

    def _serving(self, name: str, dns: str, authority: Signed, bundle: str) -> bool:
        """Have one serving certificate; whether it is ours to look after."""
        found = self._read(name)
        now = self._clock()
        if found is not None and not _is_ours(found[0]):
            self._show(name, _signed_of(found[1]))
            return False
        signed = _signed_of(found[1]) if found else None
        issuer = _certificate(authority.certificate)
        good = signed is not None and _fits(_certificate(signed.certificate), issuer, dns, now)
        if not good or found is None or found[1].get("ca.crt") != bundle:
            if not good or signed is None:
                signed = _sign(authority, dns, now)
                log.info("certificate made", secret=name, dns=dns)
            entries = {"tls.crt": signed.certificate, "tls.key": signed.key, "ca.crt": bundle}
            self._write(name, entries, found[0] if found else None)
        self._show(name, signed)
        return True

    def _others_authority(self, name: str) -> str:
        """Whose certificate somebody else put there, as its ca.crt says; "" where it is ours or does not say."""
        found = self._read(name)
        return "" if found is None or _is_ours(found[0]) else found[1].get("ca.crt", "")

    def _show(self, name: str, signed: Signed | None) -> None:
        """Load it, also that of the agents, who show it: they have no other one, and only their logs would tell."""
        if signed is None:
            return
        with self._guard:
            if name not in self._shown or self._shown[name][0] != signed:
                self._shown[name] = signed, _context_of(name, signed)

    def _publish(self, bundle: str) -> None:
        """Who uploads an image must know whom to trust."""
        found = self._api.get(CONFIG_MAP, AUTHORITY, self._namespace)
        if found is None:
            thing = {"metadata": {"name": AUTHORITY, "labels": {MANAGED_BY: MANAGER}}, "data": {"ca.crt": bundle}}
            self._api.create(CONFIG_MAP, thing, self._namespace)
        elif found.get("data", {}).get("ca.crt") != bundle:
            self._api.patch(CONFIG_MAP, AUTHORITY, {"data": {"ca.crt": bundle}}, self._namespace)

    def _trust(self, kind: Kind, bundle: str) -> None:
        """Have the API trust our webhooks."""
        found = self._api.get(kind, WEBHOOKS)
        if found is None:
            return
        text = base64.b64encode(bundle.encode()).decode()
        webhooks = found.get("webhooks", [])
        if all(each["clientConfig"].get("caBundle") == text for each in webhooks):
            return
        changed = [{**each, "clientConfig": {**each["clientConfig"], "caBundle": text}} for each in webhooks]
        version = found["metadata"]["resourceVersion"]
        self._api.patch(kind, WEBHOOKS, {"metadata": {"resourceVersion": version}, "webhooks": changed})

    def _read(self, name: str) -> tuple[Json, dict[str, str]] | None:
        found = self._api.get(SECRET, name, self._namespace)
        if found is None:
            return None
        try:
            data = {entry: base64.b64decode(value).decode() for entry, value in (found.get("data") or {}).items()}
        except UnicodeDecodeError:
            raise _damaged(name) from None
        return found, data

    def _write(self, name: str, entries: dict[str, str], there: Json | None) -> None:
        """Make or replace a secret. Raises Aborted where another operator was faster."""
        data = {entry: base64.b64encode(text.encode()).decode() for entry, text in entries.items()}
        if there is None:
            thing = {"metadata": {"name": name, "labels": {MANAGED_BY: MANAGER}}, "type": _TLS, "data": data}
            try:
                self._api.create(SECRET, thing, self._namespace)
            except AlreadyExists:
                raise Conflict(
                    f"the secret {name} was made by somebody else meanwhile; it is looked at again"
                ) from None
            return
        version = {"resourceVersion": there["metadata"]["resourceVersion"]}
        self._api.patch(SECRET, name, {"metadata": version, "data": data}, self._namespace)


def _make_authority(now: datetime) -> Signed:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"luks-csi images {now:%Y-%m-%d}")])
    usage = _usage(signs_certificates=True)
    built = (
        _begun(key, name, name, now, _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return _pem(built, key)


def _sign(authority: Signed, dns: str, now: datetime) -> Signed:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = _certificate(authority.certificate)
    try:
        signer = serialization.load_pem_private_key(authority.key.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _damaged(AUTHORITY) from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise FailedPrecondition(f"the key in the secret {AUTHORITY} is not one of ours; delete that secret")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, dns)])
    built = (
        _begun(key, name, issuer.subject, now, _LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return _pem(built, key)


def _begun(
    key: ec.EllipticCurvePrivateKey, name: x509.Name, issuer: x509.Name, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACK)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Signed:
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Signed(certificate.public_bytes(serialization.Encoding.PEM).decode(), text.decode())


def _certificate(text: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(text.encode())
    except ValueError:
        raise FailedPrecondition(
            f"a certificate of the secrets {AUTHORITY}, {AGENT_SECRET} and {OPERATOR_SECRET} cannot be read; delete "
            f"the one that is damaged, it is made anew"
        ) from None


def _signed_of(data: dict[str, str]) -> Signed | None:
    return Signed(data["tls.crt"], data["tls.key"]) if data.get("tls.crt") and data.get("tls.key") else None


def _is_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Two thirds of its life are over, or it has not begun: it was made by a clock that was ahead."""
    begun, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return not begun <= now <= begun + (end - begun) * 2 / 3


def _fits(certificate: x509.Certificate, issuer: x509.Certificate, dns: str, now: datetime) -> bool:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        certificate.verify_directly_issued_by(issuer)
    except (x509.ExtensionNotFound, InvalidSignature, ValueError, TypeError):
        return False
    return dns in names.get_values_for_type(x509.DNSName) and not _is_due(certificate, now)


def _is_ours(secret: Json) -> bool:
    return bool((secret["metadata"].get("labels") or {}).get(MANAGED_BY) == MANAGER)


def _damaged(name: str) -> FailedPrecondition:
    return FailedPrecondition(f"key or certificate of the secret {name} cannot be used; delete it, it is made anew")


def _context_of(name: str, signed: Signed) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with in_memory((signed.certificate + signed.key).encode()) as path:
        try:
            context.load_cert_chain(path, password="")
        except ssl.SSLError:
            raise _damaged(name) from None
    return context
