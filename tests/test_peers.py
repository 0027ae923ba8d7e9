"""What the peers' functions are handed in benchmarks: stand-ins with their signatures compute the op's equation."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks import providers
from vlkernels import backends
from vlkernels.testing import compare
from vlkernels.testing.case import PRECISIONS, Case, Make


def projected(x, weight, quant, a, b, scale):
    assert quant is None
    return F.linear(x, weight) + scale * F.linear(F.linear(x, a), b)


class LoRA_QKV:
    @staticmethod
    def apply(x, *rest):
        *projections, inplace = rest
        assert x.dim() == 3 and not inplace and len(projections) == 15
        return tuple(projected(x, *projections[i : i + 5]) for i in (0, 5, 10))


class LoRA_MLP:
    @staticmethod
    def apply(x, *rest):
        *projections, act, act_backward, inplace = rest
        assert x.dim() == 3 and not inplace and len(projections) == 15 and act_backward
        h = act(projected(x, *projections[:5]), projected(x, *projections[5:10]))
        return projected(h, *projections[10:])


@pytest.fixture
def unsloth(monkeypatch):
    """A package of its name with the functions that are called, by its file names."""
    parts = {
        "fast_lora": {"LoRA_QKV": LoRA_QKV, "LoRA_MLP": LoRA_MLP},
        "swiglu": {"swiglu_fg_kernel": lambda e, g: F.silu(e) * g, "swiglu_DWf_DW_dfg_kernel": True},
        "geglu": {f"geglu_{kind}_{way}_kernel": (lambda e, g, tanh=kind == "approx": F.gelu(
            e, approximate="tanh" if tanh else "none") * g) for kind in ("exact", "approx")
            for way in ("forward", "backward")},
    }  # fmt: skip
    for name in ("unsloth", "unsloth.kernels"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, members in parts.items():
        module = types.ModuleType(f"unsloth.kernels.{name}")
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(sys.modules["unsloth.kernels"], name, module)


def peer(op):
    (found,) = providers.module_of(op).PEERS
    return found


def check_peer(op, case, kw, precision):
    """The peer over its stand-in computes the op, by the rule."""
    got, truth, plain = (
        _flat(y)
        for y in (
            peer(op).build(case, kw, precision).forward(),
            op(**{k: compare.doubled(v) for k, v in kw.items()}, backend="reference"),
            op(**kw, backend="reference"),
        )
    )
    error = compare.beside(op.name, got.detach(), plain.detach(), truth)
    assert error.ok, str(error)


def _flat(y):
    return torch.cat([t.flatten() for t in (y if isinstance(y, tuple) else (y,))])


@pytest.mark.parametrize("name, options", [("lora_qkv", {}), ("lora_mlp", {}), ("lora_mlp", {"act": "gelu_tanh"})])
def test_unsloth_is_handed_the_op(unsloth, name, options):
    op, precision = backends.OPS[name], PRECISIONS["bf16"]
    module = compare.cases_of(op)
    template = next(c for c in module.CASES if "bench" in c.tags and not c.get("p"))
    sizes = {d: n for d, n in zip(template.dims, (9, 24, 40, *[5] * 9), strict=False)}
    case = Case("small", sizes, dict(template.options) | options, frozenset())
    kw = module.inputs(case, Make(precision, 0, "cpu"))
    check_peer(op, case, kw, precision)


@pytest.mark.parametrize("name", ["lora_qkv", "lora_mlp"])
def test_unsloth_says_what_it_does_not_take(unsloth, name):
    op = backends.OPS[name]
    module = compare.cases_of(op)
    case = next(c for c in module.CASES if c.get("p"))
    with pytest.raises(providers.Unavailable, match="dropout 0"):
        peer(op).build(case, module.inputs(case, Make(PRECISIONS["bf16"], 0, "cpu")), PRECISIONS["bf16"])


def stand_in(monkeypatch, module: str, **members):
    """A package with the functions that are called, importable by the name of its file."""
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
    sys.modules[module].__dict__.update(members)


@pytest.mark.parametrize("scan", ["r", "rcRC"])
def test_mamba_ssm_is_handed_the_scan(monkeypatch, scan):
    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        assert u.dtype == delta.dtype == B.dtype and A.dtype == D.dtype == delta_bias.dtype == torch.float32
        assert B.dim() == 4 and u.shape == delta.shape and z is None and return_last_state
        y, last = providers.module_of(op).scan_of_copies(u, delta, A, B, C, D, delta_bias, None, delta_softplus)
        return y.to(u.dtype), last

    op, precision = backends.OPS["selective_scan_2d"], PRECISIONS["fp32"]
    stand_in(monkeypatch, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    sizes = {"T": 12, "H": 2, "W": 3, "D": 4, "S": 3, "G": 1}
    case = Case("small", sizes, {"scan": scan, "d": True, "z": True}, frozenset())
    kw = compare.cases_of(op).inputs(case, Make(precision, 0, "cpu"))
    check_peer(op, case, kw, precision)
    with pytest.raises(providers.Unavailable, match="without a state"):
        peer(op).build(case, kw | {"state": torch.zeros(2, len(scan), 4, 3)}, precision)


@pytest.mark.parametrize("name", ["everything", "locations"])
def test_mmcv_is_handed_locations(monkeypatch, name):
    class MultiScaleDeformableAttnFunction:
        @staticmethod
        def apply(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, step):
            sizes = [int(n) for n in value_spatial_shapes.flatten()]
            areas = [h * w for h, w in value_spatial_shapes.tolist()]
            assert value_level_start_index.tolist() == [sum(areas[:i]) for i in range(len(areas))]
            assert len(value) % step == 0 and sampling_locations.dtype == attention_weights.dtype == value.dtype
            equation = providers.module_of(op).equation
            return equation(value, sampling_locations, attention_weights, sizes, False).flatten(2)

    op, precision = backends.OPS["deformable_attention"], PRECISIONS["fp32"]
    stand_in(monkeypatch, "mmcv.ops.multi_scale_deform_attn",
             MultiScaleDeformableAttnFunction=MultiScaleDeformableAttnFunction)  # fmt: skip
    module = compare.cases_of(op)
    case = next(c for c in module.CASES if c.name == name)
    check_peer(op, case, module.inputs(case, Make(precision, 0, "cpu")), precision)
