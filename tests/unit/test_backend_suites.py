"""`make backends-test` and `make ceph-test` find their tests, whatever BACKEND they are told."""

import os
import subprocess
import sys

import pytest

from tests.backends.rigs import RIGS

ONE = "test_a_volume_is_blank_and_as_long_as_asked_for"


@pytest.mark.parametrize("backend", RIGS)
def test_the_conformance_suite_is_found_for_each_backend(backend: str) -> None:
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/backends/test_conformance.py", "-k", ONE]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, env={**os.environ, "BACKEND": backend})
    assert f"{ONE}[{backend}]" in done.stdout, done.stdout + done.stderr
