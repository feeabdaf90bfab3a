"""The cluster of a session, and the summary of its tests."""

import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.driver import driver
from tests.cluster.pods import pods
from tests.cluster.settings import DISK, LOGS

__all__ = ["driver", "pods"]  # fixtures

_TEST_SECONDS = 300
_modules = pytest.StashKey["dict[str, _Module]"]()
_started = pytest.StashKey[float]()
_cluster = pytest.StashKey[Cluster]()
_told = pytest.StashKey[list[str]]()


@dataclass
class _Module:
    tests: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    seconds: float = 0


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster, with one node and no driver. `cluster.node(2)` adds a second one for the rest of the session."""
    if not os.environ.get(DISK):
        pytest.fail("The cluster needs namespaces of its own: run these tests by python -m tests.cluster.")
    cluster = Cluster()
    try:
        cluster.start()
        request.config.stash[_cluster] = cluster
        yield cluster
        assert not (complaints := [line for node in cluster.nodes for line in node.complaints]), complaints
    finally:
        cluster.close()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Puts a line into the summary, whether or not the test passes."""
    return request.config.stash[_told].append


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace for one test. Nothing of it is left at the end."""
    with cluster.namespace() as name:
        yield name


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_modules] = {}
    config.stash[_told] = []
    config.stash[_started] = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_TEST_SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    module = item.config.stash[_modules].setdefault(item.path.stem.removeprefix("test_"), _Module())
    module.seconds += report.duration
    module.tests.add(item.nodeid)
    if report.failed:
        module.failed.add(item.nodeid)
        if cluster := item.config.stash.get(_cluster, None):
            cluster.save_state(LOGS / "failed" / re.sub(r"[^\w.-]", "_", item.name))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if cluster := config.stash.get(_cluster, None):
        phases = (f"{name} {seconds:.1f} s" for name, seconds in cluster.phases)
        terminalreporter.write_line(f"cluster up: {', '.join(phases)}")
    for line in config.stash[_told]:
        terminalreporter.write_line(line)
    tests = failed = 0
    for name, module in sorted(config.stash[_modules].items()):
        tests += len(module.tests)
        failed += len(module.failed)
        counts = f"tests={len(module.tests)} failed={len(module.failed)} seconds={module.seconds:.0f}"
        terminalreporter.write_line(f"cluster {name}: {counts}")
    seconds = time.monotonic() - config.stash[_started]
    terminalreporter.write_line(f"cluster: tests={tests} failed={failed} seconds={seconds:.0f}")
