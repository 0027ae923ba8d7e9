"""What can be inserted: small descriptions, each of which builds this library's modules with the model's sizes.

GatedCrossAttention, IdeficsCrossAttention (this file); AdaptivePrefix, MemVP, EpalmTokens (`integrators_prefix.py`);
VisualExpert (`integrators_expert.py`). Prefix tuning and soft prompts in front of the text are peft's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modules._parts import check_level
from ..modules.gated import GatedCrossAttentionBlock, IdeficsGatedCrossAttentionLayer
from ..modules.gated_layers import gated_mlp
from ..modules.gated_media import MediaContext, MediaMask, _check_counts
from ..ops.media_cross_attention import spans
from .context import UNSET, Batch, Context, check_length, for_batch, past_length, rows_of, state_of
from .families import Family, Stack, follow
from .hosts import PREFIX, View


@dataclass(frozen=True, kw_only=True)
class Integrator:
    """name: the attached children are called vlkernels_<name>; another name than its kind's allows a second of it."""

    name: str = ""
    stack: str = "decoder"  # encoder, decoder or both; a model of one stack has only that

    needs = ()  # what of a family it needs, by field
    takes = ()  # what of a batch it takes: media, locations, has_image, modality, task

    def __post_init__(self):
        if not (self.name.isidentifier() and self.name):
            raise ValueError(f"name is {self.name!r}; accepted: an identifier, of which the children's name is made")
        if self.stack not in ("encoder", "decoder", "both"):
            raise ValueError(f"stack is {self.stack!r}; accepted: encoder, decoder, both")

    def refuses(self, family: Family) -> str | None:
        """Why it cannot go into layers of this family, or None."""
        missing = [name for name in self.needs if not getattr(family, name)]
        if not missing:
            return None
        return {
            "attention": f"{family.name} has no softmax attention with linears of its own that a prefix can join",
            "feed_forward": f"{family.name} has no gate_proj, up_proj and down_proj beside which experts can stand",
            "grows": f"{family.name} takes no further token between its layers; accepted: OPT, BART's decoder",
        }[missing[0]]

    def layers_of(self, stack: Stack) -> list[int]:
        """Which layers it goes into where the user names none."""
        return list(range(len(stack.layers)))

    def around(self, layers: list[int], stack: Stack) -> list[int]:
        """Which layers get a part where the user's are these."""
        return layers

    def parts(
        self, family: Family, layer: nn.Module, number: int, layers: list[int], made: dict
    ) -> dict[str, nn.Module]:
        """The modules of one layer by the path of their host in it."""
        raise NotImplementedError

    def shared(self, stack: Stack, made: dict) -> nn.Module | None:
        """A module of all layers of a stack, or None."""
        return None

    def made(self, context: Context, given: Batch | None) -> Batch | None:
        """What layers take, of what was set; where there is a shared module, made once in each pass of the model."""
        return given

    def finish(self, parts: list[nn.Module]) -> None:
        """Once all parts of the model are made."""

    def keeps(self, layer: nn.Module) -> list[nn.Parameter]:
        """Parameters of an adapted layer that go on training."""
        return []

    def batch(self, context: Context, **values) -> Batch:
        """What its parts take of a batch's values, those of `takes`; raises for values that do not fit."""
        raise NotImplementedError


class Part(nn.Module):
    """An attached module: `wire` puts it into its host's forward."""

    def place(self, name: str, context: Context, family: Family, number: int) -> None:
        self._name, self._context, self._family, self._index = name, context, family, number

    def given(self) -> Batch | None:
        """What was set; of a shared module, what it made of that."""
        batch, context = self._context.of(self._name), self._context
        if self._name in context.shared and batch is context.set_as.get(self._name):
            # the layer is called without its model
            return context.integrators[self._name].made(context, batch)
        return batch

    def past(self, bound: dict, seen: int = 0):
        return past_length(bound, self._family.cache, self._index, seen)

    def wire(self, view: View, bound: dict) -> None:
        raise NotImplementedError


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def in_dtype_of(module: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """run(x) of a module whose parameters may be of another dtype than the residual stream x, in x's dtype.

    Where x is the wider one (a Mamba's float32 stream) it keeps its digits, and gets what the module adds.
    """
    own = dtype_of(module)
    if x.dtype == own or torch.is_autocast_enabled(x.device.type):
        return run(x)
    low = x.to(own)
    if torch.promote_types(x.dtype, own) == own:
        return run(low).to(x.dtype)
    return x + (run(low) - low).to(x.dtype)


def check_tensor(what: str, t, dims: tuple[int, ...], shape: str, width: int | None = None) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{what} must be a torch.Tensor, got {type(t).__name__}")
    if t.dim() not in dims or (width is not None and t.shape[-1] != width):
        wide = "" if width is None else f", the last of {width}"
        raise ValueError(f"{what} has shape {tuple(t.shape)}; accepted: {shape}{wide}")


# -- gated cross-attention -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Gated(Integrator):
    dim_visual: int
    every: int = 4
    name: str = "gated"
    strict: bool = True
    level: int = 0

    takes = ("media", "locations")

    def __post_init__(self):
        super().__post_init__()
        if self.every < 1 or self.dim_visual < 1:
            raise ValueError(f"every is {self.every}, dim_visual {self.dim_visual}; accepted: 1 or more")
        check_level(self.level)

    def layers_of(self, stack: Stack) -> list[int]:
        return [i for i in range(len(stack.layers)) if (i + 1) % self.every == 0]

    def batch(self, context: Context, media, locations=None) -> Batch:
        if media is None:
            if locations is not None and bool(torch.as_tensor(locations).ne(0).any()):
                raise ValueError("locations has media tokens, media is None; accepted: media for them")
            return Batch({"media": None, "time": None})
        check_tensor("media", media, (4,), "(B, J, n, C): J media of n tokens each", self.dim_visual)
        check_tensor("locations", locations, (2,), "(B, T), True at each media token of the text")
        if locations.is_floating_point():
            raise TypeError(f"locations has dtype {locations.dtype}; accepted: bool, or 0 and 1 as integers")
        if locations.shape[0] != media.shape[0]:
            raise ValueError(
                f"locations is of {locations.shape[0]} samples, media of {media.shape[0]}; accepted: as many"
            )
        time = spans.text_time(locations != 0)
        if self.strict:
            _check_counts(time, media.shape[1])
        return Batch({"media": media, "time": time.to(media.device)}, {"count": media.shape[1], "n": media.shape[2]})


@dataclass(frozen=True, kw_only=True)
class GatedCrossAttention(_Gated):
    """OpenFlamingo's block before every `every`-th decoder layer: h = x + tanh(a) attn(x, media), h + tanh(f) ff(h).

    dim_visual: C of the media, a resampler's output. The rest as modules.GatedCrossAttentionBlock: dim_head, heads,
    ff_mult, immediate (a token sees the last medium so far, else all so far), strict, level.
    Both gates start at 0, where the model is the base model bit for bit. Published: every = 1 (OpenFlamingo-3B), 2
    (4B), 4 (9B). `model.vlkernels.set_media(media (B, J, n, C), locations (B, T))` before each batch; set_media(None)
    for text alone: then no token has seen a medium.
    """

    dim_head: int = 64
    heads: int = 8
    ff_mult: int = 4
    immediate: bool = True

    def parts(self, family, layer, number, layers, made):
        width = follow(layer, family.width)
        return {"": _Flamingo(width, self.dim_visual, self.dim_head, self.heads, self.ff_mult, self.immediate,
                              strict=self.strict, level=self.level, **made)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IdeficsCrossAttention(_Gated):
    """IDEFICS' layer before every `every`-th decoder layer: RMSNorms, a gated feed-forward, no attention before media.

    heads, intermediate (4 D by default), alpha_type ("float" or "vector"), qk_layer_norms, act, eps, dropout as
    modules.IdeficsGatedCrossAttentionLayer; immediate as for GatedCrossAttention. alpha_cross_attn and alpha_dense
    start at 0: the base model bit for bit.
    """

    every: int = 1
    heads: int = 8
    intermediate: int | None = None
    alpha_type: str = "float"
    qk_layer_norms: bool = False
    act: str = "silu"
    eps: float = 1e-6
    dropout: float = 0.0
    immediate: bool = True

    def parts(self, family, layer, number, layers, made):
        width = follow(layer, family.width)
        part = _Idefics(
            width, self.intermediate or 4 * width, self.heads, self.dim_visual, alpha_type=self.alpha_type,
            qk_layer_norms=self.qk_layer_norms, hidden_act=self.act, rms_norm_eps=self.eps, dropout=self.dropout,
            level=self.level, **made,
        )  # fmt: skip
        part.immediate = self.immediate
        return {"": part}


class _GatedPart(Part):
    """A gated layer before the layer that hosts it; its class is second in the subclass's bases."""

    zero_before = False  # a token before the first medium gets no attention, whatever it may see

    def wire(self, view: View, bound: dict) -> None:
        x, batch = bound["hidden_states"], self.given()
        if batch is None:
            raise RuntimeError(
                f"{PREFIX}{self._name}: {UNSET}; call model.vlkernels.set_media(media, locations) before the model, or "
                "set_media(None) for text alone"
            )
        if batch["media"] is None:
            bound["hidden_states"] = in_dtype_of(self, x, self.without_media)
            return
        time = batch["time"]
        past = self.past(bound, time.shape[1])
        check_length(past, x.shape[1], time.shape[1], "the media's locations")
        time = for_batch(rows_of(time, past, x.shape[1], "last"), x.shape[0], "media").to(x.device)
        span = spans.spans_of_time(time, batch["count"], self.immediate)
        if self.zero_before:
            span = span.masked_fill((time == 0)[..., None], 0)
        kv = {name: for_batch(t, x.shape[0], "media") for name, t in self.keys_values(batch, x.device).items()}
        context = MediaContext(MediaMask(span, tokens=batch["n"]), {id(self.attention): kv})
        bound["hidden_states"] = in_dtype_of(self, x, lambda x: self(x, context=context))

    def keys_values(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Of the media, made once for all steps of a generation; in training in each pass, which has its own graph."""
        autocast = torch.is_autocast_enabled(device.type)
        media = batch["media"].to(device) if autocast else batch["media"].to(device, dtype_of(self))
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            return MediaContext.of([self], media, MediaMask()).of_layer(self)
        weights = [linear.weight for linear in self.attention.kv if hasattr(linear, "weight")]
        key = (batch["media"], autocast, state_of(weights))
        place = (self._name, self._family.stack, self._index)
        return self._context.keep(place, key, lambda: MediaContext.of([self], media, MediaMask()).of_layer(self))


class _Flamingo(_GatedPart, GatedCrossAttentionBlock):
    @property
    def immediate(self) -> bool:
        return self.attn.only_attend_immediate_media

    def without_media(self, x: Tensor) -> Tensor:
        return gated_mlp(x, self.ff[0], self.ff[1], self.ff[3], self.ff_gate, "gelu", self.level)


class _Idefics(_GatedPart, IdeficsGatedCrossAttentionLayer):
    immediate, zero_before = True, True

    def without_media(self, x: Tensor) -> Tensor:
        mlp, p = self.mlp, self.dropout if self.training else 0.0
        return gated_mlp(
            x, self.post_attention_layernorm, mlp.up_proj, mlp.down_proj, self.alpha_dense, self.act, self.level,
            own_gate=mlp.gate_proj, p=p,
        )  # fmt: skip
