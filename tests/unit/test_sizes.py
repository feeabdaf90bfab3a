"""Sizes as people and Kubernetes write them (apimachinery's quantities)."""

import pytest

from csi_driver.model.sizes import read_size, read_some


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("5", 5),
        ("1Ki", 1024),
        ("3Mi", 3 << 20),
        ("2Ti", 2 << 40),
        ("1Ei", 1 << 60),
        ("1k", 1000),
        ("1G", 1_000_000_000),
        ("1.5Gi", 3 << 29),
        ("0.5k", 500),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "Gi", "1.Gi", ".5Gi", "0.5", "1.0001k", "-1", "1 Gi", "1GB", "1g", "1K", "\u0661"]
)
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        read_size(text)


def test_a_size_of_nothing_is_refused_where_something_is_to_be() -> None:
    assert read_some("1") == 1
    for text in ("0", "0Gi", "0.0"):
        with pytest.raises(ValueError, match="at least one byte"):
            read_some(text)
