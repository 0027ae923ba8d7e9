"""peft's AdaptionPrompt (LLaMA-Adapter on Llama and Mistral) with a fused forward. peft 0.21
`tuners/adaption_prompt/layer.py`.

peft projects the queries once more, writes scores, softmax and result out, and applies o_proj a second time. Here the
attention that it wraps runs as it is, whatever its implementation: its q_proj keeps what it returned, and its o_proj
adds the prompt to what it is given. That is the same sum, for o_proj has no bias.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .. import backends
from ..modules._children import child_problem, hook_problem
from ..ops.prefix_attention import prefix_attention
from ..ops.prefix_attention.reference import MAX_PREFIX
from .swap import class_key, finished, training_backend

_MODELS = ("transformers.models.llama.modeling_llama:LlamaAttention",
           "transformers.models.mistral.modeling_mistral:MistralAttention")  # fmt: skip


class TappedLinear(nn.Linear):
    """nn.Linear of a wrapped attention: keeps its output in `_vlkernels_kept`, adds a prompt to its input."""

    vlkernels_fused, vlkernels_original = True, nn.Linear
    vlkernels_part = True
    _vlkernels_kept = None
    _vlkernels_prompt = None

    def forward(self, x: Tensor) -> Tensor:
        if self._vlkernels_prompt is not None:
            x = _with_prompt(x, *self._vlkernels_prompt)
        y = super().forward(x)
        if self._vlkernels_kept is not None:
            self._vlkernels_kept.append(y)
        return y

    def vlkernels_configure(self, **_) -> None:
        pass

    def vlkernels_state(self) -> tuple[str, str]:
        return "stock", "part of its attention block"


TappedLinear.__name__ = TappedLinear.__qualname__ = "Linear"


def _with_prompt(o: Tensor, kept: list[Tensor], cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, gate, backend: str):
    """o (B, L, H K) + gate * what the queries, rotated as peft rotates them, find in the prompt"""
    q = kept[0].unflatten(-1, (-1, k.shape[3]))
    first, second = q.chunk(2, -1)
    q = q * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)
    o = o.unflatten(-1, (-1, k.shape[3]))
    q, k, v = (t.to(o.dtype) for t in (q, k, v))
    return prefix_attention(o, q, k, v, gate, tanh=False, backend=backend).flatten(2)


@functools.cache
def attention_class(original: type) -> type:
    """The static subclass of AdaptedAttention (`original`) that swapped layers get."""

    class AdaptedAttention(original):
        def forward(self, **kwargs):
            values = self._vlkernels_values(kwargs)
            backend = "reference" if isinstance(values, str) else backends.choose(prefix_attention, values)
            if backend == "reference":
                return super().forward(**kwargs)
            m, (cos, sin) = self.model, kwargs["position_embeddings"]
            k, v = (linear(self.adaption_prompt).unflatten(-1, (-1, m.head_dim)) for linear in (m.k_proj, m.v_proj))
            kept = m.q_proj._vlkernels_kept = []
            m.o_proj._vlkernels_prompt = kept, cos, sin, k, v, self.adaption_gate, backend
            try:
                output, *rest = m(**kwargs)
            finally:
                m.q_proj._vlkernels_kept = m.o_proj._vlkernels_prompt = None
            # the dtype of peft's rotated queries
            return output.to(torch.promote_types(kept[0].dtype, cos.dtype)), *rest

        def _vlkernels_values(self, kwargs: dict) -> tuple | str:
            """Arguments of prefix_attention in shape and dtype, or why this call takes peft's own forward."""
            x, position = kwargs.get("hidden_states"), kwargs.get("position_embeddings")
            if x is None or position is None or kwargs.get("output_attention"):
                return "called without hidden_states or position_embeddings"
            if (reason := self._vlkernels_problem()) is not None:
                return reason
            weight, K = self.model.q_proj.weight, self.model.head_dim
            autocast = torch.is_autocast_enabled(weight.device.type)
            if not autocast and (x.dtype != weight.dtype or position[0].dtype != weight.dtype):
                return f"x is {x.dtype} over {weight.dtype} weights without autocast"
            like = torch.empty((), dtype=weight.dtype, device=weight.device)
            heads, groups = (linear.out_features // K for linear in (self.model.q_proj, self.model.k_proj))
            o, prompt = like.expand(*x.shape[:2], heads, K), like.expand(1, self.adapter_len, groups, K)
            return prefix_attention.values(o, o, prompt, prompt, self.adaption_gate, tanh=False)

        def _vlkernels_problem(self) -> str | None:
            m = self.model
            if class_key(type(m)) not in _MODELS:
                return f"the attention is a {type(m).__name__}"
            if (reason := hook_problem("the attention", m)) is not None:
                return reason
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                kind = TappedLinear if name in ("q_proj", "o_proj") else nn.Linear
                if (reason := child_problem(name, getattr(m, name), (kind,))) is not None:
                    return reason
            if m.o_proj.bias is not None:
                return "o_proj has a bias, which peft adds twice"
            heads = m.q_proj.out_features // m.head_dim
            # peft takes the number of key heads from the widths
            if m.q_proj.out_features != m.k_proj.in_features or heads != m.config.num_attention_heads:
                return "the heads together are not as wide as the model"
            if not 1 <= self.adapter_len <= MAX_PREFIX:
                return f"a prompt of {self.adapter_len} rows; the op takes 1 to {MAX_PREFIX}"
            return None

        def vlkernels_state(self) -> tuple[str, str]:
            """(backend, reason) for a training step in this module's present state."""
            weight = self.model.q_proj.weight
            x = torch.empty((), dtype=weight.dtype, device=weight.device).expand(1, 1024, self.model.q_proj.in_features)
            values = self._vlkernels_values({"hidden_states": x, "position_embeddings": (x, x)})
            return training_backend(prefix_attention, values)

        def vlkernels_configure(self, **options) -> None:
            for name in ("q_proj", "o_proj"):
                child = getattr(self.model, name, None)
                if options and type(child) is nn.Linear and "forward" not in child.__dict__:
                    child.__class__ = TappedLinear

    return finished(AdaptedAttention, original, __name__)


def __getattr__(name: str):
    """A fused class by its original's name, which is how pickle and deepcopy find it."""
    if name == "Linear":
        return TappedLinear
    if name == "AdaptedAttention":
        from peft.tuners.adaption_prompt.layer import AdaptedAttention

        return attention_class(AdaptedAttention)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
