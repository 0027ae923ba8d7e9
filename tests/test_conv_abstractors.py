"""C-Abstractor, LDP and LDPv2: upstream's channels-first equation in float64, what is kept and copied, what users do"""

import contextlib
import copy
import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from equations import (
    BACKENDS,
    KERNELS_RUN,
    ShiftedNorm,
    Variant,
    check_checkpointing,
    check_copies,
    check_identity,
    check_names,
    check_one_graph,
    check_rule,
    made,
    of_module,
    on_triton,
    randomised,
    same_in_float64,
    tokens,
    trained,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.upstream_maps import c_abstractor, conv, image, ldp, ldpv2, rows
from vlkernels import use_backend
from vlkernels.modules import (
    CAbstractor,
    LDPNetProjector,
    LDPNetV2Projector,
    LlavaProjector,
    conv_abstractor,
    mobilevlm_projector,
    projector,
)
from vlkernels.modules.conv_abstractor import average_pool, squeezed_width
from vlkernels.testing import meter
from vlkernels.testing.compare import ulp


def bee(*sizes, **options):
    return lambda: CAbstractor(*sizes, **options)


C, V1, V2 = "abstractor.honeybee_c", "projector.mobilevlm_ldp", "projector.mobilevlm_ldpv2"
SE, MLP, V2_OPS = ("conv_se_linear",), ("mlp_projector",), ("depthwise_conv_norm_act", "pooled_mlp")
CASES = {
    "c": Variant(C, bee(16, 12, 14, 20, depth=1, num_query_tokens=4), c_abstractor(2), tokens(2, 16, 12), SE + MLP),
    "c same width, eos, level 1": Variant(
        C, bee(9, 16, 14, 16, depth=2, mlp_depth=1, num_query_tokens=4, prenorm=True, num_eos_tokens=2, level=1),
        c_abstractor(2), tokens(2, 9, 16), SE),
    "c upwards, no positions": Variant(
        C, bee(4, 12, 10, 12, depth=1, mlp_depth=3, num_query_tokens=9, pos_emb=False), c_abstractor(3),
        tokens(2, 4, 12), SE + MLP),
    "c depth 0": Variant(C, bee(25, 12, 10, 8, depth=0, num_query_tokens=9), c_abstractor(3), tokens(2, 25, 12), MLP),
    "ldp": Variant(V1, lambda: LDPNetProjector(10, 24), ldp, tokens(2, 16, 10), SE + MLP),
    "ldp odd, level 1": Variant(V1, lambda: LDPNetProjector(10, 20, level=1), ldp, tokens(2, 9, 10), SE + MLP),
    "ldpv2": Variant(V2, lambda: LDPNetV2Projector(10, 12), ldpv2, tokens(1, 225, 10), V2_OPS),
    "ldpv2 upwards, level 1": Variant(V2, lambda: LDPNetV2Projector(10, 12, level=1), ldpv2, tokens(2, 25, 10), V2_OPS),
}  # fmt: skip
FAMILIES = ("c", "ldp", "ldpv2 upwards, level 1")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_against_float64_by_hand(name, backend, device):
    check_rule(CASES[name], backend, device)


@pytest.mark.parametrize("name", CASES)
def test_is_upstreams_equation(name):
    check_identity(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_upstreams_state_dict_is_ours(name):
    check_names(CASES[name])
    state = CASES[name].make().state_dict()
    from vlkernels.integrations.checkpoints import to_upstream

    assert list(to_upstream(CASES[name].module_id, state)) == list(state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["c", "ldpv2 upwards, level 1"])
def test_autocast(name, backend, device):
    check_rule(CASES[name], backend, device, torch.bfloat16)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_in_one_graph(name, device):
    check_one_graph(CASES[name], "reference", device, bits=False)


@on_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_in_one_graph_with_kernels(name, device):
    check_one_graph(CASES[name], "triton", device)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_and_copies(name):
    with use_backend("reference" if name != "ldp" else None):
        check_checkpointing(CASES[name])
        check_copies(CASES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_no_image(name):
    module, (x,) = made(CASES[name])
    assert module(x[:0]).shape == (0, *module(x).shape[1:])


def test_the_input_is_left_as_it_is_and_may_be_a_slice():
    module, (x,) = made(CASES["c same width, eos, level 1"])
    wide = torch.randn(2, 11, 20)
    wide[:, 1:-1, 2:-2] = x
    before, y = x.clone(), module(x).detach()
    assert torch.equal(x, before)
    with use_backend("triton" if KERNELS_RUN else "reference"):
        got, want = (module(t).detach() for t in (wide[:, 1:-1, 2:-2], x))
    assert torch.equal(got, want) and (got - y).abs().max() <= 64 * ulp(float(y.abs().max()), y.dtype)


def uneven(module, arguments, y):
    return y + torch.arange(y.numel()).view(y.shape) % 3


# -- somebody else's children --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c", "ldp", "ldpv2"])
def test_a_hook_or_a_subclass_of_a_child_acts(name):
    module, inputs = made(CASES[name])
    module, inputs = module.double(), tuple(t.double() for t in inputs)
    plain = module(*inputs).detach()
    top = float(plain.abs().max())
    children = {n: m for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.LayerNorm))}
    assert len(children) >= 3
    for path, child in children.items():
        twin = copy.deepcopy(module)
        if isinstance(child, nn.LayerNorm):
            twin.get_submodule(path).__class__ = ShiftedNorm
        else:
            twin.get_submodule(path).register_forward_hook(
                lambda m, a, y: y + torch.arange(y.numel()).view(y.shape) % 3
            )
        assert (twin(*inputs) - plain).abs().max() > 1e-9 * top, path
    seen = set()
    between = {n: m for n, m in module.named_modules() if n.rpartition(".")[2] in ("se", "conv2", "downsample")}
    between |= {n: m for n, m in module.named_modules() if isinstance(m, nn.AdaptiveAvgPool2d)}
    for path, child in (children | between).items():
        child.register_forward_hook(lambda m, a, y, path=path: seen.add(path))
    assert (module(*inputs) - plain).abs().max() <= 4096 * ulp(top, torch.float64)
    assert seen == set(children | between)


@pytest.mark.parametrize("name", list(CASES))
def test_from_plain_shares_upstreams_parameters(name):
    module, inputs = made(CASES[name])
    extra = (module.side**2,) if isinstance(module, CAbstractor) else ()
    twin = type(module).from_plain(module, *extra, level=1)
    assert twin.level == 1 and not twin.training
    ours, theirs = dict(twin.named_parameters()), dict(module.named_parameters())
    assert list(ours) == list(theirs) and all(ours[n] is theirs[n] for n in ours)
    assert torch.equal(twin(*inputs), module(*inputs))


def test_an_old_checkpoint_with_a_position_for_cls():
    module, twin = (randomised(CASES["c"].make()) for _ in range(2))
    state = module.state_dict()
    state["pos_emb"] = torch.cat((torch.ones(1, 1, 12), state["pos_emb"]), 1)
    twin.load_state_dict(state)
    assert torch.equal(twin.pos_emb, module.pos_emb) and state["pos_emb"].shape == (1, 17, 12)


def test_types():
    kinds = {"ldpnetv2": LDPNetV2Projector, "ldpnet": LDPNetProjector, "ldpnetv2_pool": LDPNetV2Projector,
             "linear": LlavaProjector, "mlp2x_gelu": LlavaProjector}  # fmt: skip
    for name, kind in kinds.items():
        assert type(mobilevlm_projector(name, 10, 16)) is kind
    with pytest.raises(ValueError, match="mm_projector_type is 'ldp'"):
        mobilevlm_projector("ldp", 10, 16)


# -- pooling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(4, 2), (5, 3), (3, 7), (6, 6), (9, 4), (1, 3)])
def test_pooling_is_torchs_and_keeps_nothing(sides):
    side, out = sides
    x = torch.randn(2, side * side, 5, dtype=torch.float64, requires_grad=True)
    y, want = average_pool(x, side, side, out, out), rows(F.adaptive_avg_pool2d(image(x), (out, out)))
    dy = torch.randn_like(y)
    same_in_float64(
        {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]},
        {"y": want.detach(), "dx": torch.autograd.grad(want, x, dy)[0]},
    )
    # the windows, where there are any: zeros and ones of the sides
    assert meter.saved_bytes(lambda: average_pool(x, side, side, out, out)) <= 8 * (2 * out * side + out * out)


@pytest.mark.parametrize("sides", [(24, 12), (15, 12), (5, 12), (13, 4)])
def test_pooling_commutes_with_the_second_linear(sides):
    """Upstream's order and the op's in float64: windows that fit, overlap and repeat."""
    from vlkernels import pooled_mlp

    side, out = sides
    x, w1, w2, b1, b2 = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, side * side, 6), (8, 6), (7, 8), (8,), (7,))
    )
    want = rows(F.adaptive_avg_pool2d(image(F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)), (out, out)))
    got = pooled_mlp(x, w1, w2, side, side, out, out, b1, b2)
    dy = torch.randn_like(want)
    names = ("x", "w1", "w2", "b1", "b2")
    found = [dict(zip(names, torch.autograd.grad(y, (x, w1, w2, b1, b2), dy), strict=True)) for y in (got, want)]
    same_in_float64({"y": got.detach()} | found[0], {"y": want.detach()} | found[1])


# -- what is kept, computed and copied -------------------------------------------------------------------------------


def kept_bytes(call) -> int:
    """Bytes of distinct storages, other than parameters', that are saved for backward; x is among them."""
    found = {}

    def pack(t):
        base = t._base if t._base is not None else t
        if not isinstance(t, nn.Parameter) and not isinstance(base, nn.Parameter):
            found[t.untyped_storage()._cdata] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    del y
    return sum(size for size, _ in found.values())


@contextlib.contextmanager
def shapes_only():
    """Inside, tensors have shapes alone; a child with such parameters counts as a plain one, and draws nothing."""
    with (
        mock.patch.object(conv_abstractor, "_plain", return_value=True),
        mock.patch.object(projector, "_plain", return_value=True),
        mock.patch.object(CAbstractor, "reset_parameters"),
        FakeTensorMode(),
    ):
        yield


@on_triton
@pytest.mark.parametrize("kind, limits", [(C, (0.42, 0.22)), (V2, (0.52, 0.20))])
def test_what_is_kept_at_published_sizes(kind, limits):
    """Beside upstream's own code on one image; shapes alone are run, the kernels' as they are registered."""
    equation = c_abstractor(12) if kind == C else ldpv2
    ratios = []
    for level in (0, 1):
        with shapes_only(), use_backend("triton"):
            made = {"dtype": torch.bfloat16, "level": level}
            module = CAbstractor(576, 1024, 4096, **made) if kind == C else LDPNetV2Projector(1024, 2048, **made)
            parameters, x = dict(module.named_parameters()), torch.empty(1, 576, 1024, dtype=torch.bfloat16)
            eager = kept_bytes(lambda: equation(parameters, x))  # noqa: B023
            ours = kept_bytes(lambda: module(x))  # noqa: B023
        ratios.append(ours / eager)
        assert (45.5 if kind == C else 8.4) < eager / 2**20 < (46.5 if kind == C else 8.5)
    assert all(ratio <= limit for ratio, limit in zip(ratios, limits, strict=True)), ratios


def traffic_of(module, x, equation, backend="reference"):
    """(forward, backward) of upstream's equation and of the module."""
    found, parameters = [], trained(module) if isinstance(module, nn.Module) else {}
    for call in (lambda: equation(parameters, x), lambda: module(x)):
        with use_backend(backend), meter.traffic() as forward:
            y = call()
        with use_backend(backend), meter.traffic() as backward:
            y.backward(torch.ones_like(y))
        found.append((forward, backward))
    return found


@on_triton
@pytest.mark.parametrize("need_x", [False, True])
def test_ldpv2_multiplies_half(need_x, device):
    """At the published proportions C : D : D = 1 : 2 : 2 and 576 to 144 tokens."""
    module = LDPNetV2Projector(128, 256).to(device)
    x = torch.randn(1, 576, 128, device=device, requires_grad=need_x)
    eager, ours = (sum(t.flops for t in found) for found in traffic_of(module, x, ldpv2, "reference"))
    # the convolution apart, whose gradients the counter takes for those of a dense one
    y = torch.randn(1, 144, 256, device=device, requires_grad=True)
    peg = functools.partial(conv, {f"peg.peg.0.{n}": p for n, p in module.peg.peg[0].named_parameters()}, "peg.peg.0")
    same = sum(t.flops for t in traffic_of(lambda y: rows(peg(image(y))), y, lambda p, y: rows(peg(image(y))))[0])
    assert same < 0.5 * eager and ours - same <= 0.51 * (eager - same)


@on_triton
def test_level_0_computes_no_product_twice(device):
    module = CAbstractor(16, 16, 64, 16, depth=1, num_query_tokens=4).to(device)
    x = torch.randn(1, 16, 16, device=device)
    eager, ours = traffic_of(module, x, c_abstractor(2), "triton")
    assert sum(t.flops for t in ours) <= 1.02 * sum(t.flops for t in eager)
    module.level = 1
    again = sum(t.flops for t in traffic_of(module, x, c_abstractor(2), "triton")[1])
    assert again > sum(t.flops for t in ours)


COPIES = ("clone", "copy_", "_to_copy", "contiguous", "permute_copy", "transpose_copy", "cat", "im2col")


@on_triton
@pytest.mark.parametrize("name", ["c", "c same width, eos, level 1", "ldp", "ldpv2 upwards, level 1"])
def test_no_map_is_permuted_or_copied(name, device):
    module, (x,) = made(CASES[name], device)
    eos = getattr(module, "eos_tokens", None)
    with use_backend("triton"), meter.traffic() as forward, torch.no_grad():
        module(x)
    copies = {n: moved for n, moved in forward.moved_by.items() if n.removeprefix("aten::") in COPIES}
    # the tokens at the end are appended, to the result alone
    assert ("aten::cat" in copies) == (eos is not None)
    copies.pop("aten::cat", None)
    # and where windows overlap, they are made as zeros and ones of two sides of the map
    assert sum(copies.values()) <= 64 and x.numel() * x.element_size() >= 1152
    assert not {n for n in forward.launches if "convolution" in n}


# -- training it alone -------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, abstractor: nn.Module, width: int, out: int):
        super().__init__()
        self.tower, self.abstractor, self.llm = nn.Linear(width, width), abstractor, nn.Linear(out, out)

    def forward(self, x):
        return self.llm(F.silu(self.abstractor(F.gelu(self.tower(x)))))


@pytest.mark.parametrize(
    "name, backend",
    [(name, "reference") for name in FAMILIES]
    + [
        pytest.param(name, "triton", marks=[on_triton, *([pytest.mark.slow] if name == "c" else [])])
        for name in FAMILIES
    ],
)
def test_it_can_be_trained_alone(name, backend, device):
    """One stage, a frozen tower and language model: gradients only in the abstractor, each as with everything trained,
    and nothing kept that only the tower's gradient would need."""
    abstractor, (x,) = made(CASES[name], device)
    with torch.no_grad():
        out = abstractor(x).shape[-1]
    model = Model(abstractor, x.shape[-1], out).to(device)
    with use_backend(backend):
        everything = of_module(model, (x,))
        model.tower.requires_grad_(False)
        model.llm.requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None
        frozen = x.detach()
        y = model(frozen)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y))
        with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == {f"abstractor.{n}" for n, _ in abstractor.named_parameters()}
        for n, p in model.named_parameters():
            if p.grad is not None:
                top = float(everything[n].abs().max())
                assert (p.grad - everything[n]).abs().max() <= 64 * ulp(top, torch.float32), n
        saved = [meter.saved_bytes(lambda: abstractor(t), apart=abstractor.parameters())  # noqa: B023
                 for t in (x.detach(), x.detach().requires_grad_())]  # fmt: skip
        assert saved[0] <= saved[1]
        costs = []
        for t in (x.detach(), x.detach().requires_grad_()):
            y = abstractor(t)
            with meter.traffic() as backward:
                y.backward(torch.ones_like(y))
            costs.append((backward.flops, backward.moved))
    if "pos_emb" not in dict(abstractor.named_parameters()):  # positions stand where x does
        assert costs[0][0] < costs[1][0] and costs[0][1] < costs[1][1]


# -- sizes and bad input ---------------------------------------------------------------------------------------------


def test_published_sizes_and_inits():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(CAbstractor(576, 1024, 4096, device="meta")) == 37_398_016
    assert count(LDPNetProjector(1024, 2048, device="meta")) == 18_936_832
    assert count(LDPNetV2Projector(1024, 2048, device="meta")) == 6_316_032
    assert [squeezed_width(c) for c in (16, 2048, 2560, 72)] == [8, 512, 640, 24]
    module = CAbstractor(64, 32, 64, 64, depth=1, num_query_tokens=4, prenorm=True, num_eos_tokens=8)
    assert module.prenorm.eps == 1e-6 and module.net[0].b1.conv2.bn.eps == 1e-5
    for name, parameter in module.named_parameters():
        if "norm" in name or ".bn." in name:
            assert bool((parameter == float(name.endswith("weight"))).all()), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert 0.013 < parameter.std() < 0.027, name


def call(module, *shape):
    return module(torch.randn(*shape))


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: CAbstractor(16, 12, 14, num_query_tokens=5), "num_query_tokens is 5; accepted: a square"),
        (lambda: CAbstractor(16, 12, 14, num_query_tokens=0), "num_query_tokens is 0"),
        (lambda: CAbstractor(15, 12, 14), "num_input_tokens is 15; accepted: a square"),
        (lambda: CAbstractor(0, 12, 14), "num_input_tokens is 0"),
        (lambda: CAbstractor(16, 12, 14, depth=-1), "depth is -1"),
        (lambda: CAbstractor(16, 12, 14, mlp_depth=0), "mlp_depth 0"),
        (lambda: CAbstractor(16, 12, 14, num_eos_tokens=-1), "num_eos_tokens -1"),
        (lambda: CAbstractor(16, 12, 14, level=2), "level is 2"),
        (lambda: call(CASES["c"].make(), 2, 15, 12), "number of tokens is 15; accepted: a square"),
        (lambda: call(CASES["c"].make(), 2, 17, 12), "number of tokens is 17; accepted: a square"),
        (lambda: call(CASES["c"].make(), 2, 9, 12), "x has 9 tokens; accepted: the 16 rows of pos_emb"),
        (lambda: call(CASES["c"].make(), 2, 16, 13), r"x has shape \(2, 16, 13\); .* C = 12"),
        (lambda: call(CASES["c"].make(), 16, 12), r"accepted: \(B, N, C\)"),
        (lambda: call(LDPNetProjector(10, 16), 2, 12, 10), "number of tokens is 12; accepted: a square"),
        (lambda: call(LDPNetProjector(10, 16), 2, 0, 10), "number of tokens is 0; accepted: a square"),
        (lambda: call(LDPNetV2Projector(10, 16), 2, 577, 10), "number of tokens is 577; accepted: a square"),
        (lambda: call(LDPNetV2Projector(10, 16), 2, 16, 11), "C = 10"),
        (lambda: LDPNetV2Projector(10, 16, level=3), "level is 3"),
    ],
)
def test_errors_name_what_they_got(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        wrong()
