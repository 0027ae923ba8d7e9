"""The CUDA kernels' numbers where no GPU is: run on the host, and where there is one, on the device.

The host run compiles the kernels with g++ against tests/emulate (one fiber per CUDA thread, ldmatrix and mma.sync by
the tables of the PTX ISA) and calls them through the real torch border over CPU tensors. On a machine with a GPU the
same cases run on the device.
"""

import ctypes
import hashlib
import itertools
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_csrc import BUILD, ROOT, locked, python, run

from vlkernels.ops._dropout import LEVELS, keep_mask, threshold
from vlkernels.testing.compare import SEEDS, ulp

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


# -- the kernels on the host -----------------------------------------------------------------------------------------


def emulation(namespace: str = "vlkernels_emulated", edit: tuple[str, str, str] | None = None):
    """The op compiled for the host as torch.ops.<namespace>.lora_linear_update; `edit` = (file, old, new) breaks it."""
    library = host_library(namespace, "ops.cpp", ["lora_linear/lora_linear_update.cu"], edit)
    torch.ops.load_library(str(library))
    return getattr(torch.ops, namespace).lora_linear_update, library


def host_library(namespace: str, border: str, kernels: list[str], edit: tuple[str, str, str] | None = None) -> Path:
    """`border` of tests/emulate and `kernels` of csrc compiled by g++, registering torch.ops.<namespace>."""
    compiler = shutil.which("g++")
    toolkit = next((p for p in toolkit_includes() if (p / "cuda_bf16.h").is_file()), None)
    if compiler is None or toolkit is None:
        pytest.skip("the host run needs g++ and the CUDA headers")
    files = {p: p.read_text() for folder in ("csrc", "tests/emulate") for p in sorted((ROOT / folder).rglob("*.*"))}
    key = repr((namespace, edit, torch.__version__, sorted((str(p), text) for p, text in files.items())))
    library = BUILD / "emulated" / f"{namespace}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    csrc = ROOT / "csrc"
    with locked(namespace):
        if not library.exists():
            library.parent.mkdir(exist_ok=True)
            if edit is not None:
                file, old, new = edit
                csrc = library.with_suffix("")
                shutil.copytree(ROOT / "csrc", csrc, dirs_exist_ok=True)
                text = (csrc / file).read_text()
                assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
                (csrc / file).write_text(text.replace(old, new))
            torch_folder = Path(torch.__file__).parent
            emulate = ROOT / "tests" / "emulate"
            built = run(
                compiler, "-std=c++17", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", "-x", "c++",
                f"-Dvlkernels_cuda={namespace}", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
                "-isystem", toolkit, "-isystem", torch_folder / "include",
                "-include", emulate / "cuda_host.h", f"-I{emulate}", f"-I{csrc}",
                *(csrc / kernel for kernel in kernels), emulate / border, "-o", library,
                "-Wl,--no-as-needed", f"-L{torch_folder / 'lib'}", "-ltorch",
            )  # fmt: skip
            assert built.returncode == 0, built.stderr
    return library


def toolkit_includes() -> list[Path]:
    nvcc = shutil.which("nvcc")
    dryrun = run(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull).stderr if nvcc else ""
    roots = re.findall(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE) + [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return [Path(root).resolve() / "include" for root in roots if root]


@pytest.fixture(scope="module")
def emulated():
    return emulation()


@dataclass(frozen=True)
class Case:
    base: torch.dtype
    s: torch.dtype
    b: torch.dtype
    bias: torch.dtype | None = None
    T: int = 37
    N: int = 75
    R: int = 16
    b_layout: str = "rows"  # rows, padded, transposed, transposed padded, strided
    wide: bool = False  # base, s and out are slices of wider buffers
    p: float = 0.0
    inplace: bool = False

    def __str__(self) -> str:
        short = {F32: "fp32", BF16: "bf16", F16: "fp16", None: "none"}
        flags = [self.b_layout.replace(" ", "_"), f"p{self.p}"] + ["wide"] * self.wide + ["inplace"] * self.inplace
        kinds = [short[kind] for kind in (self.base, self.s, self.b, self.bias)]
        return "-".join([*kinds, f"{self.T}x{self.N}r{self.R}", *flags])


DTYPES = [
    (F32, F32, F32),
    *((half, *rest) for half in (BF16, F16) for rest in ((half, half), (half, F32), (F32, F32))),
]
RANKS = (1, 3, 8, 16, 17, 64, 128, 200)
LAYOUTS = ("rows", "padded", "transposed", "transposed padded", "strided")
# odd sizes that end inside a block, inside a run of 8 and one past a block; full blocks last
SIZES = ((37, 75), (129, 131), (5, 264), (1, 1), (128, 256))


def all_cases() -> list[Case]:
    """Every dtype at every rank; the other features turn at coprime periods, so that they meet in all pairs."""
    features = zip(
        itertools.cycle(LAYOUTS),
        itertools.cycle((F32, None, BF16, F16)),
        itertools.cycle((0.05, 0.0, 0.5)),
        itertools.cycle((False, False, True, True, False, True, True)),
        itertools.cycle((True, False)),
        strict=False,
    )
    cases = []
    kinds = itertools.product(DTYPES, RANKS)
    for (dtypes, rank), (layout, bias, p, wide, inplace) in zip(kinds, features, strict=False):
        T, N = SIZES[(len(cases) + rank) % len(SIZES)]
        cases.append(Case(*dtypes, bias, T, N, rank, layout, wide, p, inplace))
    return [*cases, Case(F32, F32, F32, R=512), Case(BF16, BF16, F32, R=512, b_layout="transposed", p=0.3)]


SCALE = 0.7
SEED = -7_046_029_254_386_353_131


@dataclass
class Inputs:
    base: torch.Tensor
    s: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None


def inputs(case: Case, seed: int, device: str = "cpu") -> Inputs:
    """base, the product and the bias are of one size, so that none hides behind another."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows, cols, dtype, room=0, factor=1.0):
        values = torch.randn(rows, cols + room, generator=generator) * factor
        return values.to(device, dtype)[:, room // 2 : room // 2 + cols]

    room = 24 if case.wide else 0
    factor = case.R**-0.5
    base = random(case.T, case.N, case.base, room)
    s = random(case.T, case.R, case.s, room)
    if case.b_layout in ("rows", "padded"):
        b = random(case.N, case.R, case.b, 8 if case.b_layout == "padded" else 0, factor)
    elif case.b_layout == "strided":
        b = random(case.N, 2 * case.R, case.b, 0, factor)[:, ::2]
    else:
        b = random(case.R, case.N, case.b, 8 if case.b_layout == "transposed padded" else 0, factor).T
    bias = None if case.bias is None else random(1, case.N, case.bias)[0]
    return Inputs(base, s, b, bias)


def exact(case: Case, x: Inputs) -> torch.Tensor:
    """The equation in float64."""
    branch = x.s.double() @ x.b.double().T
    if x.bias is not None:
        branch = branch + x.bias.double()
    return x.base.double() + mask(case, x.base) * SCALE * branch


def eager(case: Case, x: Inputs) -> torch.Tensor:
    """What the user has: the branch in s's dtype, op by op."""
    bias = None if x.bias is None else x.bias.to(x.s.dtype)
    branch = torch.nn.functional.linear(x.s, x.b.to(x.s.dtype), bias) * SCALE
    return (x.base + branch * mask(case, x.base).to(x.s.dtype)).to(x.base.dtype)


def mask(case: Case, base: torch.Tensor) -> torch.Tensor:
    seed = torch.tensor(SEED, device=base.device)
    keep = keep_mask(seed, case.T, case.N, case.p)
    return keep.double() * (LEVELS / (LEVELS - threshold(case.p)))


def limit(case: Case, device: str = "cpu") -> float:
    """2 * max |eager - exact| + 4 ulp at the output's scale, both over five seeds."""
    error = scale = 0.0
    for seed in SEEDS:
        x = inputs(case, seed, device)
        truth = exact(case, x)
        error = max(error, float((eager(case, x).double() - truth).abs().max()))
        scale = max(scale, float(truth.abs().max()))
    return 2 * error + 4 * ulp(scale, case.base)


def call(op, case: Case, x: Inputs) -> torch.Tensor:
    """The op's result; what lies around `out` in a wider buffer must stay as it was."""
    buffer = torch.full((case.T + 2, case.N + 24), float("nan"), dtype=case.base, device=x.base.device)
    out = buffer[1:-1, 8 : 8 + case.N] if case.wide else torch.full_like(x.base, float("nan"))
    if case.inplace:
        out.copy_(x.base)
    seed = torch.tensor(SEED, device=x.base.device) if case.p else None
    op(out if case.inplace else x.base, x.s, x.b, x.bias, seed, SCALE, case.p, out)
    if case.wide:
        around = torch.ones_like(buffer, dtype=torch.bool)
        around[1:-1, 8 : 8 + case.N] = False
        assert buffer[around].isnan().all(), "written outside of out"
    return out


def poison(op, case: Case) -> None:
    """Leaves NaN in the shared memory of the kernel that `case` runs, as an unlucky earlier block would."""
    x = inputs(Case(case.base, case.s, case.b, T=128, N=128, R=64, b_layout=case.b_layout), 0)
    x.s.fill_(float("nan"))
    x.b.fill_(float("nan"))
    op(x.base, x.s, x.b, None, None, 1.0, 0.0, torch.empty_like(x.base))


def worst_error(op, case: Case) -> float:
    poison(op, case)
    x = inputs(case, 0)
    return float((call(op, case, x).double() - exact(case, x)).abs().max())


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_emulated_update_is_exact(emulated, case):
    assert worst_error(emulated[0], case) <= limit(case)


def test_features_meet_in_all_pairs():
    cases = all_cases()
    for layout, p in itertools.product(LAYOUTS, (0.0, 0.05, 0.5)):
        for tensor_cores in (False, True):
            assert any(c.b_layout == layout and c.p == p and (c.s != F32) == tensor_cores for c in cases)
    for layout, wide, inplace in itertools.product(LAYOUTS, (False, True), (False, True)):
        assert any(c.b_layout == layout and c.wide == wide and c.inplace == inplace for c in cases)


KERNEL = "lora_linear/lora_linear_update.cu"
BREAKS = {
    "lanes of A": (KERNEL, "lane % 16, k + lane / 16 * 8", "lane % 16, k + lane / 8 % 2 * 8"),
    "lanes of B": (KERNEL, "tiles.b.at(n + lane % 8, r)", "tiles.b.at(n + lane % 8, r ^ 8)"),
    "lanes of transposed B": (KERNEL, "load_matrix_x4_trans(b,", "load_matrix_x4(b,"),
    "columns of C": (KERNEL, "j * 8 + lane % 4 * 2", "j * 8 + lane % 3 * 2"),
    "rows of C": (KERNEL, "&stage[k * 4 + lane / 8]", "&stage[k * 4 + lane / 8 % 2]"),
    "wait for the copies": (KERNEL, "    wait_for_copies();\n", ""),
    "barrier before the products": (KERNEL, "    __syncthreads();\n    for (int k", "    for (int k"),
    "barrier after the products": (KERNEL, "    __syncthreads();\n  }\n\n  // Through", "  }\n\n  // Through"),
    "barrier before the stage is read": (KERNEL, "    __syncwarp();\n#pragma", "#pragma"),
    "last rank in fp32": (KERNEL, "< kFmaBlockR ? p.R - r0", "< kFmaBlockR ? p.R - r0 - 1"),
    "half the bias": (KERNEL, "acc[j] + bias.x[j]", "acc[j] + 0.5f * bias.x[j]"),
    "half the scale": (KERNEL, "float factor = p.scale_f", "float factor = 0.5f * p.scale_f"),
    "no base": (KERNEL, "to_float(base.x[j]) + factor", "factor"),
    "halves of a mask word": ("common/philox.cuh", "16 * (j & 1)", "16 * (~j & 1)"),
    "words of the mask": ("common/philox.cuh", "words.w[j >> 1]", "words.w[j & 3]"),
    "rounds of the mask": ("common/philox.cuh", "round < 7", "round < 6"),
    "keep factor": ("common/dropout.h", "65536.0 / (65536.0 - threshold)", "1.0 + 0.0 * threshold"),
    "zeros past the rank": ("common/vector.cuh", "from_float<Src>(0.0f)", "from_float<Src>(1.0f)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_is_noticed(name):
    op, _ = emulation("vlkernels_broken_" + re.sub(r"\W", "_", name), BREAKS[name])
    cases = [
        Case(half, half, b, bias, 37, 75, R, layout, p=p)
        for half, b in ((BF16, F32), (BF16, BF16))
        for bias in (None, BF16)
        for R in (17, 200)
        for layout in ("rows", "transposed")
        for p in (0.0, 0.5)
    ] + [Case(F32, F32, F32, R=17)]
    assert not all(worst_error(op, case) <= limit(case) for case in cases)


def test_philox_known_answers(emulated):
    """The answers for 7 rounds that Random123 ships (kat_vectors)."""
    philox = ctypes.CDLL(str(emulated[1])).emulated_philox
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    ones = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2
    for (counter, key), answer in (
        (((0,) * 4, (0,) * 2), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (ones, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (pi, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ):
        words = (ctypes.c_uint32 * 4)()
        philox((ctypes.c_uint32 * 4)(*counter), ctypes.c_uint32(key[0]), ctypes.c_uint32(key[1]), words)
        assert tuple(words) == answer


def test_mask_rows_pass_2_to_the_32(emulated):
    """The high word of the row takes part: the masks of rows t and t + 2^32 differ."""
    bits = ctypes.CDLL(str(emulated[1])).emulated_dropout_bits
    bits.argtypes = [ctypes.c_int64] * 3
    bits.restype = ctypes.c_uint32
    low, high = ([bits(SEED, row, col) for col in range(64)] for row in (3, 3 + 2**32))
    keep = keep_mask(torch.tensor(SEED), 4, 64, 0.5)[3]
    assert [x >= threshold(0.5) for x in low] == keep.tolist()
    assert low != high


def test_offsets_pass_2_to_the_31(emulated):
    """Three rows 2^30 elements apart: the last starts at 2^31. Untouched pages of the buffers cost no memory."""
    stride, N = 2**30, 24
    storage = torch.UntypedStorage(2 * (2 * stride + N))
    base = torch.empty(0, dtype=BF16).set_(storage, 0, (3, N), (stride, 1))
    case = Case(BF16, BF16, BF16, T=3, N=N)
    x = inputs(case, 0)
    base.copy_(x.base)
    emulated[0](base, x.s, x.b, None, None, SCALE, 0.0, base)
    assert float((base.double() - exact(case, x)).abs().max()) <= limit(case)


def test_reads_stay_inside(emulated):
    """Each tensor ends where an unreadable page begins; a read past its end kills the process."""
    code = f"""
        import ctypes, mmap
        import torch
        torch.ops.load_library({str(emulated[1])!r})
        update = torch.ops.vlkernels_emulated.lora_linear_update
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

        def at_the_end(rows, cols, dtype):
            size = rows * cols * dtype.itemsize
            room = (size + 4095) // 4096 * 4096
            start = libc.mmap(None, room + 4096, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
            assert libc.mprotect(start + room, 4096, 0) == 0
            memory = (ctypes.c_char * size).from_address(start + room - size)
            return torch.frombuffer(memory, dtype=dtype).view(rows, cols).fill_(1)

        for dtype in (torch.float32, torch.bfloat16):
            for T, N, R in ((128, 128, 64), (64, 72, 24), (37, 75, 17), (1, 1, 1), (130, 8, 3)):
                base, s, out = (at_the_end(T, n, dtype) for n in (N, R, N))
                for b in (at_the_end(N, R, dtype), at_the_end(R, N, dtype).T):
                    update(base, s, b, at_the_end(1, N, dtype)[0], None, 1.0, 0.0, out)
                    assert (out == R + 2).all(), (dtype, T, N, R)
        print("inside")
    """
    assert python(code).stdout == "inside\n"


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_nan_and_inf_propagate(emulated, dtypes):
    case = Case(*dtypes, T=8, N=16, R=8, p=0.5)
    x = inputs(case, 0)
    x.base[0, 0] = float("nan")
    x.s[1, 0] = float("nan")
    x.b[2, 0] = float("inf")
    x.base[3, 3] = float("inf")
    got, expected = call(emulated[0], case, x), eager(case, x)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())


def test_empty(emulated):
    for T, N in ((0, 5), (5, 0), (0, 0)):
        emulated[0](torch.empty(T, N), torch.ones(T, 4), torch.ones(N, 4), None, None, 1.0, 0.0, torch.empty(T, N))


def test_runs_are_identical(emulated):
    case = Case(BF16, BF16, BF16, R=200, p=0.05)
    x = inputs(case, 0)
    assert torch.equal(call(emulated[0], case, x), call(emulated[0], case, x))


def refusals():
    def arguments(**changed):
        plain = dict(
            base=torch.zeros(6, 8), s=torch.zeros(6, 4), b=torch.zeros(8, 4), bias=None, seed=torch.tensor(1),
            scale=1.0, p=0.1, out=torch.zeros(6, 8),
        )  # fmt: skip
        return plain | changed

    line = torch.zeros(7 * 8)
    return {
        "base is Double; accepted are Float, BFloat16 and Half": arguments(base=torch.zeros(6, 8).double()),
        "base has shape (8); expected two dimensions (T, N)": arguments(base=torch.zeros(8)),
        "s is Half; expected base's dtype Float, or Float": arguments(s=torch.zeros(6, 4).half()),
        "s has shape (5, 4); expected (6, 4)": arguments(s=torch.zeros(5, 4)),
        "s has stride 2 along its last dimension; expected 1": arguments(s=torch.zeros(6, 8)[:, ::2]),
        "b is BFloat16; expected s's dtype Float, or Float": arguments(b=torch.zeros(8, 4).bfloat16()),
        "b has shape (8, 5); expected (8, 4)": arguments(b=torch.zeros(8, 5)),
        "the rank is 0; accepted are 1 to 512": arguments(s=torch.zeros(6, 0), b=torch.zeros(8, 0)),
        "the rank is 513; accepted are 1 to 512": arguments(s=torch.zeros(6, 513), b=torch.zeros(8, 513)),
        "bias is Long; accepted are Float": arguments(bias=torch.zeros(8, dtype=torch.long)),
        "bias has shape (7); expected (8)": arguments(bias=torch.zeros(7)),
        "p is 1; accepted are 0 <= p < 1": arguments(p=1.0),
        "p is nan; accepted are 0 <= p < 1": arguments(p=float("nan")),
        "p is not 0 and there is no seed": arguments(seed=None),
        "seed is Int of 1 elements; expected one Long": arguments(seed=torch.tensor(1, dtype=torch.int32)),
        "out is Half; expected base's dtype Float": arguments(out=torch.zeros(6, 8).half()),
        "out has shape (6, 9); expected (6, 8)": arguments(out=torch.zeros(6, 9)),
        "out has overlapping rows (row stride 0, 8 columns)": arguments(out=torch.zeros(1, 8).expand(6, 8)),
        "base overlaps out": arguments(base=line[:48].view(6, 8), out=line[8:].view(6, 8)),
        "s overlaps out": arguments(s=line[:24].view(6, 4), out=line[8:].view(6, 8)),
    }


@pytest.mark.parametrize("message, arguments", refusals().items(), ids=list(refusals()))
def test_bad_input_is_named(emulated, message, arguments):
    with pytest.raises(RuntimeError, match=re.escape("lora_linear_update: " + message)):
        emulated[0](**arguments)


# -- on a device -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_device():
    from vlkernels.ops.lora_linear import cuda

    reason = cuda.missing()
    if reason is not None:
        pytest.skip(reason)
    return cuda.update


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*all_cases(), Case(BF16, BF16, BF16, BF16, 4100, 2056, 128, p=0.05)], ids=str)
def test_update_on_the_device_is_exact(on_device, case):
    x = inputs(case, 0, "cuda")
    error = float((call(on_device, case, x).double() - exact(case, x)).abs().max())
    assert error <= limit(case, "cuda")
