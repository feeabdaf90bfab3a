"""Sizes as people and Kubernetes write them."""

import re

_UNITS: dict[str, int] = {
    "": 1,
    **{f"{letter}i": 1 << 10 * power for power, letter in enumerate("KMGTPE", 1)},
    **{letter: 10 ** (3 * power) for power, letter in enumerate("kMGTPE", 1)},
}


def read_size(text: str) -> int:
    """Bytes of a size such as 1073741824, 512Mi, 1.5Gi or 1G (10**9): a Kubernetes quantity. Raises ValueError."""
    found = re.fullmatch(r"([0-9]{1,15})(\.[0-9]{1,9})?([KMGTPE]i|[kMGTPE]|)", text)
    if found:
        fraction = (found[2] or ".")[1:]
        size, rest = divmod(int(found[1] + fraction) * _UNITS[found[3]], int(f"1{'0' * len(fraction)}"))
        if not rest:
            return size
    raise ValueError(f"{text!r} is no size; write bytes, or a number with Ki, Mi, Gi, Ti, or k, M, G, T")


def read_some(text: str) -> int:
    """As `read_size`, of something that is there. Raises ValueError for 0 too."""
    size = read_size(text)
    if size == 0:
        raise ValueError(f"{text!r} is no size that anything could have; write at least one byte")
    return size
