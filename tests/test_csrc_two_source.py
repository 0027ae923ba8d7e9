"""The product over two sources: its numbers on the host, its coordinates against CuTe, its machine code, and a GPU's.

The host run is that of test_csrc_update.py: one fiber per CUDA thread, bulk copies, barriers and wgmma as the PTX ISA
words them (tests/emulate/two_source), through the real torch border over CPU tensors.
"""

import importlib.metadata
import itertools
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_csrc import BUILD, ROOT, cuobjdump, library, objects, ptxas_usage, python, run  # noqa: F401  (fixtures)
from test_csrc_update import host_library, toolkit_includes

from vlkernels.ops import _two_source
from vlkernels.ops._dropout import keep_factor, keep_mask
from vlkernels.testing.compare import SEEDS, ulp

BF16, F16 = torch.bfloat16, torch.float16
SCALE = 0.7
SEED = -7_046_029_254_386_353_131


@dataclass(frozen=True)
class Case:
    """kind "forward": out (T, N) from depth K; "backward": the gradient of x, so N is x's width and K the layer's."""

    kind: str
    dtype: torch.dtype
    T: int
    N: int
    K: int
    R: int = 0
    p: float = 0.0
    bias: bool = True
    wide: bool = False  # every matrix is a slice of a wider buffer
    pre: bool = False

    def __str__(self) -> str:
        flags = [f"p{self.p}"] * (self.p > 0) + ["bias"] * self.bias + ["wide"] * self.wide + ["pre"] * self.pre
        dtype = "bf16" if self.dtype == BF16 else "fp16"
        return "-".join([self.kind, dtype, f"{self.T}x{self.N}x{self.K}r{self.R}", *flags])


# A tile is 256 x 256 x 64, the rank in steps of 16: one element, ends inside a tile, inside a run of 8 and one past a
# tile; then more tiles than clusters run at a time, and more depth than the ring of stages holds.
SIZES = ((1, 1, 1), (37, 75, 100), (257, 8, 65), (130, 264, 64), (128, 256, 600), (520, 521, 72))
RANKS = (1, 16, 24, 64, 65, 200)


def all_cases() -> list[Case]:
    """Every kind in every dtype at every size; the other features turn at coprime periods."""
    features = zip(
        itertools.cycle(RANKS[::-1]),
        itertools.cycle((0.05, 0.0, 0.5, 0.3, 0.0)),
        itertools.cycle((True, True, False)),
        itertools.cycle((False, True, True, False)),
        itertools.cycle((False, True, True, False, True, False, True)),
        strict=False,
    )
    cases = []
    kinds = itertools.product(("forward", "backward", "gelu"), (BF16, F16), SIZES)
    for (kind, dtype, size), (R, p, bias, wide, pre) in zip(kinds, features, strict=False):
        cases.append(
            Case(
                kind,
                dtype,
                *size,
                R=0 if kind == "gelu" else R,
                p=p if kind == "backward" else 0.0,
                bias=bias and kind != "backward",
                wide=wide,
                pre=pre and kind == "gelu",
            )  # fmt: skip
        )
    return cases


@dataclass
class Inputs:
    x: torch.Tensor
    w: torch.Tensor
    s: torch.Tensor | None
    low: torch.Tensor | None
    bias: torch.Tensor | None
    lora_bias: torch.Tensor | None


def inputs(case: Case, seed: int, device: str = "cpu") -> Inputs:
    """The products and the biases are of one size, so that none hides behind another. Rows are padded to 16 bytes."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows, cols, factor=1.0):
        room = -cols % 8 + (16 if case.wide else 0)
        values = torch.randn(rows, cols + room, generator=generator) * factor
        start = 8 if case.wide else 0
        return values.to(device, case.dtype)[:, start : start + cols]

    def vector():
        return random(1, case.N)[0] if case.bias else None

    weight = (case.K, case.N) if case.kind == "backward" else (case.N, case.K)
    low = (case.R, case.N) if case.kind == "backward" else (case.N, case.R)
    return Inputs(
        random(case.T, case.K),
        random(*weight, case.K**-0.5),
        random(case.T, case.R) if case.R else None,
        random(*low, case.R**-0.5) if case.R else None,
        vector(),
        vector() if case.R else None,
    )


def mask(case: Case, device) -> torch.Tensor:
    keep = keep_mask(torch.tensor(SEED, device=device), case.T, case.N, case.p)
    return keep.double() * keep_factor(case.p)


def exact(case: Case, x: Inputs) -> tuple[torch.Tensor, ...]:
    """The equation in float64: out, and pre where it is asked for."""
    x = Inputs(*(None if t is None else t.double() for t in vars(x).values()))
    if case.kind == "backward":
        return (x.x @ x.w + mask(case, x.x.device) * (x.s @ x.low),)
    z = F.linear(x.x, x.w, x.bias)
    if case.R:
        z = z + SCALE * F.linear(x.s, x.low, x.lora_bias)
    return (F.gelu(z), z)[: 1 + case.pre] if case.kind == "gelu" else (z,)


def eager(case: Case, x: Inputs) -> tuple[torch.Tensor, ...]:
    """What the user has, op by op."""
    if case.kind == "backward":
        return (x.x @ x.w + (x.s @ x.low) * mask(case, x.x.device).to(case.dtype),)
    z = F.linear(x.x, x.w, x.bias)
    if case.R:
        z = z + F.linear(x.s, x.low, x.lora_bias) * SCALE
    return (F.gelu(z), z)[: 1 + case.pre] if case.kind == "gelu" else (z,)


def limits(case: Case, device: str = "cpu") -> list[float]:
    """2 * max |eager - exact| + 4 ulp at the output's scale, both over five seeds."""
    errors, scales = [0.0, 0.0], [0.0, 0.0]
    for seed in SEEDS:
        x = inputs(case, seed, device)
        for i, (y, truth) in enumerate(zip(eager(case, x), exact(case, x), strict=True)):
            errors[i] = max(errors[i], float((y.double() - truth).abs().max()))
            scales[i] = max(scales[i], float(truth.abs().max()))
    return [2 * error + 4 * ulp(scale, case.dtype) for error, scale in zip(errors, scales, strict=True) if scale]


def call(ops, case: Case, x: Inputs) -> tuple[torch.Tensor, ...]:
    """The op's results; what lies around them in wider buffers must stay as it was."""
    buffers = [
        torch.full((case.T + 2, case.N + 24), float("nan"), dtype=case.dtype, device=x.x.device)
        for _ in range(1 + case.pre)
    ]
    # rows aligned to 16 bytes or not, as N has it
    results = [
        b[1:-1, 8 : 8 + case.N] if case.wide else b.view(-1)[: case.T * case.N].view(case.T, case.N) for b in buffers
    ]
    if case.kind == "backward":
        seed = torch.tensor(SEED, device=x.x.device) if case.p else None
        ops.two_source_backward(x.x, x.w, x.s, x.low, seed, case.p, results[0])
    else:
        pre = results[1] if case.pre else None
        gelu = case.kind == "gelu"
        ops.two_source_forward(x.x, x.w, x.s, x.low, x.bias, x.lora_bias, SCALE, gelu, pre, results[0])
    for buffer, result in zip(buffers, results, strict=True):
        around = torch.ones_like(buffer, dtype=torch.bool)
        if case.wide:
            around[1:-1, 8 : 8 + case.N] = False
        else:
            around.view(-1)[: case.T * case.N] = False
        assert buffer[around].isnan().all(), "written outside of out"
        assert not result.isnan().any(), "not written"
    return tuple(results)


def worst(ops, case: Case, device: str = "cpu") -> float:
    """The error, in units of the limit."""
    x = inputs(case, 0, device)
    got, truths = call(ops, case, x), exact(case, x)
    return max(
        float((y.double() - truth).abs().max()) / limit
        for y, truth, limit in zip(got, truths, limits(case, device), strict=True)
    )


# -- on the host -----------------------------------------------------------------------------------------------------


def emulation(namespace: str = "vlkernels_two_source", edit: tuple[str, str, str] | None = None):
    torch.ops.load_library(str(host_library(namespace, "two_source.cpp", [], edit)))
    return getattr(torch.ops, namespace)


@pytest.fixture(scope="module")
def emulated():
    return emulation()


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_emulated_product_is_exact(emulated, case):
    assert worst(emulated, case) <= 1


def test_terms_are_large_enough_to_be_missed(emulated):
    """Halving a term is an error far above the limit: each is of the output's size."""
    case = Case("forward", BF16, 37, 75, 100, R=24)
    (limit,) = limits(case)
    for name in ("x", "s", "bias", "lora_bias"):
        halved = inputs(case, 0)
        getattr(halved, name).mul_(0.5)
        error = call(emulated, case, halved)[0].double() - exact(case, inputs(case, 0))[0]
        assert float(error.abs().max()) > 4 * limit, name


def test_runs_are_identical(emulated):
    case = Case("backward", BF16, 130, 264, 100, R=24, p=0.05)
    x = inputs(case, 0)
    assert torch.equal(*call(emulated, case, x), *call(emulated, case, x))


def test_empty(emulated):
    for T, N in ((0, 8), (8, 0)):
        x, w = torch.empty(T, 16, dtype=BF16), torch.empty(N, 16, dtype=BF16)
        emulated.two_source_forward(x, w, None, None, None, None, 1.0, False, None, torch.empty(T, N, dtype=BF16))


def test_nan_propagates_through_dropped_elements(emulated):
    case = Case("backward", BF16, 8, 16, 16, R=8, p=0.5)
    x = inputs(case, 0)
    x.s[1, 0] = float("nan")
    out = torch.empty(case.T, case.N, dtype=BF16)
    emulated.two_source_backward(x.x, x.w, x.s, x.low, torch.tensor(SEED), case.p, out)
    assert out.isnan().nonzero()[:, 0].unique().tolist() == [1] and out[1].isnan().all()


def gelu_error(ops) -> float:
    """The error, in units of the limit, where the forms of erf and tanh differ most: 4e-4 around -2.3."""
    bias = torch.linspace(-3.2, -2.0, 64).to(F16)
    zeros = torch.zeros(64, 8, dtype=F16)
    out = torch.empty(1, 64, dtype=F16)
    ops.two_source_forward(zeros[:1], zeros, None, None, bias, None, 1.0, True, None, out)
    truth = F.gelu(bias.double())
    limit = 2 * float((F.gelu(bias).double() - truth).abs().max()) + 4 * ulp(float(truth.abs().max()), F16)
    return float((out[0].double() - truth).abs().max()) / limit


def test_gelu_is_that_of_erf(emulated):
    assert gelu_error(emulated) <= 1


KERNEL = "two_source/two_source.cuh"
BREAKS = {
    "wait for the copies": (KERNEL, "wait(&shared.full[turn.stage], turn.parity);\n    m", "cluster_rank();\n    m"),
    "wait for a free stage": (KERNEL, "  sm90::wait(&shared.empty[turn.stage], turn.parity ^ 1);\n", ""),
    "a stage freed too early": (KERNEL, "      release(shared, last);", "      release(shared, turn.stage);"),
    "accumulators read too early": (KERNEL, "wgmma_wait<0>(acc);\n    release", "wgmma_wait<1>(acc);\n    release"),
    "w for one block": (KERNEL, "kAll = (1 << kCluster) - 1", "kAll = 1"),
    "half of w": (KERNEL, "const int row = static_cast<int>(block) * kShare;", "const int row = 0;"),
    "rows of a block": (KERNEL, "(static_cast<int64_t>(tile.m) * kCluster + block) * kBlockM", "tile.m * 256l + 128"),
    "last step of the rank": (KERNEL, "i * kStepK < p.rank - k;", "(i + 1) * kStepK < p.rank - k;"),
    "steps along k": (KERNEL, "kStepAlongK = kStepK * 2 / 16", "kStepAlongK = kStepK * 4 / 16"),
    "steps along n": (KERNEL, "kStepAlongN = kStepK * 128 / 16", "kStepAlongN = kStepK * 64 / 16"),
    "boxes along n": (KERNEL, "descriptor(address, kBoxBytes, kPatternBytes)", "descriptor(address, 1024, kBoxBytes)"),
    "no scale": (KERNEL, "x *= p.scale;", "x *= 1.0f;"),
    "half of lora_bias": (KERNEL, "p.scale * element", "0.5f * p.scale * element"),
    "words of the mask": (KERNEL, "(q & 2 ? words.w[i] : words.w[i + 2]) = other", "words.w[i] = other"),
    "rows of the mask": (KERNEL, "m + acc_row(thread, drawn % 2)", "m + drawn % 2"),
    "parts of the mask": (KERNEL, "8 * (h % 4) + k", "8 * (3 - h % 4) + k"),
    "the next tile's mask": (KERNEL, "mask.begin(row_of(next), col_of(next))", "mask.begin(m, n)"),
    "keep factor": (KERNEL, "? keep_factor : 0.0f", "? 1.0f : 0.0f"),
    "tanh for erf": (KERNEL, "erff(z * 0.70710678118654752f)", "tanhf(0.797884561f * (z + 0.044715f * z * z * z))"),
    "rows past the end": (KERNEL, "if (row < rows && col < cols) store_run", "if (col < cols) store_run"),
    "barrier of the stores": (KERNEL, "  __syncwarp();\n#pragma unroll", "#pragma unroll"),
    "order of tiles": (KERNEL, "in_group % height, in_group / height", "in_group % height, in_group / kGroupM"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_is_noticed(name):
    """In a process of its own: a broken kernel may end it."""
    namespace = "vlkernels_two_source_" + re.sub(r"\W", "_", name)
    path = host_library(namespace, "two_source.cpp", [], BREAKS[name])
    answer = python(
        f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import torch
        from test_csrc_two_source import all_cases, gelu_error, worst
        torch.set_num_threads(1)
        torch.ops.load_library({str(path)!r})
        cases = [case for case in all_cases() if case.dtype == torch.bfloat16]
        ops = torch.ops.{namespace}
        print("right", all(worst(ops, case) <= 1 for case in cases) and gelu_error(ops) <= 1)
        """
    )
    assert "right True" not in answer.stdout


def refusals():
    def forward(**changed):
        plain = dict(
            x=torch.zeros(6, 8, dtype=BF16), weight=torch.zeros(16, 8, dtype=BF16),
            s=torch.zeros(6, 8, dtype=BF16), b=torch.zeros(16, 8, dtype=BF16), bias=None, lora_bias=None, scale=1.0,
            gelu=False, pre=None, out=torch.zeros(6, 16, dtype=BF16),
        )  # fmt: skip
        return "two_source_forward", plain | changed

    def backward(**changed):
        plain = dict(
            dy=torch.zeros(6, 8, dtype=BF16), weight=torch.zeros(8, 16, dtype=BF16),
            ds=torch.zeros(6, 8, dtype=BF16), a=torch.zeros(8, 16, dtype=BF16), seed=torch.tensor(1), p=0.1,
            out=torch.zeros(6, 16, dtype=BF16),
        )  # fmt: skip
        return "two_source_backward", plain | changed

    def zeros(*shape):
        return torch.zeros(*shape, dtype=BF16)

    line = zeros(6 * 16 + 32)
    return {
        "x is Float; accepted are BFloat16 and Half": forward(x=torch.zeros(6, 8)),
        "weight is Half; expected BFloat16": forward(weight=torch.zeros(16, 8).half()),
        "weight has shape (16, 9); expected (16, 8)": forward(weight=zeros(16, 9)),
        "x has stride 2 along its last dimension; expected 1": forward(x=zeros(6, 16)[:, ::2]),
        "with row stride 9; bulk copies take addresses of 16 bytes and strides of 8 elements": forward(
            x=zeros(6, 9)[:, :8]
        ),
        "with row stride 16; bulk copies take addresses of 16 bytes": forward(x=zeros(6, 16)[:, 4:12]),
        "x has overlapping rows (row stride 0, 8 columns)": forward(x=zeros(1, 8).expand(6, 8)),
        "s has shape (6, 0); expected two dimensions, with columns": forward(s=zeros(6, 0), b=zeros(16, 0)),
        "s and b belong together; one of them is missing": forward(s=None),
        "lora_bias belongs to s and b, which are missing": forward(s=None, b=None, lora_bias=zeros(16)),
        "the rank must be at most 512": forward(s=zeros(6, 520), b=zeros(16, 520)),
        "bias has shape (15); expected (16)": forward(bias=zeros(15)),
        "bias has stride 2; expected 1": forward(bias=zeros(32)[::2]),
        "out has shape (6, 15); expected (6, 16)": forward(out=zeros(6, 15)),
        "x overlaps out": forward(x=line[:48].view(6, 8), out=line[8:104].view(6, 16)),
        "dy is Double; accepted are": backward(dy=torch.zeros(6, 8).double()),
        "a has shape (8, 15); expected (8, 16)": backward(a=zeros(8, 15)),
        "p is 1; accepted are 0 <= p < 1": backward(p=1.0),
        "p is not 0 and there is no seed": backward(seed=None),
        "seed is Int of 1 elements; expected one Long": backward(seed=torch.tensor(1, dtype=torch.int32)),
    }


@pytest.mark.parametrize("message, arguments", refusals().items(), ids=list(refusals()))
def test_bad_input_is_named(emulated, message, arguments):
    name, values = arguments
    with pytest.raises(RuntimeError, match=r"two_source: .*" + re.escape(message)):
        getattr(emulated, name)(**values)


# -- in Python -------------------------------------------------------------------------------------------------------


def test_python_refuses_what_the_border_refuses(emulated):
    def zeros(*shape, dtype=BF16):
        return torch.zeros(*shape, dtype=dtype)

    plain = dict(x2=zeros(6, 8), weight=zeros(16, 8), s=zeros(6, 8), b=zeros(16, 8), bias=zeros(16), lora_bias=None)
    assert _two_source.refuses(**plain) is None
    assert _two_source.refuses(**(plain | {"x2": zeros(1, 3), "s": zeros(1, 1)})) is None
    assert _two_source.refuses(**(plain | {"x2": zeros(0, 8)})) is None
    for changed, reason in {
        "x2 is torch.float32; the kernels take bfloat16 and float16": {"x2": zeros(6, 8, dtype=torch.float32)},
        "s is torch.float16, x2 torch.bfloat16; the kernels take one dtype": {"s": zeros(6, 8, dtype=F16)},
        "weight has shape (16, 8, 1); the kernels take two dimensions": {"weight": zeros(16, 8, 1)},
        "s has no columns: shape (6, 0)": {"s": zeros(6, 0)},
        "x2 has stride 2 along its last dimension; the kernels take 1": {"x2": zeros(6, 16)[:, ::2]},
        "b has row stride 9; bulk copies take multiples of 8 elements, at least 8 here": {"b": zeros(16, 9)[:, :8]},
        "b has row stride 0; bulk copies take multiples of 8 elements": {"b": zeros(1, 8).expand(16, 8)},
        "x2 begins at an address that is no multiple of 16 bytes": {"x2": zeros(6, 16)[:, 4:12]},
        "bias has shape (16,), strides (2,); the kernels take a contiguous vector": {"bias": zeros(32)[::2]},
        "the rank is 520; the kernels take 1 to 512": {"s": zeros(6, 520)},
        "x2 has shape (1, 2147483647); the kernels take sizes up to 2147483391": {
            "x2": torch.empty(1, 2**31 - 1, dtype=BF16, device="meta")
        },
    }.items():
        assert (_two_source.refuses(**(plain | reason)) or "").startswith(changed), changed


def test_reasons_where_no_gpu_is(library):  # noqa: F811
    code = """
        import torch
        torch.cuda.is_available = lambda: False
        from vlkernels.ops import _two_source
        print(_two_source.missing())
        """
    absent = python(code, VLKERNELS_OPS=str(BUILD / "none.so")).stdout
    assert "is no file" in absent
    present = python(code, VLKERNELS_OPS=str(library)).stdout
    assert present.strip() in (
        "torch sees no CUDA device",
        "the library was built without CUTLASS's headers or without sm_90a: it holds no two_source kernels",
    )


def test_linear_act_names_its_activations():
    with pytest.raises(ValueError, match="act is 'silu'; accepted: none, gelu"):
        _two_source.linear_act(torch.zeros(1, 8), torch.zeros(1, 8), None, "silu")


# -- against CuTe ----------------------------------------------------------------------------------------------------


def cutlass() -> Path:
    """CUTLASS's headers as setup.py finds them, or a skip."""
    named = os.environ.get("VLKERNELS_CUTLASS")
    if named:
        folders = [Path(named), Path(named) / "include"]
    else:
        try:
            package = importlib.metadata.distribution("nvidia-cutlass")
        except importlib.metadata.PackageNotFoundError:
            folders = []
        else:
            folders = [Path(package.locate_file("cutlass_library/source/include"))]
    found = next((f for f in folders if (f / "cute" / "tensor.hpp").is_file()), None)
    return found or pytest.skip("CUTLASS's headers were not found (VLKERNELS_CUTLASS, or the nvidia-cutlass package)")


def compile_against_cute(folder: Path, csrc: Path) -> Path:
    headers, compiler = cutlass(), shutil.which("g++")
    toolkit = next((p for p in toolkit_includes() if (p / "cuda_bf16.h").is_file()), None)
    if compiler is None or toolkit is None:
        pytest.skip("the comparison needs g++ and the CUDA headers")
    emulate = ROOT / "tests" / "emulate"
    built = run(
        compiler, "-std=c++17", "-O0", "-fno-strict-aliasing", "-x", "c++",
        "-isystem", toolkit, "-isystem", toolkit / "cccl", "-isystem", headers,
        "-include", emulate / "cuda_host.h", f"-I{emulate}", f"-I{csrc}",
        emulate / "two_source_cute.cpp", "-o", folder / "two_source_cute",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder / "two_source_cute"


@pytest.mark.slow
def test_coordinates_and_descriptors_agree_with_cute(tmp_path):
    """Accumulators' rows and columns, operand descriptors, swizzled places and copied boxes; every tile comes once."""
    answer = run(compile_against_cute(tmp_path, ROOT / "csrc"))
    # CuTe itself complains on the host about addresses of shared memory, which are not compared
    assert answer.returncode == 0 and answer.stdout.endswith("agree\n"), answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, old, new",
    [
        ("coordinates of an accumulator", "thread % 32 / 4 + 8 * i", "thread % 32 / 4 + 4 * i"),
        ("the operand w along n", "address, kBoxBytes, kPatternBytes", "address, kPatternBytes, kBoxBytes"),
        ("the operand x", "kStepAlongK = kStepK * 2 / 16", "kStepAlongK = kStepK * 4 / 16"),
        ("a tile comes twice or never", "in_group / height", "in_group / kGroupM"),
    ],
)  # fmt: skip
def test_cute_notices_a_broken_kernel(tmp_path, what, old, new):
    cutlass()
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernel = tmp_path / "csrc" / KERNEL
    assert kernel.read_text().count(old) == 1
    kernel.write_text(kernel.read_text().replace(old, new))
    answer = run(compile_against_cute(tmp_path, tmp_path / "csrc"))
    assert answer.returncode != 0 and what in answer.stderr


# -- machine code ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(objects) -> Path:  # noqa: F811
    """The folder of the objects, with those of csrc/two_source among them."""
    cutlass()
    return objects


def test_kernels_do_not_spill(compiled, record_property):
    usage = [u for u in ptxas_usage(compiled) if "two_source" in u.kernel]
    assert len({u.kernel for u in usage}) == 4 and {u.arch for u in usage} == {"sm_90a"}
    for u in usage:
        record_property(u.kernel, f"{u.registers} registers")
        assert u.stack == 0 and u.spill == 0, u
        # three warpgroups share 65,536 registers at the launch
        assert u.registers <= 168, u
    for report in compiled.glob("csrc_two_source_*.cu.o.log"):
        # ptxas says so where accumulators move between registers, and each product then waits for the one before
        assert "serialized" not in report.read_text(), report


@pytest.mark.parametrize("name", ["fwd_bf16", "fwd_fp16", "bwd_bf16", "bwd_fp16"])
def test_machine_code_is_as_promised(compiled, name):
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump was not found")
    sass = run(tool, "-sass", "-arch", "sm_90a", compiled / f"csrc_two_source_two_source_{name}.cu.o").stdout
    direction, dtype = name.split("_")
    products = re.findall(r"HGMMA\.64x256x16\.F32(\.BF16)? R\d+, gdesc\[UR\d+\](\.tnspB)?", sass)
    # the rank's full stage and its last steps, the first stage of the depth and the others
    assert len(products) == 13
    assert set(products) == {(".BF16" * (dtype == "bf16"), ".tnspB" * (direction == "bwd"))}
    assert "UTMALDG.2D" in sass and "UTMALDG.2D.MULTICAST" in sass
    assert sass.count("USETMAXREG") == 2 and "STG.E.128" in sass
    assert "STL" not in sass and "LDL" not in sass and "TF32" not in sass


def test_library_registers_the_ops(compiled, library):  # noqa: F811
    loaded = python(
        f"""
        import torch
        torch.ops.load_library({str(library)!r})
        x = torch.zeros(2, 8, dtype=torch.bfloat16)
        for op in (torch.ops.vlkernels_cuda.two_source_forward, torch.ops.vlkernels_cuda.two_source_backward):
            print(op.default._schema)
        try:
            torch.ops.vlkernels_cuda.two_source_forward(x, x, None, None, None, None, 1.0, False, None, x)
        except RuntimeError as error:
            print(error)
        assert not torch.cuda.is_initialized()
        """
    )
    forward, backward, error = loaded.stdout.splitlines()[:3]
    assert forward == (
        "vlkernels_cuda::two_source_forward(Tensor x, Tensor weight, Tensor? s, Tensor? b, Tensor? bias, "
        "Tensor? lora_bias, float scale, bool gelu, Tensor(a!)? pre, Tensor(b!) out) -> ()"
    ), loaded.stderr
    assert backward == (
        "vlkernels_cuda::two_source_backward(Tensor dy, Tensor weight, Tensor ds, Tensor a, Tensor? seed, float p, "
        "Tensor(a!) out) -> ()"
    )
    assert "two_source: x is not on a CUDA device" in error


# -- on a device -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_device():
    reason = _two_source.missing()
    if reason is not None:
        pytest.skip(reason)
    return torch.ops.vlkernels_cuda


BIG = [
    Case("forward", BF16, 4100, 4104, 1096, R=64),
    Case("backward", BF16, 4100, 4104, 1096, R=64, p=0.05),
    Case("backward", F16, 4100, 1032, 4104, R=16),
    Case("gelu", BF16, 4100, 4104, 1096, pre=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*all_cases(), *BIG], ids=str)
def test_product_on_the_device_is_exact(on_device, case):
    assert worst(on_device, case, "cuda") <= 1


@pytest.mark.gpu
def test_wrappers_on_the_device(on_device):
    case = Case("forward", BF16, 300, 520, 136, R=16)
    x = inputs(case, 0, "cuda")
    y = _two_source.forward(x.x, x.w, x.s, x.low, x.bias, x.lora_bias, SCALE)
    assert torch.equal(y, call(on_device, case, x)[0])
    case = Case("backward", BF16, 300, 520, 136, R=16, p=0.5, bias=False)
    x = inputs(case, 0, "cuda")
    dx = _two_source.backward_dx(x.x, x.w, x.s, x.low, torch.tensor(SEED, device="cuda"), case.p)
    assert torch.equal(dx, call(on_device, case, x)[0])
    case = Case("gelu", BF16, 300, 520, 136, pre=True)
    x = inputs(case, 0, "cuda")
    pre = torch.empty(300, 520, dtype=BF16, device="cuda")
    y = _two_source.linear_act(x.x, x.w, x.bias, "gelu", pre=pre)
    got = call(on_device, case, x)
    assert torch.equal(y, got[0]) and torch.equal(pre, got[1])


@pytest.mark.gpu
def test_runs_on_the_device_are_identical(on_device):
    x = inputs(BIG[1], 0, "cuda")
    first = call(on_device, BIG[1], x)[0]
    for _ in range(20):  # a race between copies and products would show here
        assert torch.equal(first, call(on_device, BIG[1], x)[0])
