"""mlp_projector beside plain PyTorch and torch.compile, and the swapped LLaVA projector beside the stock one."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from vlkernels.ops.mlp_projector import reference
from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, Unavailable, autocast, compiled, plain

BASELINE = "eager"


def llava(case: Case, kw: dict) -> nn.Sequential:
    """A model whose only layer is transformers' LlavaMultiModalProjector with the case's weights."""
    try:
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
    except ImportError as error:
        raise Unavailable(f"transformers is not importable: {error}") from None
    other = kw["norm"] != "none" or kw["gated"] or kw["shuffle"] > 1 or kw["merge"] > 1 or kw["residual"]
    if other or kw["act"] != "gelu":
        raise Unavailable("LLaVA's projector is two linears and a GELU")
    if kw["w1"].shape[0] != kw["w2"].shape[0]:
        raise Unavailable("LLaVA's projector is as wide inside as outside")
    # what the class reads of a LlavaConfig; a whole one would check head counts that do not matter here
    config = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=kw["w1"].shape[1]),
        text_config=SimpleNamespace(hidden_size=kw["w2"].shape[0]),
        vision_feature_layer=-2,
        multimodal_projector_bias=True,
        projector_hidden_act="gelu",
    )
    with torch.device("meta"):
        layer = LlavaMultiModalProjector(config)
    for linear, w, b in ((layer.linear_1, "w1", "b1"), (layer.linear_2, "w2", "b2")):
        linear.weight, linear.bias = nn.Parameter(kw[w].detach()), nn.Parameter(kw[b].detach())
    model = nn.Sequential(layer)
    model.leaves = {"w1": layer.linear_1.weight, "w2": layer.linear_2.weight}
    model.leaves |= {"b1": layer.linear_1.bias, "b2": layer.linear_2.bias}
    if kw["x"].requires_grad:
        model.leaves = {"x": kw["x"]} | model.leaves
    model.level = kw["level"]
    return model


def _module(model: nn.Sequential, kw: dict, precision: Precision) -> Instance:
    def forward() -> Tensor:
        with autocast(kw, precision):
            return model(kw["x"])

    return Instance(forward, model.leaves, (*model.parameters(), kw["x"]))


def _stock(case: Case, kw: dict, precision: Precision) -> Instance:
    return _module(llava(case, kw), kw, precision)


def swapped(case: Case, kw: dict, precision: Precision) -> Instance:
    """The same projector after vlkernels.swap; use_backend() chooses where it runs."""
    import vlkernels

    model = llava(case, kw)
    vlkernels.swap(model, strict=True, projector_level=model.level)
    return _module(model, kw, precision)


PROVIDERS = (Provider("eager", plain(reference.forward)), Provider("compile", plain(compiled(reference.forward))))
PEERS: tuple[Provider, ...] = ()

# swapped modules that the memory report counts: (name, precision, dropout, ours, baseline)
MODULES = tuple(
    ("LLaVA projector", precision, 0.0, Provider("swapped", swapped, "ours"), Provider("stock", _stock))
    for precision in ("bf16", "amp-bf16")
)
