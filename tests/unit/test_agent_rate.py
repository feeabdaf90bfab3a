"""Work beside pods: no faster than it may go."""

from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.agent.rate import Rate, paced
from csi_driver.images.base import Progress


def test_what_is_done_is_paid_for_once_and_told_as_ever() -> None:
    told: list[int] = []

    @contextmanager
    def meter(what: str, total: int | None) -> Iterator[Progress]:  # noqa: ARG001
        yield told.append

    class Counted(Rate):
        spent = 0

        def spend(self, count: int) -> None:
            self.spent += count

    rate = Counted(1)
    with paced(meter, rate)("copying", 100) as progress:
        for done in (40, 70, 100):  # an earlier run has done 40
            progress(done)
    assert (told, rate.spent) == ([40, 70, 100], 60)
