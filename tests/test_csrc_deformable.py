"""The compiled deformable attention where no GPU is: its numbers on the host, its machine code, what it refuses.

The host run is that of test_csrc_update.py: the kernels compiled by g++, one fiber per CUDA thread, through the real
torch border over CPU tensors. Everything else is vlkernels' own: cuda.py's preparation, the op's cases and the rule.
"""

import pytest
import torch
from test_csrc import ARCHS, objects, ptxas_usage  # noqa: F401  (a fixture)
from test_csrc_update import host_library

from vlkernels import backends
from vlkernels.ops import _compiled
from vlkernels.ops.deformable_attention import cases, cuda
from vlkernels.testing import compare
from vlkernels.testing.case import PRECISIONS, Case, Make

OP = backends.OPS["deformable_attention"]
NAMES = ("value", "points", "weights", "reference", "shapes", "softmax", "dtype")
# without "amp-bf16": the compiled kernel gives value's dtype
PRECISION_NAMES = ("fp32", "bf16", "fp16")


def emulation(namespace: str = "vlkernels_deformable", edit: tuple[str, str, str] | None = None):
    library = host_library(namespace, "deformable_attention.cpp", [], edit)
    torch.ops.load_library(str(library))
    return getattr(torch.ops, namespace)


@pytest.fixture(scope="module")
def emulated():
    return emulation()


def gradients(ops, arguments: dict, dy_seed: int, precision) -> dict[str, torch.Tensor]:
    """y and all gradients of the compiled kernels, named as compare.run names them."""
    values = dict(zip(NAMES, OP.values(**arguments), strict=True))
    assert (
        cuda.unfit(*(values[n] for n in ("value", "points", "weights", "reference", "dtype")), _compiled.LEAST_SHARED)
        is None
    )
    tensors = {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in values.items()}
    y, stats = cuda.run_forward(ops, *(tensors[n] for n in NAMES[:-1]))
    needs = {n: isinstance(t, torch.Tensor) and t.requires_grad for n, t in values.items()}
    dy = compare.cotangent(y, precision, dy_seed, 0)
    grads = cuda.run_backward(ops, dy, tensors | {"stats": stats}, needs, values["shapes"], values["softmax"])
    return {"y": y} | {"d" + n: g for n, g in grads.items()}


def errors(ops, case: Case, precision, wide: bool = False) -> list[compare.Error]:
    arguments = cases.inputs(case, Make(precision, 0, "cpu", wide))
    truth = compare.exact(OP, arguments, precision, 0)
    got = gradients(ops, arguments, 0, precision)
    found = []
    for name, (limit, baseline, scale) in compare.limits(OP, case, precision, "cpu").items():
        error, where = compare.worst(got[name], truth[name])
        found.append(compare.Error(name, error, limit, baseline, scale, where))
    return found


# channels past a slab of 128, of 64 (the map of 600 positions leaves room for no more) and in part of a lane's run
LARGE = (
    cases._case("two slabs", 1, 17, 1, 136, 2, ((3, 4),)),
    cases._case("narrow slabs", 1, 20, 1, 70, 2, ((24, 25),), reference=(1, 1)),
)
SMALL = [
    cases._case("small", 2, 33, 2, 12, 2, ((5, 7), (3, 4)), reference=(1, 1), tags=("sharp",)),
    cases._case("small locations", 2, 24, 2, 6, 2, ((4, 4), (2, 3)), reference=None, softmax=False),
    *(c for c in cases.CASES if "bench" not in c.tags),
]


@pytest.mark.parametrize("precision", PRECISION_NAMES)
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=str)
def test_rule(emulated, case, precision, poisoned):
    """The rule of every backend, on the host; contiguous inputs and slices of wider buffers."""
    for wide in (False, True) if "sharp" in case.tags else (False,):
        found = errors(emulated, case, PRECISIONS[precision], wide)
        assert all(e.ok for e in found), "; ".join(str(e) for e in found if not e.ok)


def test_chunks_do_not_change_a_bit(emulated, monkeypatch):
    """However the queries are shared among blocks, outputs and gradients are the same."""
    precision = PRECISIONS["bf16"]
    arguments = cases.inputs(SMALL[0], Make(precision))
    first = gradients(emulated, arguments, 0, precision)
    monkeypatch.setattr(cuda, "chunks", lambda *sizes: 3)
    second = gradients(emulated, arguments, 0, precision)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_nan_and_outside(emulated):
    """A location that is NaN or infinite gives NaN; one far outside gives zero; neither touches value's gradient."""
    precision = PRECISIONS["fp32"]
    arguments = cases.inputs(SMALL[1], Make(precision))
    points = arguments["points"].detach().clone()
    points[0, 0, 0, 0, 0, 0], points[0, 1, 0, 0, 0, 1] = float("nan"), float("inf")
    points[0, 2, 0] = 1e30
    got = gradients(emulated, arguments | {"points": points.requires_grad_()}, 0, precision)
    assert got["y"][0, :2, 0].isnan().all() and not got["y"][0, 2, 0].any()
    assert not got["y"][0, 3:].isnan().any() and not got["y"][0, :, 1].isnan().any() and not got["y"][1].isnan().any()
    assert not got["dvalue"].isnan().any()


BREAKS = {
    "a row's one owner": (
        "if (c.row[j] < 0 || owner_of(rows, top + static_cast<float>(j / 2)) != warp) continue;",
        "if (c.row[j] < 0) continue;",
    ),
    "the second row": ("(top >= -1.0f && top + 1.0f < h && owner_of(rows, top + 1.0f) == warp)", "false"),
    "the softmax's sum": ("da = point.a * (da - warp_sum(lane < count ? point.a * da : 0.0f));", "da = point.a * da;"),
    "the slabs before": ("if (first > 0) own =", "if (false) own ="),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_fails(name):
    """The rule notices each of these edits; a row with two owners is summed twice."""
    old, new = BREAKS[name]
    broken = emulation(f"vlkernels_deformable_{list(BREAKS).index(name)}",
                       ("deformable_attention/deformable_attention_bwd.cu", old, new))  # fmt: skip
    found = [e for case in (SMALL[0], LARGE[0]) for e in errors(broken, case, PRECISIONS["bf16"])]
    assert any(not e.ok for e in found)


def test_the_border_checks(emulated):
    arguments = cases.inputs(SMALL[0], Make(PRECISIONS["fp32"]))
    value, points, weights, reference = (arguments[n].detach() for n in NAMES[:4])
    shapes = arguments["shapes"]
    y, stats = torch.empty(2, 33, 2, 12), torch.empty(2, 33, 2, 2)

    def call(value=value, points=points, weights=weights, shapes=shapes, y=y, limit=100_000):
        emulated.deformable_attention_fwd(value, points, weights, reference, shapes, True, 1, limit, y, stats)

    call()
    for changed, says in (
        ({"value": value[0]}, "value has shape"),
        ({"value": value.double()}, "value is Double"),
        ({"points": points[..., :1]}, "points has shape"),
        ({"points": points.transpose(2, 3).contiguous().transpose(2, 3)}, "points has stride"),
        ({"weights": weights[:, :5]}, "points has shape"),
        ({"shapes": shapes[:3]}, "shapes holds 3 numbers"),
        ({"shapes": [5, 7, 3, 3]}, "are not those of value"),
        ({"shapes": [5, 7, 0, 4]}, "level 1 is 0 x 4"),
        ({"y": y.bfloat16()}, "y is not contiguous, or is"),
        ({"limit": 8000}, "does not fit into shared memory"),
    ):
        with pytest.raises(RuntimeError, match=says):
            call(**changed)


def test_refusals():
    """Each with its reason; the front door says it when the backend is forced."""
    arguments = cases.inputs(SMALL[0], Make(PRECISIONS["bf16"]))
    values = OP.values(**arguments)
    assert "compiled kernels run on CUDA devices" in cuda.refuses(*values)
    assert "not measured" in cuda.declines(*values)
    value, points, weights, reference = values[:4]
    assert cuda.unfit(value, points, weights, reference, None, 100_000) is None
    for changed, says in (
        ((value.double(), points, weights, reference, None), "value is torch.float64"),
        ((value, points, weights, reference, torch.float32), "y would be torch.float32"),
        ((value, points, weights.repeat(1, 1, 1, 1, 9), reference, None), "2 levels of 18 points"),
        ((value.repeat(1, 40, 1, 1), points, weights, reference, None), "a map of 1880 positions takes"),
    ):
        assert says in cuda.unfit(*changed, 232_448)
    # what a block holds on each device: honeybee's maps fit all of these
    honeybee = torch.empty(1, 576, 8, 128, dtype=torch.bfloat16, device="meta")
    for capability in (80, 86, 90, 100, 120):
        assert cuda.unfit(honeybee, points, weights, reference, None, _compiled.shared_limit(capability)) is None


def test_chunk_counts():
    assert cuda.chunks(64, 8, 144, 4, 90) == 1
    assert cuda.chunks(1, 8, 144, 4, 90) == 9  # 16 queries a block
    assert cuda.chunks(4, 8, 144, 4, 90) == 4
    assert cuda.chunks(64, 8, 3000, 16, 90) == 36  # the sums of 85 queries fit


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(objects, arch):  # noqa: F811
    usage = [u for u in ptxas_usage(objects) if u.arch == arch and "deformable_attention" in u.kernel]
    # three kernels in three dtypes with 1, 2 and 4 channels a lane
    assert len(usage) == 27
    for u in usage:
        assert u.stack == 0 and u.spill == 0, u
        # a block of 512 threads has 128 registers a thread
        assert u.registers <= 128, u
