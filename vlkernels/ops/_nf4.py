"""4-bit weights with double quantisation, as bitsandbytes stores them. QLoRA: Dettmers et al., arXiv 2305.14314.

A weight (N, K) is flattened row by row and cut into blocks of `blocksize`, which may cross rows; the last may be short.

    w[i] = code[index[i]] * absmax[i // blocksize]
    absmax[j] = nested_code[absmax8[j]] * nested_absmax[j // 256] + offset        (double quantisation)

All of it in float32 without fused multiply-adds, rounded once to the dtype that was quantised, then cast to the dtype
of the product: the numbers are bitsandbytes' bit for bit.

packed: (ceil(N K / 2), 1) uint8, the even element in the high nibble; an odd count is filled up with a zero.
quant: one 1-D uint8 tensor with everything else that is data, so that an operator has one tensor more and not five:

    float32  code (16), offset (1), zeros (3), nested code (256), nested absmax (ceil(blocks / 256), filled up to a
             multiple of 4; none without double quantisation)
    then     absmax (blocks): uint8 with double quantisation, else float32

Its length tells the two apart for every count of blocks. Shape, blocksize and dtype travel as plain arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes' own list
NESTED_BLOCKSIZE = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD = 276  # float32 values before the nested absmax

# quantiles of the normal distribution, by index
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# a sign, two bits of exponent and one of mantissa, by bit pattern; the largest is 12
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _fp4() -> tuple[float, ...]:
    values = (torch.tensor(_FP4, dtype=torch.float32, device="cpu") / 12).tolist()
    return (*values, *(-v if v else 0.0 for v in values))


def code_book(quant_type: str, device=None) -> Tensor:
    """The 16 float32 values of "nf4" or "fp4", by index."""
    if quant_type not in _CODES:
        raise ValueError(f'quant_type is {quant_type!r}; accepted: "nf4", "fp4"')
    return torch.tensor(_CODES[quant_type], dtype=torch.float32, device=device)


def _dynamic() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = 10 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return tuple(sorted(values))


# made on import: a fake tensor mode has no values
_CODES = {"nf4": _NF4, "fp4": _fp4()}
_DYNAMIC = _dynamic()


def dynamic_map(device=None) -> Tensor:
    """The 256 float32 values of the signed dynamic 8-bit type, ascending. Dettmers, arXiv 1511.04561."""
    return torch.tensor(_DYNAMIC, dtype=torch.float32, device=device)


# -- the quant tensor ----------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What `quant` holds, as views of it. absmax: uint8 with double quantisation, else float32."""

    code: Tensor
    absmax: Tensor
    offset: Tensor
    nested_code: Tensor
    nested_absmax: Tensor

    @property
    def double(self) -> bool:
        return self.absmax.dtype == torch.uint8


def block_count(shape: tuple[int, int], blocksize: int) -> int:
    return -(-shape[0] * shape[1] // blocksize)


def packed_count(shape: tuple[int, int]) -> int:
    """Bytes of the packed weight."""
    return (shape[0] * shape[1] + 1) // 2


def _nested_floats(blocks: int) -> int:
    return -(-blocks // (4 * NESTED_BLOCKSIZE)) * 4


def quant_bytes(blocks: int, double: bool) -> int:
    """Length of `quant`. The two lengths are equal for no count: 3 blocks = 16 ceil(blocks / 1024) has no solution."""
    return 4 * (HEAD + _nested_floats(blocks)) + blocks if double else 4 * (HEAD + blocks)


def is_double(quant: Tensor, blocks: int) -> bool:
    return quant.numel() == quant_bytes(blocks, True)


def pack_state(
    code: Tensor,
    absmax: Tensor,
    offset: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_absmax: Tensor | None = None,
) -> Tensor:
    """`quant` from its parts, on their device and without waiting for it; the nested ones only for a uint8 absmax."""
    if absmax.dtype == torch.uint8:
        fill = _nested_floats(absmax.numel()) - nested_absmax.numel()
        nested = F.pad(nested_absmax.float().flatten(), (0, fill))
        offset = offset.to(absmax.device).float().reshape(1)
    else:
        nested_code, nested = absmax.new_zeros(256, dtype=torch.float32), absmax.float().flatten()
        offset = absmax.new_zeros(1, dtype=torch.float32)
    floats = torch.cat((code.float().flatten(), F.pad(offset, (0, 3)), nested_code.float().flatten(), nested))
    if absmax.dtype != torch.uint8:
        return floats.view(torch.uint8)
    return torch.cat((floats.view(torch.uint8), absmax.flatten()))


def sections(quant: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """(float32 head with the nested absmax, absmax): the two tensors that a kernel reads."""
    double = is_double(quant, blocks)
    cut = 4 * (HEAD + (_nested_floats(blocks) if double else 0))
    return quant[:cut].view(torch.float32), quant[cut:] if double else quant[cut:].view(torch.float32)


def unpack_state(quant: Tensor, blocks: int) -> State:
    floats, absmax = sections(quant, blocks)
    nested = -(-blocks // NESTED_BLOCKSIZE) if absmax.dtype == torch.uint8 else 0
    return State(floats[:16], absmax, floats[16:17], floats[20:HEAD], floats[HEAD : HEAD + nested])


def check_bytes(**tensors: Tensor | None) -> None:
    """Each is None or a uint8 tensor."""
    for name, t in tensors.items():
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t is not None and t.dtype != torch.uint8:
            raise TypeError(f"{name} has dtype {t.dtype}; accepted: torch.uint8, as quantize() gives it")


def check(weight: Tensor, quant: Tensor, shape: tuple[int, int], blocksize: int, quant_dtype: torch.dtype | None):
    """An error that names what does not fit; only shapes are looked at, never the data."""
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize is {blocksize}; accepted: {', '.join(map(str, BLOCKSIZES))}")
    if quant_dtype is not None and quant_dtype not in DTYPES:
        raise TypeError(f"quant_dtype is {quant_dtype}; accepted: None, {', '.join(map(str, DTYPES))}")
    check_bytes(weight=weight, quant=quant)
    for name, t in (("weight", weight), ("quant", quant)):
        if not t.is_contiguous():
            raise ValueError(f"{name} has strides {t.stride()}; accepted: a contiguous tensor")
    size = packed_count(shape)
    if tuple(weight.shape) not in ((size, 1), (size,)):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; accepted: (ceil(N K / 2), 1) = {(size, 1)} for a weight {shape}"
        )
    blocks = block_count(shape, blocksize)
    lengths = quant_bytes(blocks, True), quant_bytes(blocks, False)
    if quant.dim() != 1 or quant.numel() not in lengths:
        raise ValueError(
            f"quant has shape {tuple(quant.shape)}; accepted for {blocks} blocks of {blocksize}: ({lengths[0]},) with "
            f"double quantisation, ({lengths[1]},) without"
        )


# -- quantise and dequantise ---------------------------------------------------------------------------------------


def quantize(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double: bool = True
) -> tuple[Tensor, Tensor]:
    """(packed, quant) of a float weight (N, K), the codes that bitsandbytes 0.50 gives on a CPU.

    absmax = max |w| of a block, u = w / absmax in [-1, 1], index = the nearest code (the lower one on a tie).

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype}; accepted: {', '.join(map(str, DTYPES))}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted: (N, K) with at least one element")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize is {blocksize}; accepted: {', '.join(map(str, BLOCKSIZES))}")
    code = code_book(quant_type, weight.device)
    flat = weight.detach().reshape(-1).float()
    count = flat.numel()
    full = count - count % blocksize
    blocked = flat[:full].view(-1, blocksize)
    absmax = blocked.abs().amax(1)
    # whole blocks are multiplied by the rounded reciprocal, a short last one is divided: as upstream does
    unit = (blocked * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).view(-1)
    if full < count:
        last = flat[full:].abs().max().clamp(min=1e-38)
        absmax = torch.cat((absmax, last[None]))
        unit = torch.cat((unit, (flat[full:] / last).clamp(-1, 1)))
    unit = F.pad(unit, (0, count % 2))
    # fp4 is not in ascending order, and has two zeros
    order = torch.argsort(code, stable=True)
    ascending = code[order]
    index = order[torch.bucketize(unit, (ascending[:-1] + ascending[1:]) / 2)].to(torch.uint8)
    packed = ((index[::2] << 4) | index[1::2])[:, None]
    if not double:
        return packed, pack_state(code, absmax)
    offset = absmax.mean()
    absmax8, nested_absmax = _quantize_8bit(absmax - offset)
    return packed, pack_state(code, absmax8, offset, dynamic_map(weight.device), nested_absmax)


def _quantize_8bit(values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes of the dynamic map, absmax of each block of 256).

    The entry nearest to u after u is rounded to 65536 steps over [-1, 1]: upstream's CPU search is a table that long.
    A block of zeros gets code 0, which its absmax of 0 makes a zero.
    """
    code = dynamic_map(values.device)
    blocks = -(-values.numel() // NESTED_BLOCKSIZE)
    blocked = F.pad(values, (0, blocks * NESTED_BLOCKSIZE - values.numel())).view(blocks, NESTED_BLOCKSIZE)
    absmax = blocked.abs().amax(1)
    unit = (blocked / absmax[:, None]).clamp(-1, 1).view(-1)[: values.numel()]
    step = ((unit + 1) * 0.5 * 65535 + 0.5).to(torch.int32)
    unit = step.float() / 65535 * 2 - 1
    index = torch.bucketize(unit, (code[:-1] + code[1:]) / 2)
    zero = (absmax == 0).repeat_interleave(NESTED_BLOCKSIZE)[: values.numel()]
    return index.masked_fill(zero, 0).to(torch.uint8), absmax


def block_scales(quant: Tensor, blocks: int) -> Tensor:
    """absmax (blocks,) in float32."""
    state = unpack_state(quant, blocks)
    if not state.double:
        return state.absmax
    nested = state.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[:blocks]
    # absmax = nested_code[absmax8] * nested_absmax + offset, two roundings
    return state.nested_code[state.absmax.int()] * nested + state.offset


def dequantize(
    packed: Tensor,
    quant: Tensor,
    shape: tuple[int, int],
    blocksize: int = 64,
    quant_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight (N, K) in `dtype`; rounded to `quant_dtype` before, where that is given. Plain PyTorch."""
    blocks = block_count(shape, blocksize)
    count = shape[0] * shape[1]
    code = unpack_state(quant, blocks).code
    # (256, 2): the two values of every byte
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), 1)
    values = pairs[packed.flatten().int()].flatten()
    values = F.pad(values, (0, blocks * blocksize - values.numel())).view(blocks, blocksize)
    # w = code[index] * absmax
    weight = (values * block_scales(quant, blocks)[:, None]).view(-1)[:count].view(shape)
    return weight.to(quant_dtype or torch.float32).to(dtype)
