"""Rows of key maps: (upstream's name, ours), whose {holes} stand for one part of a name each."""

from __future__ import annotations

Rows = tuple[tuple[str, str], ...]


def same(*names: str) -> Rows:
    """Names that both have."""
    return tuple((name, name) for name in names)


def both(*names: str) -> Rows:
    """`weight` and `bias` of modules that both call alike."""
    return same(*(f"{name}.{p}" for name in names for p in ("weight", "bias")))


def renamed(**names: str) -> Rows:
    """`weight` and `bias` of modules: ours=upstream's."""
    return tuple((f"{their}.{p}", f"{our}.{p}") for our, their in names.items() for p in ("weight", "bias"))


def below(rows: Rows, prefix: str) -> Rows:
    """The rows under a prefix that both have."""
    return tuple((prefix + their, prefix + our) for their, our in rows)
