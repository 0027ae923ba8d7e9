"""Swapping peft's LoRA layers inside transformers models: nothing that users rely on may change."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import vlkernels
from vlkernels import backends
from vlkernels.testing import meter
from vlkernels.testing.compare import ulp

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PREFIX = "base_model.model.model.layers.0."


def llama(dtype=torch.float32, layers=1, **lora):
    """A small Llama with LoRA on every linear of the blocks, B not zero."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"} | lora
    model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=options.pop("cast", True))
    fill(model)
    return model


def fill(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def batch():
    return torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(2))


def step(model, autocast=None):
    """(loss, gradients by name) of one training step."""
    model.zero_grad(set_to_none=True)
    ids = batch().to(model.device)
    with torch.autocast(ids.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(got, want, exact, dtype):
    """The rule on a whole step: error to float64 at most twice the stock model's, plus 4 ulp."""
    for name in want:
        scale = float(exact[name].abs().max())
        limit = 2 * float((want[name].double() - exact[name]).abs().max()) + 4 * ulp(scale, dtype)
        error = float((got[name].double() - exact[name]).abs().max())
        assert error <= limit, (name, error, limit, scale)


def layer(dtype=torch.float32, cast=True, conv1d=False, bias=True, **lora):
    """One lora.Linear and its owner."""
    torch.manual_seed(0)

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            kind = transformers.pytorch_utils.Conv1D(26, 20) if conv1d else nn.Linear(20, 26, bias=bias)
            self.fc = kind

        def forward(self, x):
            return self.fc(x)

    options = {"r": 4, "lora_alpha": 8, "target_modules": ["fc"], "fan_in_fan_out": conv1d} | lora
    owner = peft.get_peft_model(Owner().to(dtype), peft.LoraConfig(**options), autocast_adapter_dtype=cast)
    fill(owner)
    return owner


def x_like(owner, rows=33):
    fc = owner.base_model.model.fc
    x = torch.randn(rows, 20, generator=torch.Generator().manual_seed(3))
    return x.to(fc.base_layer.weight.device, fc.base_layer.weight.dtype)


def test_report_and_unswap(device):
    model = llama().to(device)
    classes = {path: type(m) for path, m in model.named_modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stock = step(model)
    report = vlkernels.swap(model)
    assert len(report) == 9 and "9 modules swapped, 0 left" in str(report) and "q_proj" in str(report)
    assert {e.backend for e in report.entries} <= {"triton", "cuda"}
    assert "vlkernels_fused=True" in repr(model) and "Linear(" in repr(model)
    q = model.get_submodule(PREFIX + "self_attn.q_proj")
    assert isinstance(q, peft.tuners.lora.layer.Linear) and type(q).__name__ == type(q).__qualname__ == "Linear"
    assert list(model.state_dict()) == list(before)
    assert vlkernels.unswap(model) == 9
    assert {path: type(m) for path, m in model.named_modules()} == classes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = step(model)
    assert torch.equal(stock[0], again[0]) and all(torch.equal(stock[1][k], again[1][k]) for k in stock[1])
    assert "swapped back" in str(report)


@pytest.mark.parametrize(
    "dtype, cast, autocast",
    [
        (torch.float32, True, None),
        (torch.bfloat16, False, None),
        (torch.bfloat16, True, None),
        (torch.float32, True, torch.bfloat16),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float16, True, None),
    ],
    ids=["fp32", "bf16", "bf16+fp32", "amp", "bf16+fp32 amp", "fp16+fp32"],
)
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_layer_against_stock(dtype, cast, autocast, conv1d, device):
    """One swapped layer against stock peft in every dtype mode: outputs and gradients by the rule; kernels by name."""
    owner = layer(dtype, cast, conv1d, lora_bias=not conv1d).to(device)
    x = x_like(owner).requires_grad_()
    dy = torch.randn(33, 26, generator=torch.Generator().manual_seed(4)).to(device)

    def run(model, x):
        model.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            y = model(x)
        y.backward(dy.to(autocast or dtype).to(y.dtype))
        return {"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    exact = run(copy.deepcopy(owner).double(), x.detach().double().requires_grad_())
    want = {k: v.clone() for k, v in run(owner, x).items()}
    vlkernels.swap(owner)
    with meter.launches() as counts:
        got = run(owner, x)
    assert {"lora_down_kernel", "lora_update_kernel", "lora_outer_kernel"} <= set(counts)
    assert {n: v.dtype for n, v in got.items()} == {n: v.dtype for n, v in want.items()}
    for name in want:
        close({name: got[name]}, {name: want[name]}, exact, want[name].dtype if autocast is None else autocast)


def test_lora_compute_base(device):
    """lora_compute="base" takes the low-rank branch in bf16; the default keeps fp32 adapters exact."""
    owner = layer(torch.bfloat16).to(device)
    x = x_like(owner)

    def grads():
        owner.zero_grad()
        owner(x).float().square().sum().backward()
        return owner.base_model.model.fc.lora_A["default"].weight.grad.clone()

    stock = grads()
    vlkernels.swap(owner)
    exact = grads()
    vlkernels.swap(owner, lora_compute="base")
    base = grads()
    scale = stock.abs().max()
    assert (exact - stock).abs().max() < (base - stock).abs().max()
    assert (base - stock).abs().max() / scale < 8 * torch.finfo(torch.bfloat16).eps


def test_dropout_statistics(device):
    """p > 0: kept share and expectation as in nn.Dropout; another mask each call, the same for the same seed."""
    owner = layer(lora_dropout=0.3, bias=False).to(device)
    fc = owner.base_model.model.fc
    with torch.no_grad():
        fc.base_layer.weight.zero_()
    vlkernels.swap(owner)
    x = torch.ones(64, 20, device=device)
    torch.manual_seed(5)
    first, second = owner(x), owner(x)
    torch.manual_seed(5)
    assert torch.equal(first, owner(x)) and not torch.equal(first, second)
    owner.eval()
    plain = owner(x)
    owner.train()
    mean = torch.stack([owner(x) for _ in range(30)]).mean((0, 1))
    # 1,920 draws of each of 20 columns: six standard errors
    a, b = fc.lora_A["default"].weight, fc.lora_B["default"].weight
    sigma = 2 * (b @ a).square().sum(1).sqrt() * (0.3 / 0.7) ** 0.5 / 1920**0.5
    assert ((mean - plain[0]).abs() < 6 * sigma).all()


def test_reference_is_stock_bit_for_bit(device):
    """On the reference a swapped model runs peft's own forward, its use of torch's generator included."""
    model = llama(lora_dropout=0.2).to(device).train()
    torch.manual_seed(7)
    stock = step(model)
    vlkernels.swap(model)
    with vlkernels.use_backend("reference"):
        torch.manual_seed(7)
        swapped = step(model)
    assert torch.equal(stock[0], swapped[0]) and all(torch.equal(stock[1][k], swapped[1][k]) for k in stock[1])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant, device):
    """With dropout, checkpointing recomputes with the same masks: the gradients of the run without it, bit for bit."""
    model = llama(lora_dropout=0.2, layers=2).to(device).train()
    model.enable_input_require_grads()
    vlkernels.swap(model)
    torch.manual_seed(11)
    plain = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(11)
    with meter.launches() as counts:
        checkpointed = step(model)
    assert torch.equal(plain[0], checkpointed[0])
    assert all(torch.equal(plain[1][k], checkpointed[1][k]) for k in plain[1])
    # q, k, v share one pass over x; so do gate and up
    assert counts["lora_down_kernel"] == 2 * 2 * 4, "the blocks were not recomputed"


def test_deepcopy_and_pickle(device):
    owner = layer().to(device)
    vlkernels.swap(owner)
    x = x_like(owner)
    want = owner(x)
    twin = copy.deepcopy(owner)
    assert type(twin.base_model.model.fc) is type(owner.base_model.model.fc)
    assert torch.equal(twin(x), want)
    with torch.no_grad():
        twin.base_model.model.fc.lora_B["default"].weight.zero_()
    assert torch.equal(owner(x), want), "the copy shares state with the original"
    buffer = io.BytesIO()
    torch.save(owner.base_model.model.fc, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), want)
    assert pickle.loads(pickle.dumps(type(owner.base_model.model.fc))) is type(owner.base_model.model.fc)


def test_the_report_follows_the_state(device):
    """Printing the report looks at the layers as they are then."""
    owner = layer().to(device)
    report = vlkernels.swap(owner)
    with owner.disable_adapter():
        assert "disabled" in str(report)
    owner.merge_adapter()
    assert "merged" in str(report)
    owner.unmerge_adapter()
    assert "merged" not in str(report) and report.entries[0].backend in ("triton", "cuda")


@pytest.mark.parametrize("where", ["base hook", "A hook", "instance forward", "subclass", "parametrised"])
def test_children_that_changed(where, device):
    """A hook, an own forward or another class on a child: peft's own forward runs, and the report names the child."""
    owner = layer().to(device)
    fc = owner.base_model.model.fc
    x = x_like(owner)
    report = vlkernels.swap(owner)
    seen = []
    if where == "base hook":
        fc.base_layer.register_forward_hook(lambda *_: seen.append(1))
    elif where == "A hook":
        fc.lora_A["default"].register_forward_pre_hook(lambda *_: seen.append(1))
    elif where == "instance forward":
        original = fc.base_layer.forward
        fc.base_layer.forward = lambda x: seen.append(1) or original(x)
    elif where == "subclass":

        class Noisy(nn.Linear):
            def forward(self, x):
                seen.append(1)
                return super().forward(x)

        fc.lora_B["default"].__class__ = Noisy
    else:
        nn.utils.parametrizations.weight_norm(fc.base_layer)
        seen.append(1)
    with meter.launches() as counts:
        owner(x)
    assert seen and not counts
    assert report.entries[0].backend == "stock" and report.entries[0].reason


def test_unknown_variants_are_left(device):
    """A variant that is not DoRA runs as stock, is reported, and gives stock's numbers."""
    owner = layer(init_lora_weights="mica").to(device)
    x = x_like(owner)
    want = owner(x)
    report = vlkernels.swap(owner)
    assert torch.equal(owner(x), want)
    assert "MiCA" in str(report)


def test_float64_falls_back_and_says_why(device):
    owner = layer().double().to(device)
    report = vlkernels.swap(owner)
    assert report.entries[0].backend == "reference" and "float64" in report.entries[0].reason
    owner(x_like(owner).double()).sum().backward()


def test_generation(device):
    """Left to itself, greedy decoding with the cache takes no kernel, for few rows; the tokens are stock's."""
    model = llama().to(device).eval()
    ids = batch()[:1].to(device)
    kw = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    want = model.generate(ids, **kw)
    vlkernels.swap(model)
    with meter.launches() as counts:
        assert torch.equal(model.generate(ids, **kw), want)
    assert not counts


def test_accelerate_hooks(device):
    """A module that carries an accelerate hook keeps it, and runs fused beneath it."""
    hooks = pytest.importorskip("accelerate.hooks")
    owner = layer().to(device)
    fc = owner.base_model.model.fc
    seen = []

    class Note(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module))
            return args, kwargs

    x = x_like(owner)
    want = owner(x)
    hooks.add_hook_to_module(fc, Note())
    vlkernels.swap(owner)
    with meter.launches() as counts:
        got = owner(x)
    assert seen and counts
    torch.testing.assert_close(got, want)
    vlkernels.unswap(owner)
    with meter.launches() as counts:
        assert torch.equal(owner(x), want) and not counts
    hooks.remove_hook_from_module(fc)
    assert torch.equal(owner(x), want)


def test_nothing_to_swap():
    model = nn.Sequential(nn.Linear(3, 4))
    report = vlkernels.swap(model)
    assert not report and "nothing to swap" in str(report) and type(model[0]) is nn.Linear
    with pytest.raises(LookupError, match="nothing was swapped"):
        vlkernels.swap(model, strict=True)


def test_include_exclude():
    model = llama()
    report = vlkernels.swap(model, include="*self_attn*", exclude=["*q_proj"])
    # the block too, which then leaves its projections to themselves
    assert len(report) == 4 and report.entries[0].reason == "q_proj is not swapped"
    assert {e.reason for e in report.entries if not e.swapped} == {"not among include", "among exclude"}


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: vlkernels.swap("model"), TypeError, "torch.nn.Module"),
        (lambda: vlkernels.swap(nn.Linear(2, 2), lora_compute="fp8"), ValueError, "accepted"),
        (lambda: vlkernels.swap(nn.Linear(2, 2), include=[]), TypeError, "patterns"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_swap_twice_is_swap_once():
    owner = layer()
    vlkernels.swap(owner)
    assert len(vlkernels.swap(owner)) == 1
    assert vlkernels.unswap(owner) == 1 and vlkernels.unswap(owner) == 0


def test_forced_backend_that_refuses(device):
    """A forced backend that cannot run is an error with its reason, never a silent fallback."""
    owner = layer().double().to(device)
    vlkernels.swap(owner)
    with vlkernels.use_backend("triton"), pytest.raises(backends.BackendRefused, match="float64"):
        owner(x_like(owner).double())
