"""Bottleneck adapters at a language model's sub-layers: after attention and feed-forward, before the residual add."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..modules.adapters import KINDS, make_adapter
from ..modules.vl_adapter import PHMLinear, VLAdapterController, VLHyperformer, share_phm_rule
from .context import Batch, Context, for_batch
from .families import Family, Site, Stack, follow
from .hosts import View, on_input, on_output
from .integrators import Integrator, Part, dtype_of

# where upstream puts them, if not after both
_AT = {"seq_bn": ("ffn",), "par_bn": ("ffn",), "magma": ("ffn",), "lavin": ("attention",)}
_BLOCKS = {"attention": "attn", "cross_attention": "cross", "ffn": "ff"}  # Hyperformer's names
_TASKS = ("vl_adapter", "compacter", "low_rank", "hyperformer")


@dataclass(frozen=True, kw_only=True)
class Adapters(Integrator):
    """An adapter of `kind` at sub-layers of each layer; h its output before the residual add, r its residual input.

    kind, with modules.make_adapter's options in `options`: "bottleneck" (this library's, zero at the start), "seq_bn"
    (Pfeiffer), "double_seq_bn" (Houlsby), "par_bn" (adapter-hub), "magma", "vl_adapter", "compacter", "low_rank",
    "hyperformer" (one network for a stack), "vl_pet", "lavin" (before the sub-layer), "frozenbilm".
    at: of "attention", "cross_attention", "ffn"; None: where upstream has them (attention and ffn; ffn alone for
    seq_bn, par_bn and magma; attention alone for lavin). Of Mamba's layers the mixer is the "attention".
    stack: both. vl_pet: in a decoder with cross-attention the values get a parallel adapter of rank decoder_rank, as
    upstream, and nothing else.
    train_norms: the adapted layers' norms keep training, as published for VL-Adapter, VL-PET and FrozenBiLM.
    shared_rule: one phm_rule for all of the model's Compacters. tasks in options: `model.vlkernels.set_task(name)`.

    At the start "bottleneck", "par_bn" and "lavin" are the base model bit for bit; the others start small, as upstream.
    In a post-norm block r and the norm are the block's own. The base's dropout stands before the adapter where it is a
    module (GPT-2, GPT-J, DeBERTa-v2) and behind it elsewhere. Gates that average over the sequence (use_gating, the
    small one of VL-PET) see the tokens of one call, behind a cache the new ones alone. LaVIN's modality token:
    modules.LaVINModality.
    """

    kind: str = "bottleneck"
    options: dict = field(default_factory=dict)
    at: tuple[str, ...] | None = None
    train_norms: bool = False
    shared_rule: bool = False
    decoder_rank: int = 96
    name: str = "adapters"
    stack: str = "both"

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; accepted: {', '.join(KINDS)}")
        if self.options.get("original_ln_after") is False:
            raise ValueError("original_ln_after is False; accepted: True, for the block adds r and applies its norm")
        places = self.places
        if not places or any(p not in _BLOCKS for p in places) or len(set(places)) < len(places):
            raise ValueError(f"at is {self.at!r}; accepted: some of {', '.join(_BLOCKS)}")

    @property
    def places(self) -> tuple[str, ...]:
        if self.at is None:
            return _AT.get(self.kind, ("attention", "ffn"))
        return (self.at,) if isinstance(self.at, str) else tuple(self.at)

    @property
    def takes(self) -> tuple[str, ...]:
        return ("task",) if self.kind in _TASKS else ()

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.options.get("tasks", ("default",)))

    def refuses(self, family: Family) -> str | None:
        if not self._sites(family):
            return f"{family.name}'s {family.stack} has no {' or '.join(self.places)}"
        inner = self.kind == "lavin" or (self.kind == "magma" and self.options.get("parallel"))
        if inner and any(isinstance(s.residual, int) for s in self._sites(family)):
            return f"{family.name}'s sub-layers end where their input is no longer at hand"
        if self.kind == "lavin" and any(s.host for s in self._sites(family)):
            return f"{family.name}'s sub-layers do not tell how much of the text came before; accepted: decoders"
        return None

    def _sites(self, family: Family) -> list[Site]:
        if self._values(family):
            return [family.site("cross_attention")]
        return [s for s in family.sites if s.kind in self.places]

    def _values(self, family: Family) -> bool:
        return self.kind == "vl_pet" and family.stack == "decoder" and family.site("cross_attention") is not None

    def shared(self, stack: Stack, made: dict) -> nn.Module | None:
        if self.kind != "hyperformer":
            return None
        words = {"tasks": self.tasks, "layers": len(stack.layers)} | self.options
        return VLHyperformer(follow(stack.layers[0], stack.family.width), **words, **made)

    def parts(self, family, layer, number, layers, made):
        width, found = follow(layer, family.width), {}
        for site in self._sites(family):
            if self._values(family):
                # its own host: the attention, in whose forward the values are made
                host = f"{site.host}.{site.first}".removeprefix(".")
                values = follow(layer, host)
                values = values.v if hasattr(values, "v") else values.v_proj
                if values.out_features != width:
                    raise ValueError(f"values {values.out_features} wide beside {width} channels; accepted: as wide")
                found[host] = _Values(VLAdapterController(width, r=self.decoder_rank, **made))
                continue
            part = found.setdefault(site.host, _Adapters(number))
            own = None if self.kind == "hyperformer" else make_adapter(self.kind, width, **self.options, **made)
            part.put(site, own)
        return found

    def finish(self, parts: list[nn.Module]) -> None:
        rules = [m for part in parts for m in part.modules() if isinstance(m, PHMLinear)]
        if self.shared_rule and rules:
            share_phm_rule(nn.ModuleList(rules))

    def keeps(self, layer: nn.Module) -> list[nn.Parameter]:
        if not self.train_norms:
            return []
        norms = (m for m in layer.modules() if type(m).__name__.endswith("Norm"))
        return [p for norm in norms for p in norm.parameters()]

    def batch(self, context: Context, task) -> Batch | None:
        if task is not None and task not in self.tasks:
            raise ValueError(f"task is {task!r}; accepted: {', '.join(self.tasks)}")
        return Batch(numbers={"task": task})


class _Adapters(Part):
    """The adapters of one host's sub-layers, by the sub-layers' kinds; none of its own where the stack shares one."""

    def __init__(self, number: int):
        super().__init__()
        self.number, self.sites = number, {}

    def put(self, site: Site, adapter: nn.Module | None) -> None:
        self.sites[site.kind] = site
        if adapter is not None:
            self.add_module(site.kind, adapter)

    def wire(self, view: View, bound: dict) -> None:
        for kind, site in self.sites.items():
            adapter, words = getattr(self, kind, None), self.words(kind)
            if adapter is None:
                adapter = self._context.shared[self._name][self._family.stack]
                words |= {"layer": self.number, "block": _BLOCKS[kind]}
            if adapter.place == "input":
                self._before(view, bound, site, adapter)
            else:
                self._after(view, bound, site, adapter, words)

    def words(self, kind: str) -> dict:
        batch = self.given()
        return {} if batch is None or batch["task"] is None else {"task": batch["task"]}

    def _after(self, view: View, bound: dict, site: Site, adapter: nn.Module, words: dict) -> None:
        seen: dict[str, Tensor] = {}
        norm = getattr(view._host, site.norm) if adapter.needs_norm and site.norm else None
        if adapter.needs_residual:
            if isinstance(site.residual, int):
                seen["residual"] = list(bound.values())[site.residual]
            else:
                on_input(view, site.residual, lambda t: seen.update(residual=t))
        if adapter.needs_inputs:
            on_input(view, site.first, lambda t: seen.update(inputs=t))

        def change(h: Tensor) -> Tensor:
            given = {k: _as_text(t, bound) for k, t in seen.items()} | {"hidden": _as_text(h, bound)}
            if not torch.is_autocast_enabled(h.device.type):
                given = {k: t.to(dtype_of(adapter)) for k, t in given.items()}
            y = adapter.branch(given.pop("hidden"), given.pop("residual", None), norm, **given, **words)
            return y.to(h.dtype).view(h.shape)

        on_output(view, site.last, change)

    def _before(self, view: View, bound: dict, site: Site, adapter: nn.Module) -> None:
        def make(inner):
            def run(*args, **kwargs):
                x = args[0] if args else kwargs["hidden_states"]
                rows = _as_text(x, bound)
                if not torch.is_autocast_enabled(x.device.type):
                    rows = rows.to(dtype_of(adapter))
                y = adapter(rows, weights=self._routes(adapter, rows, bound, site.kind)).to(x.dtype).view(x.shape)
                return inner(y, *args[1:], **kwargs) if args else inner(**(kwargs | {"hidden_states": y}))

            return run

        view.wrap(site.first, make)

    def _routes(self, adapter: nn.Module, x: Tensor, bound: dict, kind: str) -> Tensor:
        """LaVIN's weights of the experts: in generation those of the prompt, whose first token is gone by then."""
        place, kept = ("route", self._name, self._family.stack, self._index, kind), self._context.kept
        past = int(self.past(bound, 1))
        if past and place in kept:
            return for_batch(kept[place], x.shape[0], "prompts")
        weights = adapter.route(x)
        if not torch.is_grad_enabled() and bound.get(self._family.cache) is not None:
            kept[place] = weights
        return weights


def _as_text(t: Tensor, bound: dict) -> Tensor:
    """(B, L, D), also where a layer's feed-forward is given rows without a batch, as OPT's."""
    return t.view(*bound["hidden_states"].shape[:2], t.shape[-1]) if t.dim() == 2 else t


class _Values(Part):
    """VL-PET's adapter beside the value projection of a decoder's cross-attention: what is cached is adapted."""

    def __init__(self, adapter: VLAdapterController):
        super().__init__()
        self.attn_value_parallel_adapter = adapter

    def wire(self, view: View, bound: dict) -> None:
        def make(inner):
            return lambda x: self.attn_value_parallel_adapter.value(x, inner(x))

        view.wrap("v" if hasattr(view._host, "v") else "v_proj", make)
