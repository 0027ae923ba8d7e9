"""VL-Adapter's controllers, Compacter, low rank, Hyperformer: equations, sharing, files, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from equations import (
    Variant,
    check_children,
    check_identity,
    check_names,
    check_one_graph,
    check_rule,
    layer_norm,
    lin,
    on_triton,
    randomised,
)
from own_goldens import both, passes, write
from torch import nn

from vlkernels import backends, use_backend
from vlkernels.modules import (
    PHMLinear,
    VLAdapterController,
    VLHyperformer,
    share_phm_rule,
)
from vlkernels.testing import compare

pytestmark = pytest.mark.usefixtures("on_the_reference")
D, R, OP = 16, 4, ("bottleneck_adapter",)


def act(t):
    return F.gelu(t, approximate="tanh")


# -- projections and controllers -----------------------------------------------------------------------------------


def project(p, name, x):
    """A Linear, a sum of Kronecker products, or two factors."""
    if f"{name}.weight" in p:
        return lin(p, name, x)
    if f"{name}.phm_rule" in p:
        w = p[f"{name}.W"] if f"{name}.W" in p else p[f"{name}.W_left"] @ p[f"{name}.W_right"]
        h = sum(torch.kron(c, m) for c, m in zip(p[f"{name}.phm_rule"], w, strict=True))
    else:
        h = p[f"{name}.W_left"] @ p[f"{name}.W_right"]
    return x @ h + p[f"{name}.b"]


def controller(p, x, task="a", top="ctrl."):
    n = layer_norm(p, f"{top}pre_layer_norm", x) if f"{top}pre_layer_norm.weight" in p else x
    a = f"{top}adapters.{task}."
    y = project(p, f"{a}up_sampler", act(project(p, f"{a}down_sampler", n)))
    y = layer_norm(p, f"{top}post_layer_norm", y) if f"{top}post_layer_norm.weight" in p else y
    return y + x


class Ctrl(nn.Module):
    def __init__(self, **words):
        super().__init__()
        self.ctrl = VLAdapterController(D, ("a",), reduction=4, **words)

    def forward(self, x):
        return self.ctrl(x)


def variant(module_id="adapter.vl_adapter", more=(), **words):
    return Variant(module_id, lambda: Ctrl(**words), controller, lambda: (torch.randn(3, 5, D),), (*OP, *more))


CASES = {
    "linear": variant(),
    "norms": variant(more=("norm_residual",), ln_before=True, ln_after=True),
    "compacter": variant("adapter.vl_adapter_compacter", kind="compacter", k=2, shared_phm_rule=False, phm_rank=2),
    "compacter whole": variant("adapter.vl_adapter_compacter", kind="compacter", k=4, shared_phm_rule=False,
                               factorized=False),
    "low rank": variant("adapter.vl_adapter_low_rank", kind="low_rank", low_rank_rank=3),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equation(name):
    check_identity(CASES[name])
    check_names(CASES[name])


@on_triton
@pytest.mark.parametrize("name", ["norms", "compacter"])
def test_rule_and_one_graph(name, device):
    torch._dynamo.reset()
    check_rule(CASES[name], "triton", device, torch.bfloat16)
    check_one_graph(CASES[name], "triton", device)


def test_children():
    for name in ("linear", "norms"):
        check_children(CASES[name])
    ctrl = VLAdapterController(D, reduction=4, kind="compacter").double()
    x, seen = torch.randn(2, 3, D).double(), []
    want = ctrl(x).detach()
    ctrl.adapters["default"].down_sampler.register_forward_hook(lambda *_: seen.append(1))
    with backends.record() as calls:
        got = ctrl(x).detach()
    assert seen and not calls
    assert float((got - want).abs().max()) <= 64 * compare.ulp(float(want.abs().max()), torch.float64)
    ctrl = VLAdapterController(D, reduction=4).double()
    ctrl.adapters["default"].register_forward_hook(lambda *_: seen.append(2))
    ctrl(x)
    assert seen == [1, 2]


def test_sharing():
    tasks, x = ("a", "c"), torch.randn(2, 3, D)
    single = VLAdapterController(D, tasks, single=True)
    assert single.adapters["a"] is single.adapters["c"] and len(list(single.parameters())) == 4
    assert {k.split(".")[1] for k in single.state_dict()} == {"a", "c"}
    twin = VLAdapterController(D, tasks, single=True)
    twin.load_state_dict(single.state_dict())
    assert torch.equal(twin(x, task="c"), single(x))
    for name, other in (("down", "up"), ("up", "down")):
        half = VLAdapterController(D, tasks, **{f"share_{name}": True})
        a, c = half.adapters["a"], half.adapters["c"]
        assert getattr(a, f"{name}_sampler") is getattr(c, f"{name}_sampler")
        assert getattr(a, f"{other}_sampler") is not getattr(c, f"{other}_sampler")
    rules = lambda m: {id(l.phm_rule) for l in m.modules() if isinstance(l, PHMLinear)}  # noqa: E731
    words = {"kind": "compacter", "reduction": 4, "k": 2}
    assert len(rules(VLAdapterController(D, tasks, **words))) == 1
    assert len(rules(VLAdapterController(D, tasks, shared_phm_rule=False, **words))) == 4
    over = VLAdapterController(D, tasks, shared_phm_rule=False, shared_phm_rule_over_tasks=True, **words)
    assert len(rules(over)) == 2 and over.adapters["a"].up_sampler.phm_rule is over.adapters["c"].up_sampler.phm_rule
    model = nn.ModuleList(VLAdapterController(D, tasks, **words) for _ in range(2))
    assert len(rules(model)) == 2
    rule = share_phm_rule(model)
    assert rules(model) == {id(rule)} and len(rules(copy.deepcopy(model))) == 1
    model[0](x).sum().backward(), model[1](x, task="c").sum().backward()
    assert rule.grad is not None
    with pytest.raises(ValueError, match="has no PHMLinear"):
        share_phm_rule(single)
    with pytest.raises(ValueError, match=r"rule has shape \(3, 3, 3\); accepted: \(2, 2, 2\)"):
        share_phm_rule(model, nn.Parameter(torch.zeros(3, 3, 3)))


def test_inits():
    torch.manual_seed(0)
    for layer, shapes in (
        (PHMLinear(320, 40, 2), ((160, 1), (1, 20))), (PHMLinear(320, 40, 4, factorized=False), ((80, 10),))
    ):  # fmt: skip
        parts = (layer.W_left, layer.W_right) if len(shapes) == 2 else (layer.W,)
        for part, (a, b) in zip(parts, shapes, strict=True):
            bound = 2**0.5 * (6 / (a + b)) ** 0.5
            assert tuple(part.shape[1:]) == (a, b) and 0.5 * bound < float(part.abs().max()) <= bound * (1 + 1e-6)
        assert not layer.b.any() and 0 < float(layer.phm_rule.abs().max()) < 6e-4
    hyper = VLHyperformer(D, ("a",), 2)
    assert 0.008 < float(hyper.hyper.up_sampler_hyper_net.weight_generator[0].weight.std()) < 0.012
    assert not hyper.hyper.LayerNorm.bias.any() and hyper.hyper.LayerNorm.eps == 1e-6


# -- Hyperformer ---------------------------------------------------------------------------------------------------


def hyper(p, x, task="a", layer=1, block=0):
    e = (p[f"task_embed.task_to_embeddings.{task}"], p["hyper.layer_id_embeddings.weight"][layer],
         p["hyper.adapters_block_type.weight"][block])  # fmt: skip
    g = "hyper.task_hypernet.task_embeding_generator"
    e = layer_norm(p, "hyper.LayerNorm", lin(p, f"{g}.2", lin(p, f"{g}.0", torch.cat(e)).relu()), 1e-6)
    made = {k: tuple(lin(p, f"hyper.{k}_sampler_hyper_net.{w}_generator.0", e) for w in ("weight", "bias"))
            for k in ("down", "up")}  # fmt: skip
    norms = {k: tuple(lin(p, f"hyper.{k}_layernorm_hypernet.{w}_generator", e) for w in ("weight", "bias"))
             for k in ("pre", "post") if f"hyper.{k}_layernorm_hypernet.weight_generator.weight" in p}  # fmt: skip
    n = F.layer_norm(x, x.shape[-1:], *norms["pre"]) if "pre" in norms else x
    y = F.linear(act(F.linear(n, made["down"][0].view(R, D), made["down"][1])), made["up"][0].view(D, R), made["up"][1])
    return x + (F.layer_norm(y, y.shape[-1:], *norms["post"]) if "post" in norms else y)


class Hyper(VLHyperformer):
    def __init__(self, **words):
        super().__init__(D, ("a", "c"), 2, r=R, task_dim=6, hidden=7, proj_dim=5, **words)

    def forward(self, x):
        return super().forward(x, layer=1)


@pytest.mark.parametrize("words", [{}, {"ln_before": True, "ln_after": True}, {"act": "tanh"}], ids=str)
def test_hyperformer(words):
    v = Variant("adapter.vl_adapter_hyperformer", lambda: Hyper(**words), hyper, lambda: (torch.randn(2, 3, D),), OP)
    check_names(v)
    if "act" in words:
        module = randomised(v.make())
        with backends.record() as calls:
            module(torch.randn(2, 3, D))
        assert not calls
        return
    check_identity(v)


def test_hyperformers_places():
    module, x = randomised(Hyper()), torch.randn(2, 3, D)
    p = dict(module.named_parameters())
    for task, layer, block in (("a", 0, "ff"), ("c", 1, "attn"), ("a", 1, "cross")):
        want = hyper(p, x, task, layer, VLHyperformer.BLOCKS.index(block))
        weights = module.weights(task, layer, block)
        for words in ({"task": task, "layer": layer, "block": block}, {"weights": weights}):
            assert compare.beside("y", VLHyperformer.forward(module, x, **words), want, want.double()).ok
    for words, says in (
        ({"task": "b"}, "task is 'b'; accepted: a, c"), ({"layer": 2}, "layer is 2, block 'ff'; accepted: 0 to 1"),
        ({"block": "mlp"}, "block 'mlp'; accepted: 0 to 1, ff, attn, cross"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            VLHyperformer.forward(module, x, **words)


# -- files as upstream writes them ---------------------------------------------------------------------------------


def compacter(tasks, factorized, k=2):
    """Shapes of a controller's parameters, and the groups that share a C over the tasks."""
    shapes, same = {}, []
    for name, (i, o) in (("down_sampler", (D, R)), ("up_sampler", (R, D))):
        for task in tasks:
            at = f"ctrl.adapters.{task}.{name}."
            weights = (
                {"W_left": (k, i // k, 1), "W_right": (k, 1, o // k)} if factorized else {"W": (k, i // k, o // k)}
            )
            shapes |= {at + n: s for n, s in {**weights, "b": (o,), "phm_rule": (k, k, k)}.items()}
        same.append([f"ctrl.adapters.{task}.{name}.phm_rule" for task in tasks])
    return shapes, same


def two_tasks(p, x, y):
    return {"y.gqa": controller(p, x, "gqa"), "y.vqa": controller(p, y, "vqa")}


BASE = {"d": D, "reduction": 4, "tasks": ["gqa", "vqa"], "run_tasks": ["gqa", "vqa"]}
INPUTS = {"x.gqa": (2, 3, D), "x.vqa": (2, 3, D)}
PHM = BASE | {"variant": "compacter", "hypercomplex_division": 2}


@pytest.mark.parametrize("over_tasks", [False, True])
@pytest.mark.parametrize("factorized", [False, True])
def test_compacters_files(over_tasks, factorized, tmp_path):
    """A C for each projection, or one over the tasks: the file says which."""
    shapes, same = compacter(("gqa", "vqa"), factorized)
    hp = PHM | {"shared_phm_rule": False, "shared_phm_rule_over_tasks": over_tasks, "factorized_phm": factorized}
    write(tmp_path, "adapter.vl_adapter_compacter", hp, shapes, INPUTS, two_tasks, same if over_tasks else ())
    passes(tmp_path)


def test_other_files(tmp_path):
    for name, module_id, words, shapes, equation, inputs, same in (
        ("low_rank", "adapter.vl_adapter_low_rank",
         {"variant": "low_rank", "low_rank_rank": 2, "single": True, "tasks": ["vqa"], "run_tasks": ["vqa"]},
         {f"ctrl.adapters.vqa.{n}.{w}": s for n, (i, o) in (("down_sampler", (D, R)), ("up_sampler", (R, D)))
          for w, s in (("W_left", (i, 2)), ("W_right", (2, o)), ("b", (o,)))},
         lambda p, x: {"y.vqa": controller(p, x, "vqa")}, {"x.vqa": (2, 3, D)}, ()),
        ("norms", "adapter.vl_adapter", {"variant": "adapter", "share_up": True, "ln_before": True, "ln_after": True},
         {k: s for t in ("gqa", "vqa") for n, o, i in (("down", R, D), ("up", D, R))
          for k, s in both(f"ctrl.adapters.{t}.{n}_sampler", o, i).items()}
         | {f"ctrl.{n}_layer_norm.{w}": (D,) for n in ("pre", "post") for w in ("weight", "bias")},
         two_tasks, INPUTS, [[f"ctrl.adapters.{t}.up_sampler.{w}" for t in ("gqa", "vqa")] for w in ("weight", "bias")],
        ),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        write(folder, module_id, BASE | words, shapes, inputs, equation, same)
        passes(folder)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: VLAdapterController(D, ()), r"tasks is \(\); accepted: one name or more"),
        (lambda: VLAdapterController(D, "vqa"), "tasks is 'vqa'; accepted"),
        (lambda: VLAdapterController(D, kind="houlsby"), "kind is 'houlsby'; accepted: adapter, compacter, low_rank"),
        (lambda: VLAdapterController(D, kind="compacter", k=3), "16 -> 2 in k=3 parts of rank 1; accepted: a divisor"),
        (lambda: VLAdapterController(D, kind="low_rank", low_rank_rank=0), "rank is 0; accepted: 1 or more"),
        (lambda: VLAdapterController(D)(torch.zeros(2, D), task="x"), "task is 'x'; accepted: default"),
        (lambda: VLHyperformer(D, ("a",), 0), r"tasks is \('a',\), layers 0; accepted"),
    ],
)  # fmt: skip
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@on_triton
def test_odd_rows_on_kernels(device):
    """One token, a single sample, none, and slices of a wider buffer."""
    ctrl = randomised(VLAdapterController(D, reduction=4, ln_before=True)).to(device)
    wide = torch.randn(3, 7, D + 8, device=device)
    for x in (wide[:0, :, :D], wide[:1, :1, :D], wide[..., 8:], wide[:, ::3, :D]):
        with use_backend("triton"):
            got = ctrl(x).detach()
        assert compare.beside("y", got, ctrl(x), copy.deepcopy(ctrl).double()(x.double())).ok
