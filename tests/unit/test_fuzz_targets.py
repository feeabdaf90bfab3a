"""The targets of `make fuzz` without the fuzzer: each takes its seeds and random damage, and a parser's bug shows."""

import random
import struct

import pytest

from tests.fuzz_targets import Target, inspected, targets

TARGETS = targets()


def damaged(seed: bytes, draw: random.Random) -> bytes:
    content = bytearray(seed)
    for _ in range(draw.randint(0, 6)):
        at = draw.randrange(len(content))
        if draw.random() < 0.8:
            content[at : at + 1] = draw.choice((b"\0", b"\xff", draw.randbytes(1), draw.randbytes(4)))
        else:
            del content[at : at + draw.choice((1, 4, 8, 64))]
            content = content or bytearray(b"x")
    return bytes(content)


def try_handful(target: Target) -> None:
    draw = random.Random(f"{target.name} 7")
    for seed in target.seeds:
        target.run(seed)
        for _ in range(60):
            target.run(damaged(seed, draw))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_seeded_handful_of_damage_is_refused_or_taken(target: Target) -> None:
    try_handful(target)


def test_a_parser_that_stumbles_turns_it_red() -> None:
    def stumbling(data: bytes) -> None:
        inspected(data)
        struct.unpack_from(">I", data, data[0])  # trusts what it is told

    with pytest.raises(struct.error):
        try_handful(Target("stumbling", stumbling, [bytes(64)]))
