"""What the compiled kernels that run on sm_80 and later ask of a device alike."""

from __future__ import annotations

import torch

from .. import _library

_MINIMUM = (8, 0)
# bytes of shared memory that one block can have, by compute capability; the least of all from 8.0 on elsewhere
_SHARED = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
LEAST_SHARED = 101_376


@torch.compiler.assume_constant_result
def missing(source: str, device: int | None = None) -> str | None:
    """Why the kernels of csrc/<source> cannot run on this CUDA device (default: the current one), or None."""
    reason = _library.load()
    if reason is not None:
        return reason
    if source not in _library.info()["ops"]:
        return f"the library was built without {source}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    name = "sm_{}{}".format(*capability)
    if capability < _MINIMUM:
        return f"the device is {name}; the kernel needs sm_80 or later"
    if not _library.covers(capability):
        return f"the device is {name}; the library holds {', '.join(_library.info()['archs'])}"
    return None


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that a block can have on a device of this compute capability (90 for 9.0)."""
    return _SHARED.get(capability, LEAST_SHARED)
