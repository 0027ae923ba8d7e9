"""lora_linear's plans: one rule for all of them, what each moves, and how one is chosen."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vlkernels import lora_linear
from vlkernels.ops import _lora_two_source
from vlkernels.ops._dropout import keep_mask
from vlkernels.ops._lora_plan import PLANS, use_plan
from vlkernels.ops.lora_linear import cases, plans
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Make

OTHERS = [plan for plan in PLANS if plan != "update"]
SMALL = [c for c in cases.CASES if "bench" not in c.tags and not c.get("base") and not c.get("quant")]
SHARP = next(c for c in SMALL if "sharp" in c.tags)


def packed_if(plan: str):
    return plans.packed_copies if plan == "packed" else (lambda kw: kw)


def rows():
    for plan in OTHERS:
        for case in SMALL:
            marks = [pytest.mark.slow] if "slow" in case.tags else []
            for precision in cases.PRECISIONS if "all-precisions" in case.tags else ("fp32", "bf16"):
                if plan == "packed" and precision == "bf16+fp32":
                    continue  # weight and b are of two dtypes and cannot share a buffer
                yield pytest.param(plan, case, PRECISIONS[precision], marks=marks, id=f"{plan}-{case}-{precision}")


@pytest.mark.parametrize("plan, case, precision", list(rows()))
def test_rule(plan, case, precision, device, poisoned):
    """Output and gradients obey the rule that the default plan is held to, p = 0 and p > 0, also from slices."""
    for wide in (False, True):
        with use_plan(plan), meter.launches() as counts:
            found = compare.errors(
                lora_linear, case, precision, "triton", device, wide, lambda kw: packed_if(plan)(kw) if kw else kw
            )
        assert all(e.ok for e in found), f"wide={wide}: " + "; ".join(str(e) for e in found if not e.ok)
        # "bf16+fp32 amp" packs nothing: the plan falls back
        ran = "lora_two_source_product_kernel" if plan == "two_source" else "lora_packed_down_kernel"
        assert counts[ran] == (2 if plan == "two_source" else 1) or precision.name == "bf16+fp32 amp"


@pytest.mark.parametrize("plan", OTHERS)
@pytest.mark.parametrize("term", list(cases.TERMS))
def test_rule_notices(plan, term, device):
    """The rule sees each term dropped or halved under every plan."""
    with use_plan(plan):
        found = compare.errors(
            lora_linear, SHARP, PRECISIONS["bf16"], "triton", device,
            change=lambda kw: packed_if(plan)(cases.TERMS[term](kw)),
        )  # fmt: skip
    assert any(not e.ok for e in found)


@pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", [c for c in SMALL if "slow" not in c.tags], ids=str)
def test_bytes_moved(plan, case):
    """cases.bytes_moved holds for each plan, within 5 %."""
    for precision, itemsize in (("bf16", 2), ("fp32", 4)):
        kw = packed_if(plan)(cases.inputs(case, Make(PRECISIONS[precision])))
        declared = cases.bytes_moved(case, itemsize, plan)
        with use_plan(plan):
            with meter.traffic() as forward:
                y = lora_linear(**kw, backend="triton")
            dy = torch.randn_like(y)
            with meter.traffic() as backward:
                y.backward(dy)
        for name, measured in (("forward", forward), ("backward", backward)):
            assert abs(measured.moved / declared[name] - 1) < 0.05, (precision, name, measured, declared)


def arguments(device, dtype=torch.float32, T=40, K=75, N=33, R=3, p=0.0, packed=False, grad=True):
    g = torch.Generator().manual_seed(1)
    x, weight, a, b = (torch.randn(*s, generator=g).to(device, dtype) for s in ((T, K), (N, K), (R, K), (N, R)))
    kw = {"x": x, "weight": weight, "a": a, "b": b, "scale": 0.5, "p": p}
    kw |= {"seed": torch.tensor(77, device=device)} if p else {}
    for name in ("x", "a", "b"):
        kw[name].requires_grad_(grad)
    return plans.packed_copies(kw) if packed else kw


def results(kw, dy=None) -> list[torch.Tensor]:
    leaves = [t for t in kw.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    y = lora_linear(**kw, backend="triton")
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy)]


def test_two_source_kernel_runs_no_pass_over_y_or_dx(device):
    kw = arguments(device, p=0.25)
    with use_plan("two_source"), meter.launches() as counts:
        results(kw)
    assert counts["lora_two_source_product_kernel"] == 2 and counts["lora_update_kernel"] == 0


def test_two_source_mask_is_the_references(device):
    kw = arguments(device, p=0.5)
    kw["weight"] = kw["weight"] * 0
    with use_plan("two_source"):
        _, dx, *_ = results(kw)
    keep = keep_mask(kw["seed"], 40, 75, 0.5)
    assert not dx[~keep].any() and (dx[keep] != 0).all()


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_two_source_strides(p, device):
    """A transposed weight (GPT-2's Conv1D), transposed adapters, sliced x, an expanded dy: the same numbers."""
    kw = arguments(device, p=p)
    with use_plan("two_source"):
        want = results(kw)
        turned = {n: t.detach().t().contiguous().t().requires_grad_(t.requires_grad) for n, t in kw.items()
                  if n in ("weight", "a", "b")}  # fmt: skip
        wide = torch.full((40, 90), float("nan"), device=device)
        wide[:, 7:82] = kw["x"].detach()
        turned["x"] = wide[:, 7:82].requires_grad_()
        got = results(kw | turned, torch.ones((), device=device).expand(40, 33))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("T", [16, 33, 80])
def test_two_source_program_order(T, group, device):
    """Each block is computed once, whatever the grouping and however many row blocks the last group has."""
    x, w = torch.randn(T, 20, device=device), torch.randn(70, 20, device=device)
    s, b = torch.randn(T, 3, device=device), torch.randn(70, 3, device=device)
    tile = _lora_two_source.Tile(16, 16, 16, 16, warps=4, stages=1, group=group)
    out = torch.full((T, 70), float("nan"), device=device)
    _lora_two_source.product(x, w, s, b, None, None, None, 2.0, 0.0, out, tile)
    torch.testing.assert_close(out, 2 * s @ b.t() + x @ w.t())


def test_two_source_float32_branch_over_half_weights(device):
    """Adapters in float32 over bf16: the term reaches the accumulator unrounded."""
    x, w = torch.randn(16, 24, device=device).bfloat16(), torch.zeros(20, 24, device=device).bfloat16()
    a, b = torch.randn(4, 24, device=device), torch.randn(20, 4, device=device)
    with use_plan("two_source"):
        y = lora_linear(x, w, a, b, backend="triton")
    exact = x.double() @ a.double().t() @ b.double().t()
    assert torch.equal(y, exact.to(torch.bfloat16))


@pytest.mark.parametrize("plan", PLANS)
def test_bits_repeat(plan, device):
    kw = arguments(device, torch.bfloat16, p=0.1, packed=plan == "packed")
    with use_plan(plan):
        first, second = results(kw), results(kw)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_only_needed_gradients(plan, device):
    for trained in ("x", "a", "b"):
        kw = arguments(device, p=0.1, packed=plan == "packed", grad=False)
        kw[trained].requires_grad_()
        with use_plan(plan):
            found = results(kw)
        with use_plan("update"):
            want = results(kw)
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", [(75,), (2, 3, 75), (0, 75)])
def test_leading_shapes(plan, shape, device):
    kw = arguments(device, packed=plan == "packed")
    kw["x"] = torch.randn(shape, device=device)
    with use_plan(plan):
        y = lora_linear(**kw, backend="triton")
    torch.testing.assert_close(y, lora_linear(**kw, backend="reference"))


@pytest.mark.parametrize("plan", OTHERS)
def test_checkpoint_and_compile(plan, device):
    """The same numbers under non-reentrant checkpointing and in one compiled graph."""
    kw = arguments(device, p=0.25, packed=plan == "packed")
    leaves = [kw[name] for name in ("x", "a", "b")]

    def call(x, a, b):
        return lora_linear(**(kw | {"x": x, "a": a, "b": b}), backend="triton")

    with use_plan(plan):
        want = results(kw)
        y = checkpoint(call, *leaves, use_reentrant=False)
        got = [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        torch._dynamo.reset()
        with meter.launches() as counts:
            y = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
            got = [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
        assert counts["lora_two_source_product_kernel" if plan == "two_source" else "lora_packed_down_kernel"]
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


# -- the choice ----------------------------------------------------------------------------------------------------


def kernels_of(kw) -> set[str]:
    with meter.launches() as counts:
        results(kw)
    return set(counts)


def test_default_plan_is_the_update(device):
    assert "lora_update_kernel" in kernels_of(arguments(device))
    with use_plan("two_source"), use_plan("auto"):
        assert "lora_update_kernel" in kernels_of(arguments(device))


def test_packed_weights_are_seen_and_can_be_overruled(device):
    kw = arguments(device, packed=True)
    assert "lora_packed_down_kernel" in kernels_of(kw)
    for plan in ("update", "two_source"):
        with use_plan(plan):
            assert "lora_packed_down_kernel" not in kernels_of(kw)
    with use_plan("packed"):
        assert "lora_update_kernel" in kernels_of(arguments(device))


@pytest.mark.parametrize("plan", OTHERS)
def test_a_second_adapter_keeps_the_default(plan, device):
    kw = arguments(device, packed=plan == "packed")
    kw |= {"weight": None, "base": torch.randn(40, 33, device=device)}
    with use_plan(plan):
        assert kernels_of(kw) & {"lora_two_source_product_kernel", "lora_packed_down_kernel"} == set()


def test_backward_outside_the_block(device):
    """What a forward saves fits every plan."""
    kw = arguments(device, p=0.25, packed=True)
    want = results(kw)
    for plan in PLANS:
        with use_plan(plan):
            y = lora_linear(**kw, backend="triton")
        for one, other in zip(torch.autograd.grad(y, [kw[n] for n in ("x", "a", "b")], torch.ones_like(y)), want[1:],
                              strict=True):  # fmt: skip
            torch.testing.assert_close(one, other)


def test_unknown_plan():
    with pytest.raises(ValueError, match="accepted: auto, update, two_source, packed"), use_plan("fused"):
        pass


@pytest.mark.parametrize("value, status", [("two_source", 0), ("fused", 1)])
def test_environment(value, status):
    code = "from vlkernels.ops import _lora_plan as p; assert p.choose('update', True) == 'two_source'"
    environment = os.environ | {"VLKERNELS_LORA_PLAN": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert status == 0 or "VLKERNELS_LORA_PLAN is 'fused'" in done.stderr
