"""Which module a golden file is about: hyper-parameters -> our module, and how to call it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..modules import (
    AdapterMLP,
    CogVLMGLU,
    DoRAEmbedding,
    DoRALinear,
    EpalmConnector,
    FromageEmbeddings,
    ImagePrefix,
    LlavaPooler,
    LlavaProjector,
    LoRAAttention,
    LoRADecoderLayer,
    LoRAEmbedding,
    LoRALinear,
    LoRAMLP,
    MLPProjector,
    PixelShuffleProjector,
    QLoRALinear,
    VisualEmbedding,
)
from ..modules.lora import Adapter
from ..modules.lora_blocks import rotary
from ..modules.projector import llava_layers
from ..ops import _nf4


class GoldenError(ValueError):
    """What a file holds, or misses, keeps it from being run."""


class Named(dict):
    """A dict whose missing key is an error that says what is missing."""

    def __init__(self, kind: str, items: dict):
        super().__init__(items)
        self.kind = kind

    def __missing__(self, key):
        raise GoldenError(f"the file has no {self.kind}{key}")

    def only(self, *known: str) -> Named:
        """Itself, after an error for a key that is neither known nor a mere size of the data."""
        unknown = [key for key in self if key not in known and key not in DATA_KEYS]
        if unknown:
            raise GoldenError(f"unknown {self.kind}{unknown[0]}; known: {', '.join(known)}")
        return self


# They size or scale the tensors, which come from the file.
DATA_KEYS = ("B", "T", "S", "x", "lens", "in_scale", "small_scale", "outlier", "zero_block")

Run = Callable[[nn.Module, Named], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Builder:
    """build: hyper-parameters -> the module and a function (module, inputs) -> outputs by name.

    ops: what must run, or a function of the hyper-parameters that says so.
    """

    build: Callable[[Named], tuple[nn.Module, Run]]
    ops: tuple[str, ...] | Callable[[Named], tuple[str, ...]] = ()

    def needs(self, hp: Named) -> tuple[str, ...]:
        return self.ops(hp) if callable(self.ops) else self.ops


def _accept(hp: Named, key: str, *accepted) -> None:
    if hp[key] not in accepted:
        raise GoldenError(f"hyper-parameter {key} is {hp[key]!r}; accepted: {', '.join(map(repr, accepted))}")


# -- low-rank adapters ---------------------------------------------------------------------------------------------


def _adapted(kind: type[nn.Module], base: str, known: tuple[str, ...]) -> Callable[[Named], tuple[nn.Module, Run]]:
    """A layer of `kind` over `base` ("linear", "conv1d" or "embedding"); known: what an adapter's options may be."""

    def build(hp: Named) -> tuple[nn.Module, Run]:
        hp.only("in", "out", "base", "adapters", *(() if base == "embedding" else ("bias",)))
        if hp.get("base", "linear" if base != "embedding" else base) != base:
            raise GoldenError(f"hyper-parameter base is {hp.get('base')!r}; accepted: {base!r}")
        options = {}
        if base != "embedding":
            options["bias"] = hp.get("bias", True) if base == "conv1d" else hp["bias"]
            options["fan_in_fan_out"] = base == "conv1d"
        layer = kind(hp["in"], hp["out"], 1, **options)
        layer.remove_adapter("default")
        for name, of in hp["adapters"].items():
            of = Named(f"adapters.{name}.", of).only("r", "lora_alpha", *known)
            switches = {key.removeprefix("use_"): of.get(key, False) for key in known}
            layer.add_adapter(name, of["r"], alpha=of["lora_alpha"], **switches)
        layer.active = tuple(hp["adapters"])
        return layer, run

    def run(layer: nn.Module, inputs: Named) -> dict[str, Tensor]:
        deltas = {f"delta_weight.{name}": layer.delta_weight(name) for name in layer.active}
        y = layer(inputs["ids" if base == "embedding" else "x"])
        return {"y": y, "merged_weight": layer.merged_weight(), **deltas}

    return build


_LORA, _DORA = ("use_rslora", "lora_bias"), ("use_rslora", "use_dora")


def _dora_mlp(hp: Named) -> tuple[nn.Module, Run]:
    """transformers' LlamaMLP, without biases, with DoRA on some of its layers."""
    hp.only("d", "ff", "heads", "kv_heads", "r", "alpha", "targets", "dora", "part")
    _accept(hp, "part", "mlp")
    _accept(hp, "dora", True, False)
    shapes = {"gate_proj": (hp["d"], hp["ff"]), "up_proj": (hp["d"], hp["ff"]), "down_proj": (hp["ff"], hp["d"])}
    unknown = [name for name in hp["targets"] if name not in shapes]
    if unknown:
        raise GoldenError(f"hyper-parameter targets has {unknown[0]!r}; accepted: {', '.join(shapes)}")
    module = nn.ModuleDict()
    for name, (width, out) in shapes.items():
        module[name] = layer = DoRALinear(width, out, 1, bias=False)
        layer.remove_adapter("default")
        if name in hp["targets"]:
            layer.add_adapter("default", hp["r"], alpha=hp["alpha"], dora=hp["dora"])
            layer.active = "default"

    def run(module: nn.ModuleDict, inputs: Named) -> dict[str, Tensor]:
        x = inputs["x"]
        return {"y": module["down_proj"](nn.functional.silu(module["gate_proj"](x)) * module["up_proj"](x))}

    return module, run


_BLOCK_KEYS = (
    "d", "ff", "heads", "kv_heads", "r", "alpha", "targets", "part", "attention_bias", "rslora", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip


def _lora_block(part: str) -> Callable[[Named], tuple[nn.Module, Run]]:
    """transformers' Llama attention, MLP or decoder layer with peft's LoRA on its targets."""

    def build(hp: Named) -> tuple[nn.Module, Run]:
        _accept(hp.only(*_BLOCK_KEYS), "part", part)
        d, ff, heads, r = (hp[key] for key in ("d", "ff", "heads", "r"))
        kv_heads, bias = hp.get("kv_heads", heads), hp.get("attention_bias", False)
        module = {
            "mlp": lambda: LoRAMLP(d, ff, r),
            "attn": lambda: LoRAAttention(d, heads, r, kv_heads=kv_heads, bias=bias),
            "layer": lambda: LoRADecoderLayer(d, ff, heads, r, kv_heads=kv_heads, attention_bias=bias),
        }[part]()
        for path, layer in module.named_modules():
            if not isinstance(layer, LoRALinear):
                continue
            name = path.rpartition(".")[2]
            layer.remove_adapter("default")
            if name in hp["targets"]:
                alpha = hp.get("alpha_pattern", {}).get(name, hp["alpha"])
                rank = hp.get("rank_pattern", {}).get(name, r)
                layer.add_adapter("default", rank, alpha=alpha, rslora=hp.get("rslora", False))
                layer.active = "default"
        return module, run

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        if part == "mlp":
            return {"y": module(inputs["x"])}
        attention = module.self_attn if part == "layer" else module
        cos, sin = rotary(inputs["position_ids"], attention.head_dim)
        return {"y": module(inputs["x"], cos, sin, inputs["attention_mask"]), "cos": cos, "sin": sin}

    return build


def _lora_block_ops(hp: Named) -> tuple[str, ...]:
    """A group op runs where one of its projections has an adapter; the output projection has its own."""
    targets, part = set(hp["targets"]), hp["part"]
    qkv = ("lora_qkv",) if part != "mlp" and targets & {"q_proj", "k_proj", "v_proj"} else ()
    out = ("lora_linear",) if part != "mlp" and "o_proj" in targets else ()
    mlp = ("lora_mlp",) if part != "attn" and targets & {"gate_proj", "up_proj", "down_proj"} else ()
    return qkv + out + mlp


class _QLoRAParts(nn.Module):
    """What a file holds as parameters: the weight comes as an input, for its quantisation is what is compared."""

    def __init__(self, hp: Named):
        super().__init__()
        out, width = hp["shape"]
        self.bias = nn.Parameter(torch.zeros(out)) if hp["bias"] else None
        scale = hp["alpha"] / hp["r"]
        self.adapters = nn.ModuleDict({"default": Adapter(width, out, hp["r"], scale, 0.0, False)})


def _qlora(hp: Named) -> tuple[nn.Module, Run]:
    """quantise and dequantise; with a rank the layer too."""
    hp.only("shape", "blocksize", "double", "type", "r", "alpha", "bias")
    _accept(hp, "type", "nf4", "fp4")

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        plain = nn.Linear(*reversed(hp["shape"]), bias=False)
        plain.weight = nn.Parameter(inputs["weight"].detach())
        plain.bias = getattr(module, "bias", None)
        trained = plain.bias is not None and plain.bias.requires_grad
        layer = QLoRALinear.from_plain(
            plain, 1, quant_type=hp["type"], blocksize=hp["blocksize"], double=hp["double"]
        ).eval()
        state = _nf4.unpack_state(layer.quant, _nf4.block_count(tuple(hp["shape"]), hp["blocksize"]))
        outputs = {"packed": layer.weight, "dequantized": layer.dense_weight(), **state._asdict()}
        if "r" in hp:
            layer.adapters = module.adapters
            # from_plain freezes the bias, and a file may hold its gradient
            if trained:
                plain.bias.requires_grad_()
            outputs["y"] = layer(inputs["x"])
        return outputs

    return (_QLoRAParts(hp) if "r" in hp else nn.Module()), run


# -- dense projectors ----------------------------------------------------------------------------------------------


def _run_x(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
    return {"output": module(inputs["x"])}


def _run_feats(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
    return {"output": module(inputs["feats"])}


def _llava(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("mm_projector_type", "mm_hidden_size", "hidden_size")
    return LlavaProjector(hp["mm_projector_type"], hp["mm_hidden_size"], hp["hidden_size"]), _run_x


def _llava_ops(hp: Named) -> tuple[str, ...]:
    linears, blocks = llava_layers(hp["mm_projector_type"])
    return ("mlp_projector",) if linears > 1 or blocks else ()


def _llava_pooler(hp: Named) -> tuple[nn.Module, Run]:
    _accept(hp.only("mm_projector_type", "mm_hidden_size", "hidden_size", "grid"), "mm_projector_type", "pooler")
    return LlavaPooler(hp["mm_hidden_size"], hp["hidden_size"], hp["grid"]), _run_x


def _hf_llava(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(
        "vision_hidden_size",
        "n_feature_layers",
        "text_hidden_size",
        "multimodal_projector_bias",
        "projector_hidden_act",
    )
    return MLPProjector(
        hp["vision_hidden_size"],
        hp["text_hidden_size"],
        n_feature_layers=hp["n_feature_layers"],
        bias=hp["multimodal_projector_bias"],
        act=hp["projector_hidden_act"],
    ), _run_x


def _internvl(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("vit_hidden_size", "llm_hidden_size", "downsample_ratio", "ps_version", "grid")
    return PixelShuffleProjector(
        hp["vit_hidden_size"],
        hp["llm_hidden_size"],
        downsample_ratio=hp["downsample_ratio"],
        ps_version=hp["ps_version"],
    ), _run_x


def _cogvlm(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("in_features", "hidden_size", "inner_hidden_size")
    return CogVLMGLU(hp["in_features"], hp["hidden_size"], hp["inner_hidden_size"]), _run_x


def _adapter_mlp(hp: Named) -> tuple[nn.Module, Run]:
    """Without MemVP's scale, indicator and padding: upstream applies them outside."""
    hp.only("in_features", "hidden_dim", "out_features")
    return AdapterMLP(hp["in_features"], hp["hidden_dim"], hp["out_features"]), _run_x


def _image_prefix(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(
        "encoder_name",
        "image_seq_len",
        "encoder_out_dim",
        "out_dim",
        "use_image_embed_layernorm",
        "image_embed_dropout_prob",
    )
    _accept(hp, "encoder_name", "nfresnet50", "clip_resnet_large")
    return ImagePrefix(
        hp["encoder_out_dim"],
        hp["out_dim"],
        image_seq_len=hp["image_seq_len"] if hp["encoder_name"] == "nfresnet50" else None,
        layernorm=hp["use_image_embed_layernorm"],
        dropout=hp["image_embed_dropout_prob"],
    ), _run_feats


def _fromage(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("n_visual_tokens", "vision_hidden_size", "embedding_dim", "shared_emb_dim")

    def run(module: FromageEmbeddings, inputs: Named) -> dict[str, Tensor]:
        return {mode: module(inputs["feats"], mode) for mode in ("captioning", "retrieval")}

    return FromageEmbeddings(
        hp["vision_hidden_size"], hp["embedding_dim"], hp["shared_emb_dim"], hp["n_visual_tokens"]
    ), run


def _epalm(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("injected_hidden_states", "vis_dim", "text_dim", "connector_type", "shared_connector")
    _accept(hp, "connector_type", "linear")

    def run(module: EpalmConnector, inputs: Named) -> dict[str, Tensor]:
        return {"output": torch.stack(module(inputs["feats"]))}

    shared = hp.get("shared_connector", False)
    return EpalmConnector(hp["vis_dim"], hp["text_dim"], hp["injected_hidden_states"], shared=shared), run


def _visual_embedding(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(
        "feat_dim",
        "pos_dim",
        "n_images",
        "d_model",
        "individual_vis_layer_norm",
        "use_vis_layer_norm",
        "additional_visual_embedding_layers",
        "use_vis_order_embedding",
        "layer_norm_epsilon",
        "vocab",
    )
    _accept(hp, "pos_dim", 4)
    ordered = hp["use_vis_order_embedding"]

    def run(module: VisualEmbedding, inputs: Named) -> dict[str, Tensor]:
        return {"output": module(inputs["feats"], inputs["pos"])}

    return VisualEmbedding(
        hp["feat_dim"],
        hp["d_model"],
        nn.Embedding(hp["vocab"], hp["d_model"]) if ordered else None,
        n_images=hp["n_images"],
        individual_vis_layer_norm=hp["individual_vis_layer_norm"],
        use_vis_layer_norm=hp["use_vis_layer_norm"],
        additional_visual_embedding_layers=hp["additional_visual_embedding_layers"],
        use_vis_order_embedding=ordered,
        eps=hp["layer_norm_epsilon"],
    ), run


_MLP = ("mlp_projector",)

BUILDERS: dict[str, Builder] = {
    "lora.linear": Builder(_adapted(LoRALinear, "linear", _LORA), ops=("lora_linear",)),
    "lora.conv1d": Builder(_adapted(LoRALinear, "conv1d", _LORA), ops=("lora_linear",)),
    "lora.mlp": Builder(_lora_block("mlp"), ops=_lora_block_ops),
    "lora.attention": Builder(_lora_block("attn"), ops=_lora_block_ops),
    "lora.llama_layer": Builder(_lora_block("layer"), ops=_lora_block_ops),
    "lora.embedding": Builder(_adapted(LoRAEmbedding, "embedding", ("use_rslora",))),
    "dora.embedding": Builder(_adapted(DoRAEmbedding, "embedding", _DORA)),
    "dora.linear": Builder(_adapted(DoRALinear, "linear", _DORA), ops=("dora_linear",)),
    "dora.conv1d": Builder(_adapted(DoRALinear, "conv1d", _DORA), ops=("dora_linear",)),
    "dora.mlp": Builder(_dora_mlp, ops=lambda hp: ("dora_linear" if hp["dora"] else "lora_linear",)),
    "qlora.linear": Builder(_qlora, ops=lambda hp: ("lora_linear",) if "r" in hp else ()),
    "dense.llava_projector": Builder(_llava, ops=_llava_ops),
    "dense.llava_next_mlp_res": Builder(_llava, ops=_llava_ops),
    "dense.llava_next_pooler": Builder(_llava_pooler, ops=_MLP),
    "dense.hf_llava": Builder(_hf_llava, ops=_MLP),
    "dense.internvl_pixel_shuffle_mlp": Builder(_internvl, ops=_MLP),
    "dense.cogvlm_glu": Builder(_cogvlm, ops=_MLP),
    "dense.lavin_adapter_mlp": Builder(_adapter_mlp, ops=_MLP),
    "dense.memvp_projector": Builder(_adapter_mlp, ops=_MLP),
    "dense.image_prefix": Builder(_image_prefix),
    "dense.fromage": Builder(_fromage),
    "dense.epalm_connector": Builder(_epalm),
    "dense.vl_adapter_visual_embedding": Builder(_visual_embedding),
}
