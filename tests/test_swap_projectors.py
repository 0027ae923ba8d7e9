"""transformers' projectors and mergers: swapped against stock, by the rule, in every dtype mode."""

import copy

import pytest
import torch
from torch import nn

import vlkernels
from vlkernels.integrations import transformers as table
from vlkernels.testing import meter
from vlkernels.testing.compare import ulp

transformers = pytest.importorskip("transformers")


class Config:
    """What the projectors read of a config, by attribute; nested ones as they are."""

    def __init__(self, **values):
        self.__dict__.update(values)


VISION, TEXT = Config(hidden_size=24, model_args={"embed_dim": 24}), Config(hidden_size=40, rms_norm_eps=1e-6)
COMMON = {
    "vision_config": VISION, "text_config": TEXT, "vision_feature_layer": -2, "multimodal_projector_bias": True,
    "vision_feature_layers": -2,  # its name before transformers 5.23
    "projector_hidden_act": "gelu", "projector_layernorm_eps": 1e-5, "downsample_ratio": 0.5, "downsample_factor": 2,
    "adapter_layer_norm_eps": 1e-6, "alignment_intermediate_size": 64, "projector_use_layernorm": True,
    "projector_bias": True, "projector_hidden_size": 56, "projector_pooling_ratio": 1, "spatial_merge_size": 2,
    "hidden_size": 24, "out_hidden_size": 40, "scale_factor": 2,
}  # fmt: skip
SHAPES = {
    "InternVLMultiModalProjector": (3, 4, 96),
    "AyaVisionMultiModalProjector": (2, 16, 24),
    "Cohere2VisionMultiModalProjector": (2, 16, 24),
    "Lfm2VlMultiModalProjector": (2, 4, 6, 24),
    "PatchMerger": (12, 24),
    "Qwen2_5_VLPatchMerger": (12, 24),
    "Qwen3VLVisionPatchMerger": (12, 24),
    "Mistral3MultiModalProjector": (16, 24),
    "Glm4vVisionPatchMerger": (9, 24),
    "Gemma3MultiModalProjector": (2, 36, 24),
    "Idefics3Connector": (2, 16, 24),
    "SmolVLMConnector": (2, 16, 24),
}


def original(key: str) -> type:
    import importlib

    module, _, name = key.partition(":")
    try:
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except ImportError as error:
        pytest.skip(f"{key}: {error}")


def built(key: str, **changes) -> nn.Module:
    """A small one with random weights, norms and biases included."""
    torch.manual_seed(0)
    cls = original(key)
    config = Config(**(COMMON | changes))
    if cls.__name__ in ("PatchMerger", "Qwen2_5_VLPatchMerger"):
        module = cls(dim=40, context_dim=24)
    elif cls.__name__ == "Qwen3VLVisionPatchMerger":
        module = cls(config, use_postshuffle_norm=changes.get("post", False))
    elif cls.__name__ == "Idefics2MLP":
        module = cls(24, 40, 32, "silu")
    elif cls.__name__ == "Glm4vVisionPatchMerger":
        module = cls(dim=24, context_dim=56, hidden_act="silu")
    elif cls.__name__ == "Gemma3MultiModalProjector":
        config.vision_config = Config(hidden_size=24, layer_norm_eps=1e-6, image_size=12, patch_size=2)
        config.mm_tokens_per_image = 4
        module = cls(config)
    elif cls.__name__ == "Mistral3MultiModalProjector":
        config.vision_config = Config(hidden_size=24, patch_size=2)
        module = cls(config)
    else:
        module = cls(config)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0))
    owner = nn.Module()
    owner.projector = module
    return owner


def arguments(owner, dtype=torch.float32, seed=1) -> tuple:
    name = type(owner.projector).__name__
    x = torch.randn(SHAPES.get(name, (2, 9, 24)), generator=torch.Generator().manual_seed(seed)).to(dtype)
    # two images of 4 x 4 and 4 x 12 pixels: 2 x 2 and 2 x 6 patches
    return (x, torch.tensor([[4, 4], [4, 12]])) if name.startswith("Mistral3") else (x,)


def run(owner, args, autocast=None):
    owner.zero_grad(set_to_none=True)
    x = args[0].detach().requires_grad_()
    with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        y = owner.projector(x, *args[1:])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(x.device, autocast or x.dtype)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | {n: p.grad.clone() for n, p in owner.named_parameters()}


def on(device, owner, args):
    return owner.to(device), tuple(a.to(device) for a in args)


def check(got, want, exact, dtype):
    check_draws([(got, want, exact)], dtype)


def check_draws(draws, dtype):
    """The rule for (ours, stock's, exact) results; the largest error of one draw is itself a random number."""

    def worst(results, name):
        return max(float((t[name].double() - exact[name]).abs().max()) for t, exact in results)

    for name in draws[0][0]:
        scale = max(float(exact[name].abs().max()) for *_, exact in draws)
        limit = 2 * worst([(want, exact) for _, want, exact in draws], name) + 4 * ulp(scale, dtype)
        error = worst([(got, exact) for got, _, exact in draws], name)
        assert error <= limit, (name, error, limit, scale)


KEYS = list(table.ROWS)


@pytest.mark.parametrize("key", KEYS, ids=lambda k: k.partition(":")[2])
@pytest.mark.parametrize(
    "dtype, autocast",
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)],
    ids=["fp32", "bf16", "amp"],
)
def test_against_stock(key, dtype, autocast, device):
    owner = built(key).to(dtype)
    inputs = [on(device, owner, arguments(owner, dtype, seed))[1] for seed in range(1, 4)]
    owner = owner.to(device)
    exact = [run(copy.deepcopy(owner).double(), (args[0].double(), *args[1:])) for args in inputs]
    want = [run(owner, args, autocast) for args in inputs]
    report = vlkernels.swap(owner)
    assert len(report) == 1 and report.entries[0].backend == "triton", str(report)
    with meter.launches() as counts:
        got = [run(owner, args, autocast) for args in inputs]
    # the activation is a pass of its own, or the epilogue of the product before it
    assert counts["mlp_projector_act_kernel"] + counts["mlp_projector_gemm_act_kernel"] == len(inputs)
    assert counts["mlp_projector_act_bwd_kernel"] == len(inputs)
    row = table.ROWS[key]
    if row.norm is not None:
        assert counts["shuffle_norm_fwd_kernel"] == 2 * len(inputs)
        assert counts["shuffle_norm_bwd_kernel"] == len(inputs)
    assert {n: (v.shape, v.dtype) for n, v in got[0].items()} == {n: (v.shape, v.dtype) for n, v in want[0].items()}
    check_draws(list(zip(got, want, exact, strict=True)), autocast or dtype)


MODES = pytest.mark.parametrize(
    "dtype, autocast",
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)],
    ids=["fp32", "bf16", "amp"],
)


@MODES
def test_gemma3(dtype, autocast, device):
    """Pool, norm with 1 + weight and the transposed product, against stock; autocast changes the product alone."""
    owner = built(table.GEMMA3).to(dtype)
    owner, args = on(device, owner, arguments(owner, dtype))
    exact = run(copy.deepcopy(owner).double(), (args[0].double(),))
    want = run(owner, args, autocast)
    report = vlkernels.swap(owner)
    assert report.entries[0].backend == "triton", str(report)
    with meter.launches() as counts:
        got = run(owner, args, autocast)
    assert counts["shuffle_norm_fwd_kernel"] == 2 and counts["shuffle_norm_bwd_kernel"] == 1
    assert {n: (v.shape, v.dtype) for n, v in got.items()} == {n: (v.shape, v.dtype) for n, v in want.items()}
    # upstream casts its result back to x's dtype, yet the product is the autocast's
    check(got, want, exact, dtype)


def test_gemma3_autocast_over_half_precision_features(device):
    """What a vision tower under autocast hands over: bfloat16 x, float32 parameters."""
    owner = built(table.GEMMA3)
    owner, args = on(device, owner, arguments(owner, torch.bfloat16))
    exact = run(copy.deepcopy(owner).double(), (args[0].double(),))
    want = run(owner, args, torch.bfloat16)
    vlkernels.swap(owner)
    with meter.launches() as counts:
        got = run(owner, args, torch.bfloat16)
    assert counts["shuffle_norm_fwd_kernel"] == 2
    assert {n: v.dtype for n, v in got.items()} == {n: v.dtype for n, v in want.items()}
    check(got, want, exact, torch.bfloat16)


# -- a shuffle and one linear --------------------------------------------------------------------------------------

CONNECTORS = pytest.mark.parametrize("key", list(table.CONNECTORS), ids=lambda k: k.partition(":")[2])


@CONNECTORS
@MODES
def test_connectors_are_stock_in_every_bit(key, dtype, autocast, device):
    """The same result and gradients from one copy instead of two each way, and no more is kept."""
    owner = built(key).to(dtype)
    owner, args = on(device, owner, arguments(owner, dtype))

    def copies():
        with meter.traffic() as traffic:
            found = run(owner, args, autocast)
        kept = meter.saved_bytes(lambda: owner.projector(args[0].clone().requires_grad_()), apart=owner.parameters())
        return found, traffic.launches["aten::clone"] - 1, kept  # run() copies one gradient

    want, before, kept_before = copies()
    report = vlkernels.swap(owner)
    assert len(report) == 1 and "one copy for the shuffle" in report.entries[0].reason, str(report)
    got, after, kept = copies()
    assert all(torch.equal(got[n], want[n]) and got[n].dtype == want[n].dtype for n in want)
    assert (before, after) == (4, 2) and kept <= kept_before


@CONNECTORS
def test_connectors_on_forced_backends(key, device):
    owner = built(key)
    owner, args = on(device, owner, arguments(owner))
    exact = run(copy.deepcopy(owner).double(), (args[0].double(),))
    want = run(owner, args)
    vlkernels.swap(owner)
    for backend in ("reference", "triton"):
        with vlkernels.use_backend(backend):
            check(run(owner, args), want, exact, torch.float32)


@CONNECTORS
def test_connectors_leave_to_upstream_what_is_not_theirs(key, device):
    """A grid that is no square, a LoRA or a hook on the layer, keyword arguments; and one graph under compile."""
    peft = pytest.importorskip("peft")
    owner = built(key)
    owner, (x,) = on(device, owner, arguments(owner))
    want = owner.projector(x)
    vlkernels.swap(owner)
    torch._dynamo.reset()
    compiled = torch.compile(owner.projector, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), want)
    assert torch.equal(owner.projector(image_hidden_states=x), want)
    for bad in (torch.randn(2, 15, 24), torch.randn(2, 16, 20), torch.randn(2, 9, 24)):
        with pytest.raises(RuntimeError):
            owner.projector(bad.to(device))
    seen = []
    handle = owner.projector.modality_projection.proj.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(owner.projector(x), want) and seen
    handle.remove()
    lora = peft.LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)
    model = peft.get_peft_model(owner, lora)
    report = vlkernels.swap(model, include="*projector")
    entry = next(e for e in report.entries if e.path.endswith("projector"))
    assert entry.backend == "stock" and "modality_projection.proj is a Linear" in entry.reason
    changed = model.base_model.model.projector(x)
    assert not torch.equal(changed, want)
    vlkernels.unswap(model)
    assert torch.equal(model.base_model.model.projector(x), changed)


def test_plain_linear_projectors_are_reported(device):
    owner = nn.Module()
    config = Config(vision_config=Config(hidden_size=8, projection_dim=12))
    owner.projector = original("paligemma.modeling_paligemma:PaliGemmaMultiModalProjector")(config)
    report = vlkernels.swap(owner)
    assert not report and "one linear layer" in str(report) and "nothing to fuse" in str(report)


@pytest.mark.parametrize("key", ["vipllava.modeling_vipllava:VipLlavaMultiModalProjector", table.GEMMA3])
def test_a_norm_too_wide_for_kernels_is_reported_as_stock(key, device):
    owner = nn.Module()
    vision = Config(hidden_size=8200, layer_norm_eps=1e-6, image_size=12, patch_size=2)
    config = Config(**(COMMON | {"vision_config": vision, "mm_tokens_per_image": 4}))
    owner.projector = original(key)(config)
    report = vlkernels.swap(owner.to(device))
    entry = report.entries[0]
    assert entry.backend == "reference" and "8200 channels to normalise" in entry.reason, str(report)
    with meter.launches() as counts:
        owner.projector(torch.randn(SHAPES["Gemma3MultiModalProjector"][:2] + (8200,), device=device)[:1])
    assert not counts


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "gelu_new", "silu", "swish", "relu", "quick_gelu"])
def test_activations(act, device):
    owner = built(KEYS[0], projector_hidden_act=act)
    owner, args = on(device, owner, arguments(owner))
    exact = run(copy.deepcopy(owner).double(), (args[0].double(),))
    want = run(owner, args)
    vlkernels.swap(owner)
    with meter.launches() as counts:
        got = run(owner, args)
    assert counts["mlp_projector_act_kernel"] == 1
    check(got, want, exact, torch.float32)


def test_unknown_activation_is_upstreams(device):
    owner = built(KEYS[0], projector_hidden_act="relu2")
    owner, args = on(device, owner, arguments(owner))
    want = run(owner, args)
    report = vlkernels.swap(owner)
    got = run(owner, args)
    assert all(torch.equal(got[n], want[n]) for n in want) and "ReLUSquared" in str(report)


@pytest.mark.parametrize("key, changes", [
    ("qwen3_vl.modeling_qwen3_vl:Qwen3VLVisionPatchMerger", {"post": True}),
    ("lfm2_vl.modeling_lfm2_vl:Lfm2VlMultiModalProjector", {"projector_use_layernorm": False, "projector_bias": False}),
    ("llava.modeling_llava:LlavaMultiModalProjector", {"multimodal_projector_bias": False}),
], ids=["post-shuffle norm", "no norm, no bias", "no bias"])  # fmt: skip
def test_variants(key, changes, device):
    owner = built(key, **changes)
    owner, args = on(device, owner, arguments(owner))
    exact = run(copy.deepcopy(owner).double(), (args[0].double(), *args[1:]))
    want = run(owner, args)
    vlkernels.swap(owner)
    with meter.launches() as counts:
        got = run(owner, args)
    assert counts["mlp_projector_act_kernel"] == 1
    check(got, want, exact, torch.float32)


def test_level_1_saves_less(device):
    owner = built(KEYS[0])
    owner, args = on(device, owner, arguments(owner))
    saved = []
    for level in (None, 0, 1):
        if level is not None:
            vlkernels.swap(owner, projector_level=level)
        known = (*owner.parameters(), *args)
        saved.append(meter.saved_bytes(lambda: owner.projector(args[0].requires_grad_()), apart=known))
    rows, inner = 18, 40
    assert saved[2] == 0 and saved[1] == 4 * rows * inner and saved[0] == 2 * saved[1]


def test_saved_shares_at_llava_proportions(device):
    """C : F = 1024 : 4096 as in LLaVA-1.5, x counted too: level 0 keeps at most 0.56 of eager's bytes, level 1 0.12."""
    owner = built(KEYS[0], vision_config=Config(hidden_size=10)).to(device)
    saved = []
    for level in (None, 0, 1):
        if level is not None:
            vlkernels.swap(owner, projector_level=level)
        # an x made inside counts; in a model the vision tower's output is kept by nothing else
        x = torch.randn(2, 9, 10, device=device)
        saved.append(meter.saved_bytes(lambda: owner.projector(x), apart=owner.parameters()))  # noqa: B023
    assert saved[1] / saved[0] <= 0.56 and saved[2] / saved[0] <= 0.12


def test_lora_on_a_child(device):
    """A LoRA placed on linear_1 is not skipped: upstream's forward runs, and the report names the child."""
    peft = pytest.importorskip("peft")
    owner = built(KEYS[0])
    model = peft.get_peft_model(owner, peft.LoraConfig(r=2, target_modules=["linear_1"], init_lora_weights=False))
    model, args = on(device, model, arguments(owner))
    want = model.base_model.model.projector(*args)
    report = vlkernels.swap(model)
    projector = model.base_model.model.projector
    assert any("linear_1 is a Linear" in e.reason for e in report.entries)
    with meter.launches() as counts:
        got = projector(*args)
    assert counts["lora_down_kernel"] == 1 and not counts["mlp_projector_act_kernel"]
    torch.testing.assert_close(got, want)


def test_hooks_odd_inputs_and_compile(device):
    key = "aya_vision.modeling_aya_vision:AyaVisionMultiModalProjector"
    owner = built(key)
    owner, (x,) = on(device, owner, arguments(owner))
    vlkernels.swap(owner)
    odd = torch.randn(2, 15, 24, device=device)
    with pytest.raises(RuntimeError):
        owner.projector(odd)  # upstream's own error for a grid that is no square
    torch._dynamo.reset()
    compiled = torch.compile(owner.projector, fullgraph=True, backend="aot_eager")
    with meter.launches() as counts:
        assert torch.equal(compiled(x), owner.projector(x))
    assert counts["mlp_projector_act_kernel"] == 2
    seen = []
    owner.projector.linear_2.register_forward_hook(lambda *_: seen.append(1))
    with meter.launches() as counts:
        owner.projector(x)
    assert seen and not counts


def test_state_dict_deepcopy_unswap(device):
    owner = built(KEYS[0])
    owner, args = on(device, owner, arguments(owner))
    keys, cls, want = list(owner.state_dict()), type(owner.projector), owner.projector(*args)
    vlkernels.swap(owner)
    assert list(owner.state_dict()) == keys and isinstance(owner.projector, cls)
    assert type(owner.projector).__name__ == cls.__name__
    twin = copy.deepcopy(owner)
    assert torch.equal(twin.projector(*args), owner.projector(*args))
    vlkernels.unswap(owner)
    assert type(owner.projector) is cls and torch.equal(owner.projector(*args), want)


@pytest.mark.parametrize("key", list(table.LEFT), ids=lambda k: k.partition(":")[2])
def test_left_classes_exist(key):
    assert original(key)


def test_a_whole_llava_with_lora(device):
    """Projector and LoRA swapped together in a LLaVA: the stock model's loss and gradients, by the rule."""
    peft = pytest.importorskip("peft")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
        image_token_index=39,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], exclude_modules=".*vision_tower.*",
                           modules_to_save=["multi_modal_projector"], init_lora_weights=False)  # fmt: skip
    model = peft.get_peft_model(model, lora).to(device)
    ids = torch.tensor([[1, 39, 39, 39, 39, 5, 6, 7]], device=device)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(device)

    def step(model, dtype=torch.float32):
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, pixel_values=pixels.to(dtype), labels=ids).loss
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = step(model)
    exact = step(copy.deepcopy(model).double(), torch.float64)
    report = vlkernels.swap(model)
    names = {e.cls.rpartition(".")[2] for e in report.entries if e.swapped}
    assert names == {"LlavaMultiModalProjector", "LlamaAttention", "LlamaMLP", "Linear"}
    with meter.launches() as counts:
        got = step(model)
    assert counts["mlp_projector_act_kernel"] == 1 and counts["lora_down_kernel"] == 2
    assert any("modules_to_save.default.linear_1.weight" in n for n in got)
    check(got, want, exact, torch.float32)


@pytest.mark.parametrize("key", ["qwen2_vl.modeling_qwen2_vl:PatchMerger", table.GEMMA3], ids=["qwen2", "gemma3"])
def test_a_norm_in_another_dtype_is_upstreams(key, device):
    """A float32 norm over a half-precision projector: what upstream does with it, no error of ours."""
    owner = built(key).bfloat16()
    norm = owner.projector.ln_q if "qwen" in key else owner.projector.mm_soft_emb_norm
    norm.float()
    owner, args = on(device, owner, arguments(owner, torch.bfloat16))
    try:
        want = owner.projector(*args)
    except RuntimeError as error:
        want = error  # a CPU build of torch may lack the mixed kernel
    report = vlkernels.swap(owner)
    assert report.entries[0].backend == "stock" and "torch.float32" in report.entries[0].reason
    if isinstance(want, RuntimeError):
        with pytest.raises(RuntimeError):
            owner.projector(*args)
    else:
        assert torch.equal(owner.projector(*args), want)
