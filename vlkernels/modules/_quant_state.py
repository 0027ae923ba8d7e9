"""bitsandbytes' state dict of a 4-bit weight, read and written. bitsandbytes 0.50 `functional.py`, class QuantState.

Beside `weight`, the packed codes, stand `weight.absmax` (uint8 with double quantisation, else float32),
`weight.quant_map` (16), with double quantisation `weight.nested_absmax` and `weight.nested_quant_map` (256), and
`weight.quant_state.bitsandbytes__nf4` (or fp4): the bytes of a JSON object with everything that is no tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import _nf4

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _nf4.DTYPES}
_HEADER = "quant_state.bitsandbytes__"
_NESTED = ("nested_absmax", "nested_quant_map")


class Facts(NamedTuple):
    """Of a packed weight: shape (N, K), "nf4" or "fp4", elements a block, the dtype that was quantised."""

    shape: tuple[int, int]
    quant_type: str
    blocksize: int
    dtype: torch.dtype


def write(quant: Tensor, facts: Facts) -> dict[str, Tensor]:
    """What stands beside the packed weight, by the names after "weight.", in upstream's order. Waits for the device."""
    state = _nf4.unpack_state(quant, _nf4.block_count(facts.shape, facts.blocksize))
    header = {
        "quant_type": facts.quant_type,
        "blocksize": facts.blocksize,
        "dtype": str(facts.dtype).removeprefix("torch."),
        "shape": facts.shape,
    }
    tensors = {"absmax": state.absmax.clone(), "quant_map": state.code.clone()}
    if state.double:
        tensors |= {"nested_absmax": state.nested_absmax.clone(), "nested_quant_map": state.nested_code.clone()}
        header |= {
            "nested_blocksize": _nf4.NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": state.offset.item() if not quant.is_meta else 0.0,
        }
    text = json.dumps(header).encode()
    return tensors | {_HEADER + facts.quant_type: torch.tensor(list(text), dtype=torch.uint8)}


def read(packed: Tensor, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Facts]:
    """(packed, quant, facts) from a weight and what stands beside it, by the names after "weight.".

    Raises: ValueError saying what does not fit: numbers are never guessed.
    """
    headers = [name for name in parts if name.startswith("quant_state.")]
    if len(headers) != 1:
        raise ValueError(f"it has {len(headers)} of weight.{_HEADER}nf4 or fp4; accepted: one")
    header = _header(headers[0], parts[headers[0]])
    facts = _facts(header)
    blocks = _nf4.block_count(facts.shape, facts.blocksize)
    # uint8, or what bitsandbytes' quant_storage made of the same bytes
    data = packed.detach().contiguous().flatten()
    data = data.view(torch.uint8) if data.numel() else data.to(torch.uint8)
    if data.numel() != _nf4.packed_count(facts.shape):
        raise ValueError(
            f"weight holds {data.numel()} bytes; a weight {facts.shape} has {_nf4.packed_count(facts.shape)}"
        )
    double = "nested_absmax" in parts
    names = ["absmax", "quant_map", *(_NESTED if double else ()), headers[0]]
    for name in names:
        if name not in parts:
            raise ValueError(f"weight.{name} is missing")
    unknown = [name for name in parts if name not in names]
    if unknown:
        raise ValueError(f"unknown key weight.{unknown[0]}; known: {', '.join('weight.' + n for n in names)}")
    _fits("absmax", parts["absmax"], (blocks,), torch.uint8 if double else torch.float32)
    _fits("quant_map", parts["quant_map"], (16,), torch.float32)
    code = _nf4.code_book(facts.quant_type, parts["quant_map"].device)
    if not code.is_meta and not torch.equal(parts["quant_map"], code):
        raise ValueError(f"weight.quant_map is not the code book of {facts.quant_type}")
    nested = {}
    if double:
        _fits("nested_absmax", parts["nested_absmax"], (-(-blocks // _nf4.NESTED_BLOCKSIZE),), torch.float32)
        _fits("nested_quant_map", parts["nested_quant_map"], (256,), torch.float32)
        offset = torch.tensor([_offset(header)], device=parts["absmax"].device)
        nested = {
            "offset": offset,
            "nested_code": parts["nested_quant_map"],
            "nested_absmax": parts["nested_absmax"],
        }
    return data[:, None], _nf4.pack_state(code, parts["absmax"], **nested), facts


def of_object(state) -> tuple[Tensor, Facts]:
    """(quant, facts) of bitsandbytes' own QuantState, on its device and without waiting for it.

    Raises: ValueError saying what this library cannot read.
    """
    nested = state.state2
    if nested is not None and nested.blocksize != _nf4.NESTED_BLOCKSIZE:
        raise ValueError(f"absmax is quantised in blocks of {nested.blocksize}; accepted: {_nf4.NESTED_BLOCKSIZE}")
    shape = tuple(state.shape or ())
    facts = _checked(shape, state.quant_type, state.blocksize, state.dtype)
    blocks = _nf4.block_count(facts.shape, facts.blocksize)
    _fits("absmax", state.absmax, (blocks,), torch.uint8 if nested is not None else torch.float32)
    code = _nf4.code_book(facts.quant_type, state.absmax.device)
    if nested is None:
        return _nf4.pack_state(code, state.absmax), facts
    return _nf4.pack_state(code, state.absmax, state.offset, nested.code, nested.absmax), facts


def _header(name: str, data: Tensor) -> dict:
    kind = name.removeprefix(_HEADER)
    if kind not in ("nf4", "fp4"):
        raise ValueError(f"weight.{name} is of an unknown kind; accepted: weight.{_HEADER}nf4, weight.{_HEADER}fp4")
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"weight.{name} is {data.dtype} {tuple(data.shape)}; accepted: the uint8 bytes of a JSON")
    try:
        header = json.loads(bytes(data.tolist()).decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"weight.{name} holds no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"weight.{name} holds no JSON object")
    if header.get("quant_type") != kind:
        raise ValueError(f"weight.{name} says quant_type {header.get('quant_type')!r}; its name says {kind!r}")
    return header


def _facts(header: dict) -> Facts:
    dtype = header.get("dtype")
    if dtype not in _DTYPES:
        raise ValueError(f"the header's dtype is {dtype!r}; accepted: {', '.join(_DTYPES)}")
    shape = header.get("shape")
    return _checked(
        tuple(shape) if isinstance(shape, list) else (), header["quant_type"], header.get("blocksize"), _DTYPES[dtype]
    )


def _checked(shape: tuple, quant_type: str, blocksize: int, dtype: torch.dtype) -> Facts:
    if len(shape) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ValueError(f"the shape of the weight is {shape!r}; accepted: [N, K], both positive")
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f'quant_type is {quant_type!r}; accepted: "nf4", "fp4"')
    if isinstance(blocksize, bool) or blocksize not in _nf4.BLOCKSIZES:
        raise ValueError(f"blocksize is {blocksize!r}; accepted: {', '.join(map(str, _nf4.BLOCKSIZES))}")
    if dtype not in _nf4.DTYPES:
        raise ValueError(f"the quantised dtype is {dtype}; accepted: {', '.join(map(str, _nf4.DTYPES))}")
    return Facts(shape, quant_type, int(blocksize), dtype)


def _offset(header: dict) -> float:
    if header.get("nested_blocksize") != _nf4.NESTED_BLOCKSIZE:
        raise ValueError(
            f"the header's nested_blocksize is {header.get('nested_blocksize')!r}; accepted: {_nf4.NESTED_BLOCKSIZE}"
        )
    if header.get("nested_dtype") != "float32":
        raise ValueError(f"the header's nested_dtype is {header.get('nested_dtype')!r}; accepted: 'float32'")
    offset = header.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise ValueError(f"the header's nested_offset is {offset!r}; accepted: a finite number")
    return float(offset)


def _fits(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(t.shape) != shape or t.dtype != dtype:
        raise ValueError(f"weight.{name} is {t.dtype} {tuple(t.shape)}; accepted: {dtype} {shape}")
