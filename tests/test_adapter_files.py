"""Adapters' files of settings that the recorded goldens do not have, and bad input."""

import pytest
from adapter_equations import D, frozen, hub, magma, tokens
from equations import layer_norm, lin
from own_goldens import both, passes, write

from vlkernels.modules import AdapterHubAdapter, BottleneckAdapter, FrozenBiLMAdapter, MAGMAAdapter, make_adapter

pytestmark = pytest.mark.usefixtures("on_the_reference")


def norm(name):
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


NORMS = {"ln_before": True, "ln_after": True, "use_gating": True, "scaling": "learned",
         "residual_before_ln": "post_add"}  # fmt: skip
X = {"x": (2, 3, D)}
FILES = {
    "hub norms": (
        "adapter.adapterhub",
        {"config": "seq_bn", "d": D, "config_kw": {"reduction_factor": 4} | NORMS},
        {**norm("layer_norm"), **both("adapter.adapter_down.1", 5, D), **both("adapter.adapter_up", D, 5),
         **both("adapter.gate", 1, D), "adapter.scaling": (1,), **norm("adapter.adapter_norm_after"),
         **norm("adapter.adapter_norm_before"), **norm("adapter.adapter_down.0")},
        {"hidden_states": (2, 3, D), "input_tensor": (2, 3, D)}, hub("seq_bn", **NORMS).equation,
        [[f"adapter.{n}.{w}" for n in ("adapter_norm_before", "adapter_down.0")] for w in ("weight", "bias")],
    ),
    "hub leakyrelu": (
        "adapter.adapterhub", {"config": "par_bn", "d": D, "config_kw": {"non_linearity": "leakyrelu"},
                               "with_ln": False},
        {**both("adapter.adapter_down.0", 10, D), **both("adapter.adapter_up", D, 10)},
        {"hidden_states": (2, 3, D), "input_tensor": (2, 3, D)},
        hub("par_bn", norm=False, non_linearity="leakyrelu").equation,
    ),
    "magma attention": (
        "adapter.magma", {"type": "attn_normal", "d": D, "factor": 4, "ln": True},
        {**both("attn_block.lin", D, D), **both("adapter.1", 5, D), **both("adapter.3", D, 5), **norm("adapter.0")},
        X, lambda p, x: (h := lin(p, "attn_block.lin", x)) + magma(p, h, first=1),
    ),
    "magma parallel attention": (
        "adapter.magma", {"type": "attn_scaled_parallel", "d": D, "factor": 5, "ln": False},
        {**both("module", D, D), **both("adapter.0", 4, D), **both("adapter.2", D, 4), "adapter_scale": (1,)},
        X, lambda p, x: lin(p, "module", x) + p["adapter_scale"] * magma(p, x),
    ),
    "frozenbilm ln_after": (
        "adapter.frozenbilm", {"d": D, "ds": 4, "ln_before": False, "ln_after": True},
        {**both("down", 5, D), **both("up", D, 5), **norm("ln")}, X, frozen(ln_after=True),
    ),
    "frozenbilm ff": (
        "adapter.frozenbilm_output", {"which": "ff", "d": D, "ff": 28, "ds": 4},
        {**both("dense", D, 28), **both("adapter.down", 5, D), **both("adapter.up", D, 5), **norm("LayerNorm")},
        {"x": (2, 3, 28), "residual": (2, 3, D)},
        lambda p, x, r: layer_norm(p, "LayerNorm", frozen(top="adapter.")(p, lin(p, "dense", x)) + r, 1e-7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_settings(name, tmp_path):
    """Settings that the recorded goldens do not have: builder, names and numbers."""
    write(tmp_path, *FILES[name])
    passes(tmp_path)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: make_adapter("lora", D), "kind is 'lora'; accepted: bottleneck, seq_bn"),
        (lambda: AdapterHubAdapter(D, "prefix"), "config is 'prefix'; accepted: seq_bn, double_seq_bn, par_bn"),
        (lambda: AdapterHubAdapter(D, "seq_bn", phm_layer=True), "seq_bn has no option 'phm_layer'"),
        (lambda: make_adapter("par_bn", D, residual_before_ln="post_add"), "residual_before_ln is 'post_add'"),
        (lambda: AdapterHubAdapter(D, init_weights="zeros"), "init_weights is 'zeros'; accepted: bert, houlsby"),
        (lambda: AdapterHubAdapter(D, scaling="free"), "scaling is 'free'; accepted: a number, 'learned'"),
        (lambda: AdapterHubAdapter(D, reduction_factor=64), "has rank 0; accepted: 1 or more"),
        (lambda: AdapterHubAdapter(D, reduction_factor=0), "reduction is 0; accepted: more than 0"),
        (lambda: BottleneckAdapter(0), "width is 0; accepted: 1 or more"),
        (lambda: BottleneckAdapter(D, norm="batch"), "norm is 'batch'; accepted: none, layer, rms"),
        (lambda: BottleneckAdapter(D, dropout=1.0), "dropout is 1.0; accepted: a dropout probability"),
        (lambda: MAGMAAdapter(D, scaled=True), "scaled=True with parallel=False"),
        (lambda: FrozenBiLMAdapter(D, 8), "width is 20, ds_factor 8; accepted: a divisor"),
    ],
)  # fmt: skip
def test_bad_construction(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda h, r: make_adapter("seq_bn", D)(h), "residual is None; accepted by this AdapterHubAdapter"),
        (lambda h, r: make_adapter("par_bn", D)(h, r[:1]), r"residual has shape \(1, 3, 20\); accepted: that"),
        (lambda h, r: make_adapter("magma", D)(h[..., :4]), r"hidden has shape \(2, 3, 4\); accepted: \(..., D\)"),
        (lambda h, r: make_adapter("seq_bn", D, use_gating=True)(h[0], r[0]), r"accepted with use_gating: \(B, L, D\)"),
        (lambda h, r: make_adapter("seq_bn", D, original_ln_after=False).branch(h, r), "original_ln_after=False"),
        (lambda h, r: make_adapter("magma", D)("text"), "hidden must be a torch.Tensor, got str"),
    ],
)  # fmt: skip
def test_bad_input(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call(*tokens(2, 2, 3, D)())
