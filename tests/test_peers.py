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


@pytest.mark.parametrize("name, options", [("lora_qkv", {}), ("lora_mlp", {}), ("lora_mlp", {"act": "gelu_tanh"})])
def test_unsloth_is_handed_the_op(unsloth, name, options):
    op, precision = backends.OPS[name], PRECISIONS["bf16"]
    module = compare.cases_of(op)
    template = next(c for c in module.CASES if "bench" in c.tags and not c.get("p"))
    sizes = {d: n for d, n in zip(template.dims, (9, 24, 40, *[5] * 9), strict=False)}
    case = Case("small", sizes, dict(template.options) | options, frozenset())
    kw = module.inputs(case, Make(precision, 0, "cpu"))
    instance = peer(op).build(case, kw, precision)
    got = instance.forward()
    got = torch.cat([y.flatten() for y in (got if isinstance(got, tuple) else (got,))])
    truth = op(**{k: compare.doubled(v) for k, v in kw.items()}, backend="reference")
    truth = torch.cat([y.flatten() for y in (truth if isinstance(truth, tuple) else (truth,))])
    plain = op(**kw, backend="reference")
    plain = torch.cat([y.flatten() for y in (plain if isinstance(plain, tuple) else (plain,))])
    error = compare.beside(name, got.detach(), plain.detach(), truth)
    assert error.ok, str(error)


@pytest.mark.parametrize("name", ["lora_qkv", "lora_mlp"])
def test_unsloth_says_what_it_does_not_take(unsloth, name):
    op = backends.OPS[name]
    module = compare.cases_of(op)
    case = next(c for c in module.CASES if c.get("p"))
    with pytest.raises(providers.Unavailable, match="dropout 0"):
        peer(op).build(case, module.inputs(case, Make(PRECISIONS["bf16"], 0, "cpu")), PRECISIONS["bf16"])
