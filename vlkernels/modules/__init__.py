"""Drop-in modules that stand alone, with plain parameter names; `integrations.checkpoints` maps upstream's to them."""

from .dora import DoRALinear
from .linear_projector import (
    EpalmConnector,
    FromageEmbeddings,
    ImagePrefix,
    LinearProjector,
    VisualEmbedding,
    placeholder_rows,
)
from .lora import LoRALinear
from .lora_blocks import LoRAAttention, LoRADecoderLayer, LoRAMLP
from .lora_embedding import DoRAEmbedding, LoRAEmbedding
from .packed import PackedLoRALinear
from .projector import AdapterMLP, CogVLMGLU, LlavaPooler, LlavaProjector, MLPProjector, PixelShuffleProjector
from .quantized import QLoRALinear

__all__ = [
    "AdapterMLP",
    "CogVLMGLU",
    "DoRAEmbedding",
    "DoRALinear",
    "EpalmConnector",
    "FromageEmbeddings",
    "ImagePrefix",
    "LinearProjector",
    "LlavaPooler",
    "LlavaProjector",
    "LoRAAttention",
    "LoRADecoderLayer",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMLP",
    "MLPProjector",
    "PackedLoRALinear",
    "PixelShuffleProjector",
    "QLoRALinear",
    "VisualEmbedding",
    "placeholder_rows",
]
