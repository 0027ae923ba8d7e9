"""Views: modules of our classes around the children of a model's own, so that our forward runs on them.

A view holds the same child modules under the same names, is kept beside them outside of the module tree, and is made
anew when a child or a parameter is another object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..modules._children import child_problem


def view_of(
    kind: type[nn.Module], names: Mapping[str, str], children: Mapping[str, nn.Module | None], **attributes
) -> nn.Module:
    """A module of `kind` around children that belong to another one; names: role -> name, as its constructor takes."""
    view = kind.__new__(kind)
    nn.Module.__init__(view)
    view.names = dict(names)
    for role, child in children.items():
        view.add_module(names[role], child)
    for name, value in attributes.items():
        setattr(view, name, value)
    return view


def problem(m: nn.Module, kinds: tuple[type, ...], acts: dict) -> str | None:
    """Which child stands in the way of reading its weights, or None. kinds: the module's own classes below it."""
    for path, child in m.named_modules():
        if child is m:
            continue
        known = (nn.Linear, nn.LayerNorm, nn.ModuleList, *kinds, *acts)
        if (reason := child_problem(path, child, known)) is not None:
            return reason
    dtypes = {p.dtype for p in m.parameters()}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(next(m.parameters()).device.type):
        return f"parameters are {' and '.join(sorted(map(str, dtypes)))}"
    return None


class Viewed:
    """Beside a model's own class in its swapped class: keeps one view."""

    def _vlkernels_view(self, make: Callable) -> object:
        """make(), remade when a module or a parameter below is another one."""
        now = (*self.modules(), *self.parameters())
        have = self.__dict__.get("_vlkernels_cache")
        if have is None or len(have[0]) != len(now) or any(a is not b for a, b in zip(have[0], now, strict=True)):
            have = self._vlkernels_cache = _Kept((now, make()))
        return have[1]

    def vlkernels_configure(self, **_) -> None:
        self.__dict__.pop("_vlkernels_cache", None)


class _Kept(tuple):
    """Made from the modules at hand; copies and pickles of those make their own."""

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return _nothing, ()


def _nothing() -> None:
    return None
