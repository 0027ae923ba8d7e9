"""Drop-in modules that stand alone, with plain parameter names; `integrations.checkpoints` maps upstream's to them."""

from .abstractor import HoneybeeResampler, MPLUGOwl2Abstractor, MPLUGOwlAbstractor
from .adapter_hub import AdapterHubAdapter
from .adapters import (
    BottleneckAdapter,
    FrozenBiLMAdapter,
    FrozenBiLMOutput,
    MAGMAAdapter,
    MAGMAWrapper,
    make_adapter,
)
from .adaption_prompt import AdaptionPromptAttention, QaPLayer
from .blip2 import Blip2Stage1
from .connector import (
    ConcatProjector,
    FrameQFormerConnector,
    QFormerConnector,
    SpeechProjector,
    VideoLlamaConnector,
)
from .conv_abstractor import CAbstractor, LDPNetProjector, LDPNetV2Projector, mobilevlm_projector
from .deformable import DAbstractor, DeformableDecoderLayer, MultiScaleDeformableAttention
from .dora import DoRALinear
from .epalm import EpalmInjection, EpalmPrompt
from .expert import CogVLMDecoderLayer, MPLUGOwl2DecoderLayer, cogvlm_position_ids, cogvlm_vision_mask
from .gated import (
    GatedCrossAttentionBlock,
    IdeficsGatedCrossAttentionLayer,
    MaskedCrossAttention,
    MllamaCrossAttentionDecoderLayer,
)
from .gated_media import MediaContext, MediaMask, mllama_mask
from .ladder import Ladder, LadderConfig, ladder_mix, set_gates
from .ladder_init import fisher_importance
from .lavin import LaVINBlock, LaVINCache, LaVINModality, RepAdapter, RepAdapterRouter, lavin_mask
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
from .scan import SS2D, MambaLayer, MambaState, VLMambaL2, VLMambaMLP
from .visual_query import VisualQuery
from .vl_adapter import LowRankLinear, PHMLinear, VLAdapter, VLAdapterController, VLHyperformer, share_phm_rule
from .vl_pet import VLPETAdapter, VLPETAttention, VLPETDecoderLayer, VLPETEncoderLayer, VLPETT5EncoderLayer

__all__ = [
    "AdapterHubAdapter",
    "BottleneckAdapter",
    "FrozenBiLMAdapter",
    "FrozenBiLMOutput",
    "MAGMAAdapter",
    "MAGMAWrapper",
    "make_adapter",
    "LaVINBlock",
    "LaVINCache",
    "LaVINModality",
    "RepAdapter",
    "RepAdapterRouter",
    "lavin_mask",
    "LowRankLinear",
    "PHMLinear",
    "VLAdapter",
    "VLAdapterController",
    "VLHyperformer",
    "share_phm_rule",
    "VLPETAdapter",
    "VLPETAttention",
    "VLPETDecoderLayer",
    "VLPETEncoderLayer",
    "VLPETT5EncoderLayer",
    "mllama_mask",
    "MediaMask",
    "MediaContext",
    "MllamaCrossAttentionDecoderLayer",
    "MaskedCrossAttention",
    "IdeficsGatedCrossAttentionLayer",
    "GatedCrossAttentionBlock",
    "AdapterMLP",
    "AdaptionPromptAttention",
    "Blip2Stage1",
    "CAbstractor",
    "ClipCapMLP",
    "ClipCapTransformer",
    "CogVLMDecoderLayer",
    "CogVLMGLU",
    "ConcatProjector",
    "DAbstractor",
    "DeformableDecoderLayer",
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
    "Ladder",
    "LadderConfig",
    "LDPNetProjector",
    "LDPNetV2Projector",
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
    "MPLUGOwl2DecoderLayer",
    "MPLUGOwlAbstractor",
    "MambaLayer",
    "MambaState",
    "MemVPAdapter",
    "MemVPFeedForward",
    "MemVPMemory",
    "MetaMapper",
    "MiniCPMVResampler",
    "MultiScaleDeformableAttention",
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
    "SS2D",
    "SpeechProjector",
    "VLMambaL2",
    "VLMambaMLP",
    "VideoLlamaConnector",
    "VisualEmbedding",
    "VisualQuery",
    "cogvlm_position_ids",
    "cogvlm_vision_mask",
    "mobilevlm_projector",
    "SoftPrompt",
    "SpeechProjector",
    "VPTPrompts",
    "VideoLlamaConnector",
    "VisualEmbedding",
    "VisualQuery",
    "fisher_importance",
    "ladder_mix",
    "memory_ffn",
    "set_gates",
    "placeholder_rows",
]
