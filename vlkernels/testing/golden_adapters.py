"""Goldens of bottleneck adapters: hyper-parameters -> our modules, and the frozen layers that stand around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules import (
    AdapterHubAdapter,
    FrozenBiLMAdapter,
    FrozenBiLMOutput,
    LaVINBlock,
    MAGMAAdapter,
    MAGMAWrapper,
    RepAdapter,
    RepAdapterRouter,
    VLAdapterController,
    VLHyperformer,
    VLPETDecoderLayer,
    VLPETEncoderLayer,
    lavin_mask,
)
from ..modules._adapter import OP_ACTS
from ..modules.llama_adapter import interleaved_rotary, swiglu_width
from .golden_builders import Builder, GoldenError, Named, Run, _accept

_OP = ("bottleneck_adapter",)


class _Tied(nn.Module):
    """A module that takes what only the file knows: sharing, and the names of a wrapped module's parameters."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.before_load({key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def before_load(self, tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError


# -- adapter-hub, MAGMA, FrozenBiLM --------------------------------------------------------------------------------


class _SubLayerEnd(nn.Module):
    def __init__(self, adapter: nn.Module, layer_norm: nn.Module | None):
        super().__init__()
        self.adapter, self.layer_norm = adapter, layer_norm


def _adapterhub(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("config", "config_kw", "d", "with_ln")
    adapter = AdapterHubAdapter(hp["d"], hp["config"], **hp.get("config_kw", {}))

    def run(module: _SubLayerEnd, inputs: Named) -> dict[str, Tensor]:
        return {"y": module.adapter(inputs["hidden_states"], inputs["input_tensor"], module.layer_norm)}

    return _SubLayerEnd(adapter, nn.LayerNorm(hp["d"]) if hp.get("with_ln", True) else None), run


class _Attention(_Tied):
    """An attention block that returns a tuple: a linear, under the file's name of it."""

    def __init__(self, d: int):
        super().__init__()
        self.d = d

    def before_load(self, tensors):
        names = {key.rpartition(".")[0] for key in tensors}
        if len(names) != 1:
            raise GoldenError(
                f"the wrapped attention has {', '.join(sorted(names)) or 'no parameters'}; known: a linear"
            )
        self.name = names.pop()
        linear = nn.Linear(self.d, self.d, bias=any(key.endswith("bias") for key in tensors))
        if self.name:
            self.add_module(self.name, linear)
        else:  # the block is the linear
            self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        if self.name:
            return getattr(self, self.name)(x), None
        return nn.functional.linear(x, self.weight, self.bias), None


def _magma(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("type", "d", "factor", "ln")
    _accept(hp, "type", "normal", "parallel", "scaled_parallel", "attn_normal", "attn_scaled_parallel", "attn_parallel")
    _, attention, kind = hp["type"].rpartition("attn_")
    d, scaled = hp["d"], kind == "scaled_parallel"
    options = {"parallel": kind != "normal", "scaled": scaled, "layer_norm": hp.get("ln", False)}
    if hp["type"] == "normal":
        module = MAGMAAdapter(d, hp["factor"], **options)
    else:
        module = MAGMAWrapper(_Attention(d) if attention else nn.Linear(d, d), d, hp["factor"], **options)

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        y = module(inputs["x"])
        return {"y": y[0] if isinstance(y, tuple) else y}

    return module, run


def _frozenbilm(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "ds", "ln_before", "ln_after")
    return FrozenBiLMAdapter(
        hp["d"], hp["ds"], ln_before=hp.get("ln_before", False), ln_after=hp.get("ln_after", False)
    ), lambda module, inputs: {"y": module(inputs["x"])}


def _frozenbilm_output(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("which", "d", "ff", "ds")
    _accept(hp, "which", "attn", "ff")
    inner = hp["d"] if hp["which"] == "attn" else hp["ff"]
    return FrozenBiLMOutput(hp["d"], inner, hp["ds"]), lambda module, inputs: {
        "y": module(inputs["x"], inputs["residual"])
    }


# -- VL-Adapter ----------------------------------------------------------------------------------------------------


class _Controlled(_Tied):
    """A controller whose Cs are shared as the file has them: names of equal values are one parameter."""

    def __init__(self, ctrl: VLAdapterController):
        super().__init__()
        self.ctrl = ctrl

    def before_load(self, tensors):
        found: list[tuple[Tensor, nn.Parameter]] = []
        for key, value in tensors.items():
            path, _, name = key.rpartition(".")
            if name != "phm_rule":
                continue
            same = next((p for t, p in found if t.shape == value.shape and torch.equal(t, value)), None)
            if same is None:
                same = nn.Parameter(value.clone(), requires_grad=False)
                found.append((value, same))
            setattr(self.get_submodule(path), name, same)


def _vl_adapter(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(
        "variant", "d", "reduction", "tasks", "run_tasks", "single", "share_down", "share_up", "ln_before", "ln_after",
        "hypercomplex_division", "factorized_phm", "shared_phm_rule", "shared_phm_rule_over_tasks", "low_rank_rank",
    )  # fmt: skip
    _accept(hp, "variant", "adapter", "compacter", "low_rank")
    names = {"hypercomplex_division": "k", "factorized_phm": "factorized", "low_rank_rank": "low_rank_rank"}
    words = {ours: hp[theirs] for theirs, ours in names.items() if theirs in hp}
    same = ("single", "share_down", "share_up", "ln_before", "ln_after", "shared_phm_rule",
            "shared_phm_rule_over_tasks")  # fmt: skip
    words |= {key: hp[key] for key in same if key in hp}
    ctrl = VLAdapterController(hp["d"], hp["tasks"], reduction=hp["reduction"], kind=hp["variant"], **words)

    def run(module: _Controlled, inputs: Named) -> dict[str, Tensor]:
        return {f"y.{task}": module.ctrl(inputs[f"x.{task}"], task=task) for task in hp["run_tasks"]}

    return _Controlled(ctrl), run


def _hyperformer(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "reduction", "tasks", "run_tasks", "task_dim", "proj_dim", "hidden", "layers", "ln_before", "ln_after")

    def run(module: VLHyperformer, inputs: Named) -> dict[str, Tensor]:
        places = [(t, i, b) for t in hp["run_tasks"] for i in range(hp["layers"]) for b in ("attn", "ff")]
        return {f"y.{t}.{i}.{b}": module(inputs["x"], task=t, layer=i, block=b) for t, i, b in places}

    return VLHyperformer(
        hp["d"], hp["tasks"], hp["layers"], task_dim=hp["task_dim"], hidden=hp["hidden"], proj_dim=hp["proj_dim"],
        reduction=hp["reduction"], ln_before=hp.get("ln_before", False), ln_after=hp.get("ln_after", False),
    ), run  # fmt: skip


# -- VL-PET --------------------------------------------------------------------------------------------------------


def _vl_pet(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "attn_heads", "ff", "r", "heads", "gate", "gate_r", "gating_scaling")
    layer = VLPETEncoderLayer(
        hp["d"], hp["attn_heads"], hp["ff"], r=hp["r"], heads=hp["heads"], gate=hp["gate"], gate_r=hp.get("gate_r"),
        scale=hp.get("gating_scaling", 1.0),
    )  # fmt: skip
    return layer, lambda module, inputs: {"y": module(inputs["x"], inputs["attention_mask"])}


def _vl_pet_decoder(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "attn_heads", "ff", "r", "heads", "src_lens")
    layer = VLPETDecoderLayer(hp["d"], hp["attn_heads"], hp["ff"], r=hp["r"], tasks=("vqa", "gqa"))

    def run(module: VLPETDecoderLayer, inputs: Named) -> dict[str, Tensor]:
        names = ("x", "enc", "attention_mask", "encoder_attention_mask")
        return {"y": module(*(inputs[n] for n in names))}

    return layer, run


# -- LaVIN ---------------------------------------------------------------------------------------------------------


def _lavin(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("router", "d", "r", "groups", "scale", "t", "given_weights")
    if not hp.get("router", True):
        # no residual, and no scale either
        return RepAdapter(hp["d"], hp["r"], groups=hp["groups"]), lambda module, inputs: {"y": module(inputs["x"])}
    adapter = RepAdapterRouter(hp["d"], hp["r"], groups=hp["groups"], scale=hp["scale"], t=hp["t"])
    return adapter, lambda module, inputs: {"y": module(inputs["x"], weights=inputs.get("weights"))}


def _lavin_rep(hp: Named) -> tuple[nn.Module, Run]:
    return _lavin(Named(hp.kind, {"router": False} | hp))


def _lavin_block(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d", "heads", "multiple_of", "r", "scale", "t", "groups", "layers", "mode")
    module = nn.Module()
    module.layers = nn.ModuleList(
        LaVINBlock(
            hp["d"], hp["heads"], swiglu_width(hp["d"], hp["multiple_of"]), mode=hp.get("mode", "attn"), r=hp["r"],
            groups=hp.get("groups", 2), scale=hp["scale"], t=hp["t"],
        )
        for _ in range(hp.get("layers", 1))
    )  # fmt: skip

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        x = inputs["x"]
        rotation = interleaved_rotary(x.shape[1], hp["d"] // hp["heads"], device=x.device)
        mask = lavin_mask(x.shape[1], device=x.device)
        for layer in module.layers:
            x = layer(x, *rotation, mask)
        return {"y": x}

    return module, run


def _frozenbilm_ops(hp: Named) -> tuple[str, ...]:
    return ("norm_residual",) if hp.get("ln_after", False) else _OP


def _adapterhub_ops(hp: Named) -> tuple[str, ...]:
    return _OP if hp.get("config_kw", {}).get("non_linearity", "relu").lower() in OP_ACTS else ()


BUILDERS: dict[str, Builder] = {
    "adapter.adapterhub": Builder(_adapterhub, ops=_adapterhub_ops),
    "adapter.magma": Builder(_magma, ops=_OP),
    "adapter.frozenbilm": Builder(_frozenbilm, ops=_frozenbilm_ops),
    "adapter.frozenbilm_output": Builder(_frozenbilm_output, ops=_OP),
    "adapter.vl_adapter": Builder(_vl_adapter, ops=_OP),
    "adapter.vl_adapter_compacter": Builder(_vl_adapter, ops=_OP),
    "adapter.vl_adapter_low_rank": Builder(_vl_adapter, ops=_OP),
    "adapter.vl_adapter_hyperformer": Builder(_hyperformer, ops=_OP),
    "adapter.vl_pet": Builder(_vl_pet, ops=_OP),
    "adapter.vl_pet_decoder": Builder(_vl_pet_decoder, ops=_OP),
    "adapter.lavin": Builder(_lavin, ops=_OP),
    "adapter.lavin_rep": Builder(_lavin_rep, ops=_OP),
    "adapter.lavin_block": Builder(_lavin_block, ops=_OP),
}
