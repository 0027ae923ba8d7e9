"""Every op on every backend, generated from its cases: the rule, its sharpness, what an operator owes."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import vlkernels
from vlkernels import backends
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Make

OPS = tuple(backends.OPS.values())


def kernels_of(op):
    """Backends whose kernels exist here; `python -m vlkernels info` says why another does not."""
    return [b for b in backends.ORDER if b != "reference" and not isinstance(op.kernels[b], str)]


def small_cases(op):
    return [c for c in compare.cases_of(op).CASES if "bench" not in c.tags]


def outputs(y) -> tuple[torch.Tensor, ...]:
    return (y,) if isinstance(y, torch.Tensor) else tuple(y)


def gradients(y, leaves, **options) -> tuple[torch.Tensor, ...]:
    """Of the sum of all outputs."""
    return torch.autograd.grad(outputs(y), leaves, [torch.ones_like(out) for out in outputs(y)], **options)


def rows():
    for op in OPS:
        for case in small_cases(op):
            everywhere = "all-precisions" in case.tags
            marks = [pytest.mark.slow] if "slow" in case.tags else []
            for precision in compare.cases_of(op).PRECISIONS if everywhere else ("fp32", "bf16"):
                yield pytest.param(op, case, PRECISIONS[precision], marks=marks, id=f"{op.name}-{case}-{precision}")


def runs(op, case, precision, device, wide=False):
    """Backends that can run this case here; some take no slices of wider buffers."""
    module = compare.cases_of(op)
    values = op.values(**module.inputs(case, Make(precision, 0, device, wide)))
    return [b for b in kernels_of(op) if backends.verdict(op, b, values) is None]


@pytest.mark.parametrize("op, case, precision", list(rows()))
def test_rule(op, case, precision, device, poisoned):
    """Outputs and all gradients obey the rule; in bfloat16 inputs are slices of wider buffers, else contiguous."""
    # every case is computed in float32 and in bfloat16, and strides know no dtype
    wide = precision.name == "bf16"
    chosen = runs(op, case, precision, device, wide)
    assert "triton" in chosen
    for backend in chosen:
        found = compare.errors(op, case, precision, backend, device, wide)
        assert all(e.ok for e in found), f"{backend}: " + "; ".join(str(e) for e in found if not e.ok)


def changes():
    for op in OPS:
        sharp = [c for c in small_cases(op) if "sharp" in c.tags]
        for term, change in compare.cases_of(op).TERMS.items():
            # the first that has the term; where none has, the test says so
            having = (c for c in sharp if change(compare.cases_of(op).inputs(c, Make(PRECISIONS["fp32"]))) is not None)
            case = next(having, sharp[0])
            for precision in ("fp32", "bf16", "fp16"):
                yield pytest.param(op, case, PRECISIONS[precision], term, id=f"{op.name}-{term}-{precision}")


@pytest.mark.parametrize("op, case, precision, term", list(changes()))
def test_rule_notices(op, case, precision, term, device):
    """Leaving a term out, or halving it, breaks the rule in every dtype: the rule is not too loose to see it."""
    change = compare.cases_of(op).TERMS[term]
    assert change(compare.cases_of(op).inputs(case, Make(precision, 0, device))) is not None, "the case lacks the term"
    found = compare.errors(op, case, precision, "triton", device, change=change)
    assert any(not e.ok for e in found)


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_opcheck(op, device):
    """Schema, fake and autograd registrations agree with what the operators do."""
    module = compare.cases_of(op)
    case = next(c for c in small_cases(op) if "sharp" in c.tags)
    values = op.reference.draw(*op.values(**module.inputs(case, Make(PRECISIONS["fp32"], 0, device))))
    operator = getattr(torch.ops.vlkernels, op.name).default
    torch.library.opcheck(operator, (*values, "triton"))


@pytest.mark.parametrize("op", OPS, ids=repr)
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "amp-bf16"])
def test_compiles(op, precision, device):
    """One full graph, forward and backward, no recompilation for another row count, the same numbers as uncompiled."""
    module, precision = compare.cases_of(op), PRECISIONS[precision]
    case = next(c for c in small_cases(op) if "sharp" in c.tags)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(kw):
        with torch.autocast(device, precision.autocast or torch.bfloat16, enabled=precision.autocast is not None):
            return op(**kw)

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    traced = 0
    for rows_kept in (None, 20, 31):
        kw = module.inputs(case, Make(precision, 0, device))
        if rows_kept:
            kw = module.fewer_rows(kw, rows_kept)
        leaves = [v for v in kw.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        with meter.launches() as counts:
            y = compiled(kw)
            grads = gradients(y, leaves)
        assert counts, "no kernel ran"
        plain = call(kw)
        for got, want in zip((*outputs(y), *grads), (*outputs(plain), *gradients(plain, leaves)), strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        # dynamic=True may trace the first call twice, to turn symbolic floats back into constants
        traced = traced or counter.frame_count
    assert counter.frame_count == traced


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS, ids=repr)
def test_inductor(op, device):
    """Inductor's code around the operator gives the uncompiled numbers."""
    module = compare.cases_of(op)
    case = next(c for c in small_cases(op) if "sharp" in c.tags)
    kw = module.inputs(case, Make(PRECISIONS["fp32"], 0, device))
    torch._dynamo.reset()
    call = lambda kw: [out * 2 for out in outputs(op(**kw))]  # noqa: E731
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(kw), call(kw))


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_reference_gradients(op):
    """The reference against numerical derivatives in float64."""
    module = compare.cases_of(op)
    case = min(small_cases(op), key=lambda c: math.prod(c.dims.values()))
    kw = {k: compare.doubled(v) for k, v in module.inputs(case, Make(PRECISIONS["fp32"], 0)).items()}
    names = [k for k, v in kw.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    small = module.fewer_rows(kw, 2)
    leaves = tuple(small[n].detach().requires_grad_() for n in names)
    call = lambda *ts: op(**(small | dict(zip(names, ts, strict=True))), backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_deterministic(op, device):
    """Run to run, every bit of every output and gradient is the same."""
    case = next(c for c in small_cases(op) if "sharp" in c.tags)
    module, precision = compare.cases_of(op), PRECISIONS["bf16"]
    arguments = module.inputs(case, Make(precision, 0, device))
    for backend in runs(op, case, precision, device):
        first, second = (compare.run(op, arguments, precision, backend, 0) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_empty(op, device):
    """No rows: an empty result and zero gradients, on every backend."""
    module = compare.cases_of(op)
    case = next(c for c in small_cases(op) if "sharp" in c.tags)
    for backend in ("reference", *runs(op, case, PRECISIONS["fp32"], device)):
        kw = module.fewer_rows(module.inputs(case, Make(PRECISIONS["fp32"], 0, device)), 0)
        leaves = {
            k: v.detach().requires_grad_() for k, v in kw.items() if isinstance(v, torch.Tensor) and v.requires_grad
        }
        y = outputs(op(**(kw | leaves), backend=backend))
        assert not any(out.numel() for out in y)
        sum(out.sum() for out in y).backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None and leaf.grad.shape == leaf.shape, (backend, name)
            assert not leaf.grad.any(), (backend, name)


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_double_backward_refused(op, device):
    """Kernels have no second derivative and say how to get one; the reference has it."""
    module = compare.cases_of(op)
    case = next(c for c in small_cases(op) if "sharp" in c.tags)
    kw = module.fewer_rows(module.inputs(case, Make(PRECISIONS["fp32"], 0, device)), 4)
    leaves = [v for v in kw.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    for backend in ("triton", "reference"):
        y = outputs(op(**kw, backend=backend))
        grads = torch.autograd.grad(sum(out.square().sum() for out in y), leaves, create_graph=True)
        second = sum(g.square().sum() for g in grads)
        if backend == "triton":
            with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
                second.backward()
        else:
            second.backward()


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_shapes_without_data(op):
    """Meta and fake tensors go through shape inference."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = compare.cases_of(op)
    case = next(c for c in small_cases(op) if "sharp" in c.tags)
    kw = module.inputs(case, Make(PRECISIONS["bf16"], 0))
    shape = lambda y: [(out.shape, out.dtype, out.stride()) for out in outputs(y)]  # noqa: E731
    want = shape(op(**kw, backend="reference"))
    meta = op(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in kw.items()}, backend="reference")
    assert shape(meta) == want
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
        for backend in ("reference", "triton"):
            if backends.verdict(op, backend, op.values(**fake)) is None:
                assert shape(op(**fake, backend=backend)) == want


def counted():
    for op in OPS:
        for case in small_cases(op):
            if "slow" not in case.tags:
                yield pytest.param(op, case, id=f"{op.name}-{case}")


@pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("op, case", list(counted()))
def test_bytes_moved(op, case):
    """cases.bytes_moved says what the masked loads, stores and ATen operands add up to, within 5 %."""
    module = compare.cases_of(op)
    # what is cast for a product shows in 16 bits; float32's other tiles in the cases of all precisions
    for precision, itemsize in (("bf16", 2), ("fp32", 4))[: 2 if "all-precisions" in case.tags else 1]:
        kw = module.inputs(case, Make(PRECISIONS[precision]))
        declared = module.bytes_moved(case, itemsize)
        with meter.traffic() as forward:
            y = outputs(op(**kw, backend="triton"))
        dy = [torch.randn_like(out) for out in y]
        leaves = [v for v in kw.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        with meter.traffic() as backward:
            torch.autograd.grad(y, leaves, dy)  # a gradient that is dy itself would be copied into its leaf
        for name, measured in (("forward", forward), ("backward", backward)):
            assert abs(measured.moved / declared[name] - 1) < 0.05, (precision, name, measured, declared)


def test_every_op_is_public():
    for op in OPS:
        assert getattr(vlkernels, op.name) is op
        assert op.__doc__ and len(op.__doc__) > 200
