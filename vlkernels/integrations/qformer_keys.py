"""Parameter names of Q-Formers and of the connectors around them: LAVIS' and transformers' beside ours."""

from __future__ import annotations

from ._rows import Rows, renamed


def _under(their: str, our: str, rows: Rows) -> Rows:
    """Rows below two prefixes; an empty target drops the key."""
    return tuple((their + a, our + b if b else "") for a, b in rows)


_TABLES: Rows = (
    ("embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
    ("embeddings.position_embeddings.weight", "embeddings.position_embeddings.weight"),
    ("embeddings.position_ids", ""),  # a buffer that holds 0, 1, 2, ...
)
_FFN: Rows = (
    ("encoder.layer.{l}.{attention}.output.{part}.{p}", "encoder.layer.{l}.{attention}.output.{part}.{p}"),
    ("encoder.layer.{l}.{ffn}.{part}.{p}", "encoder.layer.{l}.{ffn}.{part}.{p}"),
)
_ATTENTION = "encoder.layer.{l}.{attention}.attention.{part}.{p}"
_LAVIS: Rows = (
    *_FFN,
    *_TABLES,
    *renamed(layernorm="embeddings.LayerNorm"),
    ("encoder.layer.{l}.{attention}.self.{part}.{p}", _ATTENTION),
)
_HF: Rows = (*_FFN, (_ATTENTION, _ATTENTION))
# the decoder shares its weight with the word table and its bias with the head's
_HEAD: Rows = (
    ("cls.predictions.transform.{part}.{p}", "cls.{part}.{p}"),
    ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.bias", "cls.bias"),
    ("cls.predictions.bias", "cls.bias"),
)
_TOKENS: Rows = (("query_tokens", "query_tokens"),)
_LAVIS_QFORMER = _under("Qformer.bert.", "qformer.", _LAVIS)
_IMAGE = (*renamed(ln_vision="ln_vision"), *_TOKENS, *_LAVIS_QFORMER)

QFORMER_MAPS: dict[str, Rows] = {
    # transformers models/blip_2 and models/instructblip; our QFormer alone has the names below qformer. in BLIP-2
    "qformer.hf_blip2": (
        *_TOKENS,
        *_under("qformer.", "qformer.", (*_HF, *renamed(layernorm="layernorm"))),
        *_under("", "qformer.", _TABLES),  # Blip2ForImageTextRetrieval
        *renamed(projection="language_projection"),
    ),
    "qformer.hf_instructblip": (
        *_TOKENS,
        *_under("qformer.", "qformer.", (*_HF, *_TABLES, *renamed(layernorm="embeddings.layernorm"))),
        *renamed(projection="language_projection"),
    ),
    # LAVIS lavis/models/blip2_models: OPT's projection, T5's, InstructBLIP's, and the first stage
    "qformer.lavis_image": (*_IMAGE, *renamed(projection="opt_proj")),
    "qformer.lavis_t5": (*_IMAGE, *renamed(projection="t5_proj")),
    "qformer.lavis_text": (*_IMAGE, *renamed(projection="llm_proj")),
    "qformer.lavis_itg": (*_IMAGE, *_under("Qformer.", "qformer.", _HEAD)),
    "qformer.lavis_stage1": (
        *_IMAGE,
        *_under("Qformer.", "qformer.", _HEAD),
        *renamed(vision_proj="vision_proj", text_proj="text_proj", itm_head="itm_head"),
        ("temp", "temp"),
    ),
    "connector.minigpt4": (*_IMAGE, *renamed(projection="llama_proj")),
    "connector.minigpt_v2": (*_IMAGE, *renamed(projection="llama_proj")),
    "connector.video_llama": (
        *_IMAGE,
        *_under("video_Qformer.bert.", "video.qformer.", _LAVIS),
        ("video_query_tokens", "video.query_tokens"),
        ("video_frame_position_embedding.weight", "video.position.weight"),
        ("llama_proj.{p}", "video.projection.{p}"),
    ),
    "connector.video_llama_audio": (
        *_under("audio_Qformer.bert.", "qformer.", _LAVIS),
        ("audio_query_tokens", "query_tokens"),
        ("audio_position_embedding.weight", "position.weight"),
        *renamed(projection="audio_llama_proj"),
    ),
    "connector.x_llm_image": (*_IMAGE, *renamed(projection="opt_proj")),
    "connector.x_llm_video": (
        *renamed(ln_vision="ln_vision", projection="video_proj"),
        *_LAVIS_QFORMER,
        ("video_query_tokens", "query_tokens"),
    ),
    "connector.x_llm_speech": renamed(projection="speech_feat_proj"),
}
