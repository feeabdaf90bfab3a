"""The table: what was measured, on both sides, beside its bound."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.measure import ratio


@dataclass(frozen=True)
class Row:
    """One measured thing: `value` is to be at most `bound`, or at least where `at_least` says so; without a bound it is
    told for another row's sake.

    `ours` and `other` are the two sides as a person reads them; `written` says how value and bound are.
    """

    what: str
    ours: str
    other: str
    value: float
    bound: float | None
    written: Callable[[float], str] = "{:.2f}x".format
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the bound is kept."""
        if self.bound is None:
            return True
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        told = self.what, self.ours, self.other, self.written(self.value)
        if self.bound is None:
            return *told, "", ""
        return *told, f"{'≥' if self.at_least else '≤'} {self.written(self.bound)}", "met" if self.met else "MISSED"


def times(what: str, ours: Sequence[float], other: Sequence[float], bound: float | None) -> Row:
    """A row of two series of seconds, as `side_by_side` gives them: their `ratio`, at most `bound`, if any."""
    return Row(what, in_ms(ours), in_ms(other), ratio(ours, other), bound)


def fraction(what: str, ours: Sequence[float], other: Sequence[float], most: float) -> Row:
    """As `times`, where ours may take at most one `most`th of the other's."""
    return Row(what, in_ms(ours), in_ms(other), ratio(ours, other), 1 / most, _as_fraction)


def in_ms(seconds: Sequence[float]) -> str:
    """The median of a series, with the number of its values."""
    return f"{median(seconds) * 1e3:.2f} ms (n={len(seconds)})"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of the table, in Markdown, and the summary line."""
    head = ("what", "ours", "against", "is", "bound", "")
    cells = [head, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    for line in (head, tuple("-" * width for width in widths), *cells[1:]):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
    yield f"bench: rows={len(rows)} missed={sum(not row.met for row in rows)}"


def _as_fraction(ratio: float) -> str:
    return f"1/{1 / ratio:.1f}"
