"""Drop-in modules that stand alone, with plain parameter names; `integrations.checkpoints` maps upstream's to them."""

from .abstractor import HoneybeeResampler, MPLUGOwl2Abstractor, MPLUGOwlAbstractor
from .adaption_prompt import AdaptionPromptAttention, QaPLayer
from .blip2 import Blip2Stage1
from .connector import (
    ConcatProjector,
    FrameQFormerConnector,
    QFormerConnector,
    SpeechProjector,
    VideoLlamaConnector,
)
from .dora import DoRALinear
from .epalm import EpalmInjection, EpalmPrompt
from .linear_projector import (
    EpalmConnector,
    FromageEmbeddings,
    ImagePrefix,
    LinearProjector,
    VisualEmbedding,
    placeholder_rows,
)
from .llama_adapter import (
    LlamaAdapterAttention,
    LlamaAdapterBlock,
    LlamaAdapterFeedForward,
    LlamaAdapterPrompts,
    LlamaAdapterVisualPrompts,
)
from .lora import LoRALinear
from .lora_blocks import LoRAAttention, LoRADecoderLayer, LoRAMLP
from .lora_embedding import DoRAEmbedding, LoRAEmbedding
from .mapper import ESPERMLP, ClipCapMLP, ClipCapTransformer, MAPLMapper, MetaMapper
from .memvp import MemVPAdapter, MemVPFeedForward, MemVPMemory, memory_ffn
from .packed import PackedLoRALinear
from .position_resampler import MiniCPMVResampler, OmniLMMResampler, QwenVLResampler
from .projector import AdapterMLP, CogVLMGLU, LlavaPooler, LlavaProjector, MLPProjector, PixelShuffleProjector
from .prompts import PrefixEncoder, PromptFuse, SoftPrompt, VPTPrompts
from .qformer import ImageKV, QFormer, QFormerCache, QFormerOutput
from .quantized import QLoRALinear
from .resampler import LlavaPerceiverResampler, PerceiverResampler
from .resampler_hf import (
    Idefics2Connector,
    Idefics2PerceiverResampler,
    IdeficsPerceiverResampler,
    Kosmos2Projection,
)
from .visual_query import VisualQuery

__all__ = [
    "AdapterMLP",
    "AdaptionPromptAttention",
    "Blip2Stage1",
    "ClipCapMLP",
    "ClipCapTransformer",
    "CogVLMGLU",
    "ConcatProjector",
    "DoRAEmbedding",
    "DoRALinear",
    "ESPERMLP",
    "EpalmConnector",
    "EpalmInjection",
    "EpalmPrompt",
    "FrameQFormerConnector",
    "FromageEmbeddings",
    "HoneybeeResampler",
    "Idefics2Connector",
    "Idefics2PerceiverResampler",
    "IdeficsPerceiverResampler",
    "ImageKV",
    "ImagePrefix",
    "Kosmos2Projection",
    "LinearProjector",
    "LlamaAdapterAttention",
    "LlamaAdapterBlock",
    "LlamaAdapterFeedForward",
    "LlamaAdapterPrompts",
    "LlamaAdapterVisualPrompts",
    "LlavaPerceiverResampler",
    "LlavaPooler",
    "LlavaProjector",
    "LoRAAttention",
    "LoRADecoderLayer",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMLP",
    "MAPLMapper",
    "MLPProjector",
    "MPLUGOwl2Abstractor",
    "MPLUGOwlAbstractor",
    "MemVPAdapter",
    "MemVPFeedForward",
    "MemVPMemory",
    "MetaMapper",
    "MiniCPMVResampler",
    "OmniLMMResampler",
    "PackedLoRALinear",
    "PerceiverResampler",
    "PixelShuffleProjector",
    "PrefixEncoder",
    "PromptFuse",
    "QFormer",
    "QFormerCache",
    "QFormerConnector",
    "QFormerOutput",
    "QLoRALinear",
    "QaPLayer",
    "QwenVLResampler",
    "SoftPrompt",
    "SpeechProjector",
    "VPTPrompts",
    "VideoLlamaConnector",
    "VisualEmbedding",
    "VisualQuery",
    "memory_ffn",
    "placeholder_rows",
]
