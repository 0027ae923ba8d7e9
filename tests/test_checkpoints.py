"""Key maps: users' checkpoints and saved adapters under our names."""

import copy

import pytest
import torch
from torch import nn

from vlkernels import use_backend
from vlkernels.integrations import checkpoints
from vlkernels.integrations.checkpoints import load_peft_adapter, split_peft_adapter, to_ours, to_upstream
from vlkernels.modules import LoRALinear


def test_key_maps_are_strict_and_invert():
    layer = LoRALinear(20, 28, 3)
    layer.add_adapter("second", 1)
    layer.add_adapter("third", 9, lora_bias=True)
    state = layer.state_dict()
    upstream = to_upstream("lora.linear", state)
    assert {"base_layer.weight", "lora_A.second.weight", "lora_B.third.bias"} <= set(upstream)
    back = to_ours("lora.linear", upstream)
    assert set(back) == set(state) and all(back[name] is state[name] for name in state)
    for wrong in ("lora_A.default.bias", "base_layer.weight.absmax", "lora_A.a.b.weight", "weight", "xlora_A.a.weight"):
        with pytest.raises(ValueError, match=f"unknown upstream key '{wrong}'"):
            to_ours("lora.linear", {wrong: torch.zeros(1)})
    with pytest.raises(ValueError, match="unknown key 'base_layer.weight'"):
        to_upstream("lora.linear", {"base_layer.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no key map for 'lora.nothing'"):
        to_ours("lora.nothing", {})


def test_shared_upstream_tensors(monkeypatch):

    rows = (("first.w", "w"), ("second.w", "w"))
    monkeypatch.setitem(checkpoints.KEY_MAPS, "shared", rows)
    one = torch.ones(2)
    assert set(to_upstream("shared", {"w": one})) == {"first.w", "second.w"}
    assert to_ours("shared", {"first.w": one, "second.w": one.clone()}).keys() == {"w"}
    with pytest.raises(ValueError, match="values differ"):
        to_ours("shared", {"first.w": one, "second.w": one + 1})


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 16), nn.Linear(12, 20)


@pytest.fixture
def saved(tmp_path):
    """A peft model of two blocks, saved as users save it."""
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"0.v_proj": 5}}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], **patterns)
    wrapped = peft.PeftModel(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path)
    return wrapped, tmp_path / "adapter_model.safetensors"


def with_loralinear(wrapped, alpha_v0=5) -> nn.Module:
    """Our model with its layers, over peft's base weights, under other paths: `blocks` for `layers`."""
    blocks = []
    for i, theirs in enumerate(wrapped.base_model.model["layers"]):
        block = Block()
        block.q_proj = LoRALinear.from_plain(theirs.q_proj.base_layer, 4, alpha=6)
        block.v_proj = LoRALinear.from_plain(theirs.v_proj.base_layer, 2, alpha=alpha_v0 if i == 0 else 6)
        blocks.append(block)
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})


def to_blocks(path: str) -> str:
    return path.replace("layers.", "blocks.")


def test_a_saved_peft_adapter_loads_into_a_model(saved):
    wrapped, file = saved
    model = with_loralinear(wrapped)
    loaded = load_peft_adapter(model, file, path=to_blocks)
    assert sorted(loaded) == [f"blocks.{i}.{n}_proj" for i in (0, 1) for n in "qv"]
    x = torch.randn(5, 12)
    for theirs, ours in zip(wrapped.base_model.model["layers"], model["blocks"], strict=True):
        for name in ("q_proj", "v_proj"):
            with use_backend("reference"):
                assert torch.equal(getattr(ours, name)(x), getattr(theirs, name)(x)), name


def test_a_saved_adapter_under_another_name_and_into_one_layer(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    wrapped, file = saved
    theirs = wrapped.base_model.model["layers"][1].q_proj
    one = {k: v for k, v in load_file(file).items() if "layers.1.q_proj" in k}
    (tmp_path / "one").mkdir()
    save_file(one, tmp_path / "one" / "adapter_model.safetensors")
    layer = LoRALinear.from_plain(theirs.base_layer, 1)
    layer.add_adapter("task", 4, alpha=6)
    layer.active = ("task",)
    assert load_peft_adapter(layer, tmp_path / "one" / "adapter_model.safetensors", "task") == [""]
    assert torch.equal(layer.adapters["task"].a, theirs.lora_A["default"].weight)
    with pytest.raises(ValueError, match="model is one LoRALinear"):
        load_peft_adapter(layer, file, "task")


def test_what_does_not_fit_is_named_and_nothing_is_loaded(saved):
    wrapped, file = saved
    model = with_loralinear(wrapped)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the model has nothing at 'layers.0.q_proj'"):
        load_peft_adapter(model, file)
    with pytest.raises(ValueError, match="no adapter 'other'; there are default"):
        load_peft_adapter(model, file, "other", path=to_blocks)
    with pytest.raises(ValueError, match="layers.0.v_proj: adapter_config.json gives the scale 2.5, .* has 3.5"):
        load_peft_adapter(with_loralinear(wrapped, alpha_v0=7), file, path=to_blocks)
    model["blocks"][1].v_proj = LoRALinear(12, 20, 3, alpha=9)
    with pytest.raises(ValueError, match=r"adapters.default.a is \(2, 12\) in the file, \(3, 12\) in the layer"):
        load_peft_adapter(model, file, path=to_blocks)
    model["blocks"][1].v_proj = LoRALinear(12, 20, 2, alpha=6, lora_bias=True)
    with pytest.raises(ValueError, match="the file misses 'adapters.default.bias'"):
        load_peft_adapter(model, file, path=to_blocks)
    model["blocks"][1].v_proj = nn.Linear(12, 20)
    with pytest.raises(ValueError, match="a Linear at 'blocks.1.v_proj'"):
        load_peft_adapter(model, file, path=to_blocks)
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items() if "1.v_proj" not in name)


def test_keys_of_other_tuners_are_unknown():
    known = {"base_model.model.q.lora_A.weight": torch.zeros(2, 3)}
    assert split_peft_adapter(known, "x") == {"q": {"adapters.x.a": known["base_model.model.q.lora_A.weight"]}}
    for wrong in ("base_model.model.q.hada_w1_a", "base_model.model.lm_head.weight", "q.lora_A.weight"):
        with pytest.raises(ValueError, match=f"unknown key '{wrong}'"):
            split_peft_adapter(known | {wrong: torch.zeros(2)})
