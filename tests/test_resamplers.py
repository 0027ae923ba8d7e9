"""Perceiver resamplers: every variant against float64 by hand, upstream's classes, packed media, and what users do."""

import copy
import os

import pytest
import torch
from equations import slow_on_kernels
from resampler_cases import (
    CASES,
    both_embeddings,
    by_hand,
    doubled,
    draws_by_hand,
    flamingo,
    of_module,
    randomised,
    results,
    small,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.modules import on_meta
from vlkernels import backends, use_backend
from vlkernels.integrations.checkpoints import to_ours, to_upstream
from vlkernels.modules import (
    Idefics2Connector,
    Idefics2PerceiverResampler,
    IdeficsPerceiverResampler,
    Kosmos2Projection,
    LlavaPerceiverResampler,
    LoRALinear,
    PerceiverResampler,
)
from vlkernels.testing import meter
from vlkernels.testing.compare import SEEDS, assert_model, ulp

pytestmark = pytest.mark.usefixtures("on_the_reference")
# what else runs on kernels is slow
FAST = ["openflamingo masked", "openflamingo level 1", "idefics qk norms", "idefics2 masked level 1", "kosmos2"]
COMPILED = ["openflamingo", "idefics qk norms level 1", "idefics2 masked level 1", "kosmos2"]
KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
on_triton = pytest.mark.skipif(not KERNELS_RUN, reason="neither a GPU nor Triton's interpreter")
BACKENDS = ["reference", pytest.param("triton", marks=on_triton)]
OPS = {"cross_attention", "linear_projector", "mlp_projector", "multi_layer_kv"}


@pytest.mark.parametrize(
    "name, backend",
    slow_on_kernels(
        CASES, ["openflamingo masked", "openflamingo level 1", "idefics qk norms", "idefics2 masked level 1", "kosmos2"]
    ),
)
def test_against_float64_by_hand(name, backend, device):
    module_id, make, equation, drawn = CASES[name]
    module, inputs = randomised(make()).to(device).eval(), tuple(x.to(device) for x in drawn())
    with use_backend(backend), backends.record() as calls:
        got = of_module(module, inputs)
    expected = OPS - ({"mlp_projector"} if name in ("llava no ffn", "kosmos2", "kosmos2 level 1") else set())
    expected -= {"multi_layer_kv"} if name.endswith("level 1") else set()
    assert set(calls) == {(op, backend) for op in expected}
    assert_model(got, draws_by_hand(module_id, module, equation, drawn, inputs, torch.float32))


@pytest.mark.parametrize("name", CASES)
def test_hoisted_folded_and_two_sources_is_upstreams_equation(name):
    """In float64 nothing is left but the order of sums."""
    module_id, make, equation, inputs = CASES[name]
    module, inputs = randomised(make()).double().eval(), doubled(inputs())
    got, exact = of_module(module, inputs), by_hand(module_id, module, equation, inputs, torch.float64)
    top = max(float(t.abs().max()) for t in exact.values())
    assert set(got) == set(exact)
    for n, truth in exact.items():
        assert (got[n] - truth).abs().max() <= 256 * ulp(top, torch.float64), n


@pytest.mark.parametrize("name", CASES)
def test_state_dict_goes_to_upstream_and_back(name):
    module_id, make, *_ = CASES[name]
    module, twin = randomised(make()), make()
    upstream = to_upstream(module_id, module.state_dict())
    assert list(upstream) == list(module.state_dict())  # our names are upstream's
    twin.load_state_dict(to_ours(module_id, upstream))
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in twin.state_dict().items())
    with pytest.raises(ValueError, match="unknown upstream key 'else.where.other'"):
        to_ours(module_id, {"else.where.other": torch.zeros(1)})


# -- upstream's own classes ----------------------------------------------------------------------------------------


def transformers_pair(family: str):
    """(upstream's module, ours, inputs)"""
    transformers = pytest.importorskip("transformers")
    if family == "kosmos2":
        from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

        config = transformers.Kosmos2Config(
            text_config={"embed_dim": 24, "attention_heads": 4}, vision_config={"hidden_size": 14}, latent_query_num=5
        )
        for part in (config, config.text_config):
            part._attn_implementation = "eager"
        return Kosmos2ImageToTextProjection(config), Kosmos2Projection(14, 24, 4, 5), (torch.randn(3, 9, 14),)
    if family == "idefics2":
        from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector as Theirs

        config = transformers.Idefics2Config(
            vision_config={"hidden_size": 14},
            text_config={"hidden_size": 16, "intermediate_size": 20, "model_type": "mistral"},
            perceiver_config={
                "hidden_size": 16, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4,
                "resampler_head_dim": 6, "num_key_value_heads": 2,
            },
        )  # fmt: skip
        config.perceiver_config._attn_implementation = "eager"
        ours = Idefics2Connector(14, 20, 16, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=4,
                                 resampler_head_dim=6, num_key_value_heads=2)  # fmt: skip
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[0, 5:] = 0
        return Theirs(config), ours, (torch.randn(2, 9, 14), mask)
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler as Theirs

    config = transformers.IdeficsConfig(
        vision_config={"embed_dim": 16}, perceiver_config={"qk_layer_norms_perceiver": family.endswith("norms")}
    )
    ours = IdeficsPerceiverResampler(16, 2, 2, 6, 5, qk_layer_norms=family.endswith("norms"))
    return Theirs(config, 16, 2, 2, 6, 5), ours, (torch.randn(2, 9, 16),)


@pytest.mark.parametrize("family", ["idefics", "idefics norms", "idefics2", "kosmos2"])
def test_transformers_state_dicts_load_and_agree(family):
    theirs, ours, inputs = transformers_pair(family)
    theirs, ours = randomised(theirs).eval(), ours.eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)

    def first(module):
        return lambda *x: y[0] if isinstance(y := module(*x), tuple) else y

    wide = copy.deepcopy(theirs).double()
    got, draws = of_module(ours, inputs), []
    for draw in SEEDS:
        if draw:
            inputs = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in inputs)
            wide.load_state_dict(randomised(theirs).state_dict())
        usual = results(first(theirs), dict(theirs.named_parameters()), inputs)
        draws.append((usual, results(first(wide), dict(wide.named_parameters()), doubled(inputs))))
    assert_model(got, draws)


def test_published_sizes_and_inits():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(PerceiverResampler(1024, device="meta")) == 63_019_008
    assert count(Idefics2Connector(1152, 14336, 4096, device="meta")) == 743_219_200
    module = PerceiverResampler(256, 1, max_num_media=64, max_num_frames=64)
    for table in (module.latents, module.frame_embs, module.media_time_embs):
        assert 0.9 < table.std() < 1.1 and table.mean().abs() < 0.1
    bound = 256**-0.5
    assert 0.9 * bound < module.layers[0].get_submodule("0").to_q.weight.abs().max() <= bound
    module = Idefics2PerceiverResampler(64, 5, 1, 4, 16, 2)
    assert bool((module.latents == 1).all()) and 0.015 < module.layers[0].self_attn.q_proj.weight.std() < 0.025
    module = Kosmos2Projection(64, 64, 4, 8)
    assert not module.dense.bias.any() and 0.015 < module.dense.weight.std() < 0.025
    assert LlavaPerceiverResampler(8).state_dict()["perceiver.latents"].shape == (32, 8)
    assert set(PerceiverResampler(8, 1, num_media_embeds=4).state_dict()) >= {"latents", "media_pos_emb", "norm.bias"}


# -- any number of media in one batch ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_and_videos_in_one_packed_batch(backend, device):
    """Samples with an image, an image and two videos, nothing, a video: as each media by itself."""
    module = randomised(both_embeddings()()).to(device)
    frames, media = [1, 3, 1, 4, 3], [1, 3, 0, 1]
    x = torch.randn(sum(frames), 5, 12, device=device)
    numbers = [t for n in media for t in range(n)]

    def alone(x):
        own = [frame.unbind() for frame in x.split(frames)]
        rows = []
        for t, parts in zip(numbers, own, strict=True):
            # upstream numbers the media of a sample along its axis
            padded = torch.zeros(1, t + 1, len(parts), 5, 12, device=device, dtype=x.dtype)
            padded[0, t] = torch.stack(parts)
            rows.append(flamingo(dict(reference.named_parameters()), padded)[0, t])
        return torch.stack(rows)

    reference = copy.deepcopy(module)
    draws = []
    for draw in SEEDS:
        if draw:
            reference = randomised(reference.float())
            drawn = torch.randn_like(x)
        else:
            drawn = x
        usual = results(alone, dict(reference.named_parameters()), (drawn,))
        reference = reference.double()
        draws.append((usual, results(alone, dict(reference.named_parameters()), (drawn.double(),))))
    with use_backend(backend):
        got = results(
            lambda x: module(x, frames=frames, media=torch.tensor(media)), dict(module.named_parameters()), (x,)
        )
    assert_model(got, draws)
    assert [len(rows) for rows in got["y"].split(media)] == media
    mask = torch.ones(sum(frames), 5, dtype=torch.bool, device=device)
    assert torch.equal(module(x, mask, frames=frames, media=media), module(x, frames=frames, media=media))


@pytest.mark.parametrize("level", [0, 1])
def test_packed_images_of_any_size(level):
    """Idefics2's images of different sizes without padding, one of them without tokens: as padded ones with a mask."""
    _, make, *_ = CASES["idefics2"]
    module = randomised(make()).double()
    module.perceiver_resampler.level = level
    lengths = [4, 9, 0, 4, 1]
    x = torch.randn(len(lengths), 9, 14, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    padded = results(lambda x: module(x, mask), dict(module.named_parameters()), (x,))
    packed = results(lambda x: module(x[mask], lengths=lengths), dict(module.named_parameters()), (x,))
    top = max(float(t.abs().max()) for t in padded.values())
    for n, truth in padded.items():
        assert (packed[n] - truth).abs().max() <= 256 * ulp(top, torch.float64), n


def test_nothing_visible_gives_what_the_latents_alone_give():
    module, x = randomised(small()()).double(), torch.randn(2, 3, 1, 7, 16, dtype=torch.float64)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 1:] = False  # a sample with one media only
    y = module(x, mask)
    empty = module(x[:1, :1, :, :0])[0, 0]
    top = float(y.detach().abs().max())
    assert (y[1, 1:] - empty).abs().max() <= 64 * ulp(top, torch.float64)
    changed = x.clone()
    changed[1, 1:] += 1
    assert torch.equal(module(changed, mask), y)
    assert (y[0] - module(x[:1])[0]).abs().max() <= 64 * ulp(top, torch.float64)
    # the other ways to say so: frames, tokens, 0 and 1
    wide = mask[:, :, None, None].expand(2, 3, 1, 7)
    assert torch.equal(module(x, wide), y) and torch.equal(module(x, wide[..., 0].int()), y)
    alone = module(x[0, 0], frames=[0, 1])
    assert (alone[0] - empty).abs().max() <= 64 * ulp(top, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_media_at_all(backend, device):
    module = small()().to(device)
    with use_backend(backend):
        y = module(torch.zeros(0, 7, 16, device=device), frames=[], media=[0, 0])
        y.sum().backward()
    assert y.shape == (0, 5, 16)
    # every parameter has a gradient, so that distributed training does not wait for one
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


# -- what users do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, backend", slow_on_kernels(["openflamingo frames", "idefics qk norms", "idefics2"], ["idefics2"])
)
@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_half_precision_and_autocast(name, dtype, autocast, backend, device):
    module_id, make, equation, drawn = CASES[name]
    module = randomised(make()).to(device, dtype).eval()
    inputs = tuple(x.to(device, dtype) if x.is_floating_point() else x for x in drawn())
    with use_backend(backend), torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        got = of_module(module, inputs)
    assert_model(got, draws_by_hand(module_id, module, equation, drawn, inputs, dtype, autocast), torch.bfloat16)


@pytest.mark.parametrize(
    "name, backend",
    slow_on_kernels(
        ["openflamingo", "idefics qk norms level 1", "idefics2 masked level 1", "kosmos2"], ["openflamingo"]
    ),
)
def test_compile_without_a_graph_break(name, backend, device):
    _, make, _, inputs = CASES[name]
    module, inputs = randomised(make()).to(device).eval(), tuple(x.to(device) for x in inputs())
    with use_backend(backend):
        plain = of_module(module, inputs)
        compiled = results(
            torch.compile(module, fullgraph=True, backend="aot_eager"), dict(module.named_parameters()), inputs
        )
    top = max(float(t.abs().max()) for t in plain.values())
    for n, t in plain.items():
        assert (compiled[n] - t).abs().max() <= 64 * ulp(top, torch.float32), n


def test_compiled_packed_batch():
    """Other counts too, which a recompilation makes symbolic."""
    module = randomised(both_embeddings()())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for frames, media, v in ([1, 3, 2], [2, 1], 5), ([2, 0, 3], [1, 0, 2], 4):
        x = torch.randn(sum(frames), v, 12)
        with use_backend("reference"), torch.no_grad():
            plain, y = (call(x, frames=frames, media=media) for call in (module, compiled))
        assert (y - plain).abs().max() <= 64 * ulp(float(plain.abs().max()), torch.float32)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=[on_triton, pytest.mark.slow])])
@pytest.mark.parametrize("name", ["openflamingo frames", "kosmos2 level 1"])
def test_gradient_checkpointing_deepcopy_and_freezing(name, backend, device):
    _, make, _, inputs = CASES[name]
    module, inputs = randomised(make()).to(device).eval(), tuple(x.to(device) for x in inputs())
    with use_backend(backend):
        plain = of_module(module, inputs)
        again = results(lambda *x: checkpoint(module, *x, use_reentrant=False), dict(module.named_parameters()), inputs)
        twin = of_module(copy.deepcopy(module), inputs)
        assert all(torch.equal(again[n], t) and torch.equal(twin[n], t) for n, t in plain.items())
        for p in module.parameters():
            p.requires_grad_(False)
        latents = next(p for n, p in module.named_parameters() if "latent" in n)
        latents.requires_grad_()
        frozen = of_module(module, inputs)
    (some,) = (n for n in frozen if n != "y" and not n.startswith("input"))
    assert torch.equal(frozen[some], plain[some])


def lora(child: nn.Linear) -> nn.Module:
    layer = LoRALinear.from_plain(child, 3)
    with torch.no_grad():
        layer.adapters["default"].b.normal_()
    return layer


CHILDREN = {
    "openflamingo": ["layers.1.0.to_q", "layers.0.0.to_kv", "layers.1.0.to_out", "layers.0.1.1"],
    "openflamingo level 1": ["layers.1.0.to_kv"],
    "idefics qk norms level 1": ["blocks.1.0.k_proj", "blocks.0.0.q_proj"],
    "idefics2": ["perceiver_resampler.layers.1.mlp.gate_proj", "perceiver_resampler.layers.0.self_attn.v_proj",
                 "modality_projection.down_proj"],
    "kosmos2": ["x_attn.v_proj", "x_attn.out_proj", "x_attn.q_proj"],
}  # fmt: skip


@pytest.mark.parametrize("name, child", [(name, child) for name, children in CHILDREN.items() for child in children])
def test_a_replaced_child_is_called(name, child):
    """A LoRA on a child: as the same module with the merged weight."""
    _, make, _, inputs = CASES[name]
    module, inputs = randomised(make()).double().eval(), doubled(inputs())
    merged = copy.deepcopy(module)
    parent, _, leaf = child.rpartition(".")
    setattr(module.get_submodule(parent), leaf, lora(module.get_submodule(child)).double())
    before = merged(*inputs)
    with torch.no_grad():
        merged.get_submodule(child).weight.copy_(module.get_submodule(child).merged_weight())
    y, expected = module(*inputs), merged(*inputs)
    top = float(expected.detach().abs().max())
    assert (y - expected).abs().max() <= 256 * ulp(top, torch.float64)
    assert (y - before).abs().max() > 256 * ulp(top, torch.float64)
    y.sum().backward()
    assert module.get_submodule(child).adapters["default"].a.grad.abs().max() > 0


@pytest.mark.parametrize("child", [n for n in CHILDREN["openflamingo"] if n.startswith("layers.1")] + ["layers.0.1.3"])
def test_a_linear_that_was_given_a_bias_keeps_it(child):
    _, make, _, inputs = CASES["openflamingo"]
    module, inputs = randomised(make()).double(), doubled(inputs())
    before = module(*inputs).detach()
    linear = module.get_submodule(child)
    linear.bias = nn.Parameter(torch.randn(linear.out_features, dtype=torch.float64))
    y = module(*inputs)
    assert (y - before).abs().max() > 256 * ulp(float(before.abs().max()), torch.float64)
    y.sum().backward()
    assert linear.bias.grad is not None


@pytest.mark.parametrize(
    "name", ["openflamingo frames", "idefics qk norms level 1", "idefics2 masked level 1", "kosmos2"]
)
def test_hooks_on_any_child_run(name):
    """A hook on every module below, one at a time: it runs once a call and nothing else changes."""
    _, make, _, inputs = CASES[name]
    module, inputs = randomised(make()).double().eval(), doubled(inputs())
    expected = module(*inputs).detach()
    top = float(expected.abs().max())
    quiet = (nn.ModuleList,)  # never called, upstream's neither
    for path, child in module.named_modules():
        if path == "" or isinstance(child, quiet):
            continue
        seen = []
        handle = child.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y))
        y = module(*inputs)
        handle.remove()
        assert seen, path
        assert (y - expected).abs().max() <= 256 * ulp(top, torch.float64), path


def test_packed_batches_through_children():
    module, x = randomised(both_embeddings()()).double(), torch.randn(6, 5, 12, dtype=torch.float64)
    mask = torch.rand(6, 5) > 0.3
    expected = module(x, mask, frames=[1, 3, 0, 2], media=[2, 2]).detach()
    module.layers[0].register_forward_hook(lambda *_: None)
    y = module(x, mask, frames=[1, 3, 0, 2], media=[2, 2])
    assert (y - expected).abs().max() <= 256 * ulp(float(expected.abs().max()), torch.float64)


def test_attention_dropout_acts_in_training():
    torch.manual_seed(1)
    module, x = Kosmos2Projection(14, 24, 4, 5, attention_dropout=0.5), torch.randn(2, 9, 14)
    with torch.no_grad():
        assert torch.equal(module.eval()(x), module(x))
        module.train()
        torch.manual_seed(2)
        one = module(x)
        torch.manual_seed(2)
        assert torch.equal(one, module(x)) and not torch.equal(one, module(x))


def test_one_product_for_all_layers_and_the_first_layer_once():
    """Ops called: one product for the keys of all layers; the first layer's latents have batch 1."""
    from unittest import mock

    from vlkernels.modules import resampler_layers as layers

    shapes = []

    def counted(x, *rest, **options):
        shapes.append(tuple(x.shape))
        return own(x, *rest, **options)

    own = layers.linear_projector
    module = PerceiverResampler(16, 3, 6, 2, 5)
    with mock.patch.object(layers, "linear_projector", counted), backends.record() as calls:
        module(torch.randn(2, 2, 1, 7, 16))
    names = [name for name, _ in calls]
    assert {n: names.count(n) for n in names} == {
        "multi_layer_kv": 1, "linear_projector": 3, "cross_attention": 3, "mlp_projector": 3
    }  # fmt: skip
    assert shapes == [(1, 5, 16), (4, 5, 16), (4, 5, 16)]


# -- what a call costs ---------------------------------------------------------------------------------------------

# OpenFlamingo: dim 1024, 6 layers, 8 heads of 64, 64 latents, 256 tokens an image, x frozen, bf16
WIDTH, HEADS, LATENTS, TOKENS = 1024, 8, 64, 256
SHRINK = 8  # of the widths; bytes are given at full width


def published(shrink: int = 1, latents: int = LATENTS, **options) -> PerceiverResampler:
    width, heads = WIDTH // shrink, HEADS // shrink
    return PerceiverResampler(width, heads=heads, num_latents=latents, dtype=torch.bfloat16, **options)


def eager(module):
    parameters = dict(module.named_parameters())
    return lambda x: flamingo(parameters, x, K=64)


def images(count: int, module, tokens: int = TOKENS):
    return torch.randn(count, 1, 1, tokens, module.dim, dtype=torch.bfloat16)


@pytest.mark.parametrize("level, limit", [(0, 0.46), (1, 0.30)])
def test_saved_bytes_of_one_image_at_full_size(level, limit):
    """On meta tensors, where the operators say what they keep; what a call keeps whatever the batch is in it."""
    made = {"dtype": torch.bfloat16, "device": "meta"}
    module, x = PerceiverResampler(1024, level=level, **made), torch.empty(1, 1, 1, 256, 1024, **made)
    with on_meta(), use_backend("triton"):
        ours = meter.saved_bytes(lambda: module(x), [x, *module.parameters()])
    usual = meter.saved_bytes(lambda: eager(module)(x), [x, *module.parameters()])
    assert ours <= limit * usual, f"{ours / 2**20:.2f} MiB, {ours / usual:.3f} of eager's"


@on_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
@pytest.mark.parametrize("level", [0, 1])
def test_what_meta_tensors_say_is_what_is_kept(level):
    """In float32: in 16 bits the CPU keeps a plain LayerNorm's statistics in 16 bits, unlike a GPU and meta tensors."""
    saved = []
    for device in ("cpu", "meta"):
        module = PerceiverResampler(16, 2, 6, 2, 5, level=level, device=device)
        x = torch.empty(2, 1, 1, 7, 16, device=device).fill_(0.5)
        with on_meta(), use_backend("triton"):
            saved.append(meter.saved_bytes(lambda m=module, x=x: m(x), [x, *module.parameters()]))
    assert saved[0] == saved[1] > 0


@on_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
def test_launches_of_the_forward():
    """As at 64 images, where 512 programs leave no reason to split the attention's keys; few keys leave none either."""
    module, x = PerceiverResampler(16, 6, 4, 2, 4, dtype=torch.bfloat16), torch.randn(2, 1, 1, 8, 16).bfloat16()
    parameters = dict(module.named_parameters())
    with meter.traffic() as usual:
        flamingo(parameters, x, K=4)
    with use_backend("triton"), meter.traffic() as traffic:
        module(x)
    assert usual.launch_count == 133
    assert traffic.launch_count <= 50, dict(traffic.launches)


@on_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
@pytest.mark.slow
def test_flops_of_a_step():
    """Level 0 recomputes no product but the attention's scores, whose share is larger here than at full width."""
    module = published(SHRINK)
    x, leaves = images(2, module), list(module.parameters())
    flops = []
    for call, backend in ((eager(module), "reference"), (module, "triton")):
        with use_backend(backend), meter.traffic() as traffic:
            y = call(x)
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        flops.append(traffic.flops)
    assert flops[1] <= 1.02 * flops[0], f"{flops[1] / flops[0]:.3f} of eager's"


# -- bad inputs ----------------------------------------------------------------------------------------------------


def resampler(**options):
    return PerceiverResampler(4, 1, 2, 2, 3, **options)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: resampler(level=2), "level is 2"),
        (lambda: PerceiverResampler(0), "dim is 0"),
        (lambda: PerceiverResampler(4, num_latents=0), "num_latents is 0"),
        (lambda: resampler(max_num_frames=0), "max_num_frames is 0"),
        (lambda: resampler(max_num_media=2, num_media_embeds=4), "max_num_media and num_media_embeds name one"),
        (lambda: PerceiverResampler(4, heads=0), "0 heads of width 64"),
        (lambda: resampler()(torch.randn(2, 1, 1, 3, 5)), "accepted: 4 channels"),
        (lambda: resampler()(torch.randn(3, 4)), r"x has shape \(3, 4\); accepted: \(B, T, F, v, D\)"),
        (lambda: resampler(max_num_media=2)(torch.randn(1, 3, 1, 2, 4)), "x has 3 media; accepted: at most 2"),
        (lambda: resampler(num_media_embeds=2)(torch.randn(1, 3, 2, 4)), "x has 3 media; accepted: at most 2"),
        (lambda: resampler(max_num_frames=2)(torch.randn(1, 1, 3, 2, 4)), "x has 3 frames; accepted: at most 2"),
        (lambda: resampler(max_num_frames=2)(torch.randn(4, 2, 4), frames=[1, 3]), "x has 3 frames"),
        (lambda: resampler(max_num_media=1)(torch.randn(4, 2, 4), frames=[1, 3]), "x has 2 media"),
        (lambda: resampler()(torch.randn(4, 2, 4), frames=[1, 2]), r"frames is \[1, 2\]; .* the 4 frames of x"),
        (lambda: resampler()(torch.randn(4, 2, 4), frames=[5, -1]), r"frames is \[5, -1\]"),
        (lambda: resampler()(torch.randn(4, 2, 4), frames=[4], media=[2]), r"media is \[2\]; .* the 1 entries"),
        (lambda: resampler()(torch.randn(4, 2, 4), media=[2]), "media is given without frames"),
        (lambda: resampler()(torch.randn(1, 4, 2, 4), frames=[4]), r"accepted with frames: \(total frames, v, 4\)"),
        (lambda: resampler()(torch.randn(4, 2, 4), frames=torch.ones(2, 2)), "frames is torch.float32 "),
        (lambda: resampler()(torch.randn(1, 1, 1, 3, 4), torch.ones(1, 1, 1, 3)), "mask is torch.float32"),
        (lambda: resampler()(torch.randn(1, 1, 1, 3, 4), torch.ones(1, 2).bool()), r"mask is torch.bool \(1, 2\)"),
        (lambda: LlavaPerceiverResampler(4)(torch.randn(3, 4)), r"accepted: \(B, n, 4\)"),
        (lambda: IdeficsPerceiverResampler(4, 1, 2, 2, 3)(torch.randn(3, 4)), r"context has shape \(3, 4\)"),
        (lambda: IdeficsPerceiverResampler(4, 1, 2, 2, 3)(torch.randn(1, 3, 5)), "accepted: 4 channels"),
        (lambda: IdeficsPerceiverResampler(4, 1, 2, 2, 3)(torch.randn(3, 4), lengths=[2]), r"lengths is \[2\]"),
        (lambda: Idefics2PerceiverResampler(4, 3, 1, 3, 2, 2), "3 heads of width 2, 2 key/value heads"),
        (lambda: Idefics2PerceiverResampler(4, hidden_act="mish"), "act is 'mish'"),
        (lambda: Idefics2PerceiverResampler(4, attention_dropout=1.0), "attention dropout is 1.0"),
        (lambda: Idefics2Connector(4, 6, 8)(torch.randn(1, 3, 5)), "accepted: 4 channels"),
        (lambda: Kosmos2Projection(4, 6, 4), "embed_dim is 6; accepted: a multiple of the 4 attention_heads"),
        (lambda: Kosmos2Projection(4, 8, 4)(torch.randn(1, 3, 5)), "accepted: 4 channels"),
    ],
)
def test_errors_name_what_they_got(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        wrong()
