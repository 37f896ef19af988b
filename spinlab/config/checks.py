"""Checks of single settings: each raises InputError with the value, the limit and the fix."""

from spinlab.errors import InputError, near_names

_MOST = 1_000_000


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = near_names(value, allowed)
        told = f"choose one of {', '.join(allowed)}" + (f"; {near}" if near else "")
        raise InputError(f"{name}={value} is unknown: {told}")


def bits(name: str, value: int, fewest: int) -> None:
    if not fewest <= value <= 16:
        raise InputError(f"{name}={value} is out of range: bits go from {fewest} to 16 (16 = off)")


def ratio(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InputError(f"{name}={value} is out of range: a clip ratio lies in (0, 1]")


def positive(name: str, value: float | None) -> None:
    """None stands for a setting that is left out."""
    if value is not None and not value > 0:
        raise InputError(f"{name}={value} must be positive")


def at_least(name: str, value: float | None, least: float) -> None:
    """None stands for a setting that is left out."""
    if value is not None and not value >= least:
        raise InputError(f"{name}={value} must be at least {least}")


def count(name: str, value: int, least: int = 1, most: int = _MOST) -> None:
    """Check how many of something a run makes or holds: more than `most` is a slip of the hand."""
    if not least <= value <= most:
        raise InputError(f"{name}={value} is out of range: it goes from {least} to {most}")


def filled(name: str, values: list[str]) -> None:
    if not values:
        raise InputError(f"{name}=[] is empty: name at least one")
