"""What a batch gives to inserted modules: media and where they stand in the text, which tokens are visual.

It is set before the model is called and stays until it is set anew or cleared, so that generate's steps, its beams, and
several forward passes read the same. A `with` block would end before backward, where a checkpointed layer runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

UNSET = "nothing was set"


@dataclass(frozen=True)
class Batch:
    """Of one integrator. tensors: what layers take, some None; numbers: the rest, per name."""

    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str):
        return self.tensors[name] if name in self.tensors else self.numbers[name]


@dataclass(frozen=True)
class Given:
    """Of all integrators, by their names; never changed, only replaced."""

    batches: dict[str, Batch] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [t for b in self.batches.values() for t in b.tensors.values() if t is not None]

    def over(self, tensors) -> Given:
        """The same with these in place of `tensors()`."""
        rest = iter(tensors)
        return Given({
            name: replace(b, tensors={k: None if t is None else next(rest) for k, t in b.tensors.items()})
            for name, b in self.batches.items()
        })  # fmt: skip

    def plus(self, name: str, batch: Batch | None) -> Given:
        kept = {n: b for n, b in self.batches.items() if n != name}
        return Given(kept if batch is None else kept | {name: batch})


class Context:
    """One for all hosts and attached modules of a model. `shared`: an integrator's module for all layers, by stack.

    A copy of it, with the model, forgets the batch.
    """

    def __init__(self):
        self.given = Given()
        self.set_as: dict[str, Batch] = {}  # what `given` was made of, where a shared module makes it
        self.shared: dict[str, dict[str, nn.Module]] = {}
        self.parts: dict[str, list[nn.Module]] = {}  # the attached modules of each integrator
        self.kept: dict[tuple, tuple] = {}  # keys and values of media while nothing is trained
        self.now: dict[str, Tensor | None] = {}  # what a layer tells its own sub-layers

    def of(self, name: str) -> Batch | None:
        return self.given.batches.get(name)

    def set(self, name: str, batch: Batch | None) -> None:
        self.set_as = {n: b for n, b in self.set_as.items() if n != name}
        if batch is not None:
            self.set_as[name] = batch
        self.given = self.given.plus(name, batch)
        self.kept.clear()

    def keep(self, place: tuple, key: tuple, make: Callable):
        """make(), or what it gave at this place when the key was the same: compared by identity of its tensors."""
        if place not in self.kept or not _same(self.kept[place][0], key):
            self.kept[place] = key, make()
        return self.kept[place][1]

    def shared_of(self, name: str) -> nn.Module:
        """Of an integrator that goes into one stack."""
        return next(iter(self.shared[name].values()))

    def __getstate__(self):
        return {"shared": self.shared, "parts": self.parts}

    def __setstate__(self, state):
        self.__init__()
        self.shared, self.parts = state["shared"], state["parts"]


def _same(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(
        _same(p, q) if isinstance(p, tuple) else p is q or (isinstance(p, (bool, int)) and p == q)
        for p, q in zip(a, b, strict=True)
    )


def state_of(tensors: Iterable[Tensor]) -> tuple:
    """A key of tensors and their present values."""
    return tuple((t, t._version) for t in tensors)


def past_length(bound: dict, cache: str, index: int, seen: int):
    """How many tokens of the text came before this call's: a number, or a tensor of a static cache.

    seen: what a cache without a length (Mamba's) stands for once it holds a state.
    """
    found = bound.get(cache)
    if found is None:
        return 0
    if cache == "cache_params":
        state = getattr(found.layers[index] if hasattr(found, "layers") else found, "has_previous_state", False)
        return seen if (any(state.values()) if isinstance(state, dict) else bool(state)) else 0
    return found.get_seq_length(index)


def rows_of(t: Tensor, past, length: int, after: str) -> Tensor:
    """t (B, T0, ...) at the positions past to past + length - 1; beyond T0 the last row (after "last") or zeros.

    A call of T0 tokens is the text that t was set for, whatever stands before it in the cache: a prefix of peft's.
    """
    if t.shape[1] == 0:
        return t.new_zeros((t.shape[0], length, *t.shape[2:]))
    if length == t.shape[1] and (length > 1 or (isinstance(past, int) and past == 0)):
        return t
    at = torch.arange(length, device=t.device) + past
    rows = t.index_select(1, at.clamp(max=t.shape[1] - 1))
    if after == "last":
        return rows
    return rows.masked_fill((at >= t.shape[1]).view(1, -1, *([1] * (t.dim() - 2))), 0)


def for_batch(t: Tensor, batch: int, what: str) -> Tensor:
    """t's samples for a batch of as many, or of several beams of each; beams of a sample stand beside each other."""
    if t.shape[0] == batch or t.shape[0] == 1:
        return t
    if batch == 0 or t.shape[0] == 0 or batch % t.shape[0]:
        raise ValueError(f"{what} of {t.shape[0]} samples were set, the text has {batch}; accepted: as many")
    return t.repeat_interleave(batch // t.shape[0], 0)


def check_length(past, length: int, seen: int, what: str) -> None:
    """An error where a text from its start is another one than `what` was set for.

    Without a cache generation calls with ever longer texts; a training step has exactly this one.
    """
    other = length < seen or (length != seen and torch.is_grad_enabled())
    if isinstance(past, int) and past == 0 and other:
        raise ValueError(f"{what} are of {seen} tokens, the text of {length}; accepted: as many")
