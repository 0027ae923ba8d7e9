"""LLaMA-Adapter's, peft's and QaP's modules: zero gates, caches, casts, low-rank pairs, and errors at the door."""

import copy

import pytest
import torch
from equations import on_triton
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlkernels import backends, use_backend
from vlkernels.modules import (
    AdaptionPromptAttention,
    LlamaAdapterAttention,
    LlamaAdapterBlock,
    LlamaAdapterPrompts,
    LlamaAdapterVisualPrompts,
    LoRALinear,
    QaPLayer,
)
from vlkernels.modules.llama_adapter import interleaved_rotary
from vlkernels.modules.lora_blocks import rotary
from vlkernels.testing import compare

D, HEADS, L = 24, 2, 7
V2 = {"bias": True, "lora_rank": 3, "new_gate": True}
KINDS = {
    "v1": {"half_gate": True},
    "v2": V2,
    "grouped": {"kv_heads": 1},
    "chat": {"scale": True, "shift": True, "half_gate": True},
}


def attention(kind="v2", seed=0, **options) -> LlamaAdapterAttention:
    torch.manual_seed(seed)
    found = LlamaAdapterAttention(D, HEADS, **KINDS[kind], **options)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.3)
    return found


def inputs(length=L, prompts=4, seed=1):
    torch.manual_seed(seed)
    return torch.randn(2, length, D), interleaved_rotary(length, D // HEADS), torch.randn(2, prompts, D)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_gate_is_no_prefix(kind):
    module, (x, rotation, prompt) = attention(kind), inputs()
    nn.init.zeros_(module.gate)
    assert torch.equal(module(x, *rotation, prompt=prompt), module(x, *rotation))


@on_triton
def test_zero_gates_on_kernels():
    module, (x, rotation, prompt) = attention("v1"), inputs()
    qap, adaption = QaPLayer(D, HEADS, 10), AdaptionPromptAttention(D, HEADS, 3)
    nn.init.zeros_(module.gate)
    with use_backend("triton"), backends.record() as calls:
        assert torch.equal(module(x, *rotation, prompt=prompt), module(x, *rotation))
        assert torch.equal(qap(prompt, torch.randn(2, 5, 10)), prompt)
        cos, sin = rotary(torch.arange(L).expand(2, -1), D // HEADS)
        y = adaption(x, cos, sin)
        adaption.adaption_prompt.data.normal_()
        assert torch.equal(adaption(x, cos, sin), y)
    assert {name for name, _ in calls} == {"prefix_attention", "cross_attention"}


@on_triton
@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
def test_half_precision(kind, dtype):
    """Beside the same module on the reference, against float64."""
    amp = dtype == "autocast"
    module, (x, rotation, prompt) = attention(kind), inputs()
    if not amp:
        module, x, prompt = module.to(dtype), x.to(dtype), prompt.to(dtype)

    def results(m, backend, *args, autocast=False):
        x, prompt = (t.detach().clone().requires_grad_() for t in args)
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = m(x, *rotation, prompt=prompt)
        generator = torch.Generator().manual_seed(0)
        y.backward(torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype))
        grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        return {"y": y, "dx": x.grad, "dprompt": prompt.grad} | grads

    usual = results(copy.deepcopy(module), "reference", x, prompt, autocast=amp)
    got = results(copy.deepcopy(module), "triton", x, prompt, autocast=amp)
    exact = results(copy.deepcopy(module).double(), "reference", x.double(), prompt.double())
    assert set(got) == set(exact)
    for name in exact:
        error = compare.beside(name, got[name], usual[name], exact[name], torch.bfloat16)
        assert error.ok, error


def test_a_cache_gives_the_same_rows():
    """Token by token after a first part: the prefix is beside the cache, not in it."""
    module, (x, (cos, sin), prompt) = attention("grouped").double(), inputs()
    x, prompt = x.double(), prompt.double()
    want = module(x, cos, sin, prompt=prompt)
    empty = torch.zeros(2, 0, 1, D // HEADS, dtype=torch.float64)
    past, rows = (empty, empty), []
    for begin, end in ((0, 3), (3, 5), (5, 6), (6, 7)):
        y, past = module(x[:, begin:end], cos[begin:end], sin[begin:end], prompt=prompt, past=past)
        rows.append(y)
    assert past[0].shape == (2, L, 1, D // HEADS)
    difference = float((torch.cat(rows, 1) - want).detach().abs().max())
    assert difference <= 64 * compare.ulp(float(want.detach().abs().max()), torch.float64)


def test_the_cast_of_the_gate():
    module, (x, rotation, prompt) = attention("v1"), inputs()
    with torch.no_grad():
        module.gate.fill_(0.1234567)
        rounded = module(x, *rotation, prompt=prompt)
        module.half_gate = False
        assert not torch.equal(module(x, *rotation, prompt=prompt), rounded)
        module.gate.copy_(module.gate.tanh().half().double().atanh())
        near = module(x, *rotation, prompt=prompt)
    assert float((near - rounded).abs().max()) <= 16 * compare.ulp(float(rounded.abs().max()), torch.float32)


def test_one_row_ignores_new_gate():
    """As upstream, whose one-row branch has no new_gate."""
    module, (x, rotation, prompt) = attention("v2"), inputs(prompts=1)
    y = module(x, *rotation, prompt=prompt)
    module.new_gate.data.fill_(7.0)
    assert torch.equal(module(x, *rotation, prompt=prompt), y)


def test_a_changed_child_acts():
    """With a hook, or something else in its place, the linears run one by one and give the same numbers."""
    torch.manual_seed(0)
    block, (x, rotation, prompt) = LlamaAdapterBlock(D, HEADS, 32, **V2).double(), inputs()
    for n, p in block.named_parameters():
        if "l2" in n or "gate" in n:
            nn.init.normal_(p)
    x, prompt = x.double(), prompt.double()
    with backends.record() as calls:
        want = block(x, *rotation, prompt=prompt).detach()
    fused = {"lora_qkv", "lora_linear", "lora_mlp"}
    assert {name for name, _ in calls} == fused | {"prefix_attention"}
    limit = 64 * compare.ulp(float(want.abs().max()), torch.float64)
    for path in ("attention.wq", "attention.lora_wo_l1", "feed_forward.w3"):
        twin, seen = copy.deepcopy(block), []
        twin.get_submodule(path).register_forward_hook(lambda m, args, y, seen=seen: seen.append(1))
        assert float((twin(x, *rotation, prompt=prompt) - want).detach().abs().max()) <= limit and seen, path
    twin = copy.deepcopy(block)
    twin.attention.wv = LoRALinear.from_plain(twin.attention.wv, 2)
    nn.init.normal_(twin.attention.wv.adapters["default"].b)
    assert float((twin(x, *rotation, prompt=prompt) - want).detach().abs().max()) > limit


@on_triton
def test_graph_and_checkpointing():
    module, (x, rotation, prompt) = attention("v1"), inputs()
    call = lambda x: module(x, *rotation, prompt=prompt)  # noqa: E731
    x.requires_grad_()
    torch._dynamo.reset()
    with use_backend("triton"):
        want = torch.autograd.grad(call(x).sum(), [x, *module.parameters()])
        y = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        again = torch.autograd.grad(checkpoint(call, x, use_reentrant=False).sum(), [x, *module.parameters()])
        assert torch.equal(y, call(x))
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))


def test_prompts():
    prompts = LlamaAdapterPrompts(3, 4, D)
    alone = prompts()
    assert [tuple(p.shape) for p in alone] == [(1, 4, D)] * 3
    assert torch.equal(alone[1][0], prompts.adapter_query.weight[4:8])
    visual = torch.randn(2, 4, D)
    assert torch.equal(prompts(visual)[2], prompts.adapter_query.weight[8:] + visual)
    assert torch.equal(prompts(visual[:, :1])[0], prompts.adapter_query.weight[:4] + visual[:, :1])  # v1
    v2 = LlamaAdapterVisualPrompts(10, D, 2, v_embed_dim=16, v_depth=1, v_num_heads=2, query_len=3)
    x = torch.randn(2, 5, 10)
    assert torch.equal(v2(x)[1], v2.adapter_query.weight[3:] + v2.query(x))


def test_qap_equation():
    layer = QaPLayer(D, HEADS, 10).double()
    nn.init.normal_(layer.gate)
    p, x = torch.randn(2, 1, D).double(), torch.randn(2, 5, 10).double()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    q, k, v = (
        t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (layer.q_proj(p), layer.k_proj(x), layer.v_proj(x))
    )
    s = (q @ k.transpose(2, 3) * (D // HEADS) ** -0.5).masked_fill(~mask[:, None, None], -torch.inf)
    want = p + layer.gate * layer.o_proj((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
    difference = float((layer(p, x, mask) - want).detach().abs().max())
    assert difference <= 64 * compare.ulp(float(want.detach().abs().max()), torch.float64)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: LlamaAdapterAttention(D, 5), "multiple of the number of heads"),
        (lambda: LlamaAdapterAttention(D, 4, kv_heads=3), "heads a multiple of kv_heads"),
        (lambda: LlamaAdapterAttention(D, 8), "an even head dim"),
        (lambda: LlamaAdapterAttention(D, 2, lora_rank=-1), "lora_rank is -1"),
        (lambda: LlamaAdapterPrompts(2, 65, D), "1 to 64 rows"),
        (lambda: AdaptionPromptAttention(D, 2, 65), "1 to 64 rows"),
        (lambda: AdaptionPromptAttention(D, 2, 3, kv_heads=4), "heads a multiple of kv_heads"),
        (lambda: attention()(*_bad(prompt=torch.zeros(2, 65, D))), "prompt has 65 rows; accepted: 1 to 64"),
        (lambda: attention()(*_bad(prompt=torch.zeros(3, 4, D))), "with B = 2, D = 24"),
        (lambda: attention()(*_bad(prompt=torch.zeros(2, 4, D + 1))), "with B = 2, D = 24"),
        (lambda: attention()(*_bad(x=torch.zeros(2, 3, D + 1))), "with C = 24"),
        (lambda: attention()(*_bad(x=torch.zeros(2, 3, D))), r"cos has shape .*\(3, 6\)"),
        (lambda: LlamaAdapterPrompts(2, 4, D)(torch.zeros(2, 3, D)), "or one row for all"),
        (lambda: QaPLayer(D, 2, 10)(torch.zeros(2, 1, D), torch.zeros(2, 5, 9)), "with C = 10"),
    ],
)
def test_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def _bad(x=None, prompt=None):
    good, rotation, _ = inputs()
    return (good if x is None else x), *rotation, None, prompt
