"""Q-Former: dropout, autocast, compile, children that are no plain layers, saved bytes and bad input."""

import copy

import pytest
import torch
from qformer_by_hand import (
    BACKENDS,
    LAVIS,
    SLOW_BACKENDS,
    D,
    data,
    gradients,
    make,
    on_triton,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlkernels import use_backend
from vlkernels.modules import QFormer
from vlkernels.testing.compare import SEEDS, assert_model, beside, ulp


@pytest.fixture(autouse=True)
def _on_the_reference():
    """Where a test names no backend: its subject is the module."""
    with use_backend("reference"):
        yield


# -- what users do with modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
def test_dropout_replays_under_checkpointing(backend, device):
    module = make(layers=1, hidden_dropout=0.1, attention_dropout=0.2).to(device).train()
    x, queries, ids, keep, seen = data(device)

    leaves = dict(module.named_parameters())

    def run(again):
        torch.manual_seed(7)
        call = lambda: module(queries, x, ids, keep, seen).hidden  # noqa: E731
        return gradients(checkpoint(call, use_reentrant=False) if again else call(), leaves)

    with use_backend(backend):
        plain, other = run(False), run(True)
        assert all(torch.equal(plain[n], t) for n, t in other.items())
        assert not torch.equal(plain["y"], module.eval()(queries, x, ids, keep, seen).hidden)


def test_hidden_dropout_acts_on_each_branch():
    """With branches of ones, s = LN(s) + dropout(1): each element of a branch is 0 or 1 / (1 - p)."""
    module, (x, queries, *_) = make(layers=1, text=False, hidden_dropout=0.25).double(), data(dtype=torch.float64)
    layer = module.encoder.layer[0].train()
    outputs = [layer.attention.output, layer.crossattention.output, layer.output_query]
    sums = []
    with torch.no_grad():
        for output in outputs:
            output.dense.weight.zero_(), output.dense.bias.fill_(1.0)
            output.LayerNorm.register_forward_pre_hook(lambda m, args: sums.append(args[0]))
            output.LayerNorm.weight.zero_(), output.LayerNorm.bias.zero_()
        module(queries, x)
    assert len(sums) == 3
    # the first sum stands on the embedding; the others on norms that give zero
    for branch in sums[1:]:
        assert set(branch.unique().tolist()) == {0.0, 4 / 3}
        assert 0.1 < (branch == 0).double().mean() < 0.4
    assert not torch.equal(sums[1], sums[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, device):
    module, (x, queries, ids, keep, seen) = make(layers=1, lm_head=True).to(device), data(device)
    leaves = dict(module.named_parameters())

    def run():
        with torch.autocast(device, torch.bfloat16):
            return module(queries, x, ids, keep, seen).hidden

    with use_backend(backend):
        got = gradients(run(), leaves)

    # the children one after the other, as upstream under the same autocast
    plain, wide = copy.deepcopy(module), copy.deepcopy(module).double()
    for child in list(plain.modules()):
        if isinstance(child, (nn.Linear, nn.LayerNorm)):
            child.register_forward_hook(lambda *_: None)
    draws = []
    for draw in SEEDS:
        if draw:
            x, queries, ids, keep, seen = data(device)
        with use_backend("reference"):
            with torch.autocast(device, torch.bfloat16):
                y = plain(queries, x, ids, keep, seen).hidden
            usual = gradients(y, dict(plain.named_parameters()))
            truth = wide(queries.double(), x.double(), ids, keep, seen).hidden
        draws.append((usual, gradients(truth, dict(wide.named_parameters()))))
    assert_model(got, draws, torch.bfloat16)


@pytest.mark.parametrize("text, backend", [
    (False, "reference"),
    pytest.param(True, "reference", marks=pytest.mark.slow),
    pytest.param(True, "triton", marks=[on_triton, pytest.mark.slow]),
])  # fmt: skip
def test_compiles_in_one_graph(text, backend, device):
    module = make(layers=2, text=text, lm_head=text, masked=LAVIS).to(device)
    x, queries, ids, keep, seen = data(device)
    leaves = dict(module.named_parameters()) | {"x": x.requires_grad_()}

    def step():
        image = module.image_kv(x, seen)
        first = module(queries, image, use_cache=True)
        if not text:
            return first.queries
        then = module(input_ids=ids, attention_mask=keep, cache=first.cache).text
        match = module(queries, image, ids, keep, index=torch.tensor([2, 0, 1], device=device)).queries
        return torch.cat((first.queries, match, module.lm_logits(then)[..., :D]), 1)

    with use_backend(backend):
        eager = gradients(step(), leaves)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got = gradients(compiled(), leaves)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled()
    with use_backend("reference"):
        usual = gradients(step(), leaves)
    for name, truth in eager.items():
        assert beside(name, got[name], usual[name], truth.double()).ok or torch.equal(got[name], truth), name


def test_deepcopy():
    module, (x, queries, ids, keep, seen) = make(lm_head=True), data()
    twin = copy.deepcopy(module)
    assert torch.equal(module(queries, x, ids, keep, seen).hidden, twin(queries, x, ids, keep, seen).hidden)
    with torch.no_grad():
        twin.encoder.layer[0].crossattention.attention.key.weight.zero_()
    assert not torch.equal(module(queries, x, ids, keep, seen).hidden, twin(queries, x, ids, keep, seen).hidden)


CHILDREN = [n for n, m in make(lm_head=True).named_modules()
            if isinstance(m, (nn.Linear, nn.LayerNorm)) and ".1." not in n]  # fmt: skip


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_that_is_no_plain_layer_acts(name):
    """The ops read the children's weights: they must not where that would skip what a child does."""
    module, (x, queries, ids, keep, seen) = make(lm_head=True), data()
    run = lambda m: m.lm_logits(m(queries, x, ids, keep, seen).hidden)  # noqa: E731
    plain = run(module)
    hooked, changed, expected = (copy.deepcopy(module) for _ in range(3))
    seen_by_hook = []
    hooked.get_submodule(name).register_forward_hook(lambda m, args, y: seen_by_hook.append(y.shape))
    again = run(hooked)
    assert seen_by_hook
    assert beside("hook", again, plain, plain.double()).error <= 256 * ulp(
        float(plain.detach().abs().max()), torch.float32
    )
    child, other = changed.get_submodule(name), expected.get_submodule(name)
    child.__class__ = Doubled if isinstance(child, nn.Linear) else Shifted
    with torch.no_grad():
        if isinstance(child, nn.Linear):
            other.weight.mul_(2), other.bias.mul_(2)
        else:
            other.bias.add_(1)
    got, usual = run(changed), run(expected)
    assert beside("subclass", got, usual, usual.double()).error <= 256 * ulp(
        float(usual.detach().abs().max()), torch.float32
    )
    assert not torch.equal(got, plain)


def test_a_layer_that_is_gathered_around_its_forward():
    """What FSDP does: a layer's weights are there only while it runs."""
    module, (x, queries, ids, keep, seen) = make(), data()
    usual = module(queries, x, ids, keep, seen).hidden
    inside = []

    class Sharded(nn.Parameter):
        """A parameter that may be read only while its layer runs."""

    for layer in module.encoder.layer:
        whole = {}
        for path, child in layer.named_modules():
            for key, parameter in list(child._parameters.items()):
                whole[path, key] = parameter
                child._parameters[key] = Sharded(torch.full_like(parameter, torch.nan))
        store = dict(whole)

        def gather(m, args, kwargs, store=store):
            inside.append(m)
            for (path, key), parameter in store.items():
                m.get_submodule(path)._parameters[key] = parameter

        def release(m, args, kwargs, y, store=store):
            for path, key in store:
                m.get_submodule(path)._parameters[key] = Sharded(torch.full_like(store[path, key], torch.nan))

        layer.register_forward_pre_hook(gather, with_kwargs=True)
        layer.register_forward_hook(release, with_kwargs=True)
    got = module(queries, x, ids, keep, seen).hidden
    assert len(inside) == 3
    assert beside("sharded", got, usual, usual.double()).error <= 256 * ulp(
        float(usual.detach().abs().max()), torch.float32
    )


def test_a_lora_on_a_child():
    from vlkernels.modules import LoRALinear

    module, (x, queries, ids, keep, seen) = make(), data()
    attention = module.encoder.layer[2].crossattention.attention
    plain = module(queries, x, ids, keep, seen).hidden
    attention.value = LoRALinear.from_plain(attention.value, 4)
    assert beside("b is zero", module(queries, x, ids, keep, seen).hidden, plain, plain.double()).error <= 256 * ulp(
        float(plain.detach().abs().max()), torch.float32
    )
    with torch.no_grad():
        attention.value.adapters["default"].b.normal_()
    assert not torch.equal(module(queries, x, ids, keep, seen).hidden, plain)


# -- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level, dropout, most", [(0, 0.1, 0.62), (1, 0.1, 0.40), (0, 0.0, 0.68), (1, 0.0, 0.40)])
def test_saved_bytes_beside_transformers(level, dropout, most):
    """What one image more adds at BLIP-2's published size, on meta tensors."""
    pytest.importorskip("transformers")
    from benchmarks.modules import blip2_qformer, saved

    (_, eager), *ours = blip2_qformer(dropout)
    usual, got = (saved(*make("meta"), shape=(257, 1408))[1] for make in (eager, ours[level][1]))
    assert got <= most * usual, got / usual


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, says", [
    (lambda m, q, x, i, k: m(), "accepted: query_embeds, input_ids or both"),
    (lambda m, q, x, i, k: m(q), "query_embeds are accepted with an image"),
    (lambda m, q, x, i, k: m(input_ids=i, image=x), "accepted with query_embeds only"),
    (lambda m, q, x, i, k: m(q[..., :7], x), "query_embeds has shape .*16 channels"),
    (lambda m, q, x, i, k: m(q, x[..., :7]), "image_embeds has shape .*20 channels"),
    (lambda m, q, x, i, k: m(q, x[0]), "image_embeds has shape .*accepted: .B, N, C."),
    (lambda m, q, x, i, k: m(q, x, i[:2]), "batch sizes differ: .*'image': 3, 'input_ids': 2"),
    (lambda m, q, x, i, k: m(q, x, i[:1]), "batch sizes differ"),
    (lambda m, q, x, i, k: m(q.expand(2, -1, -1), x), "batch sizes differ"),
    (lambda m, q, x, i, k: m(q, x, i, k[:, :2]), "attention_mask is torch.int64 .3, 2.; accepted"),
    (lambda m, q, x, i, k: m(q, x, i, k.float()), "attention_mask is torch.float32"),
    (lambda m, q, x, i, k: m(q, x, image_mask=k), "image mask is .*accepted: bool or integers .3, 9."),
    (lambda m, q, x, i, k: m(q, m.image_kv(x), image_mask=k), "image_mask is given beside no image tensor"),
    (lambda m, q, x, i, k: m(q, x, index=torch.tensor([0.0])), "index is torch.float32"),
    (lambda m, q, x, i, k: m(q, x, want=("hidden",)), "want is .*accepted: some of 'queries', 'text'"),
    (lambda m, q, x, i, k: m(input_ids=torch.ones(1, 13, dtype=torch.long)), "13 tokens; accepted: up to 12"),
    (lambda m, q, x, i, k: m(input_ids=i.float()), "input_ids is torch.float32"),
    (lambda m, q, x, i, k: m.lm_logits(q), "no LM head"),
    (lambda m, q, x, i, k: make(text=False)(q, x, i), "Q-Former without text"),
    (lambda m, q, x, i, k: make(text=False).copy_text_to_queries(), "has no text"),
    (lambda m, q, x, i, k: m(q, x, cache=m(q, x, use_cache=True).cache), "without a cache"),
    (lambda m, q, x, i, k: m(input_ids=i, cache=make(layers=2)(q, x, use_cache=True).cache), "cache holds 2 layers"),
    (lambda m, q, x, i, k: QFormer(10, 1, 3), "hidden_size is 10, heads 3"),
    (lambda m, q, x, i, k: QFormer(12, 1, 3, lm_head=True), "accepted with a vocab_size"),
    (lambda m, q, x, i, k: QFormer(12, 1, 3, hidden_act="mish"), "hidden_act is 'mish'"),
    (lambda m, q, x, i, k: QFormer(12, 0, 3), "layers is 0"),
    (lambda m, q, x, i, k: QFormer(12, 1, 3, level=2), "level is 2"),
])  # fmt: skip
def test_errors_name_the_argument(call, says):
    x, queries, ids, keep, _ = data()
    with pytest.raises(ValueError, match=says):
        call(make(), queries, x, ids, keep)
