"""Fused Triton and CUDA kernels for the parts that turn a language model into a vision-LLM, behind drop-in modules."""

from .backends import BackendRefused, explain, use_backend
from .integrations.swap import swap, unswap
from .modules import LoRALinear
from .ops.linear_projector import linear_projector
from .ops.lora_linear import lora_linear
from .ops.mlp_projector import mlp_projector

__version__ = "0.1.0"
__all__ = [
    "BackendRefused",
    "LoRALinear",
    "explain",
    "linear_projector",
    "lora_linear",
    "mlp_projector",
    "swap",
    "unswap",
    "use_backend",
]
