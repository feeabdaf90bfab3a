"""What kubectl makes of kustomizations that lie beside the project, as a user's do."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def told(page: str, words: str) -> dict[str, Any]:
    """The one kustomization of a page of docs/ that has these words."""
    found = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    (text,) = (text for text in found if words in text)
    kustomization: dict[str, Any] = yaml.safe_load(text)
    return kustomization


def built(folder: Path, kustomization: dict[str, Any]) -> list[Any]:
    """The objects of one; CalledProcessError, with kubectl's words, where it is refused."""
    place = os.path.relpath(ROOT, folder)
    for key in ("resources", "components", "transformers"):
        if key in kustomization:
            kustomization[key] = [each.replace("luks-csi/deploy", f"{place}/deploy", 1) for each in kustomization[key]]
    folder.mkdir(exist_ok=True)
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    kubectl = Path(os.environ.get("KUBERNETES_BIN", "")) / "kubectl"
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=True)
    return [*yaml.safe_load_all(done.stdout)]
