"""Goldens of position resamplers, mapping networks and abstractors: hyper-parameters -> our module, and its call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..modules import (
    ESPERMLP,
    ClipCapMLP,
    ClipCapTransformer,
    HoneybeeResampler,
    MAPLMapper,
    MetaMapper,
    MiniCPMVResampler,
    MPLUGOwl2Abstractor,
    MPLUGOwlAbstractor,
    OmniLMMResampler,
    QwenVLResampler,
    VisualQuery,
)
from .golden_builders import Builder, GoldenError, Named, Run


def _accept(hp: Named, key: str, *accepted) -> None:
    if hp[key] not in accepted:
        raise GoldenError(f"hyper-parameter {key} is {hp[key]!r}; accepted: {', '.join(map(repr, accepted))}")


def _call(*names: str, optional: tuple[str, ...] = ()) -> Run:
    """module(inputs by these names, in this order); optional ones are None where the file has none."""

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        return {"output": module(*(inputs[n] for n in names), *(inputs.get(n) for n in optional))}

    return run


def _qwen(kind: type[QwenVLResampler]) -> Callable[[Named], tuple[nn.Module, Run]]:
    def build(hp: Named) -> tuple[nn.Module, Run]:
        hp.only("grid_size", "embed_dim", "num_heads", "kv_dim", "norm_eps", "n_tokens")
        module = kind(hp["grid_size"], hp["embed_dim"], hp["num_heads"], hp["kv_dim"], eps=hp["norm_eps"])
        return module, _call("x", optional=("attn_mask",))

    return build


def _minicpmv(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("num_queries", "embed_dim", "num_heads", "kv_dim", "max_size", "tgt_sizes", "norm_eps")
    return MiniCPMVResampler(
        hp["num_queries"],
        hp["embed_dim"],
        hp["num_heads"],
        hp["kv_dim"],
        max_size=hp["max_size"],
        eps=hp["norm_eps"],
    ), _call("x", "tgt_sizes")


def _llama_adapter(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("clip_dim", "v_embed_dim", "v_depth", "v_num_heads", "v_mlp_ratio", "query_len", "llm_dim")
    return VisualQuery(
        hp["clip_dim"],
        hp["llm_dim"],
        v_embed_dim=hp["v_embed_dim"],
        v_depth=hp["v_depth"],
        v_num_heads=hp["v_num_heads"],
        v_mlp_ratio=hp["v_mlp_ratio"],
        query_len=hp["query_len"],
    ), _call("feats")


def _clipcap_mlp(hp: Named) -> tuple[nn.Module, Run]:
    _accept(hp.only("prefix_size", "gpt_embedding_size", "prefix_length", "act"), "act", "tanh")
    return ClipCapMLP(hp["prefix_size"], hp["gpt_embedding_size"], hp["prefix_length"]), _call("prefix")


def _esper_mlp(hp: Named) -> tuple[nn.Module, Run]:
    _accept(hp.only("prefix_size", "n_embd", "prefix_length", "num_layers", "act"), "act", "tanh")
    module = ESPERMLP(hp["prefix_size"], hp["n_embd"], hp["prefix_length"], num_layers=hp["num_layers"])
    return module, _call("features")


def _clipcap_transformer(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("dim_clip", "dim_embedding", "prefix_length", "clip_length", "num_layers", "num_heads", "mlp_ratio", "act")
    _accept(hp, "act", "relu")
    return ClipCapTransformer(
        hp["dim_clip"],
        hp["dim_embedding"],
        hp["prefix_length"],
        hp["clip_length"],
        hp["num_layers"],
        num_heads=hp["num_heads"],
        mlp_ratio=hp["mlp_ratio"],
    ), _call("prefix")


def _mapl(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("input_dim", "output_dim", "hidden_dim", "num_heads", "num_layers", "output_length", "proj_bias")
    return MAPLMapper(
        hp["input_dim"],
        hp["output_dim"],
        hp["hidden_dim"],
        hp["num_heads"],
        hp["num_layers"],
        hp["output_length"],
        proj_bias=hp.get("proj_bias", True),
    ), _call("x")


def _meta_mapper(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("dim_clip", "dim_gpt_embedding", "prefix_length", "num_heads", "scale")
    _accept(hp, "scale", "sqrt(dim_clip)")
    return MetaMapper(hp["dim_clip"], hp["dim_gpt_embedding"], hp["prefix_length"], num_heads=hp["num_heads"]), _call(
        "clip_x"
    )


_OWL = (
    "n_query", "hidden_size", "layers", "heads", "intermediate", "layer_norm_eps_ffn", "layer_norm_eps_other",
)  # fmt: skip


def _owl(hp: Named) -> dict:
    sizes = {name: hp[name] for name in ("n_query", "hidden_size", "layers", "heads", "intermediate")}
    return sizes | {"eps": hp["layer_norm_eps_other"], "eps_ffn": hp["layer_norm_eps_ffn"]}


def _mplug_owl1(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(*_OWL, "lm_hidden")
    return MPLUGOwlAbstractor(lm_hidden=hp["lm_hidden"], **_owl(hp)), _call("x", optional=("encoder_attention_mask",))


def _mplug_owl2(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(*_OWL, "lm_hidden", "grid_size", "use_cls_token")
    return MPLUGOwl2Abstractor(
        lm_hidden=hp["lm_hidden"], grid_size=hp["grid_size"], use_cls_token=hp["use_cls_token"], **_owl(hp)
    ), _call("x", optional=("encoder_attention_mask",))


def _honeybee(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(*_OWL, "num_input_tokens", "encoder_hidden_size", "output_hidden_size", "num_eos_tokens", "pos_emb")
    return HoneybeeResampler(
        hp["num_input_tokens"],
        hp["encoder_hidden_size"],
        hp["output_hidden_size"],
        num_eos_tokens=hp["num_eos_tokens"],
        pos_emb=hp["pos_emb"],
        **_owl(hp),
    ), _call("x", optional=("encoder_attention_mask",))


def _abstractor_ops(hp: Named) -> tuple[str, ...]:
    """The first layer's queries have a batch of 1 and are added without the op."""
    return ("cross_attention", "linear_projector", "multi_layer_kv") + (("norm_residual",) if hp["layers"] > 1 else ())


_RESAMPLER = ("cross_attention", "linear_projector")
_BLOCKS = ("cross_attention", "linear_projector", "mlp_projector")

BUILDERS: dict[str, Builder] = {
    "resampler.qwen_vl": Builder(_qwen(QwenVLResampler), ops=_RESAMPLER),
    "resampler.omnilmm": Builder(_qwen(OmniLMMResampler), ops=_RESAMPLER),
    "resampler.minicpmv26": Builder(_minicpmv, ops=_RESAMPLER),
    "resampler.llama_adapter_v2": Builder(_llama_adapter, ops=lambda hp: _BLOCKS if hp["v_depth"] else ()),
    "mapper.clipcap_mlp": Builder(_clipcap_mlp),
    "mapper.esper_mlp": Builder(_esper_mlp),
    "mapper.clipcap_transformer": Builder(_clipcap_transformer, ops=_BLOCKS),
    "mapper.mapl": Builder(_mapl, ops=_BLOCKS),
    "mapper.meta_mapper": Builder(_meta_mapper, ops=("cross_attention", "linear_projector", "norm_residual")),
    "abstractor.mplug_owl1": Builder(_mplug_owl1, ops=_abstractor_ops),
    "abstractor.mplug_owl2": Builder(_mplug_owl2, ops=_abstractor_ops),
    "abstractor.honeybee_resampler": Builder(_honeybee, ops=_abstractor_ops),
}
