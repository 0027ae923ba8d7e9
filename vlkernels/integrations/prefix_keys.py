"""Upstream's parameter names of prefixes and prompts, with those of the layers around them in the goldens."""

from __future__ import annotations

from ._rows import Rows, below, both, same

# OpenGVLab/LLaMA-Adapter llama/llama.py, class TransformerBlock; our modules have upstream's names
_BLOCK: Rows = (
    *both("attention.{linear}", "feed_forward.{linear}"),
    *same("attention.{parameter}", "feed_forward.{parameter}", "attention_norm.weight", "ffn_norm.weight"),
)
_VIT: Rows = tuple(
    (f"visual_blocks.{{l}}.{their}.{p}", f"visual_blocks.{{l}}.{our}.{p}")
    for our, their in (
        ("norm1", "norm1"), ("norm2", "norm2"), ("qkv", "attn.qkv"), ("proj", "attn.proj"), ("fc1", "mlp.fc1"),
        ("fc2", "mlp.fc2"),
    )
    for p in ("weight", "bias")
)  # fmt: skip

# a transformers Llama below peft's base_model; peft keeps its word embeddings by a second name
_PEFT_LLAMA: Rows = (
    ("base_model.model.embed_tokens.weight", "base_model.embed_tokens.weight"),
    ("word_embeddings.weight", "base_model.embed_tokens.weight"),
    ("base_model.lm_head.weight", "base_model.lm_head.weight"),
    ("base_model.model.norm.weight", "base_model.norm.weight"),
    ("base_model.model.layers.{l}.{norm}.weight", "base_model.layers.{l}.{norm}.weight"),
    ("base_model.model.layers.{l}.{block}.{linear}.weight", "base_model.layers.{l}.{block}.{linear}.weight"),
)
_PROMPT_ENCODER: Rows = (*same("embedding.weight"), *both("transform.{i}"))
_OPT = "model_text.model.decoder."

PREFIX_MAPS: dict[str, Rows] = {
    "prefix.llama_adapter_v1": (
        *same("adapter_query.weight", "norm.weight", "output.weight", "tok_embeddings.weight"),
        *below(_BLOCK, "layers.{l}."),
    ),
    "prefix.llama_adapter_v2": _BLOCK,
    "prefix.llama_adapter_v2_scale_bias": _BLOCK,
    "prefix.llama_adapter_v2_visual_query": (
        *both("clip_proj", "clip_proj_norm", "visual_proj", "visual_proj_norm"),
        *same("visual_query.weight", "adapter_query.weight"),
        *_VIT,
    ),
    "prefix.adaption_prompt": (
        *same("adaption_prompt", "adaption_gate"),
        *both("model.{linear}"),
    ),
    "prompt.encoder": _PROMPT_ENCODER,  # peft, below prompt_encoder.<adapter>.
    "prompt.prefix": (
        *((f"prompt_encoder.default.{their}", f"prompt_encoder.{our}") for their, our in _PROMPT_ENCODER),
        *_PEFT_LLAMA,
    ),
    "prompt.soft": (("prompt_encoder.default.embedding.weight", "prompt_encoder.embedding.weight"), *_PEFT_LLAMA),
    "prompt.vpt": (
        *same("prompt_embeddings", "deep_prompt_embeddings", "embeddings.{name}"),
        *both("prompt_proj", "embeddings.patch_embeddings", "encoder.encoder_norm"),
        *both("encoder.layer.{l}.{norm}", "encoder.layer.{l}.{block}.{linear}"),
    ),
    "prompt.epalm_soft": (
        ("prefix_embedding.{i}.weight", "prefix_embedding.{i}.weight"),
        *both("prefix_embedding.{i}"),
    ),
    "prompt.epalm": (
        *both("connector.{i}"),
        ("prompt_embedding.weight", "prompt.prefix_embedding.0.weight"),
        ("model_text.lm_head.weight", _OPT + "embed_tokens.weight"),
        *same(_OPT + "embed_tokens.weight", _OPT + "embed_positions.weight"),
        *both(_OPT + "final_layer_norm", _OPT + "layers.{l}.{name}", _OPT + "layers.{l}.self_attn.{linear}"),
    ),
    "memory.memvp": (
        *same("adapter_emb1", "adapter_emb2"),
        *((f"adapter_proj.fc{i}.{p}", f"adapter_proj.linear_{i}.{p}") for i in (1, 2) for p in ("weight", "bias")),
        *below(_BLOCK, "layers.{l}."),
    ),
    "memory.memvp_clip": same("fc1.weight", "fc2.weight"),
}
