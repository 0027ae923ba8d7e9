"""transformers' Q-Formers swapped: the rule beside stock, what they fall back on, and what stays as it was."""

import copy
import pickle

import pytest
import torch

import vlkernels
from vlkernels.testing import compare, meter

pytest.importorskip("transformers")
torch.set_num_threads(1)
interpreted = pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="runs in the interpreter")

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "encoder_hidden_size": 20, "cross_attention_frequency": 2, "vocab_size": 30, "max_position_embeddings": 16,
}  # fmt: skip


def blip2():
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    return Blip2QFormerModel(Blip2QFormerConfig(**SIZES)), {}


def instructblip(kind="InstructBlip"):
    import transformers

    config = getattr(transformers, f"{kind}QFormerConfig")(**SIZES)
    model = getattr(transformers, f"{kind}QFormerModel")(config)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 4:] = 0
    ids = torch.randint(1, 30, (2, 2), generator=torch.Generator().manual_seed(3))
    return model, {"input_ids": ids, "attention_mask": mask}


KINDS = {"blip2": blip2, "instructblip": instructblip, "video": lambda: instructblip("InstructBlipVideo")}


def made(kind: str, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model, text = KINDS[kind]()
    for name, p in model.named_parameters():
        p.data.normal_(1.0, 0.3) if name.endswith("Norm.weight") or name.endswith("norm.weight") else p.data.normal_(
            std=0.2
        )
    image_mask = torch.ones(2, 7, dtype=torch.long)
    image_mask[1, 5:] = 0
    given = {"encoder_attention_mask": image_mask, **text}
    return model.to(dtype).eval(), given


def inputs(dtype=torch.float32, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((1, 3, 16), (2, 7, 20))]


def call(model, given, queries, image):
    queries = queries.expand(image.shape[0], -1, -1)
    return model(query_embeds=queries, encoder_hidden_states=image, **given).last_hidden_state


def step(model, given, tensors, autocast=None) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    queries, image = (t.detach().requires_grad_() for t in tensors)
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = call(model, given, queries, image)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dqueries": queries.grad, "dimage": image.grad} | found


PRECISIONS = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None), "amp": (torch.float32, torch.bfloat16)}


@interpreted
@pytest.mark.parametrize(
    "kind, precision",
    [
        *(("blip2", name) for name in PRECISIONS),
        ("instructblip", "fp32"),
        pytest.param("instructblip", "bf16", marks=pytest.mark.slow),
        pytest.param("instructblip", "amp", marks=pytest.mark.slow),
    ],
)
def test_rule(kind, precision):
    """Outputs and gradients on the kernels beside stock, in the same dtypes."""
    dtype, autocast = PRECISIONS[precision]
    draws = []
    for seed in compare.SEEDS:
        model, given = made(kind, dtype, seed)
        tensors = inputs(dtype, seed)
        stock = step(model, given, tensors, autocast)
        draws.append((stock, step(copy.deepcopy(model).double(), given, [t.double() for t in tensors])))
    model, given = made(kind, dtype, 0)
    assert len(vlkernels.swap(model, strict=True)) == 1
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        got = step(model, given, inputs(dtype, 0), autocast)
    assert counts["cross_attention_fwd_kernel"] and counts["norm_residual_fwd_kernel"]
    compare.assert_model(got, draws, autocast or dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_stock(kind):
    """On the reference backend, and after unswap, every bit is stock's."""
    model, given = made(kind)
    keys, original = list(model.state_dict()), type(model)
    usual = step(model, given, inputs())
    vlkernels.swap(model, strict=True)
    assert isinstance(model, original) and list(model.state_dict()) == keys
    with vlkernels.use_backend("reference"):
        again = step(model, given, inputs())
    assert vlkernels.unswap(model) == 1 and type(model) is original
    back = step(model, given, inputs())
    assert all(torch.equal(again[n], usual[n]) and torch.equal(back[n], usual[n]) for n in usual)


@interpreted
def test_what_is_upstreams_own():
    """Calls that the fused forward does not know, each with stock's result: no kernel runs."""
    model, given = made("instructblip")
    queries, image = inputs()
    stock = copy.deepcopy(model)
    vlkernels.swap(model, strict=True)

    def same(**more):
        with vlkernels.use_backend("triton"), meter.launches() as counts:
            got = model(query_embeds=queries.expand(2, -1, -1), encoder_hidden_states=image, **{**given, **more})
        want = stock(query_embeds=queries.expand(2, -1, -1), encoder_hidden_states=image, **{**given, **more})
        assert not counts
        for g, w in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
            assert torch.equal(g, w)

    same(return_dict=False)
    same(position_ids=torch.arange(2)[None])
    handle = model.encoder.layer[1].output_query.dense.register_forward_hook(lambda *_: None)
    same()
    assert "carries hooks" in model.vlkernels_state()[1]
    handle.remove()
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        call(model, given, queries, image)
    assert counts
    same(output_attentions=True)
    # transformers leaves its recording hooks on the layers, so this model stays with its own forward from here on
    same(output_hidden_states=True)
    same()


@interpreted
def test_gradient_checkpointing_stays_the_layers():
    model, given = made("blip2")
    vlkernels.swap(model, strict=True)
    model.train()
    model.gradient_checkpointing_enable()
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        call(model, given, *inputs()).sum().backward()
    assert not counts
    model.gradient_checkpointing_disable()
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        call(model, given, *inputs()).sum().backward()
    assert counts


@interpreted
def test_dropout_acts_in_training():
    model, given = made("blip2")
    vlkernels.swap(model, strict=True)
    with vlkernels.use_backend("triton"):
        plain = call(model, given, *inputs())
        torch.manual_seed(5)
        first = call(model.train(), given, *inputs())
        torch.manual_seed(5)
        assert torch.equal(call(model, given, *inputs()), first) and not torch.equal(first, plain)
        assert torch.equal(call(model.eval(), given, *inputs()), plain)


@interpreted
@pytest.mark.parametrize("kind", ["blip2", pytest.param("instructblip", marks=pytest.mark.slow)])
def test_copies(kind):
    """deepcopy and pickle after a call: the copy has views of its own."""
    model, given = made(kind)
    vlkernels.swap(model, strict=True)
    with vlkernels.use_backend("triton"):
        first = call(model, given, *inputs())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(call(other, given, *inputs()), first)
            with torch.no_grad():
                other.encoder.layer[0].attention.attention.query.weight.zero_()
            assert not torch.equal(call(other, given, *inputs()), first)
            assert torch.equal(call(model, given, *inputs()), first)
