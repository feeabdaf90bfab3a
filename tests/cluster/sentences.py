"""What events say to users, held against what docs/kubernetes.md tells of them."""

import re

from tests.cluster.driver import KEY, STATE, secret
from tests.cluster.pods import Pods
from tests.cluster.settings import ROOT

SAID_SECONDS = 90
MENDED_SECONDS = 120  # kubelet doubles its pauses, the provisioner's end at 30 s, capacities are published each minute


def said(pods: Pods, kind: str, name: str, *words: str, namespace: str | None = None) -> str:
    """Wait until an event of an object has all these words, and return it. The document must know it."""
    where = pods.namespace if namespace is None else namespace
    text = pods.cluster.wait_event(kind, name, where, *words, timeout=SAID_SECONDS)
    assert any(known.search(text) for known in _documented()), text
    return text


def _documented() -> list[re.Pattern[str]]:
    """What the events say according to the document: the quotations in the first column of its table."""
    section = (ROOT / "docs" / "kubernetes.md").read_text().partition("## A pod that does not start")[2]
    rows = (line.split(" | ")[0] for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `"))
    quoted = [quotation for row in rows for quotation in re.findall("`([^`]+)`", row)]
    return [re.compile(".*".join(map(re.escape, quotation.split("…")))) for quotation in quoted]


def made(pods: Pods) -> str:
    """The files on the node of all claims of the test, which are named after their uids."""
    claims = pods.cluster.items("PersistentVolumeClaim", pods.namespace)
    uids = "\\|".join(claim["metadata"]["uid"] for claim in claims)
    return pods.node.run(f"find {STATE}/loopfile | grep '{uids}'; true").text


def restore_secret(pods: Pods) -> None:
    """Have the secret KEY as it should be."""
    pods.cluster.api.delete("Secret", KEY, pods.namespace)
    pods.cluster.api.create(secret(), pods.namespace)
