"""The manifests and what the documents say of them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def arguments_of(container: str) -> set[str]:
    """The arguments of a container of the node's pod."""
    manifest = (ROOT / "deploy/kubernetes/driver/node.yaml").read_text()
    (found,) = re.findall(
        rf"^        - name: {container}\n(.*?)(?=^        - name: |^      \w)", manifest, re.MULTILINE | re.DOTALL
    )
    return set(re.findall(r"^            - (--\S+)$", found, re.MULTILINE))


def test_the_provisioner_has_the_settings_that_are_explained() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    section = page.partition("## Volumes of many nodes")[2].partition("\n## ")[0]
    explained = set(re.findall(r"^\| `(--[^`]+)`", section, re.MULTILINE))
    assert explained > {"--enable-capacity", "--capacity-for-immediate-binding"}
    assert explained <= arguments_of("provisioner")
