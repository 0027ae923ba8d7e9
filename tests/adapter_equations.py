"""Equations of adapter-hub's, MAGMA's and FrozenBiLM's adapters as upstream computes them, and the cases of them."""

import torch
import torch.nn.functional as F
from equations import Variant, layer_norm, lin
from torch import nn

from vlkernels.modules import AdapterHubAdapter, FrozenBiLMAdapter, FrozenBiLMOutput, MAGMAAdapter, MAGMAWrapper

D, OP = 20, ("bottleneck_adapter",)


def tokens(count=2, *shape):
    shape = shape or (3, 5, D)
    return lambda: tuple(torch.randn(shape) for _ in range(count))


# -- adapter-hub ---------------------------------------------------------------------------------------------------


class End(nn.Module):
    """An adapter and the block's norm, as the goldens have them."""

    def __init__(self, adapter, norm=True):
        super().__init__()
        self.adapter, self.layer_norm = adapter, nn.LayerNorm(D) if norm else None

    def forward(self, h, r):
        return self.adapter(h, r, self.layer_norm)


ACTS = {"relu": F.relu, "swish": F.silu, "gelu": F.gelu, "gelu_new": lambda t: F.gelu(t, approximate="tanh"),
        "tanh": torch.tanh, "leakyrelu": F.leaky_relu}  # fmt: skip


def hub(config, norm=True, **kw):
    """Step by step: what D reads and what is added, the bottleneck, the sub-layer's own end."""
    published = {"seq_bn": ("relu", 1.0), "double_seq_bn": ("swish", 1.0), "par_bn": ("relu", 4.0)}[config]
    act, scaling = ACTS[kw.get("non_linearity", published[0])], kw.get("scaling", published[1])
    before = kw.get("original_ln_before", config == "seq_bn")

    def equation(p, h, r):
        own = (lambda t: layer_norm(p, "layer_norm", t)) if norm else lambda t: t
        if config == "par_bn":
            x, kept = r, h
        else:
            x = own(h + r) if before else h
            kept = {True: h, False: x, "post_add": h + r}[kw.get("residual_before_ln", True)]
        n, i = x, int(kw.get("ln_before", False))
        if i:
            n = layer_norm(p, "adapter.adapter_norm_before", x)
        y = lin(p, "adapter.adapter_up", act(lin(p, f"adapter.adapter_down.{i}", n)))
        y = y * (p["adapter.scaling"] if scaling == "learned" else scaling)
        if kw.get("use_gating"):
            y = y * lin(p, "adapter.gate", x).sigmoid().mean(1, keepdim=True)
        inside = kw.get("adapter_residual_before_ln", False) and config != "par_bn"
        y = y + kept if inside else y
        if kw.get("ln_after"):
            y = layer_norm(p, "adapter.adapter_norm_after", y)
        y = y if inside else y + kept
        return own(y + r) if kw.get("original_ln_after", True) else y

    return Variant(
        "adapter.adapterhub", lambda: End(AdapterHubAdapter(D, config, **{"reduction_factor": 4, **kw}), norm),
        equation, tokens(), (*OP, *(("norm_residual",) if kw.get("ln_after") else ())),
    )  # fmt: skip


HUB = {
    "seq": hub("seq_bn"),
    "seq without norm": hub("seq_bn", norm=False, ln_before=True),
    "seq everything": hub("seq_bn", ln_before=True, ln_after=True, use_gating=True, scaling="learned"),
    "seq residual after the norm": hub("seq_bn", residual_before_ln=False, use_gating=True),
    "seq post_add": hub("seq_bn", residual_before_ln="post_add", scaling=0.5),
    "seq inner residual": hub("seq_bn", ln_after=True, adapter_residual_before_ln=True, non_linearity="gelu_new"),
    "seq open end": hub("seq_bn", original_ln_after=False),
    "double": hub("double_seq_bn"),
    "double without norm": hub("double_seq_bn", norm=False, ln_before=True, non_linearity="gelu", scaling="learned"),
    "double ln_after": hub("double_seq_bn", ln_after=True, original_ln_before=True),
    "par": hub("par_bn"),
    "par everything": hub("par_bn", ln_before=True, ln_after=True, use_gating=True, scaling="learned"),
}


# -- the others ----------------------------------------------------------------------------------------------------


def magma(p, x, top="adapter", first=0):
    n = layer_norm(p, f"{top}.0", x) if first else x
    return lin(p, f"{top}.{first + 2}", lin(p, f"{top}.{first}", n).relu())


def frozen(ln_before=False, ln_after=False, top=""):
    def equation(p, x, r=None):
        if ln_after:
            return x + layer_norm(p, f"{top}ln", x)
        n = layer_norm(p, f"{top}ln", x) if ln_before else x
        return x + lin(p, f"{top}up", lin(p, f"{top}down", n).relu())

    return equation


OTHERS = {
    "magma": Variant("adapter.magma", lambda: MAGMAAdapter(D, 4), lambda p, x: x + magma(p, x), tokens(1), OP),
    "magma ln": Variant("adapter.magma", lambda: MAGMAAdapter(D, 3, layer_norm=True),
                        lambda p, x: x + magma(p, x, first=1), tokens(1), OP),
    "magma parallel": Variant("adapter.magma", lambda: MAGMAWrapper(nn.Linear(D, D), D, parallel=True),
                              lambda p, x: lin(p, "module", x) + magma(p, x), tokens(1), OP),
    "magma scaled parallel": Variant(
        "adapter.magma", lambda: MAGMAWrapper(nn.Linear(D, D), D, parallel=True, scaled=True, layer_norm=True),
        lambda p, x: lin(p, "module", x) + p["adapter_scale"] * magma(p, x, first=1), tokens(1), OP,
    ),
    "frozenbilm": Variant("adapter.frozenbilm", lambda: FrozenBiLMAdapter(D, 4), frozen(), tokens(1), OP),
    "frozenbilm ln": Variant("adapter.frozenbilm", lambda: FrozenBiLMAdapter(D, 5, ln_before=True), frozen(True),
                             tokens(1), OP),
    "frozenbilm output": Variant(
        "adapter.frozenbilm_output", lambda: FrozenBiLMOutput(D, 28, 5, ln_before=True),
        lambda p, x, r: layer_norm(p, "LayerNorm", frozen(True, top="adapter.")(p, lin(p, "dense", x)) + r, 1e-7),
        lambda: (torch.randn(3, 5, 28), torch.randn(3, 5, D)), OP,
    ),
}  # fmt: skip
CASES = HUB | OTHERS
