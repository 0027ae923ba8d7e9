"""Cases of the perceiver resamplers: our module, upstream's equation written plainly, inputs; and how they compare."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.upstream import attention, flamingo, layer_norm, lin, seen
from vlkernels.integrations.checkpoints import to_ours, to_upstream
from vlkernels.modules import (
    Idefics2Connector,
    IdeficsPerceiverResampler,
    Kosmos2Projection,
    LlavaPerceiverResampler,
    PerceiverResampler,
)
from vlkernels.testing import compare

# -- the equations as upstream writes them, from a state dict under upstream's names -------------------------------


def rms(p, name, x):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return p[f"{name}.weight"] * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def lucidrains(p, x):
    x = x if x.dim() == 4 else x[:, None]
    return flamingo(p, x[:, :, None], media="media_pos_emb")


def llava(p, x):
    p = {n.removeprefix("perceiver."): t for n, t in p.items()}
    return flamingo(p, x[:, None, None], K=6).squeeze(1)


def idefics(p, x, mask=None, K=6):
    l = p["latents"].expand(len(x), -1, -1)
    i = 0
    while f"blocks.{i}.1.ln.weight" in p:
        a, f = f"blocks.{i}.0.", f"blocks.{i}.1."
        lm = layer_norm(p, a + "latents_layer_norm", l)
        both = torch.cat((layer_norm(p, a + "context_layer_norm", x), lm), -2)
        norms = None
        if a + "q_layer_norm.weight" in p:
            norms = [lambda t, n=a + f"{n}_layer_norm": layer_norm(p, n, t) for n in "qk"]
        y = attention(
            lin(p, a + "q_proj", lm), lin(p, a + "k_proj", both), lin(p, a + "v_proj", both), K, seen(mask, l), norms
        )
        l = lin(p, a + "output_proj", y) + l
        l = lin(p, f + "c_proj", lin(p, f + "fc", layer_norm(p, f + "ln", l)).relu()) + l
        i += 1
    return layer_norm(p, "layer_norm", l)


def gated(p, name, x):
    return lin(p, f"{name}.down_proj", F.silu(lin(p, f"{name}.gate_proj", x)) * lin(p, f"{name}.up_proj", x))


def idefics2(p, x, mask=None, K=6):
    c = gated(p, "modality_projection", x)
    p = {n.removeprefix("perceiver_resampler."): t for n, t in p.items()}
    l = p["latents"].expand(len(x), -1, -1)
    i = 0
    while f"layers.{i}.self_attn.q_proj.weight" in p:
        a = f"layers.{i}."
        lm = rms(p, a + "input_latents_norm", l)
        both = torch.cat((rms(p, a + "input_context_norm", c), lm), -2)
        q, k, v = (lin(p, a + f"self_attn.{n}_proj", lm if n == "q" else both) for n in "qkv")
        l = l + lin(p, a + "self_attn.o_proj", attention(q, k, v, K, seen(None if mask is None else mask.bool(), l)))
        l = l + gated(p, a + "mlp", rms(p, a + "post_attention_layernorm", l))
        i += 1
    return rms(p, "norm", l)


def kosmos2(p, x, K=6):
    l = p["latent_query"].expand(len(x), -1, -1)
    both = torch.cat((lin(p, "dense", x), l), 1)
    q, k, v = (lin(p, f"x_attn.{n}_proj", l if n == "q" else both) for n in "qkv")
    return lin(p, "x_attn.out_proj", attention(q, k, v, K))


def tokens(*shape):
    return lambda: (torch.randn(*shape),)


def masked(*shape):
    """The last token of the first media is hidden, and all of the last media."""

    def make():
        mask = torch.ones(shape[:-1], dtype=torch.bool)
        mask[(0,) * (len(shape) - 2) + (-1,)] = False
        mask[(-1,) * (len(shape) - 2)] = False
        return torch.randn(*shape), mask

    return make


def small(**options):
    return lambda: PerceiverResampler(16, 2, 6, 2, 5, **options)


def both_embeddings(**options):
    return lambda: PerceiverResampler(12, 1, 6, 3, 4, max_num_media=3, max_num_frames=4, ff_mult=2, **options)


FLAMINGO, IDEFICS2 = "resampler.openflamingo", "resampler.idefics2"
CASES = {
    "openflamingo": (FLAMINGO, small(), flamingo, tokens(2, 3, 1, 7, 16)),
    "openflamingo level 1": (FLAMINGO, small(level=1), flamingo, tokens(2, 3, 1, 7, 16)),
    "openflamingo frames": (FLAMINGO, both_embeddings(), flamingo, tokens(2, 2, 3, 5, 12)),
    "openflamingo one image": (FLAMINGO, small(), flamingo, tokens(1, 1, 1, 7, 16)),
    "openflamingo masked": (
        FLAMINGO, both_embeddings(), lambda p, x, mask: flamingo(p, x, mask.flatten(2)), masked(2, 2, 3, 5, 12),
    ),
    "lucidrains": ("resampler.lucidrains", small(num_media_embeds=4), lucidrains, tokens(2, 3, 7, 16)),
    "lucidrains one media": ("resampler.lucidrains", small(num_media_embeds=4), lucidrains, tokens(2, 7, 16)),
    "llava": (
        "resampler.llava_next_perceiver",
        lambda: LlavaPerceiverResampler(16, 2, 5, 2, dim_head=6, heads=3), llava, tokens(2, 9, 16),
    ),
    "llava no ffn": (
        "resampler.llava_next_perceiver",
        lambda: LlavaPerceiverResampler(16, 2, 5, 0, dim_head=6, heads=3), llava, tokens(2, 9, 16),
    ),
    "idefics": ("resampler.idefics", lambda: IdeficsPerceiverResampler(16, 2, 2, 6, 5), idefics, tokens(2, 9, 16)),
    "idefics qk norms": (
        "resampler.idefics",
        lambda: IdeficsPerceiverResampler(16, 2, 3, 6, 5, qk_layer_norms=True, intermediate_size=20),
        idefics, tokens(3, 9, 16),
    ),
    "idefics qk norms level 1": (
        "resampler.idefics",
        lambda: IdeficsPerceiverResampler(16, 2, 3, 10, 5, qk_layer_norms=True, level=1),
        lambda p, x, mask: idefics(p, x, mask, K=10), masked(2, 9, 16),
    ),
    "idefics2": (
        IDEFICS2,
        lambda: Idefics2Connector(14, 20, 16, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=4,
                                  resampler_head_dim=6, num_key_value_heads=2),
        idefics2, tokens(2, 9, 14),
    ),
    "idefics2 masked level 1": (
        IDEFICS2,
        lambda: Idefics2Connector(14, 20, 16, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=6,
                                  resampler_head_dim=6, num_key_value_heads=2, level=1),
        idefics2, masked(2, 9, 14),
    ),
    "kosmos2": ("resampler.kosmos2", lambda: Kosmos2Projection(14, 24, 4, 5), kosmos2, tokens(2, 9, 14)),
    "kosmos2 level 1": ("resampler.kosmos2", lambda: Kosmos2Projection(14, 24, 4, 5, level=1), kosmos2,
                        tokens(3, 9, 14)),
}  # fmt: skip


def randomised(module: nn.Module) -> nn.Module:
    """No parameter at its initial zero or one, which would hide errors."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(float(name.endswith("weight")), 0.5)
            elif "proj" in name or "to_" in name or ".1." in name or "dense" in name:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.normal_()
    return module


def doubled(inputs: tuple) -> tuple:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def results(call, parameters: dict, inputs: tuple) -> dict:
    """y, and the gradient of each input and parameter."""
    inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
    for parameter in parameters.values():
        parameter.grad = None
    y = call(*inputs)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y))
    grads = {f"input {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    return {"y": y.detach()} | grads | {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


def of_module(module, inputs) -> dict:
    return results(module, dict(module.named_parameters()), inputs)


def by_hand(module_id, module, equation, inputs, dtype, autocast=None) -> dict:
    upstream = to_upstream(module_id, {n: p.detach() for n, p in module.named_parameters()})
    parameters = {n: p.to(dtype, copy=True).requires_grad_() for n, p in upstream.items()}
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)

    def call(*x):
        with torch.autocast(x[0].device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            return equation(parameters, *x)

    found = results(call, parameters, inputs)
    ours = to_ours(module_id, {n: t for n, t in found.items() if n in parameters})
    return {n: t for n, t in found.items() if n not in parameters} | ours


def draws_by_hand(module_id, module, equation, inputs, first, usual, autocast=None):
    """(usual, exact) of five draws: of the module as it is on the inputs `first`, then of others."""
    for draw in compare.SEEDS:
        tensors = first
        if draw:
            randomised(module)
            tensors = tuple(x.to(t.device, t.dtype) for x, t in zip(inputs(), first, strict=True))
        found = by_hand(module_id, module, equation, tensors, usual, autocast)
        yield found, by_hand(module_id, module, equation, tensors, torch.float64)
