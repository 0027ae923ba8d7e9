"""Experts of the visual tokens beside a Llama's own linears: CogVLM's, and mPLUG-Owl2's modality-adaptive layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modules.expert import cogvlm_vision_mask, through
from .context import Batch, Context, check_length, for_batch, rows_of
from .families import Family, follow
from .hosts import View
from .integrators import Integrator, Part, check_tensor
from .integrators_prefix import check_zero_one

_PARTS = {
    "cogvlm": {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")},
    "mplug_owl2": {"self_attn": ("k_proj", "v_proj")},
}


@dataclass(frozen=True, kw_only=True)
class VisualExpert(Integrator):
    """A second set of weights for visual tokens in each layer, starting as copies: the base model at step 0.

    kind "cogvlm": q, k, v, o and the feed-forward's three linears; the last image token of each run goes through the
    language's, as in CogVLM. "mplug_owl2": both norms, k and v, of exactly the tokens that are marked. vision_bias: of
    the visual q, k, v, zeros (CogVLM2). `set_modality(mask (B, T))`, 1 at image tokens (CogVLM: begin and end of image
    among them); of nothing or None all tokens are text, and so are those that generation adds.

    A batch of text alone (nothing set, or a mask on the CPU without image tokens) is the base model's, bit for bit;
    text beside images is so where the linears run as PyTorch's, and to rounding in the kernel that routes tokens.

    CogVLM's shared positions are the caller's: model(..., position_ids=cogvlm_position_ids(mask)).
    Text tokens go through the base's own linears, whatever has become of them (a LoRA, a quantised weight).
    """

    kind: str = "cogvlm"
    vision_bias: bool = False
    name: str = "expert"

    needs = ("feed_forward",)
    takes = ("modality",)

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in _PARTS:
            raise ValueError(f"kind is {self.kind!r}; accepted: {', '.join(_PARTS)}")

    def parts(self, family: Family, layer: nn.Module, number, layers, made):
        norms = family.norms if self.kind == "mplug_owl2" else ()
        found: dict[str, nn.Module] = {"": _Router({n: _norm(getattr(layer, n), made) for n in norms})}
        for host, names in _PARTS[self.kind].items():
            linears = {n: getattr(follow(layer, host), n) for n in names}
            bias = self.vision_bias and host == "self_attn"
            found[host] = _Experts({n: _copy(n, m, bias and n != "o_proj", made) for n, m in linears.items()})
        return found

    def batch(self, context: Context, modality) -> Batch | None:
        if modality is None:
            return None
        check_tensor("the modality mask", modality, (2,), "(B, T)")
        if modality.is_floating_point() or modality.is_complex():
            raise TypeError(f"the modality mask has dtype {modality.dtype}; accepted: bool, or 0 and 1 as integers")
        check_zero_one("the modality mask", modality)
        visual = cogvlm_vision_mask(modality) if self.kind == "cogvlm" else modality
        if visual.device.type == "cpu" and not visual.any():
            return None
        return Batch({"index": visual.to(torch.int32)})


def _base(module: nn.Module) -> nn.Module:
    """The layer under peft's adapters."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _copy(name: str, linear: nn.Module, bias: bool, made: dict) -> nn.Linear:
    linear = _base(linear)
    weight = getattr(linear, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(f"{name} is a {type(linear).__name__}; accepted: a linear of floating weights, to be copied")
    copy = nn.Linear(weight.shape[1], weight.shape[0], bias=bias or linear.bias is not None, **made)
    with torch.no_grad():
        copy.weight.copy_(weight)
        if copy.bias is not None:
            copy.bias.zero_() if linear.bias is None else copy.bias.copy_(linear.bias)
    return copy


def _norm(norm: nn.Module, made: dict) -> nn.RMSNorm:
    norm = _base(norm)
    copy = nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon, **made)
    with torch.no_grad():
        copy.weight.copy_(norm.weight)
    return copy


class _Router(Part):
    """At the layer: which expert each token of this call has; and the visual tokens' norms."""

    def __init__(self, norms: dict[str, nn.Module]):
        super().__init__()
        for name, norm in norms.items():
            self.add_module(name, norm)

    def wire(self, view: View, bound: dict) -> None:
        index = self._context.now[self._name] = self.index(bound)
        if index is None:
            return
        for name, own in self.named_children():

            def norm(inner, own=own):
                return lambda x: torch.where((index == 1).unsqueeze(-1), own(x).to(x.dtype), inner(x))

            view.wrap(name, norm)

    def index(self, bound: dict) -> Tensor | None:
        batch, x = self.given(), bound["hidden_states"]
        if batch is None:
            return None
        index = batch["index"]
        past = self.past(bound)
        if isinstance(past, int) and past >= index.shape[1]:
            return None
        check_length(past, x.shape[1], index.shape[1], "the modality mask's tokens")
        return for_batch(rows_of(index, past, x.shape[1], "zeros"), x.shape[0], "modality masks").to(x.device)


class _Experts(Part):
    """The visual tokens' linears, by the names of the text's."""

    def __init__(self, linears: dict[str, nn.Linear]):
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)

    def wire(self, view: View, bound: dict) -> None:
        index = self._context.now.get(self._name)
        if index is None:
            return
        for name, own in self.named_children():

            def routed(inner, own=own):
                return lambda x: through(x, index, (inner, own))

            view.wrap(name, routed)
