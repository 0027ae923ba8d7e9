"""peft's AdaptionPrompt on Llama and Mistral, swapped: the rule beside stock peft, and that nothing else changes."""

import copy
import pickle

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import vlkernels  # noqa: E402
from vlkernels.testing import compare, meter  # noqa: E402

interpreted = pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="runs in the interpreter")
IDS = torch.randint(0, 19, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 9, [1] * 7 + [0] * 2])


def model(family="Llama", gate=0.7, adapter_len=5, seed=0, **options):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=19, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **options,
    )  # fmt: skip
    base = getattr(transformers, f"{family}ForCausalLM")(config)
    prompt = peft.AdaptionPromptConfig(adapter_len=adapter_len, adapter_layers=1, task_type="CAUSAL_LM")
    found = peft.get_peft_model(base, prompt)
    for name, parameter in found.named_parameters():
        if "adaption_gate" in name:
            torch.nn.init.constant_(parameter, gate)
    return found


def step(m, dtype=None) -> dict:
    m.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        out = m(input_ids=IDS, attention_mask=MASK, labels=IDS)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}


@interpreted
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
def test_beside_peft(family, dtype):
    """Logits and gradients obey the rule beside peft's in the same dtypes, and the kernels ran."""
    amp = dtype == "autocast"
    exact = step(model(family).double() if amp else model(family).to(dtype).double())
    m = model(family) if amp else model(family).to(dtype)
    usual = step(m, dtype if amp else None)
    report = vlkernels.swap(m, strict=True)
    assert report.swapped == ["base_model.model.model.layers.1.self_attn"]
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        got = step(m, dtype if amp else None)
    assert counts == {f"prefix_attention_{k}_kernel": 1 for k in ("fwd", "bwd", "sum")}
    for name in exact:
        computed = torch.bfloat16 if amp else None
        error = compare.beside(name, got[name], usual[name], exact[name], computed)
        assert error.ok, error


def test_reference_is_stock():
    m = model()
    usual, keys = step(m), list(m.state_dict())
    vlkernels.swap(m)
    with vlkernels.use_backend("reference"):
        got = step(m)
    assert all(torch.equal(got[n], usual[n]) for n in usual)
    assert list(m.state_dict()) == keys
    assert vlkernels.unswap(m) == 3
    assert all(torch.equal(t, usual[n]) for n, t in step(m).items())


@interpreted
def test_zero_gates_leave_the_base_model():
    m = model(gate=0.0)
    with m.disable_adapter(), torch.no_grad():
        plain = m(input_ids=IDS, attention_mask=MASK).logits
    vlkernels.swap(m)
    with vlkernels.use_backend("triton"), torch.no_grad():
        assert torch.equal(m(input_ids=IDS, attention_mask=MASK).logits, plain)


@interpreted
def test_copies_and_checkpointing():
    m = model()
    vlkernels.swap(m)
    with vlkernels.use_backend("triton"):
        want = step(m)
        for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            assert all(torch.equal(t, want[n]) for n, t in step(twin).items())
        m.enable_input_require_grads()
        m.base_model.gradient_checkpointing_enable({"use_reentrant": False})
        m.train()
        assert all(torch.equal(t, want[n]) for n, t in step(m).items() if n in want)


@interpreted
def test_generation_with_a_cache():
    m = model().eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = m.generate(input_ids=IDS[:1], **options)
    vlkernels.swap(m)
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        assert torch.equal(m.generate(input_ids=IDS[:1], **options), want)
    assert counts["prefix_attention_fwd_kernel"] == 4


@interpreted
@pytest.mark.parametrize(
    "change, says",
    [
        (lambda: model(attention_bias=True), "o_proj has a bias, which peft adds twice"),
        (lambda: model(adapter_len=65), "a prompt of 65 rows; the op takes 1 to 64"),
        (lambda: hooked(model()), "o_proj carries hooks"),
    ],
)
def test_what_stays_stock(change, says):
    m = change()
    usual = step(m)
    report = vlkernels.swap(m)
    assert says in str(report)
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        got = step(m)
    assert not counts and all(torch.equal(got[n], usual[n]) for n in usual)


def hooked(m):
    m.get_submodule("base_model.model.model.layers.1.self_attn.model.o_proj").register_forward_hook(lambda *_: None)
    return m


@interpreted
def test_one_graph():
    m = model()
    vlkernels.swap(m)
    layer = m.get_submodule("base_model.model.model.layers.1.self_attn")
    x, position = torch.randn(2, 9, 32), (torch.randn(2, 9, 8), torch.randn(2, 9, 8))
    call = lambda x: layer(hidden_states=x, position_embeddings=position, attention_mask=None)[0]  # noqa: E731
    torch._dynamo.reset()
    with vlkernels.use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        dtype = call(x).dtype
    with vlkernels.use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        assert call(x).dtype == dtype == torch.float32  # of peft's rotated queries
    with vlkernels.use_backend("triton"):
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


def test_gpt2_is_left_with_a_reason():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=19)
    prompt = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    m = peft.get_peft_model(transformers.GPT2LMHeadModel(config), prompt)
    assert "after the output projection" in str(vlkernels.swap(m))


def test_our_module_is_pefts():
    """Around the same projections, in float64 but for peft's float32 softmax; a bias of o_proj is refused."""
    from vlkernels.modules import AdaptionPromptAttention

    layer = model().double().get_submodule("base_model.model.model.layers.1.self_attn")
    ours = AdaptionPromptAttention.from_plain(layer.model, 5)
    assert ours.model.q_proj is layer.model.q_proj
    ours.load_state_dict(layer.state_dict(), strict=True)
    x, cos, sin = (torch.randn(2, 9, width, dtype=torch.float64) for width in (32, 8, 8))
    want = layer(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)[0].detach()
    difference = float((ours(x, cos, sin) - want).detach().abs().max())
    assert difference <= compare.ulp(float(want.abs().max()), torch.float32)
    with pytest.raises(ValueError, match="o_proj has a bias"):
        biased = model(attention_bias=True).get_submodule("base_model.model.model.layers.1.self_attn")
        AdaptionPromptAttention.from_plain(biased.model, 5)
