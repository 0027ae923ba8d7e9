"""Drop-in modules that stand alone, with plain parameter names; `integrations.checkpoints` maps upstream's to them."""

from .abstractor import HoneybeeResampler, MPLUGOwl2Abstractor, MPLUGOwlAbstractor
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
from .expert import CogVLMDecoderLayer, MPLUGOwl2DecoderLayer, cogvlm_position_ids, cogvlm_vision_mask
from .gated import (
    GatedCrossAttentionBlock,
    IdeficsGatedCrossAttentionLayer,
    MaskedCrossAttention,
    MllamaCrossAttentionDecoderLayer,
)
from .gated_media import MediaContext, MediaMask, mllama_mask
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
from .mapper import ESPERMLP, ClipCapMLP, ClipCapTransformer, MAPLMapper, MetaMapper
from .packed import PackedLoRALinear
from .position_resampler import MiniCPMVResampler, OmniLMMResampler, QwenVLResampler
from .projector import AdapterMLP, CogVLMGLU, LlavaPooler, LlavaProjector, MLPProjector, PixelShuffleProjector
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

__all__ = [
    "mllama_mask",
    "MediaMask",
    "MediaContext",
    "MllamaCrossAttentionDecoderLayer",
    "MaskedCrossAttention",
    "IdeficsGatedCrossAttentionLayer",
    "GatedCrossAttentionBlock",
    "AdapterMLP",
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
    "FrameQFormerConnector",
    "FromageEmbeddings",
    "HoneybeeResampler",
    "Idefics2Connector",
    "Idefics2PerceiverResampler",
    "IdeficsPerceiverResampler",
    "ImageKV",
    "ImagePrefix",
    "Kosmos2Projection",
    "LDPNetProjector",
    "LDPNetV2Projector",
    "LinearProjector",
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
    "MetaMapper",
    "MiniCPMVResampler",
    "MultiScaleDeformableAttention",
    "OmniLMMResampler",
    "PackedLoRALinear",
    "PerceiverResampler",
    "PixelShuffleProjector",
    "QFormer",
    "QFormerCache",
    "QFormerConnector",
    "QFormerOutput",
    "QLoRALinear",
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
    "placeholder_rows",
]
