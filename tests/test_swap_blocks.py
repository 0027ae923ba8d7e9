"""Attention, feed-forward and decoder layers with adapters, swapped: one node a group, nothing else changed."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

import vlkernels
from vlkernels import backends
from vlkernels.testing import meter
from vlkernels.testing.compare import beside

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(1, 48, (2, 9), generator=torch.Generator().manual_seed(2))


def model_of(family="Llama", targets=ALL, dtype=torch.float32, layers=1, cast=True, config=None, **lora):
    """A small decoder with adapters whose B is not zero; grouped keys and values."""
    torch.manual_seed(0)
    options = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**options | (config or {}))
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.normal_(p, mean=0.5, std=0.3)
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets} | lora
    model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=cast)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.train()


def step(model, ids=IDS, autocast=None, call=None):
    """Loss and gradients of one training step."""
    model.zero_grad(set_to_none=True)
    ids = ids.to(model.device)
    with torch.autocast(ids.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        loss = (model if call is None else call)(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def swapped(model, **options):
    model = copy.deepcopy(model)
    vlkernels.swap(model, strict=True, **options)
    return model


def ran(model, **options) -> tuple[dict, Counter]:
    """A step on kernels, and the ops that it ran."""
    with backends.use_backend("triton"), backends.record() as calls, meter.launches() as counts:
        got = step(model, **options)
    assert counts and {backend for _, backend in calls} == {"triton"}
    return got, Counter(name for name, _ in calls)


def check(model, options=None, **how):
    """The swapped model by the rule, against the same model in float64; the ops that ran."""
    exact = step(copy.deepcopy(model).double(), **{k: v for k, v in how.items() if k != "autocast"})
    want = step(model, **how)
    got, ops = ran(swapped(model, **(options or {})), **how)
    within_rule(got, want, exact)
    return ops


def within_rule(got, want, exact):
    assert got.keys() == want.keys()
    found = [beside(name, got[name], want[name], exact[name]) for name in want]
    assert all(e.ok for e in found), "; ".join(str(e) for e in found if not e.ok)


FAMILIES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
}


@pytest.mark.parametrize("fuse_norms", [False, True], ids=["blocks", "layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, fuse_norms, device):
    """Loss and every gradient of a step; one node for q, k, v and one for the feed-forward block."""
    model = model_of(family, config=FAMILIES[family]).to(device)
    ops = check(model, {"fuse_norms": fuse_norms})
    assert ops == {"lora_qkv": 1, "lora_linear": 1, "lora_mlp": 1}


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["q_proj", "v_proj"], {"lora_qkv": 1}),
        (["k_proj", "o_proj", "down_proj"], {"lora_qkv": 1, "lora_linear": 1, "lora_mlp": 1}),
        (["o_proj"], {"lora_linear": 1}),
    ],
    ids=["q-v", "k-o-down", "o"],
)
def test_some_targets(targets, expected, device):
    """Projections without an adapter belong to the node; a block without any stays as it is."""
    assert check(model_of(targets=targets).to(device), {"fuse_norms": True}) == expected


@pytest.mark.parametrize(
    "dtype, cast, autocast",
    [
        (torch.bfloat16, True, None),
        (torch.float32, True, torch.bfloat16),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float16, False, None),
    ],
    ids=["bf16+fp32", "amp", "bf16+fp32 amp", "fp16"],
)
def test_mixed_precision(dtype, cast, autocast, device):
    """As people train: the block's output and gradients by the rule, where rounding is that of a block and not of a
    whole model."""
    model = model_of(dtype=dtype, cast=cast, rank_pattern={"up_proj": 6}).to(device)
    block = model.get_submodule("base_model.model.model.layers.0.mlp")
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3)).to(device, dtype).requires_grad_()
    dy = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(4)).to(device)

    def run(block, x):
        block.zero_grad(set_to_none=True)
        wide = x.dtype == torch.float64
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None and not wide):
            y = block(x)
        (dx,) = torch.autograd.grad(y, x, dy.to(autocast or dtype).to(y.dtype), retain_graph=True)
        y.backward(dy.to(autocast or dtype).to(y.dtype))
        x.grad = None
        return {"y": y.detach(), "dx": dx} | {
            n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None
        }

    exact = run(copy.deepcopy(block).double(), x.detach().double().requires_grad_())
    want = run(block, x)
    fused = swapped(block)
    with backends.use_backend("triton"), backends.record() as calls:
        got = run(fused, x)
    assert calls == [("lora_mlp", "triton")]
    within_rule(got, want, exact)


def falls_back(change, reason):
    model = swapped(model_of())
    change(model)
    path = "base_model.model.model.layers.0."
    attention, mlp = (model.get_submodule(path + name) for name in ("self_attn", "mlp"))
    with backends.use_backend("triton"):
        assert reason in attention.vlkernels_state()[1] and reason in mlp.vlkernels_state()[1]
    want = step(model)  # stock on this machine, or kernels one by one: the numbers are the model's own
    got, ops = ran(model)
    assert ops["lora_qkv"] == ops["lora_mlp"] == 0 and ops["lora_linear"] > 0
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def _second_adapter(model):
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=ALL))
    model.base_model.set_adapter(["default", "second"])


def _hook(model):
    for name in ("k_proj", "up_proj"):
        child = next(m for path, m in model.named_modules() if path.endswith(name))
        child.lora_A["default"].register_forward_hook(lambda *_: None)


def _dropouts(model):
    for name in ("k_proj", "up_proj"):
        child = next(m for path, m in model.named_modules() if path.endswith(name))
        child.lora_dropout["default"] = nn.Dropout(1e-9)  # rounds to zero, and is another number


@pytest.mark.parametrize(
    "change, reason",
    [(_second_adapter, "2 adapters are active"), (_hook, "carries hooks"), (_dropouts, "different dropouts")],
    ids=["two-adapters", "hook", "dropouts"],
)
def test_one_by_one(change, reason):
    """What a group does not cover runs layer by layer, with the reason in the report."""
    falls_back(change, reason)


def test_child_hooks_run(device):
    """A hook on a projection sees its call: the block then leaves its projections to themselves."""
    model = swapped(model_of().to(device))
    seen = []
    path = "base_model.model.model.layers.0."
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        model.get_submodule(path + name).register_forward_hook(lambda m, args, out, name=name: seen.append(name))
    _, ops = ran(model)
    assert seen == ["self_attn.k_proj", "mlp.up_proj"]
    assert ops == {"lora_linear": 7}


def test_nothing_is_left_behind(device):
    """State dict, parameters and children are those of the stock model, before, after, and after an error."""
    model = model_of(targets=["q_proj", "v_proj", "up_proj"]).to(device)
    fused = swapped(model, fuse_norms=True)
    names = [n for n, _ in model.named_modules()]
    ran(fused)
    with pytest.raises(Exception), backends.use_backend("triton"):  # noqa: B017, PT011
        fused.get_submodule("base_model.model.model.layers.0")(torch.zeros(1, 3, 32, device=device))  # no positions
    assert [n for n, _ in fused.named_modules()] == names
    assert list(fused.state_dict()) == list(model.state_dict())
    pickled = pickle.loads(pickle.dumps(fused))
    for clone in (fused, copy.deepcopy(fused), pickled):
        assert ran(clone)[1] == {"lora_qkv": 1, "lora_mlp": 1}
    vlkernels.unswap(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant, device):
    """Gradient checkpointing with dropout gives the gradients of the same step without it, bit for bit."""
    model = swapped(model_of(layers=2, lora_dropout=0.2).to(device), fuse_norms=True)
    torch.manual_seed(5)
    want, _ = ran(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    got, ops = ran(model)
    assert ops["lora_qkv"] == 4, "the layers were not recomputed"
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"]], ids=["all", "q-v"])
def test_compiles(targets, device):
    """One full graph, the same numbers."""
    model = swapped(model_of(targets=targets).to(device), fuse_norms=True)
    want, _ = ran(model)
    torch._dynamo.reset()
    with backends.use_backend("triton"):
        got = step(model, call=torch.compile(model, fullgraph=True, backend="aot_eager"))
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_generates(device):
    """Decoding with a cache gives stock tokens, with kernels forced and without."""
    model = model_of(layers=2).to(device).eval()
    fused = swapped(model, fuse_norms=True)
    ids = IDS.to(device)
    want = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    with backends.use_backend("triton"), backends.record() as calls:
        assert torch.equal(fused.generate(input_ids=ids, max_new_tokens=5, do_sample=False), want)
    assert ("lora_qkv", "triton") in calls
    assert torch.equal(fused.generate(input_ids=ids, max_new_tokens=5, do_sample=False), want)


def test_attention_is_captured(device):
    """output_attentions looks for the class; the fused one is found."""
    model = model_of(config={"attn_implementation": "eager"}).to(device).eval()
    fused = swapped(model, fuse_norms=True)
    with backends.use_backend("triton"), torch.no_grad():
        out = fused(input_ids=IDS.to(device), output_attentions=True, output_hidden_states=True)
    want = model(input_ids=IDS.to(device), output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == len(want.attentions) == 1 and len(out.hidden_states) == len(want.hidden_states)
    torch.testing.assert_close(out.attentions[0], want.attentions[0])


def test_reported(device):
    """Blocks are named with their backend; without adapters they are not mentioned; layers only when asked for."""
    model = model_of(layers=2).to(device)
    report = str(vlkernels.swap(model))
    assert "LlamaAttention x 2" in report and "LlamaMLP x 2" in report and "LlamaDecoderLayer" not in report
    assert "LlamaDecoderLayer x 2" in str(vlkernels.swap(model, fuse_norms=True))
    assert "LlamaAttention" not in str(vlkernels.swap(model_of(targets=["o_proj"]).to(device).unload()))


@pytest.mark.parametrize("norm_saves, most", [("transformers", 0.55), ("as Liger's", 0.48), ("fused", 0.40)])
def test_saved_bytes(norm_saves, most, device):
    """A layer of Llama-7B's proportions in bf16, r = 128 of 4096, p = 0.05, against peft's 241 KB a token."""
    shrink, tokens = 32, 256
    sizes = {"hidden_size": 4096 // shrink, "intermediate_size": 11008 // shrink, "num_attention_heads": 1,
             "num_key_value_heads": 1, "head_dim": 128, "attn_implementation": "sdpa"}  # fmt: skip
    model = model_of(
        dtype=torch.bfloat16, config=sizes, r=128 // shrink, lora_alpha=256 // shrink, lora_dropout=0.05
    ).to(device)
    layer = model.get_submodule("base_model.model.model.layers.0")
    if norm_saves == "as Liger's":
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, _LeanNorm(getattr(layer, name)))
    vlkernels.swap(layer, fuse_norms=norm_saves == "fused")
    x = torch.randn(1, tokens, 4096 // shrink, device=device, dtype=torch.bfloat16, requires_grad=True)
    position = torch.arange(tokens, device=device)[None]
    rotary = model.get_submodule("base_model.model.model.rotary_emb")(x, position)

    def forward():
        with torch.autocast(device, torch.bfloat16), backends.use_backend("triton"):
            return layer(x, position_embeddings=rotary)

    apart = [*model.parameters(), *rotary]
    saved = meter.saved_bytes(forward, apart) / tokens * shrink / 1024
    assert 0.9 * most * 241 < saved <= most * 241


class _LeanNorm(nn.Module):
    """RMSNorm that keeps its input and a number a row, as liger_kernel.ops.rms_norm does."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return _LeanNormFunction.apply(x, self.weight, self.eps)


class _LeanNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, dy):
        raise NotImplementedError


def test_four_bits(device):
    """Blocks over bitsandbytes' 4-bit layers: one node a group, the numbers of the swapped layers one by one."""
    bnb = pytest.importorskip("bitsandbytes")
    plain = model_of(config={"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}).base_model.unload()
    for block in (m for m in plain.modules() if type(m).__name__ in ("LlamaAttention", "LlamaMLP")):
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                packed = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, False, torch.float32, quant_type="nf4"
                )
                packed.load_state_dict(child.state_dict())
                setattr(block, name, packed.to(device))
    plain.is_loaded_in_4bit = True
    model = peft.get_peft_model(plain.to(device), peft.LoraConfig(r=4, target_modules=ALL, init_lora_weights=False))
    step(model.train())  # bitsandbytes settles its compute dtype in the first call
    vlkernels.swap(model, include="Linear4bit")
    want, ops = ran(model)
    assert ops == {"lora_linear": 7}
    vlkernels.unswap(model)
    vlkernels.swap(model, fuse_norms=True)
    got, ops = ran(model)
    assert ops == {"lora_qkv": 1, "lora_linear": 1, "lora_mlp": 1}
    for name in want:
        torch.testing.assert_close(got[name], want[name])
