"""One declaration of shapes for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """Named dims of one call of an op, the options that are no tensor shapes, and what it is for.

    tags: "bench" cases are timed and compiled ahead of time, the others are computed in tests; "uncounted" ones take
    the interpreter too long for the memory report. recipe: where the shape comes from.
    """

    name: str
    dims: Mapping[str, int]
    options: Mapping[str, object] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    recipe: str = ""

    def __post_init__(self):
        object.__setattr__(self, "dims", MappingProxyType(dict(self.dims)))
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        object.__setattr__(self, "tags", frozenset(self.tags))

    def __getitem__(self, dim: str) -> int:
        return self.dims[dim]

    def get(self, option: str, default=None):
        return self.options.get(option, default)

    def derived(self, **options) -> Case:
        """The same case with other options."""
        return replace(self, options={**self.options, **options})

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Precision:
    """base: dtype of activations and frozen weights; adapter: of what is trained; autocast: to which dtype, if any."""

    name: str
    base: torch.dtype
    adapter: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def compute(self) -> torch.dtype:
        return self.autocast or self.base


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32", torch.float32, torch.float32),
        Precision("bf16", torch.bfloat16, torch.bfloat16),
        Precision("fp16", torch.float16, torch.float16),
        # peft's default over a half-precision model
        Precision("bf16+fp32", torch.bfloat16, torch.float32),
        Precision("fp16+fp32", torch.float16, torch.float32),
        Precision("amp-bf16", torch.float32, torch.float32, torch.bfloat16),
        # as people train: frozen base in bf16, fp32 adapters, autocast
        Precision("bf16+fp32 amp", torch.bfloat16, torch.float32, torch.bfloat16),
    )
}


class Make:
    """Makes a case's tensors: seeded, in the precision's dtypes, and as slices of wider buffers when `wide`."""

    def __init__(self, precision: Precision, seed: int = 0, device: str | torch.device = "cpu", wide: bool = False):
        self.precision, self.device, self.wide = precision, torch.device(device), wide
        self.generator = torch.Generator(device=self.device).manual_seed(seed)

    def normal(
        self, *shape: int, std: float = 1.0, role: str = "base", grad: bool = False, wide: bool = True
    ) -> Tensor:
        """Normal values; role "adapter" takes the adapter dtype. `wide=False` for what users never slice."""
        dtype = self.precision.adapter if role == "adapter" else self.precision.base
        buffer = shape
        if self.wide and wide and len(shape) > 1:
            buffer = (*shape[:-1], shape[-1] + 8)
        # drawn in float32 so that every dtype rounds the same numbers
        t = (torch.randn(buffer, generator=self.generator, device=self.device) * std).to(dtype)
        if buffer is not shape:
            t = t[..., 4:-4]  # keeps the odd strides and a start off the allocation's alignment
        return t.requires_grad_(grad)

    def seed(self, count: int | None = None) -> Tensor:
        """One 0-d seed, or `count` of them."""
        size = () if count is None else (count,)
        return torch.randint(-(2**62), 2**62, size, generator=self.generator, device=self.device)

    def rows(self, count: int, below: int) -> Tensor:
        """`count` row numbers in a random order: distinct where there are so many, else every one at least once."""
        order = torch.randperm(max(count, below), generator=self.generator, device=self.device)
        return order[:count].remainder(below)  # a tensor of its own, no view

    def numbers(self, values: Sequence[int]) -> Tensor:
        """Given integers, as int32."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)
