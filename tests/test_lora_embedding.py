"""LoRAEmbedding beside peft's layer: numbers, merging, what F.embedding's options do, saved adapters."""

import copy

import pytest
import torch
from torch import nn

import vlkernels
from vlkernels import backends
from vlkernels.integrations.checkpoints import load_peft_adapter, to_ours, to_upstream
from vlkernels.modules import DoRAEmbedding, LoRAEmbedding, LoRALinear
from vlkernels.modules.dora import cached_norms
from vlkernels.testing.compare import ulp

V, D = 23, 14
ADAPTERS = {"a": {"r": 3, "lora_alpha": 8}, "b": {"r": 9, "lora_alpha": 2, "use_rslora": True}}


class Scaled(nn.Embedding):
    """As Gemma 3's: the result times a scalar buffer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(5.6568), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def pair(plain=None, dtype=torch.float32, adapter_dtype=None, dora=False):
    """peft's layer with two random adapters, both active, and ours with the same values."""
    peft = pytest.importorskip("peft")
    base = (nn.Embedding(V, D) if plain is None else plain).to(dtype)
    model = nn.ModuleDict({"layer": base})
    ours = (DoRAEmbedding if dora else LoRAEmbedding).from_plain(copy.deepcopy(base), 1)
    ours.remove_adapter("default")
    for name, options in ADAPTERS.items():
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["layer"], use_dora=dora, **options), model, name)
        ours.add_adapter(
            name,
            options["r"],
            alpha=options["lora_alpha"],
            rslora=options.get("use_rslora", False),
            adapter_dtype=adapter_dtype,
        )
    theirs = model["layer"]
    theirs.set_adapter(list(ADAPTERS))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(adapter_dtype or dtype)
    ours.load_state_dict(to_ours(module_id(dora), theirs.state_dict()))
    ours.active = tuple(ADAPTERS)
    for layer in (theirs, ours):
        layer.requires_grad_()
    return theirs, ours


def module_id(dora=False):
    return "dora.embedding" if dora else "lora.embedding"


def ids(*shape):
    # some rows several times, some never
    return torch.randint(0, V // 2, shape, generator=torch.Generator().manual_seed(3))


def gradients(layer, x, dy):
    layer.zero_grad()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def assert_as_exact(name, got, usual, exact):
    got, usual, exact = got.detach(), usual.detach(), exact.detach()
    assert got.dtype == usual.dtype and got.shape == exact.shape, name
    error = (got.double() - exact).abs().max()
    limit = 2 * (usual.double() - exact).abs().max() + 4 * ulp(float(exact.abs().max()), got.dtype)
    assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"


@pytest.mark.filterwarnings("ignore:Already found")
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "embed_scale"])
@pytest.mark.parametrize(
    "dtype, adapter_dtype, autocast",
    [
        (torch.float32, None, False),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, None, False),
        (torch.float32, None, True),
    ],
    ids=["fp32", "bf16+fp32", "bf16", "amp"],
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_equals_peft(dtype, adapter_dtype, autocast, scaled, dora):
    x, worst, scale = ids(4, 5), {}, {}
    for seed in reversed(range(5)):  # the baseline is peft's error on five draws
        torch.manual_seed(seed)
        theirs, ours = pair(Scaled(V, D) if scaled else None, dtype, adapter_dtype, dora)
        dy = torch.randn(4, 5, D).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            usual, mine = gradients(theirs, x, dy), gradients(ours, x, dy)
        exact = gradients(copy.deepcopy(theirs).double(), x, dy.double())
        for name, truth in exact.items():
            worst[name] = max(worst.get(name, 0.0), float((usual[name].double() - truth).abs().max()))
            scale[name] = max(scale.get(name, 0.0), float(truth.abs().max()))
    mine = {"y": mine.pop("y")} | to_upstream(module_id(dora), mine)
    assert set(mine) == set(usual) and "lora_embedding_A.b" in mine and "base_layer.weight" in mine
    for name in usual:
        assert mine[name].dtype == usual[name].dtype
        error = (mine[name].double() - exact[name]).abs().max()
        assert error <= 2 * worst[name] + 4 * ulp(scale[name], mine[name].dtype), name
    if dtype == torch.float32:
        assert all(torch.equal(ours.delta_weight(name), theirs.get_delta_weight(name)) for name in ADAPTERS)


@pytest.mark.filterwarnings("ignore:Already found")
@pytest.mark.parametrize("options", [{"padding_idx": 2}, {"max_norm": 1.5}, {"scale_grad_by_freq": True}], ids=str)
def test_options_of_the_lookup_are_pefts(options):
    """padding_idx stops gradients, max_norm shortens rows of E and columns of A in place: as in peft, bit for bit."""
    theirs, ours = pair(nn.Embedding(V, D, **options))
    x, dy = torch.tensor([1, 2, 2, 9, 1]), torch.randn(5, D)
    usual, mine = gradients(theirs, x, dy), gradients(ours, x, dy)
    mine = {"y": mine.pop("y")} | to_upstream("lora.embedding", mine)
    assert all(torch.equal(mine[name], usual[name]) for name in usual)
    after = to_upstream("lora.embedding", ours.state_dict())
    assert all(torch.equal(after[name], value) for name, value in theirs.state_dict().items())
    if "padding_idx" in options:
        assert not mine["base_layer.weight"][2].any() and not mine["lora_embedding_A.a"][:, 2].any()
        assert mine["lora_embedding_A.a"][:, 1].any()


@pytest.mark.filterwarnings("ignore:Already found")
def test_merge_unmerge_and_active():
    theirs, ours = pair()
    x = ids(3, 4)
    before, y = ours.weight.clone(), ours(x)
    expected = ours.merged_weight()
    theirs.merge()
    ours.merge(keep=True)
    assert ours.merged == ("a", "b") and torch.equal(ours.weight, expected)
    error = (ours.weight - theirs.base_layer.weight).detach().abs().max()
    assert error <= 2 * ulp(float(expected.detach().abs().max()), torch.float32)
    assert torch.equal(ours(x), expected[x]) and "merged=" in repr(ours)
    ours.unmerge()
    assert torch.equal(ours.weight, before) and torch.equal(ours(x), y)
    ours.active = "b"
    delta = ours.delta_weight("b").double()
    assert_as_exact("y", ours(x), (ours.weight + ours.delta_weight("b"))[x], ours.weight.double()[x] + delta[x])
    ours.active = ()
    assert torch.equal(ours(x), ours.weight[x])


@pytest.mark.filterwarnings("ignore:Already found")
def test_dora_merges_as_peft_and_keeps_its_norm():
    theirs, ours = pair(dora=True)
    ours.active = "a"
    theirs.set_adapter("a")
    x, before = ids(3, 4), ours.weight.clone()
    y = ours(x)
    with torch.no_grad(), cached_norms():
        first, second = ours(x), ours(x)
    assert torch.equal(first, y) and torch.equal(second, y)
    theirs.merge()
    ours.merge(keep=True)
    error = (ours.weight - theirs.base_layer.weight).detach().abs().max()
    assert error <= 4 * ulp(float(ours.weight.detach().abs().max()), torch.float32)
    ours.unmerge()
    assert torch.equal(ours.weight, before)
    fresh = DoRAEmbedding(V, D, 3, padding_idx=0)
    plain = nn.Embedding.from_pretrained(fresh.weight.detach(), padding_idx=0)
    assert_as_exact("fresh", fresh(x), plain(x), plain(x).double())
    fresh.add_adapter("lora", 2, dora=False)
    assert "adapters.lora.magnitude" not in fresh.state_dict() and "adapters.default.magnitude" in fresh.state_dict()


def test_construction_and_initialisation():
    torch.manual_seed(3)
    layer = LoRAEmbedding(V, D, 4, alpha=6, padding_idx=-1, adapter_dtype=torch.float32, dtype=torch.bfloat16)
    torch.manual_seed(3)
    plain = nn.Embedding(V, D, padding_idx=-1, dtype=torch.bfloat16)
    assert torch.equal(layer.weight, plain.weight) and layer.padding_idx == V - 1
    adapter = layer.adapters["default"]
    assert adapter.scale == 1.5 and adapter.a.dtype == torch.float32 and not adapter.a.any() and adapter.b.any()
    x = ids(2, 3)
    with backends.record() as calls:
        assert torch.equal(layer(x), plain(x)) and layer(x).dtype == torch.bfloat16
    assert not calls, "there is no op to call"
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["adapters.default.a", "adapters.default.b"]
    shared = LoRAEmbedding.from_plain(plain.eval(), 2)
    assert shared.weight is plain.weight and not shared.training and shared.padding_idx == V - 1
    assert layer.state_dict().keys() == {"weight", "adapters.default.a", "adapters.default.b"}


def test_deepcopy_meta_and_compile():
    layer = LoRAEmbedding(V, D, 3)
    nn.init.normal_(layer.adapters["default"].a)
    x = ids(2, 3)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    meta = LoRAEmbedding(V, D, 3, device="meta")
    assert meta(torch.empty(2, 5, dtype=torch.int64, device="meta")).shape == (2, 5, D)


def test_a_saved_peft_adapter_loads(tmp_path):
    """peft writes the base table too when an embedding is targeted; embedding and linear layers load together."""
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens, self.proj = nn.Embedding(V, D), nn.Linear(D, 6)

        def forward(self, x):
            return self.proj(self.embed_tokens(x))

    base = Model()
    ours = copy.deepcopy(base)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens", "proj"])
    theirs = peft.PeftModel(base, config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ours.embed_tokens = LoRAEmbedding.from_plain(ours.embed_tokens, 3, alpha=6)
    ours.proj = LoRALinear.from_plain(ours.proj, 3, alpha=6)
    loaded = load_peft_adapter(ours, tmp_path / "adapter_model.safetensors")
    assert sorted(loaded) == ["embed_tokens", "proj"]
    with vlkernels.use_backend("reference"):
        assert torch.equal(ours(ids(2, 3)), theirs(ids(2, 3)))


class Own(nn.Embedding):
    """A subclass without embed_scale: what its forward does is not known."""


def quantised():
    m = nn.Embedding(V, D)
    m.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.uint8), requires_grad=False)
    return m


def with_long_scale():
    m = Scaled(V, D)
    m.embed_scale = torch.ones(D)
    return m


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: LoRAEmbedding(V, D, 0), "r is 0"),
        (lambda: LoRAEmbedding.from_plain(nn.Linear(3, 3), 4), "m is a Linear; accepted: nn.Embedding"),
        (lambda: LoRAEmbedding.from_plain(Own(3, 3), 4), "m is a Own"),
        (lambda: LoRAEmbedding.from_plain(quantised(), 4), "uint8"),
        (lambda: LoRAEmbedding.from_plain(with_long_scale(), 4), r"embed_scale has shape \(14,\)"),
        (lambda: LoRAEmbedding(V, D, 2).add_adapter("default", 4), "'default'; accepted: a new name"),
        (lambda: LoRAEmbedding(V, D, 2).add_adapter("x", 4, lora_bias=True), "lora_bias"),
    ],
)
def test_errors_name_what_they_got(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        wrong()
