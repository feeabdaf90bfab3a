"""The servers of a session, and what a driver's key sources are made of."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import stamina

from csi_driver.host.workers import Workers
from csi_driver.keys.audit import Audit
from csi_driver.keys.config import KmsConfig
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.keys.sources import KeySources
from tests.cluster.pki import Authority
from tests.keys import clouds, servers
from tests.keys.apiserver import ApiServer, api_server

AWS_CREDENTIALS = {name.upper(): value for name, value in servers.AWS_CREDENTIALS.items()}


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "pki")


@pytest.fixture(scope="session")
def vault(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[servers.Vault]:
    with servers.vault(tmp_path_factory.mktemp("vault"), authority) as vault:
        for mount, kind, version in (("secret", "kv", "2"), ("old", "kv", "1"), ("transit", "transit", "")):
            options = {"options": {"version": version}} if version else {}
            vault.ask("POST", f"sys/mounts/{mount}", {"type": kind, **options})
        yield vault


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.aws(tmp_path_factory.mktemp("aws")) as address:
        yield address


@pytest.fixture
def aws_key(aws: str) -> str:
    return servers.aws_key(aws)


@pytest.fixture(scope="session")
def local_kms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.local_kms(tmp_path_factory.mktemp("local-kms")) as address:
        yield address


@pytest.fixture
def local_kms_key(local_kms: str) -> str:
    return servers.aws_key(local_kms)


@pytest.fixture(scope="session")
def kmip(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[servers.KmipServer]:
    with servers.kmip(tmp_path_factory.mktemp("kmip"), authority) as kmip:
        yield kmip


@pytest.fixture(scope="session")
def azure_service(authority: Authority) -> Iterator[clouds.AzureKeyVault]:
    with clouds.serving(clouds.AzureKeyVault(), authority) as cloud:
        yield cloud


@pytest.fixture(scope="session")
def ibm_service(authority: Authority) -> Iterator[clouds.IbmKeyProtect]:
    with clouds.serving(clouds.IbmKeyProtect(), authority) as cloud:
        yield cloud


@pytest.fixture(scope="session")
def google_service(authority: Authority) -> Iterator[clouds.GoogleKms]:
    with clouds.google(authority) as cloud:
        yield cloud


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's container trusts the authority of the tests."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", authority.certificate)


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[tuple[servers.Plugin, str]]:
    with servers.plugin(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("api"), authority) as api:
        yield api


@pytest.fixture
def kubernetes(api: ApiServer, tmp_path: Path) -> Kubernetes:
    return api.as_driver(tmp_path / "serviceaccount")


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    workers = Workers(("csi_driver.keys.exec",))
    workers.start()
    yield workers
    workers.stop()


@pytest.fixture
def once() -> Iterator[None]:
    """Nothing is tried again."""
    stamina.set_testing(True, attempts=1)
    yield
    stamina.set_testing(False)


Make = Callable[..., KeySources]


@pytest.fixture
def sources(tmp_path: Path, workers: Workers) -> Iterator[Make]:
    """Makes the key sources of a driver whose configuration has one entry, `kms`, of these fields."""
    made: list[KeySources] = []

    def make(kubernetes: Kubernetes | None = None, **fields: object) -> KeySources:
        config = tmp_path / "config.json"
        config.write_bytes(msgspec.json.encode({"kms": fields}))
        found = kubernetes or Kubernetes("", "")
        programs = tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        audit = Audit(tmp_path / "audit.jsonl")
        made.append(KeySources(KmsConfig(config, found), found, workers, programs, audit))
        return made[-1]

    yield make
    for each in made:
        each.close()
