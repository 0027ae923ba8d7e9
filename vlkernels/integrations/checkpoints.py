"""Parameter names: upstream's and ours, declared once, for users' checkpoints and for the goldens alike."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ._rows import below, both, renamed, same
from .adapter_keys import ADAPTER_MAPS
from .gated_keys import GATED_MAPS
from .ladder_keys import LADDER_MAPS
from .mapper_keys import MAPPER_MAPS
from .prefix_keys import PREFIX_MAPS
from .qformer_keys import QFORMER_MAPS

# (upstream template, our template); {name} stands for one part of a dotted name and is carried over; an empty template
# of ours drops the key
_LORA = (
    ("base_layer.weight", "weight"),
    ("base_layer.bias", "bias"),
    ("lora_A.{adapter}.weight", "adapters.{adapter}.a"),
    ("lora_B.{adapter}.weight", "adapters.{adapter}.b"),
    ("lora_B.{adapter}.bias", "adapters.{adapter}.bias"),
)

_LORA_EMBEDDING = (
    ("base_layer.weight", "weight"),
    ("lora_embedding_A.{adapter}", "adapters.{adapter}.a"),
    ("lora_embedding_B.{adapter}", "adapters.{adapter}.b"),
)
_MAGNITUDE = ("lora_magnitude_vector.{adapter}.weight", "adapters.{adapter}.magnitude")
_DORA = (*_LORA, _MAGNITUDE)
# bitsandbytes functional.py, class QuantState, below peft's base_layer
_QLORA = (
    *_LORA,
    *((f"base_layer.weight.{n}", f"weight.{n}") for n in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
    ("base_layer.weight.quant_state.bitsandbytes__{type}", "weight.quant_state.bitsandbytes__{type}"),
)
# what a saved adapter may hold
_LORA_SAVED = (
    *_LORA,
    *_LORA_EMBEDDING[1:],
    ("lora_magnitude_vector.{adapter}", "adapters.{adapter}.magnitude"),  # a saved file has it without .weight
)


# a projection with an adapter, and one without
_PROJECTION = (*_LORA, ("weight", "weight"), ("bias", "bias"))


_LLAVA = (
    ("weight", "weight"),
    ("bias", "bias"),
    *both("{i}", "{i}.pre_norm", "{i}.proj.0", "{i}.proj.2"),
)


_SS2D = (
    *same("in_proj.weight", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds", "out_proj.weight"),
    *both("conv2d", "out_norm"),
)
# our resamplers have upstream's names
_FLAMINGO = (
    *same("latents", "frame_embs", "media_time_embs", "media_pos_emb"),
    *both("layers.{l}.0.{part}", "layers.{l}.1.{part}", "norm"),
)
_IDEFICS2 = (
    *same("latents", "norm.weight", "layers.{l}.{part}.weight"),
    *same("layers.{l}.self_attn.{part}.weight", "layers.{l}.mlp.{part}.weight"),
)

# so do our convolutional abstractors
_HONEYBEE_C = (
    *same("pos_emb", "eos_tokens", "net.{stage}.{block}.{conv}.conv.weight"),
    *both("prenorm", "readout.{i}", "net.{stage}.{block}.{conv}.bn", "net.{stage}.{block}.se.{fc}"),
)
_LDP = (
    *both("model.mlp.{i}", "model.mb_block.{k}.block.{i}.1", "model.mb_block.{k}.block.1.{fc}"),
    ("model.mb_block.{k}.block.{i}.0.weight", "model.mb_block.{k}.block.{i}.0.weight"),
)

KEY_MAPS: dict[str, tuple[tuple[str, str], ...]] = {
    "lora.linear": _LORA,  # peft tuners/lora/layer.py
    "lora.conv1d": _LORA,  # our weight keeps Conv1D's (in, out) layout
    "dora.linear": _DORA,  # peft tuners/lora/dora.py
    "dora.conv1d": _DORA,
    "dora.mlp": tuple((f"{{layer}}.{their}", f"{{layer}}.{our}") for their, our in _DORA),
    "qlora.linear": _QLORA,
    "dora.embedding": (*_LORA_EMBEDDING, _MAGNITUDE),
    "lora.embedding": _LORA_EMBEDDING,  # our weight keeps the embedding's (V, D) layout
    "lora.mlp": below(_PROJECTION, "{layer}."),  # transformers models/llama/modeling_llama.py with peft's layers
    "lora.attention": below(_PROJECTION, "{layer}."),
    "lora.llama_layer": (
        *below(_PROJECTION, "{block}.{layer}."),
        ("input_layernorm.weight", "input_layernorm.weight"),
        ("post_attention_layernorm.weight", "post_attention_layernorm.weight"),
    ),
    "dense.llava_projector": _LLAVA,  # below model.mm_projector.
    "dense.llava_next_mlp_res": _LLAVA,
    "dense.llava_next_pooler": both("conv_pool") + renamed(proj="proj.1"),
    "dense.hf_llava": both("linear_1", "linear_2"),  # below multi_modal_projector.
    "dense.internvl_pixel_shuffle_mlp": renamed(layer_norm="mlp1.0", linear_1="mlp1.1", linear_2="mlp1.3"),
    "dense.cogvlm_glu": (
        *both("linear_proj", "norm1", "gate_proj", "dense_h_to_4h", "dense_4h_to_h"),
        ("boi", "boi"),
        ("eoi", "eoi"),
    ),
    "dense.lavin_adapter_mlp": renamed(linear_1="conv_A", linear_2="conv_B"),
    "dense.memvp_projector": renamed(linear_1="fc1", linear_2="fc2"),
    "dense.image_prefix": both("proj", "ln"),
    "dense.fromage": both("visual_embeddings", "visual_fc"),
    "dense.epalm_connector": both("connector.{i}"),
    "dense.vl_adapter_visual_embedding": both(
        "feat_embedding.{i}",
        "absolute_vis_pos_embedding.{i}",
        "img_order_embedding",
        "obj_order_embedding",
        "layer_norm",
    ),
    **QFORMER_MAPS,
    **MAPPER_MAPS,
    "abstractor.honeybee_c": _HONEYBEE_C,  # below abstractor.
    "projector.mobilevlm_ldp": _LDP,  # below model.mm_projector.
    "projector.mobilevlm_ldpv2": both("mlp.mlp.{i}", "peg.peg.{i}"),
    **ADAPTER_MAPS,
    **GATED_MAPS,
    **LADDER_MAPS,
    **PREFIX_MAPS,
    "resampler.openflamingo": _FLAMINGO,  # below perceiver.
    "resampler.lucidrains": _FLAMINGO,
    "resampler.llava_next_perceiver": below(_FLAMINGO, "perceiver."),
    "resampler.idefics": (("latents", "latents"), *both("blocks.{l}.{block}.{part}", "layer_norm")),
    "resampler.idefics2": (
        ("modality_projection.{part}.weight", "modality_projection.{part}.weight"),
        *below(_IDEFICS2, "perceiver_resampler."),
    ),
    "expert.cogvlm": (
        *(
            (f"self_attn.{{kind}}_expert_{n}.{p}",) * 2
            for n in ("query_key_value", "dense")
            for p in ("weight", "bias")
        ),
        ("mlp.{kind}_mlp.{proj}.weight", "mlp.{kind}_mlp.{proj}.weight"),
        ("{norm}.weight", "{norm}.weight"),
        ("self_attn.rotary_emb.inv_freq", ""),
    ),
    "expert.mplug_owl2": (
        ("{norm}.multiway.{modality}.weight", "{norm}.multiway.{modality}.weight"),
        ("self_attn.{proj}.multiway.{modality}.weight", "self_attn.{proj}.multiway.{modality}.weight"),
        ("self_attn.{proj}.weight", "self_attn.{proj}.weight"),
        ("mlp.{proj}.weight", "mlp.{proj}.weight"),
        ("self_attn.rotary_emb.inv_freq", ""),
    ),
    "op.selective_scan": (),
    "op.mamba_layer": (  # transformers models/mamba/modeling_mamba.py, below mixer.
        *both("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"),
        *same("A_log", "D"),
    ),
    "ss2d.vmamba": _SS2D,  # MzeroMiko/VMamba classification/models/vmamba.py, below op.
    "connector.vl_mamba_l2": (*both("in_proj", "norm", "out_proj"), *below(_SS2D, "vss.")),
    "connector.vl_mamba_mlp": (*both("norm", "mlp.{i}"), *below(_SS2D, "vss.")),
    "resampler.kosmos2": (("latent_query", "latent_query"), *both("dense", "x_attn.{part}")),
}


def to_ours(module_id: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's state dict under our names.

    Upstream names of one shared tensor may map to one of ours. Raises ValueError for an unknown module id, for a key
    that no template fits, and for keys of one name with different values.
    """
    rows = _map(module_id)
    ours: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        names = _renamed(key, rows)
        if not names:
            raise ValueError(f"{module_id}: unknown upstream key {key!r}; known: {_listed(module_id, 0)}")
        name = names[0]
        if not name:
            continue  # what upstream keeps and we do not need
        if name in ours and not (ours[name].shape == value.shape and torch.equal(ours[name], value)):
            raise ValueError(f"{module_id}: {key!r} and another key both are our {name!r} but their values differ")
        ours[name] = value
    return ours


def to_upstream(module_id: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict (or gradients by our names) under upstream's names: all of them where upstream shares a tensor.

    Raises ValueError for an unknown module id and for a key that no template fits.
    """
    rows = tuple((our, their) for their, our in _map(module_id))
    theirs: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        names = _renamed(key, rows)
        if not names:
            raise ValueError(f"{module_id}: unknown key {key!r}; known: {_listed(module_id, 1)}")
        theirs.update(dict.fromkeys(names, value))
    return theirs


def load_peft_adapter(
    model: nn.Module,
    file: str | Path,
    adapter: str = "default",
    path: Callable[[str], str] | None = None,
) -> list[str]:
    """Load peft's saved adapter (`adapter_model.safetensors`) into the LoRALinear and LoRAEmbedding layers of `model`.

    The file's keys are `base_model.model.<path>.lora_A.weight`, `base_model.model.<path>.lora_embedding_A` and so on,
    without the adapter's name.

    Args:
        model: a model whose layers at the file's paths are ours with an adapter of this name; or one such layer, for a
            file that holds one layer.
        adapter: our adapter's name.
        path: from a path in the file to the layer's path in `model`, where they differ.

    Returns: the paths in `model` that were loaded.

    Raises: ValueError naming the key, path, shape or scale that does not fit, before anything is changed. The scale is
        compared with `adapter_config.json` where that lies beside the file.
    """
    from safetensors.torch import load_file

    from ..modules.lora import LoRALinear

    file = Path(file)
    layers = split_peft_adapter(load_file(file), adapter)
    config_file = file.with_name("adapter_config.json")
    config = json.loads(config_file.read_text()) if config_file.is_file() else None
    modules = dict(model.named_modules())
    plan: dict[str, tuple[LoRALinear, dict[str, Tensor]]] = {}
    for upstream_path, tensors in layers.items():
        if isinstance(model, LoRALinear):
            if len(layers) > 1:
                raise ValueError(f"{file.name} holds the layers {', '.join(layers)}; model is one LoRALinear")
            place = ""
        else:
            place = path(upstream_path) if path is not None else upstream_path
        layer = modules.get(place)
        if not isinstance(layer, LoRALinear):
            found = "nothing" if layer is None else f"a {type(layer).__name__}"
            raise ValueError(f"{file.name} has a layer {upstream_path!r}; the model has {found} at {place!r}")
        if place in plan:
            raise ValueError(f"{file.name}: two layers map to {place!r}, one of them {upstream_path!r}")
        _check_fit(layer, adapter, tensors, f"{file.name}: {upstream_path}")
        if config is not None:
            _check_scale(layer, adapter, config, upstream_path)
        plan[place] = layer, tensors
    for layer, tensors in plan.values():
        layer.load_state_dict(tensors, strict=False)
    return list(plan)


def split_peft_adapter(state_dict: Mapping[str, Tensor], adapter: str = "default") -> dict[str, dict[str, Tensor]]:
    """A saved peft adapter as {layer path: {our name: tensor}}; the file drops the adapter's name, `adapter` is put in.

    Raises ValueError for a key that is no LoRA parameter of a linear or embedding layer.
    """
    short = [(theirs.replace(".{adapter}", ""), theirs.format(adapter=adapter)) for theirs, _ in _LORA_SAVED]
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        for ending, live in short:
            if key.startswith("base_model.model.") and key.endswith("." + ending):
                layer = key.removeprefix("base_model.model.").removesuffix("." + ending)
                layers.setdefault(layer, {})[_renamed(live, _LORA_SAVED)[0]] = value
                break
        else:
            known = ", ".join(f"base_model.model.<path>.{ending}" for ending, _ in short)
            raise ValueError(f"unknown key {key!r} in a saved LoRA adapter; known: {known}")
    return layers


def _check_fit(layer: nn.Module, adapter: str, tensors: Mapping[str, Tensor], where: str) -> None:
    if adapter not in layer.adapters:
        raise ValueError(f"{where}: the layer has no adapter {adapter!r}; there are {', '.join(layer.adapters)}")
    own = layer.state_dict()
    missing = [name for name in own if name.startswith(f"adapters.{adapter}.") and name not in tensors]
    if missing:
        raise ValueError(f"{where}: the file misses {missing[0]!r}")
    for name, value in tensors.items():
        if name not in own:
            raise ValueError(f"{where}: the layer has no {name!r}")
        if own[name].shape != value.shape:
            shapes = f"{tuple(value.shape)} in the file, {tuple(own[name].shape)} in the layer"
            raise ValueError(f"{where}: {name} is {shapes}")


def _check_scale(layer: nn.Module, adapter: str, config: Mapping, path: str) -> None:
    """peft's alpha / r by layer: patterns are regular expressions that match the end of a path."""

    def by_pattern(patterns: Mapping | None, default):
        fits = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path))
        return next(fits, default)

    r = by_pattern(config.get("rank_pattern"), config["r"])
    alpha = by_pattern(config.get("alpha_pattern"), config["lora_alpha"])
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    own = layer.adapters[adapter].scale
    if not math.isclose(scale, own, rel_tol=1e-6):
        raise ValueError(f"{path}: adapter_config.json gives the scale {scale:g}, the layer's adapter has {own:g}")


def _map(module_id: str) -> tuple[tuple[str, str], ...]:
    if module_id not in KEY_MAPS:
        raise ValueError(f"no key map for {module_id!r}; there are {', '.join(KEY_MAPS)}")
    return KEY_MAPS[module_id]


def _listed(module_id: str, side: int) -> str:
    return ", ".join(row[side] for row in _map(module_id))


def _renamed(key: str, rows: tuple[tuple[str, str], ...]) -> list[str]:
    matches = ((_pattern(source).fullmatch(key), target) for source, target in rows)
    return [target.format(**match.groupdict()) for match, target in matches if match]


@cache
def _pattern(template: str) -> re.Pattern:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^.]+)", re.escape(template)))
