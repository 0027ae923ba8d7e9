"""Which backend runs an op, and why."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .op import Op

ORDER = ("cuda", "triton", "reference")
OPS: dict[str, Op] = {}


class BackendRefused(RuntimeError):
    """A backend was forced and cannot run this call; the message carries its reason."""


def _known(name: str | None, where: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in ORDER:
        raise ValueError(f"{where} is {name!r}; accepted: auto, {', '.join(ORDER)}")
    return name


_forced: str | None = _known(os.environ.get("VLKERNELS_BACKEND"), "VLKERNELS_BACKEND")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force every op call in the block onto "reference", "triton" or "cuda"; None or "auto" lifts it.

    The setting is the process's, as torch's own switches are. A backward pass uses its forward's backend.
    """
    global _forced
    previous, _forced = _forced, _known(name, "use_backend(name)")
    try:
        yield
    finally:
        _forced = previous


_recorder: list[tuple[str, str]] | None = None


@contextlib.contextmanager
def record() -> Iterator[list[tuple[str, str]]]:
    """Yields a list that grows by (op name, backend) with each op call inside the block."""
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous


def verdict(op: Op, backend: str, values: tuple) -> str | None:
    """Why `backend` cannot run op(*values), or None when it can."""
    if backend == "reference":
        return None
    kernel = op.kernels[backend]
    return kernel if isinstance(kernel, str) else kernel.refuses(*values)


def choose(op: Op, values: tuple, backend: str | None = None) -> str:
    """The backend for op(*values): the forced one, else the first of ORDER that neither refuses nor declines."""
    chosen = _choose(op, values, _known(backend, "backend=") or _forced)
    if _recorder is not None:
        _recorder.append((op.name, chosen))
    return chosen


def _choose(op: Op, values: tuple, forced: str | None) -> str:
    if forced is not None:
        reason = verdict(op, forced, values)
        if reason is not None:
            raise BackendRefused(f"{op.name}: backend {forced!r} was asked for but refuses: {reason}")
        return forced
    for name in ORDER:
        if verdict(op, name, values) is None and _declines(op, name, values) is None:
            return name
    raise AssertionError("unreachable: the reference never refuses")


def _declines(op: Op, backend: str, values: tuple) -> str | None:
    """Why `backend` is not chosen by itself although it could run: it is not the faster one here, as far as known."""
    return None if backend == "reference" else op.kernels[backend].declines(*values)


@dataclass(frozen=True)
class Explanation:
    """The decision for one op call: the backend that would run and each backend's answer."""

    op: str
    chosen: str
    answers: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        rows = (f"  {'->' if name == self.chosen else '  '} {name:<10} {answer}" for name, answer in self.answers)
        return "\n".join((f"{self.op}: {self.chosen}", *rows))

    @property
    def reason(self) -> str:
        """Why no backend before the chosen one runs, in one line."""
        before = ORDER[: ORDER.index(self.chosen)] if self.chosen in ORDER else ()
        return "; ".join(f"{name} {answer}" for name, answer in self.answers if name in before)


def decide(op: Op, values: tuple, backend: str | None = None) -> Explanation:
    """What `choose` would do for op(*values), with every backend's answer; nothing is run and nothing raises."""
    forced = _known(backend, "backend=") or _forced
    answers, able = [], []
    for name in ORDER:
        refusal = verdict(op, name, values)
        declined = None if refusal is not None else _declines(op, name, values)
        if refusal is not None:
            answers.append((name, f"refuses: {refusal}"))
        elif declined is not None and name != forced:
            answers.append((name, f"can run, not chosen by itself: {declined}"))
        else:
            note = getattr(op.kernels.get(name), "note", lambda *_: "")(*values)
            answers.append((name, "can run" + (" (forced)" if name == forced else "") + (f", {note}" if note else "")))
            able.append(name)
    if forced is None:
        chosen = able[0]
    else:
        chosen = forced if forced in able else f"an error, {forced} was asked for"
    return Explanation(op.name, chosen, tuple(answers))


def explain(op: Op, *args, backend: str | None = None, **kwargs) -> Explanation:
    """Print, and return, which backend op(*args, **kwargs) would run on and what each backend says about it."""
    explanation = decide(op, op.values(*args, **kwargs), backend)
    print(explanation)
    return explanation
