"""One API for the session, with operator and agents of two nodes; and one for a module, with nothing."""

from collections.abc import Iterator

import pytest

from tests.cluster.pki import Authority
from tests.image_server import ImageServer, serving
from tests.keys.apiserver import api_server
from tests.operator.api import Api, running
from tests.operator.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("operator")
    authority = Authority(folder / "pki")
    with api_server(folder, authority) as api:
        lab = Lab(api, authority, folder)
        try:
            lab.operator.start()
            lab.mount_certificates()
            for name in ("one", "two"):
                lab.node(name)
            yield lab
        finally:
            lab.close()


@pytest.fixture
def web() -> Iterator[ImageServer]:
    """A server with a disk of two MiB that is no text."""
    with serving(bytes(range(256)) * 8192) as server:
        yield server


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An API of a module's own, without any of our kinds."""
    with running(tmp_path_factory.mktemp("api")) as api:
        yield api
