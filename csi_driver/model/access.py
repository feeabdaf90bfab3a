"""What a call brings to reach a volume's storage, where that lies outside the node."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """The entries of the call's secret, the contexts of its volume, and, for a new one, where it may lie.

    `topologies` are segments to choose from, the preferred first. Neither repr nor comparison shows a secret's entry.
    """

    secrets: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    volume_context: Mapping[str, str] = field(default_factory=dict)
    publish_context: Mapping[str, str] = field(default_factory=dict)
    topologies: tuple[Mapping[str, str], ...] = ()
