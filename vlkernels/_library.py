"""The compiled op library, _ops.so: found and loaded once. Nothing here starts a CUDA context."""

import ctypes
import functools
import json
import os
import re
import threading
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent
_lock = threading.Lock()
_loaded: Path | None = None


def _find() -> Path | str:
    """The library's path, or why there is none."""
    named = os.environ.get("VLKERNELS_OPS")
    if named:
        path = Path(named)
        return path if path.is_file() else f"VLKERNELS_OPS={named} is no file"
    for path in (_PACKAGE / "_ops.so", _PACKAGE.parent / "build" / "gpu" / "_ops.so"):
        if path.is_file():
            return path
    return (
        "this install holds no compiled kernels (_ops.so); where nvcc and torch are, "
        "VLKERNELS_BUILD=cuda pip install --no-build-isolation . builds them or says why not"
    )


def load() -> str | None:
    """Load the library unless that is done: None, or the reason why it is not loaded."""
    global _loaded
    with _lock:
        if _loaded is not None:
            return None
        path = _find()
        if isinstance(path, str):
            return path
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            return f"{path} does not load: {error.__cause__ or error}"
        _loaded = path
        return None


@functools.cache
def _build_info(path: Path) -> dict:
    describe = ctypes.CDLL(str(path)).vlkernels_build_info
    describe.restype = ctypes.c_char_p
    return json.loads(describe())


def info() -> dict:
    """path, version, archs, cuda, torch (built with), torch_target, ops, git; or path None and the reason why."""
    reason = load()
    if reason is not None:
        return {"path": None, "reason": reason}
    return {"path": str(_loaded), **_build_info(_loaded)}


def covers(capability: tuple[int, int]) -> bool:
    """Whether the library holds code for a device of this compute capability."""
    if load() is not None:
        return False
    return any(_runs_on(arch, capability) for arch in _build_info(_loaded)["archs"])


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    kind, digits, variant = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", arch).groups()
    target = divmod(int(digits), 10)
    if variant == "a":
        return capability == target
    if kind == "compute" and variant == "":
        return capability >= target
    # machine code, and code for a family of devices, runs on later minor versions of its major version
    return capability[0] == target[0] and capability[1] >= target[1]
