"""Fused Triton and CUDA kernels for the parts that turn a language model into a vision-LLM, behind drop-in modules."""

from .backends import BackendRefused, explain, use_backend
from .integrations.swap import swap, unswap
from .modules import DoRALinear, LoRALinear, QLoRALinear
from .modules.quantized import release_scratch, scratch_limit
from .ops.cross_attention import cross_attention
from .ops.dora_linear import dora_linear
from .ops.linear_projector import linear_projector
from .ops.lora_linear import lora_linear
from .ops.lora_mlp import lora_mlp
from .ops.lora_qkv import lora_qkv
from .ops.mlp_projector import mlp_projector
from .ops.multi_layer_kv import multi_layer_kv
from .ops.norm_residual import norm_residual
from .ops.prefix_attention import prefix_attention

__version__ = "0.1.0"
__all__ = [
    "BackendRefused",
    "DoRALinear",
    "LoRALinear",
    "QLoRALinear",
    "cross_attention",
    "dora_linear",
    "explain",
    "linear_projector",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "mlp_projector",
    "multi_layer_kv",
    "norm_residual",
    "prefix_attention",
    "release_scratch",
    "scratch_limit",
    "swap",
    "unswap",
    "use_backend",
]
