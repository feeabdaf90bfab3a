"""Errors speak to whoever asked: options at the command line, StorageClass words for kubelet."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import csi_driver
from csi_driver.cli.remote import Reach
from csi_driver.cli.words import WORDS, for_people
from csi_driver.rpc.client import RemoteError
from tests.cli import run_cli

FOREIGN = re.compile(
    r"\bStorageClass|PersistentVolume|\bclaims?\b|\bpods?\b|[Kk]ubelet|provisioner|mountOptions|csi\.storage|CreateVolume|"
    r"Kubernetes|VolumeAttributes|ReadWriteOncePod"
)
NO_ERRORS = {
    "/var/lib/kubelet",  # a setting
    "StorageClass parameter ignored",  # an event of the log
    "csi.storage.k8s.io/",  # names of parameters
    "provisioner",  # the same
}


def sentences() -> Iterator[str]:
    """Every text of the code below rpc but for docstrings; what is put in is {}. `doctor`, what a KMS and its
    configuration are told of, and what works with Kubernetes' objects speak to administrators.
    """
    for path in sorted(Path(csi_driver.__file__).parent.rglob("*.py")):
        if path.parent.name in {"admission", "agent", "cli", "kube", "operator", "rpc"} or path.name in {
            "health.py",
            "storage_health.py",
        }:
            continue
        if path.parent.name == "backends" and path.name.startswith("csi"):
            continue
        if path.parent.name == "keys" and path.name != "secret.py":
            continue
        tree = ast.parse(path.read_text())
        passed = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                passed |= set(map(id, node.values))
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in passed:
                yield node.value


def test_no_error_speaks_of_kubernetes_at_the_command_line() -> None:
    told = [for_people(sentence) for sentence in sentences() if sentence not in NO_ERRORS]
    assert [sentence for sentence in told if FOREIGN.search(sentence)] == []
    assert len(told) > 1000, "they are found"


def test_every_word_that_is_replaced_is_said_somewhere() -> None:
    said = list(sentences())
    assert [theirs for theirs, _ in WORDS if not any(theirs in sentence for sentence in said)] == []


@pytest.mark.parametrize("output", ["table", "json"])
def test_what_a_server_says_is_told_in_them(output: str) -> None:
    def refuse(_: Path) -> None:
        raise RemoteError(
            "UNAUTHENTICATED",
            "the passphrase in the secret opens no key slot of volume v on /dev/loop0; put the passphrase it was "
            "last given back into the secret",
        )

    done = run_cli("volume", "list", "-o", output, obj=Reach(refuse))  # type: ignore[arg-type]
    assert done.exit_code == 1
    assert (
        "the passphrase opens no key slot of volume v on /dev/loop0; give the passphrase it was last given"
        in done.stderr
    )
