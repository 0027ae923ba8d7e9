"""Goldens of prefixes and prompts: hyper-parameters -> our modules in the small frozen models around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import (
    AdaptionPromptAttention,
    EpalmConnector,
    EpalmInjection,
    EpalmPrompt,
    LlamaAdapterBlock,
    LlamaAdapterPrompts,
    LlamaAdapterVisualPrompts,
    MemVPAdapter,
    MemVPFeedForward,
    MemVPMemory,
    PrefixEncoder,
    SoftPrompt,
    VPTPrompts,
)
from ..modules.llama_adapter import attended, interleaved_rotary, swiglu_width
from ..modules.lora_blocks import rotary, rotated
from .golden_builders import Builder, Named, Run, _accept

_LOW_RANK = ("lora_linear", "lora_mlp", "lora_qkv")


# -- LLaMA-Adapter -------------------------------------------------------------------------------------------------


class _AdapterLlama(LlamaAdapterPrompts):
    """v1's whole model: the last layers get a prompt each."""

    def __init__(self, hp: Named):
        super().__init__(hp["adapter_layer"], hp["adapter_len"], hp["d"])
        hidden = swiglu_width(hp["d"], hp["multiple_of"])
        self.layers_of = hp["layers"]
        self.tok_embeddings = nn.Embedding(hp["vocab"], hp["d"])
        prompts = self.layers
        del self.layers  # a number there, the blocks in upstream's names
        self.prompted = prompts
        self.layers = nn.ModuleList(
            LlamaAdapterBlock(hp["d"], hp["heads"], hidden, half_gate=True) for _ in range(hp["layers"])
        )
        self.norm = nn.RMSNorm(hp["d"], 1e-5)
        self.output = nn.Linear(hp["d"], hp["vocab"], bias=False)


def _v1(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "heads", "layers", "vocab", "multiple_of", "adapter_len", "adapter_layer")

    def run(module: _AdapterLlama, inputs: Named) -> dict[str, Tensor]:
        h = inputs["h"]
        rotation = interleaved_rotary(h.shape[1], hp["d"] // hp["heads"], device=h.device)
        first = len(module.layers) - module.prompted
        prompts = [None] * first + LlamaAdapterPrompts.forward(module)
        for layer, prompt in zip(module.layers, prompts, strict=True):
            h = layer(h, *rotation, prompt=prompt)
        h = module.norm(h)
        return {"h": h, "logits": module.output(h)}

    return _AdapterLlama(hp), run


def _run_block(module: LlamaAdapterBlock, inputs: Named) -> dict[str, Tensor]:
    x = inputs["x"]
    rotation = interleaved_rotary(x.shape[1], module.attention.head_dim, device=x.device)
    return {"y": module(x, *rotation, prompt=inputs.get("prompt", inputs.get("adapter")))}


def _v2(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "heads", "multiple_of", "w_bias", "w_lora", "w_new_gate", "r", "query_len")
    return LlamaAdapterBlock(
        hp["d"], hp["heads"], swiglu_width(hp["d"], hp["multiple_of"]), bias=hp["w_bias"],
        lora_rank=hp["r"] if hp["w_lora"] else 0, new_gate=hp["w_new_gate"],
    ), _run_block  # fmt: skip


def _scale_bias(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "heads", "multiple_of", "bias", "scale", "adapter_len")
    return LlamaAdapterBlock(
        hp["d"], hp["heads"], swiglu_width(hp["d"], hp["multiple_of"]), scale=hp["scale"], shift=hp["bias"],
        half_gate=True,
    ), _run_block  # fmt: skip


def _visual_query(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("clip_dim", "v_dim", "v_heads", "mlp_ratio", "v_depth", "query_len", "query_layer", "d")

    def run(module: LlamaAdapterVisualPrompts, inputs: Named) -> dict[str, Tensor]:
        visual = module.query(inputs["clip_feats"])
        return {f"prompt.{i}": t for i, t in enumerate(module.prompts(visual))} | {"visual_query": visual}

    return LlamaAdapterVisualPrompts(
        hp["clip_dim"], hp["d"], hp["query_layer"], v_embed_dim=hp["v_dim"], v_depth=hp["v_depth"],
        v_num_heads=hp["v_heads"], v_mlp_ratio=hp["mlp_ratio"], query_len=hp["query_len"],
    ), run  # fmt: skip


def _adaption(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "heads", "kv_heads", "adapter_len")

    def run(module: AdaptionPromptAttention, inputs: Named) -> dict[str, Tensor]:
        cos, sin = rotary(inputs["position_ids"], module.head_dim)
        return {"y": module(inputs["x"], cos, sin, inputs["attention_mask"]), "cos": cos, "sin": sin}

    return AdaptionPromptAttention(hp["d"], hp["heads"], hp["adapter_len"], kv_heads=hp["kv_heads"]), run


# -- prompts of a language model -----------------------------------------------------------------------------------


class _Llama(nn.Module):
    """A transformers Llama, in plain PyTorch: what stands around peft's prompts."""

    def __init__(self, hp: Named):
        super().__init__()
        d, ff, self.heads = hp["d"], hp["ff"], hp["heads"]
        self.head_dim = d // self.heads
        kv = hp["kv_heads"] * self.head_dim
        self.embed_tokens = nn.Embedding(hp["vocab"], d)
        self.layers = nn.ModuleList()
        for _ in range(hp["layers"]):
            layer = nn.Module()
            layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(d, 1e-6), nn.RMSNorm(d, 1e-6)
            sizes = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (d, d)}
            layer.self_attn = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in sizes.items()})
            sizes = {"gate_proj": (d, ff), "up_proj": (d, ff), "down_proj": (ff, d)}
            layer.mlp = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in sizes.items()})
            self.layers.append(layer)
        self.norm = nn.RMSNorm(d, 1e-6)
        self.lm_head = nn.Linear(d, hp["vocab"], bias=False)

    def forward(self, h: Tensor, mask: Tensor, past: tuple | None = None) -> Tensor:
        """Logits of h (B, T, d) after `past`, one (keys, values) for each layer; mask (B, S): 1 = keep."""
        T, S = h.shape[1], mask.shape[1]
        positions = torch.arange(S - T, S, device=h.device).expand(h.shape[0], -1)
        cos, sin = rotary(positions, self.head_dim)
        seen = torch.ones(T, S, dtype=torch.bool, device=h.device).tril(S - T)
        seen = seen & (mask[:, None, None, :] != 0)
        for i, layer in enumerate(self.layers):
            x, a = layer.input_layernorm(h), layer.self_attn
            q, k, v = (a[f"{n}_proj"](x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for n in "qkv")
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
            if past is not None:
                k, v = (torch.cat((before, t), 2) for before, t in zip(past[i], (k, v), strict=True))
            y = attended(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen)
            h = h + a["o_proj"](y.flatten(2))
            x, m = layer.post_attention_layernorm(h), layer.mlp
            h = h + m["down_proj"](F.silu(m["gate_proj"](x)) * m["up_proj"](x))
        return self.lm_head(self.norm(h))


class _Prompted(nn.Module):
    def __init__(self, base_model: nn.Module, prompt_encoder: nn.Module):
        super().__init__()
        self.base_model, self.prompt_encoder = base_model, prompt_encoder


_PEFT_KEYS = ("method", "n", "d", "ff", "heads", "kv_heads", "layers", "vocab", "projection", "enc_hidden")


def _prefix_encoder(hp: Named) -> PrefixEncoder:
    kv, head_dim = hp.get("kv_heads", 1), hp["d"] // hp.get("heads", 1)
    hidden = hp["enc_hidden"] if hp.get("projection") else None
    return PrefixEncoder(hp["n"], hp["layers"], kv, head_dim, hidden=hidden)


def _peft_prefix(hp: Named) -> tuple[nn.Module, Run]:
    _accept(hp.only(*_PEFT_KEYS), "method", "prefix")

    def run(module: _Prompted, inputs: Named) -> dict[str, Tensor]:
        prefix, ids = module.prompt_encoder, inputs["input_ids"]
        h = module.base_model.embed_tokens(ids)
        past = prefix.past_key_values(len(ids))
        return {"logits": module.base_model(h, prefix.mask(inputs["attention_mask"]), past)}

    return _Prompted(_Llama(hp), _prefix_encoder(hp)), run


def _peft_soft(hp: Named) -> tuple[nn.Module, Run]:
    _accept(hp.only(*_PEFT_KEYS), "method", "prompt")

    def run(module: _Prompted, inputs: Named) -> dict[str, Tensor]:
        prompt = module.prompt_encoder
        h = prompt(module.base_model.embed_tokens(inputs["input_ids"]))
        return {"logits": module.base_model(h, prompt.mask(inputs["attention_mask"]))}

    return _Prompted(_Llama(hp), SoftPrompt(hp["n"], hp["d"])), run


def _encoder(hp: Named) -> tuple[nn.Module, Run]:
    _accept(hp.only(*_PEFT_KEYS), "method", "prefix", "prompt")

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        ids = inputs["ids"]
        return {"prompt": module(ids) if hp["method"] == "prefix" else module(None, ids)}

    return (_prefix_encoder(hp) if hp["method"] == "prefix" else SoftPrompt(hp["n"], hp["d"])), run


# -- VPT -----------------------------------------------------------------------------------------------------------


class _ViT(VPTPrompts):
    """VPT's vision transformer with the prompts at its top, as upstream nests them."""

    def __init__(self, hp: Named):
        d, deep = hp["d"], hp["deep"]
        super().__init__(hp["n"], d, hp["layers"], deep=deep, project=hp["project"], patch=4)
        self.heads = hp["heads"]
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.patch_embeddings = nn.Conv2d(3, d, 4, 4)
        self.embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, (hp["img"] // 4) ** 2 + 1, d))
        self.encoder.layer = nn.ModuleList()
        for _ in range(hp["layers"]):
            layer = nn.Module()
            layer.attention_norm, layer.ffn_norm = nn.LayerNorm(d, 1e-6), nn.LayerNorm(d, 1e-6)
            layer.attn = nn.ModuleDict({n: nn.Linear(d, d) for n in ("query", "key", "value", "out")})
            layer.ffn = nn.ModuleDict({"fc1": nn.Linear(d, hp["ff"]), "fc2": nn.Linear(hp["ff"], d)})
            self.encoder.layer.append(layer)
        self.encoder.encoder_norm = nn.LayerNorm(d, 1e-6)


def _vpt(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "heads", "ff", "layers", "n", "project", "deep", "img")

    def run(module: _ViT, inputs: Named) -> dict[str, Tensor]:
        e = module.embeddings
        x = e.patch_embeddings(inputs["pixels"]).flatten(2).transpose(1, 2)
        x = torch.cat((e.cls_token.expand(len(x), -1, -1), x), 1) + e.position_embeddings
        for i, layer in enumerate(module.encoder.layer):
            x = module(x, i)
            h, a = layer.attention_norm(x), layer.attn
            q, k, v = (a[n](h).unflatten(-1, (module.heads, -1)).transpose(1, 2) for n in ("query", "key", "value"))
            x = x + a["out"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + layer.ffn["fc2"](F.gelu(layer.ffn["fc1"](layer.ffn_norm(x))))
        return {"y": module.encoder.encoder_norm(x)}

    return _ViT(hp), run


# -- eP-ALM --------------------------------------------------------------------------------------------------------


class _Opt(nn.Module):
    """OPT with eP-ALM's connectors and prompt."""

    def __init__(self, hp: Named):
        super().__init__()
        d = hp["d"]
        self.connector = EpalmConnector(hp["vis_dim"], d, hp["injected"], shared=hp["shared"]).connector
        self.prompt = EpalmPrompt(hp["prompt_len"], d, mlp=False)
        decoder = nn.Module()
        decoder.embed_tokens, decoder.final_layer_norm = nn.Embedding(hp["vocab"], d), nn.LayerNorm(d)
        decoder.embed_positions = nn.Embedding(hp.get("positions", 40) + 2, d)
        decoder.layers = nn.ModuleList()
        for _ in range(hp["layers"]):
            layer = nn.Module()
            layer.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(d, d) for n in ("q", "k", "v", "out")})
            layer.fc1, layer.fc2 = nn.Linear(d, hp["ff"]), nn.Linear(hp["ff"], d)
            layer.self_attn_layer_norm, layer.final_layer_norm = nn.LayerNorm(d), nn.LayerNorm(d)
            decoder.layers.append(layer)
        self.model_text = nn.Module()
        self.model_text.model = nn.Module()
        self.model_text.model.decoder = decoder


def _epalm(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "heads", "ff", "layers", "vocab", "vis_dim", "injected", "shared", "start", "end", "prompt_len")
    place = EpalmInjection(hp["start"], hp["end"])

    def run(module: _Opt, inputs: Named) -> dict[str, Tensor]:
        m = module.model_text.model.decoder
        connect = EpalmConnector(hp["vis_dim"], hp["d"], hp["injected"], shared=hp["shared"])
        connect.connector = module.connector
        # the connectors give the last layer's token first
        tokens = connect([inputs[f"cls.{i}"][:, None] for i in range(hp["injected"])])[::-1]
        ids, keep = inputs["input_ids"], inputs["attention_mask"]
        positions = keep.cumsum(1) * keep - 1 + 2
        x = m.embed_tokens(ids) + m.embed_positions(positions)
        prompt = module.prompt(len(ids))
        x, keep = torch.cat((prompt, x), 1), torch.cat((keep.new_ones(prompt.shape[:2]), keep), 1)
        T = x.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() & (keep[:, None, None, :] != 0)
        mask = torch.zeros(seen.shape, device=x.device).masked_fill(~seen, torch.finfo(x.dtype).min)
        for i, layer in enumerate(m.layers):
            x, mask = place(x, i, tokens, mask)
            h, a = layer.self_attn_layer_norm(x), layer.self_attn
            q, k, v = (a[f"{n}_proj"](h).unflatten(-1, (hp["heads"], -1)).transpose(1, 2) for n in "qkv")
            y = F.scaled_dot_product_attention(q, k, v, mask)
            x = x + a["out_proj"](y.transpose(1, 2).flatten(2))
            x = x + layer.fc2(F.relu(layer.fc1(layer.final_layer_norm(x))))
        return {"logits": m.final_layer_norm(x) @ m.embed_tokens.weight.t()}

    return _Opt(hp), run


def _epalm_soft(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("n", "d", "mid", "mlp", "deep", "nb")

    def run(module: EpalmPrompt, inputs: Named) -> dict[str, Tensor]:
        prompts = module(hp["B"])
        return {f"prompt.{i}": t for i, t in enumerate(prompts)} if hp["deep"] else {"prompt": prompts}

    return EpalmPrompt(hp["n"], hp["d"], mid=hp["mid"], mlp=hp["mlp"], deep=hp["deep"], nb_prompts=hp["nb"]), run


# -- MemVP ---------------------------------------------------------------------------------------------------------


def _memvp(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "heads", "multiple_of", "emb", "clip_dim", "proj", "n_img", "s", "proj_scale", "indicators", "layers")
    module = MemVPMemory(hp["clip_dim"], hp["proj"], hp["d"], hp["emb"], scale=hp["proj_scale"])
    hidden = swiglu_width(hp["d"], hp["multiple_of"])
    module.layers = nn.ModuleList(LlamaAdapterBlock(hp["d"], hp["heads"], hidden) for _ in range(hp.get("layers", 1)))
    for layer in module.layers:
        layer.attention.gate = None

    def run(module: MemVPMemory, inputs: Named) -> dict[str, Tensor]:
        x = inputs["x"]
        memory = module(inputs["clip_feats"], inputs["img_indicators"])
        rotation = interleaved_rotary(x.shape[1], hp["d"] // hp["heads"], device=x.device)
        for layer in module.layers:
            h = x + layer.attention(layer.attention_norm(x), *rotation)
            x = h + MemVPFeedForward(layer.feed_forward, s=hp["s"]).eval()(layer.ffn_norm(h), *memory)
        return {"y": x}

    return module, run


def _memvp_clip(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "r")
    return MemVPAdapter(hp["d"], hp["r"]), lambda module, inputs: {"y": module(inputs["x"])}


_PREFIX = ("prefix_attention",)

BUILDERS: dict[str, Builder] = {
    "prefix.llama_adapter_v1": Builder(_v1, ops=_PREFIX),
    "prefix.llama_adapter_v2": Builder(_v2, ops=lambda hp: _PREFIX + (_LOW_RANK if hp["w_lora"] else ())),
    "prefix.llama_adapter_v2_scale_bias": Builder(_scale_bias, ops=lambda hp: _PREFIX if hp["adapter_len"] else ()),
    "prefix.llama_adapter_v2_visual_query": Builder(
        _visual_query, ops=lambda hp: ("cross_attention", "linear_projector", "mlp_projector") if hp["v_depth"] else ()
    ),
    "prefix.adaption_prompt": Builder(_adaption, ops=_PREFIX),
    "prompt.encoder": Builder(_encoder),
    "prompt.prefix": Builder(_peft_prefix),
    "prompt.soft": Builder(_peft_soft),
    "prompt.vpt": Builder(_vpt),
    "prompt.epalm": Builder(_epalm),
    "prompt.epalm_soft": Builder(_epalm_soft),
    "memory.memvp": Builder(_memvp, ops=("mlp_projector",)),
    "memory.memvp_clip": Builder(_memvp_clip),
}
