"""The compiled selective scan where no GPU is: its numbers on the host (test_csrc.py holds it to no spill).

The host run is that of test_csrc_update.py: one fiber per CUDA thread, through the real torch border over CPU tensors.
"""

import functools
import re

import pytest
import torch
from test_csrc_update import host_library

from vlkernels import selective_scan_2d
from vlkernels.ops.selective_scan_2d import cuda, triton
from vlkernels.testing import compare
from vlkernels.testing.case import PRECISIONS, Case, Make

KERNELS = ["selective_scan/selective_scan_fwd.cu", "selective_scan/selective_scan_bwd.cu"]
# every switch: two chunks with an end inside of a tile, two blocks of channels, groups, a gate, a state, no softplus
CASES = {
    "csm": Case("csm", {"T": 15, "H": 3, "W": 5, "D": 7, "S": 16, "G": 1}, {"scan": "rcRC", "d": True, "state": True}),
    # two states kept on the way
    "chunks": Case("chunks", {"T": 81, "H": 9, "W": 9, "D": 5, "S": 3, "G": 1}, {"scan": "Cr"}),
    "gated": Case("gated", {"T": 18, "H": 9, "W": 1, "D": 34, "S": 4, "G": 1}, {"scan": "r", "d": True, "z": True}),
    "groups": Case("groups", {"T": 3, "H": 3, "W": 1, "D": 8, "S": 5, "G": 2},
                   {"scan": "R", "state": True, "delta_bias": False, "softplus": False}),
}  # fmt: skip


@functools.cache
def emulated(namespace: str = "vlkernels_scan", edit: tuple[str, str, str] | None = None):
    torch.ops.load_library(str(host_library(namespace, "selective_scan.cpp", KERNELS, edit)))
    return getattr(torch.ops, namespace)


def run(case: Case, precision, ops, wide: bool = False) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the compiled kernels; the sum over directions as torch computes it."""
    kw = compare.cases_of(selective_scan_2d).inputs(case, Make(precision, 0, wide=wide))
    values = selective_scan_2d.values(**kw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "_merge", lambda parts, out, K: out.copy_(parts.sum(0)) if K > 1 else None)
        with torch.no_grad():
            y, last, states = triton.forward(*values, launch=functools.partial(cuda.launch_forward, ops=ops))
            named = dict(zip(selective_scan_2d.names, values, strict=True)) | {"states": states}
            dy, dlast = (compare.cotangent(t, precision, 0, i) for i, t in enumerate((y, last)))
            found = triton.backward(
                dy, dlast, {n: named[n] for n in selective_scan_2d.saves},
                {n: isinstance(v, torch.Tensor) for n, v in named.items()},
                *values[9:], launch=functools.partial(cuda.launch_backward, ops=ops),
            )  # fmt: skip
    shaped = {n: g.reshape(kw[n].shape) for n, g in found.items()}
    return {"y": y, "y1": last} | {"d" + n: g for n, g in shaped.items() if kw[n].requires_grad}


def errors(case: Case, precision, ops, wide: bool = False) -> list[compare.Error]:
    kw = compare.cases_of(selective_scan_2d).inputs(case, Make(precision, 0, wide=wide))
    truth = compare.exact(selective_scan_2d, kw, precision, 0)
    limits, got = compare.limits(selective_scan_2d, case, precision), run(case, precision, ops, wide)
    assert set(got) == set(limits)
    return [compare.Error(n, *(worst := compare.worst(got[n], truth[n]))[:1], *limits[n], worst[1]) for n in limits]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_emulated_scan_is_exact(name, precision, poisoned):
    wide = precision == "bf16"
    found = errors(CASES[name], PRECISIONS[precision], emulated(), wide)
    assert all(e.ok for e in found), "; ".join(str(e) for e in found if not e.ok)


BWD, FWD, SHARED = KERNELS[1], KERNELS[0], "selective_scan/selective_scan.cuh"
BREAKS = {
    "decay": (SHARED, "exp2_fast(dt * k.a[s]) * h[s]", "h[s]"),
    "columns": (SHARED, "t % p.height * p.width + t / p.height", "t % p.width * p.height + t / p.width"),
    "softplus": (SHARED, "0.33333334f", "0.3f"),
    "states": (FWD, "begin / p.chunk - 1) * p.S", "0) * p.S"),
    "barrier of the tile": (SHARED, "  }\n  __syncwarp();\n}", "  }\n}"),
    "lanes of db": (BWD, "const float keep = upper ? v[i + kW] : v[i];", "const float keep = v[i];"),
    "held states": (BWD, "step(half * kHeld + i - 1, before[i]);", "step(half * kHeld + i, before[i]);"),
    "gate": (BWD, "dy *= gate * open;", "dy *= open;"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_is_noticed(name):
    ops = emulated("vlkernels_scan_broken_" + re.sub(r"\W", "_", name), BREAKS[name])
    assert not all(e.ok for case in CASES.values() for e in errors(case, PRECISIONS["fp32"], ops))


def test_the_border_names_what_does_not_fit():
    case = CASES["csm"]
    kw = compare.cases_of(selective_scan_2d).inputs(case, Make(PRECISIONS["fp32"], 0))
    values = dict(zip(selective_scan_2d.names, selective_scan_2d.values(**kw), strict=True))
    out = [torch.empty(4, 1, 15, 7), torch.empty(1, 4, 7, 16), torch.empty(1, 4, 0, 16, 7)]
    for change, says in (
        ({"c": values["c"].bfloat16()}, "c is BFloat16; expected Float"),
        ({"height": 4}, "height and width are 4, 5"),
        ({"delta": values["delta"][:, :14]}, "delta has another shape"),
        ({"z": values["u"]}, "z with 4 directions"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(says)):
            cuda.launch_forward(*(values | change).values(), *out, ops=emulated())


def test_refusals_and_shared_memory():
    """Without a GPU the compiled kernels refuse with a reason; where they run they are not chosen unmeasured."""
    kw = compare.cases_of(selective_scan_2d).inputs(CASES["csm"], Make(PRECISIONS["fp32"], 0))
    values = selective_scan_2d.values(**kw)
    assert "compiled kernels run on CUDA devices" in cuda.refuses(*values)
    assert "not measured" in cuda.declines(*values)
    # 576 and 729 tokens of four directions fit an A100 in 16 bits
    assert max(cuda.shared_bytes(L, 4, 2) for L in (576, 729)) <= 166_912
