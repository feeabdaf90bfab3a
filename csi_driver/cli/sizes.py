"""Sizes as people and Kubernetes write them."""

import re
from fractions import Fraction

_UNITS = {
    "": 1,
    **{f"{letter}i": 1 << 10 * power for power, letter in enumerate("KMGTPE", 1)},
    **{letter: 10 ** (3 * power) for power, letter in enumerate("kMGTPE", 1)},
}


def read_size(text: str) -> int:
    """Bytes of a size such as 1073741824, 512Mi, 1.5Gi or 1G (10**9): a Kubernetes quantity. Raises ValueError."""
    found = re.fullmatch(r"([0-9]{1,15})(\.[0-9]{1,9})?([KMGTPE]i|[kMGTPE]|)", text)
    size = Fraction(found[1] + (found[2] or "")) * _UNITS[found[3]] if found else Fraction(1, 2)
    if size.denominator != 1:
        raise ValueError(f"{text!r} is no size; write bytes, or a number with Ki, Mi, Gi, Ti, or k, M, G, T")
    return int(size)


def read_some(text: str) -> int:
    """As `read_size`, of something that is there. Raises ValueError for 0 too."""
    size = read_size(text)
    if size == 0:
        raise ValueError(f"{text!r} is no size that anything could have; write at least one byte")
    return size
