"""One API for the session, with operator and agents of two nodes; and one for a module, with nothing."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.image_server import ImageServer, serving
from tests.operator.api import Api, running
from tests.operator.lab import Lab, a_lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with a_lab(tmp_path_factory.mktemp("operator"), ("one", "two")) as lab:
        yield lab


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


@pytest.fixture
def small(lab: Lab) -> Iterator[str]:
    """A node whose disk has room for four MiB."""
    images = lab.images_of("small")
    images.mkdir(parents=True, exist_ok=True)
    alone = ("unshare", "--user", "--map-root-user", "--mount")
    if subprocess.run([*alone, "mount", "-t", "tmpfs", "none", images], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    mount = f'mount -t tmpfs -o size=4m none "{images}" && exec "$@"'
    lab.node("small", within=[*alone, "sh", "-c", mount, "sh"], room="little", spare="room")
    yield "small"
    lab.forget_node("small")
