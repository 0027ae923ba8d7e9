"""Goldens of Q-Formers and their connectors: hyper-parameters -> our module, and how to call it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..modules import ConcatProjector, QFormer, QFormerConnector, VideoLlamaConnector
from .golden_builders import Builder, Named, Run, _accept, _run_feats

# of a fused layer; the LM head and the vision norm use the same
_QFORMER = ("cross_attention", "linear_projector", "mlp_projector", "multi_layer_kv", "norm_residual")
_SIZES = ("hidden_size", "layers", "heads", "intermediate", "n_query")
_TEXT = ("vocab", "max_pos", "pad_token_id")
_LAVIS_MASKED = -10000.0


def _qformer(hp: Named, width: str, *, text: bool = False, layers: str = "layers", **options) -> QFormer:
    words = {}
    if text:
        words = {"vocab_size": hp["vocab"], "max_position_embeddings": hp["max_pos"]}
        words["pad_token_id"] = hp.get("pad_token_id", 0)
    return QFormer(
        hp["hidden_size"],
        hp[layers],
        hp["heads"],
        hp["intermediate"],
        hp.get("freq", 2),
        hp[width],
        hidden_act=hp.get("hidden_act", "gelu"),
        layer_norm_eps=hp.get("layer_norm_eps", 1e-12),
        **words,
        **options,
    )


def _image(width: str, *, mode: str | None = None) -> Callable[[Named], tuple[nn.Module, Run]]:
    """Queries only: transformers' BLIP-2, LAVIS' second stage."""

    def build(hp: Named) -> tuple[nn.Module, Run]:
        hp.only(*_SIZES, *_TEXT, "freq", width, "text_hidden", "hidden_act", "layer_norm_eps", "mode")
        options = {}
        if mode is not None:
            _accept(hp, "mode", mode)
            options = {"masked": _LAVIS_MASKED}
        qformer = _qformer(hp, width, **options)
        return QFormerConnector(qformer, hp["text_hidden"], hp["n_query"], ln_vision=False), run

    def run(module: QFormerConnector, inputs: Named) -> dict[str, Tensor]:
        states = module.states(inputs["x"], inputs.get("encoder_attention_mask")).queries
        return {"query_output": states, "projected": module.projection(states)}

    return build


def _with_text(width: str, *, mode: str | None = None) -> Callable[[Named], tuple[nn.Module, Run]]:
    """Queries and text: transformers' and LAVIS' InstructBLIP; LAVIS' files hold the text alone too."""

    def build(hp: Named) -> tuple[nn.Module, Run]:
        hp.only(*_SIZES, *_TEXT, "freq", width, "text_hidden", "hidden_act", "layer_norm_eps", "mode")
        options = {}
        if mode is not None:
            _accept(hp, "mode", mode)
            options = {"masked": _LAVIS_MASKED}
        qformer = _qformer(hp, width, text=True, **options)
        return QFormerConnector(qformer, hp["text_hidden"], hp["n_query"], ln_vision=False), run

    def run(module: QFormerConnector, inputs: Named) -> dict[str, Tensor]:
        ids, text_mask = inputs["input_ids"], inputs.get("text_mask")
        states = module.states(inputs["x"], inputs.get("encoder_attention_mask"), ids, text_mask)
        found = {"hidden": states.hidden, "projected": module.projection(states.queries)}
        if mode is not None:
            found["text_only"] = module.qformer(input_ids=ids, attention_mask=text_mask).text
        return found

    return build


def _itg(hp: Named) -> tuple[nn.Module, Run]:
    """Image-grounded generation: the queries' keys and values from a first pass, then the text, causal."""
    hp.only(*_SIZES, *_TEXT, "freq", "encoder_width", "hidden_act", "layer_norm_eps", "mode")
    _accept(hp, "mode", "lm")
    qformer = _qformer(hp, "encoder_width", text=True, lm_head=True, masked=_LAVIS_MASKED)

    def run(module: QFormerConnector, inputs: Named) -> dict[str, Tensor]:
        cache = module.states(inputs["x"], inputs.get("encoder_attention_mask"), use_cache=True).cache
        states = module.qformer(input_ids=inputs["input_ids"], attention_mask=inputs.get("text_mask"), cache=cache)
        return {"logits": module.qformer.lm_logits(states.text)}

    return QFormerConnector(qformer, None, hp["n_query"], ln_vision=False), run


def _minigpt(hp: Named) -> tuple[nn.Module, Run]:
    """MiniGPT-4 with a Q-Former, MiniGPT-v2 without."""
    _accept(hp, "has_qformer", True, False)
    if not hp["has_qformer"]:
        hp.only("has_qformer", "d_v", "d_t")
        return ConcatProjector(hp["d_v"], hp["d_t"]), _run_feats
    hp.only(*_SIZES, "has_qformer", "d_v", "d_t", "freq")
    return QFormerConnector(_qformer(hp, "d_v", masked=_LAVIS_MASKED), hp["d_t"], hp["n_query"]), _run_feats


def _video_llama(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(*_SIZES, "freq", "d_v", "d_t", "video_layers", "n_video_query", "max_frame_pos")
    image = _qformer(hp, "d_v", masked=_LAVIS_MASKED)
    every = Named("hyper-parameter ", hp | {"freq": 1})
    video = _qformer(every, "hidden_size", layers="video_layers", masked=_LAVIS_MASKED)
    return VideoLlamaConnector(
        image, video, hp["d_t"], hp["n_query"], hp["n_video_query"], hp["max_frame_pos"]
    ), _run_feats  # fmt: skip


def _x_llm_video(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(*_SIZES, "freq", "d_v", "d_t")
    return QFormerConnector(_qformer(hp, "d_v", masked=_LAVIS_MASKED), hp["d_t"], hp["n_query"]), _run_feats


BUILDERS: dict[str, Builder] = {
    "qformer.hf_blip2": Builder(_image("encoder_hidden_size"), ops=_QFORMER),
    "qformer.hf_instructblip": Builder(_with_text("encoder_hidden_size"), ops=_QFORMER),
    "qformer.lavis_image": Builder(_image("encoder_width", mode="query_only"), ops=_QFORMER),
    "qformer.lavis_text": Builder(_with_text("encoder_width", mode="instruct"), ops=_QFORMER),
    "qformer.lavis_itg": Builder(_itg, ops=_QFORMER),
    "connector.minigpt4": Builder(_minigpt, ops=lambda hp: _QFORMER if hp["has_qformer"] else ()),
    "connector.minigpt_v2": Builder(_minigpt, ops=lambda hp: _QFORMER if hp["has_qformer"] else ()),
    "connector.video_llama": Builder(_video_llama, ops=_QFORMER),
    "connector.x_llm_video": Builder(_x_llm_video, ops=_QFORMER),
}
