"""Drop-in modules that stand alone, with plain parameter names; `integrations.checkpoints` maps upstream's to them."""

from .linear_projector import EpalmConnector, FromageEmbeddings, ImagePrefix, VisualEmbedding
from .lora import LoRALinear
from .projector import AdapterMLP, CogVLMGLU, LlavaPooler, LlavaProjector, MLPProjector, PixelShuffleProjector

__all__ = [
    "AdapterMLP",
    "CogVLMGLU",
    "EpalmConnector",
    "FromageEmbeddings",
    "ImagePrefix",
    "LlavaPooler",
    "LlavaProjector",
    "LoRALinear",
    "MLPProjector",
    "PixelShuffleProjector",
    "VisualEmbedding",
]
