"""What somebody has to do for an Image, or what he did to it, in words."""

from collections.abc import Collection, Sequence
from typing import Final

from csi_driver.kube.kinds import Json, name_of

COPIES_LOST: Final = "CopiesLost"
"""Reason of the condition Ready: each copy of what was there is gone."""


def upload_of(image: Json) -> str:
    """The command that an Image waits for; a secret that it names is named there too."""
    words = ["luks-csi image upload FILE", name_of(image)]
    if secret := image["spec"].get("secretRef"):
        words.append(f"--secret {secret['namespace']}/{secret['name']}")
    return " ".join(words)


def lost(image: Json, nodes: Collection[str]) -> str:
    """Why there is no copy of it any more, `nodes` being those there are. Once that was told, nothing else tells which
    had one.
    """
    status = image["status"]
    if any(each.get("reason") == COPIES_LOST for each in status.get("conditions") or ()):
        return str(status["message"])
    here = sorted(node["name"] for node in status.get("nodes") or () if node["name"] in nodes)
    if here:
        return f"somebody deleted its copies, and with them the files on {', '.join(here)}; delete it and make it anew"
    return (
        "the nodes that had it are gone, and with them each copy; it is usable when one returns with its disk, else "
        "delete it and make it anew"
    )


def removed(copies: Sequence[Json], agents: Collection[str]) -> str:
    """How far the removal of its files is, `agents` being the nodes with one; what helps where nobody answers."""
    nodes = sorted(copy["spec"]["node"] for copy in copies)
    away, here = ([node for node in nodes if (node in agents) is up] for up in (False, True))
    told = {copy["spec"]["node"]: copy.get("status", {}).get("message") for copy in copies}
    said = [f"node {node}: {told[node]}" for node in here if told[node]]
    if here and not said:
        said.append(f"its files are being removed from {', '.join(here)}")
    if away:
        where = f"node {away[0]}" if len(away) == 1 else f"nodes {', '.join(away)}"
        said.append(
            f"no image agent answers on {where}; its file there is removed when one does, and forgotten when the node "
            f"is deleted from the cluster"
        )
    return "; ".join(said) or "its files are removed"
