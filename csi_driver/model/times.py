"""Moments as records tell them."""

from datetime import UTC, datetime


def recorded(moment: datetime) -> str:
    """ISO 8601, in UTC and to the second."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def recorded_now() -> str:
    """The present moment."""
    return recorded(datetime.now(UTC))
