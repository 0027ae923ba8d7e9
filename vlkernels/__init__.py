"""Fused Triton and CUDA kernels for the parts that turn a language model into a vision-LLM, behind drop-in modules."""

from .backends import BackendRefused, explain, use_backend
from .integrations.insert import insert, remove, train_inserted
from .integrations.inserted_state import inserted_state_dict, load_inserted, save_inserted
from .integrations.integrators import GatedCrossAttention, IdeficsCrossAttention
from .integrations.integrators_adapter import Adapters
from .integrations.integrators_expert import VisualExpert
from .integrations.integrators_prefix import AdaptivePrefix, EpalmTokens, MemVP
from .integrations.swap import swap, unswap
from .modules import DoRALinear, LoRALinear, QLoRALinear
from .modules.quantized import release_scratch, scratch_limit
from .ops.bottleneck_adapter import bottleneck_adapter
from .ops.conv_se_linear import conv_se_linear
from .ops.cross_attention import cross_attention
from .ops.deformable_attention import deformable_attention
from .ops.depthwise_conv_norm_act import depthwise_conv_norm_act
from .ops.dora_linear import dora_linear
from .ops.gated_residual import gated_residual
from .ops.linear_projector import linear_projector
from .ops.lora_linear import lora_linear
from .ops.lora_mlp import lora_mlp
from .ops.lora_qkv import lora_qkv
from .ops.media_cross_attention import media_cross_attention
from .ops.mlp_projector import mlp_projector
from .ops.modality_linear import modality_linear
from .ops.multi_layer_kv import multi_layer_kv
from .ops.norm_residual import norm_residual
from .ops.pooled_mlp import pooled_mlp
from .ops.prefix_attention import prefix_attention
from .ops.selective_scan_2d import selective_scan_2d

__version__ = "0.1.0"
__all__ = [
    "AdaptivePrefix",
    "Adapters",
    "BackendRefused",
    "DoRALinear",
    "EpalmTokens",
    "GatedCrossAttention",
    "IdeficsCrossAttention",
    "LoRALinear",
    "MemVP",
    "QLoRALinear",
    "VisualExpert",
    "bottleneck_adapter",
    "conv_se_linear",
    "cross_attention",
    "deformable_attention",
    "depthwise_conv_norm_act",
    "dora_linear",
    "explain",
    "gated_residual",
    "insert",
    "inserted_state_dict",
    "linear_projector",
    "load_inserted",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "media_cross_attention",
    "mlp_projector",
    "modality_linear",
    "multi_layer_kv",
    "norm_residual",
    "pooled_mlp",
    "prefix_attention",
    "release_scratch",
    "remove",
    "save_inserted",
    "scratch_limit",
    "selective_scan_2d",
    "swap",
    "train_inserted",
    "unswap",
    "use_backend",
]
