"""Visual knowledge as prefixes, memory and tokens inside the layers: LLaMA-Adapter, MemVP, eP-ALM.

Prefix tuning and soft prompts before the text are peft's own (PrefixTuningConfig, PromptTuningConfig).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modules.epalm import EpalmInjection
from ..modules.linear_projector import EpalmConnector
from ..modules.llama_adapter import check_prompt_size
from ..modules.memvp import MemVPMemory, memory_ffn
from ..ops.prefix_attention import prefix_attention
from .context import UNSET, Batch, Context, for_batch
from .families import Family, Stack, follow
from .hosts import PREFIX, View, on_input, on_output
from .integrators import Integrator, Part, check_tensor

# -- LLaMA-Adapter -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AdaptivePrefix(Integrator):
    """LLaMA-Adapter's gated prefix in the top layers' self-attention: o + g softmax(q K_Pᵀ / sqrt(K)) V_P.

    K_P, V_P are the layer's own keys and values of `prompt` (1, rows, D), N(0, 1), without positions. rows: 1 to 64.
    top: how many layers, from the last (published: 30 of 32; 31 in v2). gate: "head", g = tanh of one gate per head
    (LLaMA-Adapter), or "scalar", one raw gate (peft's AdaptionPrompt); both start at 0: the base model bit for bit.
    new_gate: v2's second factor (1), ones. visual: `set_media((B, 1 or rows, D))` is added to the prompts, such as
    VisualQuery's output (v2) or a projected image feature (v1); set_media(None) for text alone.

    Linears of the attention are called as they are: a LoRA on them acts on the prompt too, as in peft.
    """

    rows: int = 10
    top: int = 30
    gate: str = "head"
    new_gate: bool = False
    visual: bool = False
    name: str = "prefix"

    needs = ("attention",)

    def __post_init__(self):
        super().__post_init__()
        check_prompt_size(max(self.top, 0), self.rows)
        if self.gate not in ("head", "scalar"):
            raise ValueError(f"gate is {self.gate!r}; accepted: head, scalar")

    @property
    def takes(self) -> tuple[str, ...]:
        return ("media",) if self.visual else ()

    def layers_of(self, stack: Stack) -> list[int]:
        return list(range(max(len(stack.layers) - self.top, 0), len(stack.layers)))

    def parts(self, family: Family, layer: nn.Module, number, layers, made):
        a = family.attention
        longest = getattr(getattr(follow(layer, a.path), "config", None), "max_position_embeddings", None)
        if longest is not None and self.rows > longest:
            raise ValueError(f"a prefix of {self.rows} rows; accepted: as long as the model's cache, {longest}")
        heads = follow(follow(layer, a.path), a.heads)
        return {a.path: _Prefix(follow(layer, family.width), heads, self, made)}

    def batch(self, context: Context, media) -> Batch:
        if media is not None:
            check_tensor("media", media, (3,), f"(B, 1 or {self.rows}, D)")
            part = next(m for m in _parts(context, self.name) if isinstance(m, _Prefix))
            if media.shape[1] not in (1, self.rows) or media.shape[2] != part.prompt.shape[2]:
                shape = (1, self.rows), part.prompt.shape[2]
                raise ValueError(f"media has shape {tuple(media.shape)}; accepted: (B, {shape[0]}, {shape[1]})")
        return Batch({"visual": media})


def _parts(context: Context, name: str) -> list[nn.Module]:
    return context.parts.get(name, [])


class _Prefix(Part):
    """Keys: `prompt` (1, P, D), `gate` (1, H, 1, 1) or (1), `new_gate` (1, 1, 1, 1)."""

    def __init__(self, width: int, heads: int, how: AdaptivePrefix, made: dict):
        super().__init__()
        self.tanh, self.visual = how.gate == "head", how.visual
        self.prompt = nn.Parameter(torch.empty(1, how.rows, width, **made).normal_())
        self.gate = nn.Parameter(torch.zeros((1, heads, 1, 1) if self.tanh else (1,), **made))
        self.new_gate = nn.Parameter(torch.ones(1, 1, 1, 1, **made)) if how.new_gate else None

    def wire(self, view: View, bound: dict) -> None:
        a, kept = self._family.attention, []
        check_room(bound.get(self._family.cache), self.prompt.shape[1], "a prefix of {} rows")
        if a.rotary == "inside":

            def attention(inner):
                def run(query, key, value, *rest, **kwargs):
                    y, weights = inner(query, key, value, *rest, **kwargs)
                    return self.added(view, y.transpose(1, 2), query.transpose(1, 2)).transpose(1, 2), weights

                return run

            view.wrap("_attn", attention)
            return
        on_output(view, a.query, lambda y: kept.append(y) or y)

        def out(inner):
            def run(o):
                q = kept[0].chunk(3, -1)[0] if a.packed else kept[0]
                q = q.unflatten(-1, (-1, getattr(view, a.head_dim)))
                if a.rotary == "half":
                    cos, sin = (t.unsqueeze(2) for t in bound["position_embeddings"])
                    first, second = q.chunk(2, -1)
                    q = q * cos + torch.cat((-second, first), -1) * sin
                return inner(self.added(view, o.unflatten(-1, (-1, q.shape[3])), q).flatten(2))

            return run

        view.wrap(a.out, out)

    def added(self, view: View, o: Tensor, q: Tensor) -> Tensor:
        """o + gate * what q finds in the prompt; o and q (B, L, H, K)."""
        a, host, prompt = self._family.attention, view._host, self.prompt
        batch = self.given()
        if self.visual and batch is None:
            raise RuntimeError(f"{PREFIX}{self._name}: {UNSET}; call model.vlkernels.set_media(media) before the model")
        if batch is not None and batch["visual"] is not None:
            visual = for_batch(batch["visual"], o.shape[0], "media")
            prompt = prompt + visual.to(device=prompt.device, dtype=prompt.dtype)
        if not torch.is_autocast_enabled(o.device.type):
            prompt = prompt.to(o.dtype)
        if a.packed:
            _, k, v = getattr(host, a.query)(prompt).chunk(3, -1)
        else:
            k, v = getattr(host, a.key)(prompt), getattr(host, a.value)(prompt)
        q, k, v = (t.to(o.dtype) for t in (q, *(t.unflatten(-1, (-1, q.shape[3])) for t in (k, v))))
        factor = None if self.new_gate is None or prompt.shape[1] == 1 else self.new_gate.flatten()
        return prefix_attention(o, q, k, v, self.gate.flatten(), factor, scale=a.scale, tanh=self.tanh)


def check_room(cache, rows: int, what: str) -> None:
    """An error for a cache of fixed length that is shorter than so many rows."""
    room = _room(cache)
    if room is not None and room < rows:
        raise ValueError(f"{what.format(rows)} is longer than the cache, which holds {room}; accepted: a longer cache")


def _room(cache) -> int | None:
    """How many tokens a cache holds, None for one that grows."""
    length = getattr(cache, "get_max_length", None) or getattr(cache, "get_max_cache_shape", None)
    room = length() if length is not None else None
    return room if isinstance(room, int) and room >= 0 else None


# -- MemVP ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MemVP(Integrator):
    """MemVP's memory beside each feed-forward: h + s silu(z K_xᵀ) V_x, z what the feed-forward is given.

    in_features: C of the vision features; rows, hidden: modules.MemVPMemory, which all layers share; s, dropout:
    modules.MemVPFeedForward. `set_media((B, N, C), has_image=(B,))` before each batch; text alone needs nothing and
    still has the memory's own rows, whose values start at 0: the base model bit for bit. With an image the memory
    starts near 0 (0.01 of its projection), as published.
    """

    in_features: int
    rows: int = 320
    hidden: int = 128
    s: float = 0.1
    dropout: float = 0.1
    name: str = "memory"

    takes = ("media", "has_image")

    def __post_init__(self):
        super().__post_init__()
        if min(self.in_features, self.rows, self.hidden) < 1 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"in_features {self.in_features}, rows {self.rows}, hidden {self.hidden}, dropout {self.dropout}; "
                "accepted: 1 or more, and a probability in [0, 1)"
            )
        if self.stack == "both":
            raise ValueError("stack is 'both'; accepted: encoder, decoder: the memory is of one stack's width")

    def refuses(self, family: Family) -> str | None:
        site = family.site("ffn")
        if site is None or isinstance(site.residual, int):
            return f"{family.name} has no feed-forward beside which a memory can stand"
        return super().refuses(family)

    def shared(self, stack: Stack, made: dict) -> nn.Module:
        width = follow(stack.layers[0], stack.family.width)
        return MemVPMemory(self.in_features, self.hidden, width, self.rows, **made)

    def parts(self, family, layer, number, layers, made):
        return {family.site("ffn").host: _Memory(self.s, self.dropout)}

    def batch(self, context: Context, media, has_image=None) -> Batch | None:
        if media is None:
            return None
        check_tensor("media", media, (3,), "(B, N, C)", self.in_features)
        if media.shape[1] > self.rows:
            raise ValueError(f"media has {media.shape[1]} rows of a sample; accepted: up to {self.rows}")
        if has_image is not None:
            check_tensor("has_image", has_image, (1,), "(B,)")
            if has_image.shape[0] != media.shape[0]:
                raise ValueError(f"has_image is of {has_image.shape[0]} samples, media of {media.shape[0]}")
            check_zero_one("has_image", has_image)
            has_image = has_image.to(media.device)
        return Batch({"media": media, "has_image": has_image})

    def made(self, context: Context, given: Batch | None) -> Batch:
        values = () if given is None else (given["media"], given["has_image"])
        return Batch(dict(zip(("keys", "values"), context.shared_of(self.name)(*values), strict=True)))


def check_zero_one(what: str, t: Tensor) -> None:
    """On a GPU the assertion stops the kernels behind it, and nothing waits here."""
    if t.dtype == torch.bool:
        return
    fits = ((t == 0) | (t == 1)).all()
    if t.device.type == "cpu":
        if not fits:
            raise ValueError(f"{what} holds {t[(t != 0) & (t != 1)][0].item()}; accepted: 0 and 1")
    else:
        torch._assert_async(fits, f"{what} holds other numbers than 0 and 1")


class _Memory(Part):
    """No parameters of its own: they are the stack's."""

    def __init__(self, s: float, dropout: float):
        super().__init__()
        self.s, self.dropout = s, dropout

    def wire(self, view: View, bound: dict) -> None:
        site, kept = self._family.site("ffn"), []
        on_input(view, site.first, kept.append)

        def change(h: Tensor) -> Tensor:
            z, batch = kept.pop(), self.given()
            keys, values = batch["keys"], batch["values"]
            # OPT's feed-forward is given rows without a batch
            rows = z.view(bound["hidden_states"].shape) if z.dim() == 2 else z
            keys, values = (for_batch(t, rows.shape[0], "media").to(rows.device) for t in (keys, values))
            if not torch.is_autocast_enabled(rows.device.type):
                keys, values = keys.to(rows.dtype), values.to(rows.dtype)
            found = memory_ffn(rows, keys, values, self.s, self.dropout if self.training else 0.0)
            return h + found.view(h.shape).to(h.dtype)

        on_output(view, site.last, change)


# -- eP-ALM --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EpalmTokens(Integrator):
    """eP-ALM's visual tokens: CLS tokens of the last `tokens` vision layers at position 0 of layers start <= i < end.

    Before layer `start` the sequence grows by one token, later layers replace it; logits have one more position, at
    the front, so that labels are padded with -100 there. vis_dim: of the vision layers; shared: one linear for all.
    Published for OPT-2.7B: tokens 6, start 19, end 31. `set_media(hidden states (layers, B, T, C))` before each batch;
    set_media(None), or nothing, for text alone: the base model bit for bit. For layers whose positions are in the
    embeddings: OPT, BART's decoder. layers=: consecutive numbers, in place of start to end.
    """

    vis_dim: int
    tokens: int = 6
    start: int = 19
    end: int = 31
    shared_linear: bool = False
    name: str = "epalm"

    needs = ("grows",)
    takes = ("media",)

    def __post_init__(self):
        super().__post_init__()
        if self.vis_dim < 1 or self.tokens < 1 or not 1 <= self.start < self.end or self.stack != "decoder":
            raise ValueError(
                f"vis_dim {self.vis_dim}, tokens {self.tokens}, start {self.start}, end {self.end}, "
                f"stack {self.stack}; accepted: 1 or more, 1 <= start < end, decoder"
            )

    def layers_of(self, stack: Stack) -> list[int]:
        if self.end > len(stack.layers):
            raise ValueError(f"end is {self.end}; accepted: up to {len(stack.layers)}, the number of layers")
        return list(range(self.start, self.end))

    def around(self, layers: list[int], stack: Stack) -> list[int]:
        if layers[0] < 1 or layers != list(range(layers[0], layers[-1] + 1)):
            raise ValueError(f"layers is {layers}; accepted: consecutive numbers from 1 on")
        # behind the last of them the mask is still one wider
        return list(range(layers[0], len(stack.layers)))

    def shared(self, stack: Stack, made: dict) -> nn.Module:
        width = follow(stack.layers[0], stack.family.width)
        return EpalmConnector(self.vis_dim, width, self.tokens, shared=self.shared_linear, **made)

    def parts(self, family, layer, number, layers, made):
        return {"": _Token(EpalmInjection(layers[0], layers[-1] + 1), number)}

    def batch(self, context: Context, media) -> Batch | None:
        if media is None:
            return None
        states = list(media) if isinstance(media, (list, tuple)) else media
        if not isinstance(states, (list, Tensor)) or any(not isinstance(t, Tensor) or t.dim() != 3 for t in states):
            raise TypeError("media holds something else than hidden states; accepted: (layers, B, T, C), or a sequence")
        last = states[-self.tokens :]
        if len(last) < self.tokens or any(t.shape[2] != self.vis_dim or t.shape[1] == 0 for t in last):
            shapes = ", ".join(str(tuple(t.shape)) for t in last)
            raise ValueError(f"media holds {shapes}; accepted: {self.tokens} or more of (B, T, {self.vis_dim})")
        # the connector reads CLS alone
        return Batch({f"state{j}": t[:, :1] for j, t in enumerate(last)})

    def made(self, context: Context, given: Batch | None) -> Batch | None:
        if given is None:
            return None
        tokens = context.shared_of(self.name)(list(given.tensors.values()))
        return Batch({f"token{j}": t for j, t in enumerate(tokens)})


class _Token(Part):
    def __init__(self, injection: EpalmInjection, number: int):
        super().__init__()
        self.injection, self.number = injection, number

    def wire(self, view: View, bound: dict) -> None:
        batch = self.given()
        if batch is None:
            return
        x, mask = bound["hidden_states"], bound.get("attention_mask")
        if mask is not None and mask.dim() != 4 or "flash" in str(getattr(_config(view), "_attn_implementation", "")):
            raise ValueError("EpalmTokens needs masks of four dimensions; accepted: attn_implementation eager or sdpa")
        past = int(self.past(bound))
        inserted = past == 0 and self.number == self.injection.start
        keys = past + x.shape[1] + inserted
        check_room(bound.get(self._family.cache), keys, "a text of {} rows with its visual token")
        if past == 0:
            tokens = [for_batch(t, x.shape[0], "media").to(x.device) for t in batch.tensors.values()]
            x, _ = self.injection(x, self.number, tokens)
        bound["hidden_states"] = x
        if mask is None and past == 0:
            # with a cache of fixed length the keys are as many as that has room for
            room = _room(bound.get(self._family.cache))
            mask = torch.ones(keys - 1, room or keys - 1, dtype=torch.bool, device=x.device).tril()[None, None]
        if mask is not None:
            mask = _opened(mask, keys, past == 0)
        bound["attention_mask"] = mask


def _config(view: View):
    return next((getattr(m, "config", None) for m in view._host.children() if hasattr(m, "config")), None)


def _opened(mask: Tensor, keys: int, first: bool) -> Tensor:
    """The mask with the token's column in front, open, and in the first call its row, open to all `keys`."""
    seen, unseen = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    # a cache of fixed length has its room behind the text
    width = max(mask.shape[-1], keys)
    mask = nn.functional.pad(mask, (1, 0), value=seen)[..., :width]
    if not first:
        return mask
    row = torch.full((width,), unseen, dtype=mask.dtype, device=mask.device)
    row[:keys] = seen
    return torch.cat((row.expand(*mask.shape[:2], 1, -1), mask), 2)
