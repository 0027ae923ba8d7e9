"""lora_linear's plans: one rule for all of them, what each moves, and how one is chosen."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks import check, providers, record, tune
from benchmarks import plans as bench_plans
from vlkernels import lora_linear
from vlkernels.ops import _device, _lora, _lora_two_source
from vlkernels.ops._dropout import keep_mask
from vlkernels.ops._lora_plan import PLANS, use_plan
from vlkernels.ops.lora_linear import cases
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Make

OTHERS = [plan for plan in PLANS if plan != "update"]
SMALL = [c for c in cases.CASES if "bench" not in c.tags and not c.get("base") and not c.get("quant")]
SHARP = next(c for c in SMALL if "sharp" in c.tags)


def stored_for(plan: str):
    """The arguments as the plan needs them stored."""

    def change(kw: dict) -> dict:
        with cases.planned(plan, kw) as kw:
            return kw

    return change


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
            found = compare.errors(lora_linear, case, precision, "triton", device, wide, stored_for(plan))
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
            change=lambda kw: stored_for(plan)(cases.TERMS[term](kw)),
        )  # fmt: skip
    assert any(not e.ok for e in found)


@pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("plan", OTHERS)
@pytest.mark.parametrize("case", [c for c in SMALL if "slow" not in c.tags], ids=str)
def test_bytes_moved(plan, case):
    """cases.bytes_moved holds for each plan, within 5 %; test_ops.py holds it for the default one."""
    for precision, itemsize in (("bf16", 2), ("fp32", 4)):
        kw = stored_for(plan)(cases.inputs(case, Make(PRECISIONS[precision])))
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
    return stored_for("packed")(kw) if packed else kw


def results(kw, dy=None) -> list[torch.Tensor]:
    leaves = [t for t in kw.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    y = lora_linear(**kw, backend="triton")
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy)]


def exact(kw) -> list[torch.Tensor]:
    """`results` of the float64 reference."""
    kw = {k: compare.doubled(v) for k, v in kw.items()} | {"dtype": None}
    y = lora_linear(**kw, backend="reference")
    leaves = [t for t in kw.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def assert_rule(got, usual, truth, dtype=None) -> None:
    found = [compare.beside(str(i), *three, dtype) for i, three in enumerate(zip(got, usual, truth, strict=True))]
    assert all(e.ok for e in found), "; ".join(map(str, found))


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


@pytest.mark.parametrize("plan", OTHERS)
def test_a_four_bit_weight_keeps_the_default(plan, device):
    case = next(c for c in cases.CASES if c.get("quant") and "bench" not in c.tags)
    kw = stored_for(plan)(cases.inputs(case, Make(PRECISIONS["fp32"], 0, device)))
    with use_plan(plan):
        assert kernels_of(kw) & {"lora_two_source_product_kernel", "lora_packed_down_kernel"} == set()


@pytest.mark.parametrize("plan", OTHERS)
def test_scale_of_a_sum_in_parts(plan, device):
    """A long row is summed over ranges of its columns; the scale, which the cases leave at 1, is applied once."""
    kw = arguments(device, T=20, K=900, R=5, p=0.25, packed=plan == "packed")
    assert _lora.config(_lora.Dims(20, 900, 33, 5), torch.float32, _device.arch(kw["x"])).packed.splits > 1
    with use_plan("update"):
        want = results(kw)
    with use_plan(plan):
        assert_rule(results(kw), want, exact(kw))


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


# -- tuned records -------------------------------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path, monkeypatch):
    """A function that writes records as benchmarks/tune.py does, for config() to read."""
    monkeypatch.setattr(_device, "OPS", tmp_path)

    def write(*entries, arch=90, name="device"):
        folder = tmp_path / "lora_linear" / "tuned"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps({"arch": arch, "entries": entries}))
        _device._records.cache_clear()

    yield write
    _device._records.cache_clear()


DIMS = _lora.Dims(4096, 512, 768, 16)


def test_tuned_tiles_and_plan_are_used(records):
    """What tune.py writes comes back from config(), for that architecture, dtype and shape, and rows of that size."""
    plain = _lora.config(DIMS, torch.bfloat16, 90)
    best = dataclasses.replace(plain, down=dataclasses.replace(plain.down, rows=32, stages=5), plan="two_source")
    records(tune.entry(best, _lora.config_key(DIMS, torch.bfloat16, 90)))
    assert _lora.config(DIMS, torch.bfloat16, 90) == best
    nearly = _lora.config(dataclasses.replace(DIMS, T=5000), torch.bfloat16, 90)
    assert nearly.down.rows == 32 and nearly.plan == "two_source"
    for other in (
        _lora.config(dataclasses.replace(DIMS, T=8192), torch.bfloat16, 90),
        _lora.config(dataclasses.replace(DIMS, R=17), torch.bfloat16, 90),
        _lora.config(DIMS, torch.float16, 90),
        _lora.config(DIMS, torch.bfloat16, 90, torch.float32),
        _lora.config(DIMS, torch.bfloat16, 90, group=2),
        _lora.config(DIMS, torch.float32, 90, plain=torch.bfloat16),
        _lora.config(DIMS, torch.bfloat16, 100),
    ):
        assert other.plan == "update" and other.down.stages == 3


def test_tuned_plan_runs(records, device):
    """A record's plan is followed without being asked for, and a forced plan goes before it."""
    kw = arguments(device)
    dims = _lora.Dims(40, 75, 33, 3)
    where = _device.arch(kw["x"])
    found = dataclasses.replace(_lora.config(dims, torch.float32, where), plan="two_source")
    records(tune.entry(found, _lora.config_key(dims, torch.float32, where)), arch=where)
    assert "lora_two_source_product_kernel" in kernels_of(kw)
    with use_plan("update"):
        assert "lora_two_source_product_kernel" not in kernels_of(kw)


def test_records_of_another_version(records):
    """A tile that the configuration no longer has is left out; a file that names no architecture is nobody's."""
    found = tune.entry(_lora.config(DIMS, torch.bfloat16, 90), _lora.config_key(DIMS, torch.bfloat16, 90))
    records(found | {"tiles": {"gone": {"rows": 1}}})
    assert _lora.config(DIMS, torch.bfloat16, 90).plan == "update"
    records(found | {"plan": "two_source"}, arch=None)
    assert _lora.config(DIMS, torch.bfloat16, 90).plan == "update"


def test_tune_searches_the_plans():
    config = _lora.config(DIMS, torch.bfloat16, 90)
    assert tune.plans_of(lora_linear, config) == ["update", "two_source"]
    assert {t.depth for t in tune.neighbours(config.two_source)} == {32, 64, 128}


def test_tune_finds_the_key(device):
    x, a, b = (torch.randn(*shape, device=device) for shape in ((80, 24), (4, 24), (20, 4)))
    found, key = tune.picked(lora_linear, lambda: lora_linear(x, b @ a, a, b, backend="triton"))
    dims, where = _lora.Dims(80, 24, 20, 4), _device.arch(x)
    assert found == _lora.config(dims, torch.float32, where)
    assert key == _lora.config_key(dims, torch.float32, where)


# -- the compiled kernels ------------------------------------------------------------------------------------------


def test_cuda_takes_the_compiled_product(monkeypatch, device):
    """Under "two_source" backend cuda's forward and dx run there; what it refuses goes to Triton."""
    from vlkernels.ops import _two_source
    from vlkernels.ops.lora_linear import cuda

    ran = []

    def forward(x2, weight, s, b, bias, lora_bias, scale, out):
        ran.append("forward")
        low = s.float() @ b.float().t() + (0 if lora_bias is None else lora_bias.float())
        return out.copy_(scale * low + x2.float() @ weight.float().t() + (0 if bias is None else bias.float()))

    def backward_dx(dy2, weight, ds, a, seed, p, out):
        ran.append("backward_dx")
        keep = keep_mask(seed, *out.shape, p) / (1 - round(p * 65536) / 65536) if seed is not None else 1
        return out.copy_(keep * (ds.float() @ a.float()) + dy2.float() @ weight.float())

    monkeypatch.setattr(_two_source, "missing", lambda index: None)
    monkeypatch.setattr(_two_source, "forward", forward)
    monkeypatch.setattr(_two_source, "backward_dx", backward_dx)

    def calls(dtype, N=32, p=0.25, autocast=None):
        kw = arguments(device, dtype, T=40, K=72, N=N, R=8, p=p)
        kw |= {"bias": torch.randn(N, device=device, dtype=dtype), "dtype": autocast}
        values = [kw.get(name, lora_linear.defaults.get(name)) for name in lora_linear.names]
        found = []
        for kernels in (cuda, lora_linear.kernels["triton"]):
            ran.clear()
            with use_plan("two_source"), torch.no_grad():
                y, s = kernels.forward(*values)
                saved = dict(zip(lora_linear.names, values, strict=True)) | {"s": s}
                saved = {name: saved[name] for name in lora_linear.saves}
                needs = dict.fromkeys(lora_linear.names, False) | {"x": True}
                others = {name: kw.get(name, lora_linear.defaults.get(name)) for name in lora_linear.others}
                dx = kernels.backward(torch.ones_like(y), saved=saved, needs=needs, **others)["x"]
            found.append((y, dx, list(ran)))
        (y, dx, first), (want_y, want_dx, second) = found
        assert second == []
        assert_rule((y, dx), (want_y, want_dx), exact(kw)[:2], autocast)
        return first

    assert calls(torch.bfloat16) == ["forward", "backward_dx"]
    assert calls(torch.bfloat16, p=0.0) == ["forward", "backward_dx"]
    assert calls(torch.bfloat16, N=33) == ["forward"]  # rows of dy are 33 elements apart
    assert calls(torch.float32) == []
    assert calls(torch.float32, autocast=torch.bfloat16) == ["forward"]  # dx is float32, its operands are not
    monkeypatch.setattr(_two_source, "missing", lambda index: "not here")
    assert calls(torch.bfloat16) == []


# -- what is timed, and the bytes on the bench cases ---------------------------------------------------------------


def test_providers_follow_their_plan(device):
    """The benchmark times what it names, checked by the rule first; a case that cannot be packed says so."""
    case = dataclasses.replace(SHARP, name="smoke", dims={"T": 40, "K": 24, "N": 40, "R": 8}, options={"p": 0.25})
    found = {p.name: p for p in providers.of(lora_linear) if p.plan}
    assert {"triton two_source", "triton packed"} <= set(found)
    for name, kernel in (("triton two_source", "lora_two_source_product_kernel"),
                         ("triton packed", "lora_packed_down_kernel")):  # fmt: skip
        with meter.launches() as counts:
            errors = check.errors(lora_linear, found[name], case, PRECISIONS["bf16"], device)
        assert check.failure(errors) is None and counts[kernel] and not counts["lora_sum_kernel"]
        assert counts["lora_update_kernel"] == (name == "triton packed")
    with pytest.raises(providers.Unavailable, match="cannot share a buffer"):
        kw = cases.inputs(case, Make(PRECISIONS["bf16+fp32"]))
        found["triton packed"].build(case, kw, PRECISIONS["bf16+fp32"])


@pytest.fixture(scope="module")
def counted() -> dict:
    path = record.RESULTS / "plans.json"
    return {(e["case"], e["plan"]): e["moved"] for e in json.loads(path.read_text())["entries"]}


def test_recorded_bytes_are_the_declared_ones(counted):
    """results/plans.json was measured; cases.bytes_moved says the same within 5 % for every plan."""
    todo = bench_plans.cases()
    assert set(counted) == {(c.name, plan) for c in todo for plan in (*PLANS, bench_plans.IN_BUFFER)}
    with _device.assume(bench_plans.ARCH):
        for case in todo:
            for plan in PLANS:
                for name, declared in cases.bytes_moved(case, 2, plan).items():
                    assert abs(counted[case.name, plan][name] / declared - 1) < 0.05, (case.name, plan, name)


@pytest.mark.parametrize("case", [c for c in cases.CASES if "bench" in c.tags and not c.get("quant")], ids=str)
def test_bytes_over_the_floors(case):
    """What NOTES.md says of the plans, by the declared counts: forward two_source moves at most 1.15 of the floor that
    reads x twice, backward at r <= 32 at most 1.15 of the one that reads dy twice, and none reaches 1.15 of less."""
    floor, reading_twice = cases.floor_bytes(case, 2), cases.plan_floor_bytes(case, 2)
    with _device.assume(90):
        moved = {plan: cases.bytes_moved(case, 2, plan) for plan in PLANS}
    share = {d: moved["two_source"][d] / reading_twice[d] for d in floor}
    assert share["forward"] <= (1.15 if case["T"] < 8192 else 1.04)
    assert share["backward"] <= (1.15 if case["R"] <= 32 else 1.6)
    assert all(moved[plan][d] > 1.15 * floor[d] for plan in PLANS for d in floor)
    for d in floor:
        assert moved["two_source"][d] < moved["update"][d]
        # the copy of a wide x costs more than the update of a narrow y
        if d == "backward" or case["K"] <= case["N"]:
            assert moved["packed"][d] < moved["update"][d]


@pytest.mark.slow
@pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="bytes are counted in the interpreter")
def test_recorded_bytes_are_measured(counted):
    """One case measured again."""
    case = bench_plans.cases()[0]
    for plan in bench_plans.by_plan():
        assert bench_plans.measured(case, plan) == counted[case.name, plan]
