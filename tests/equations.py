"""What the tests of resamplers, mappers and abstractors share: parts of upstream's equations, and the checks."""

import copy
import os
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlkernels import backends, use_backend
from vlkernels.integrations.checkpoints import to_ours, to_upstream
from vlkernels.modules import LoRALinear
from vlkernels.testing import compare
from vlkernels.testing.compare import ulp

KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
on_triton = pytest.mark.skipif(not KERNELS_RUN, reason="neither a GPU nor Triton's interpreter")
BACKENDS = ["reference", pytest.param("triton", marks=on_triton)]


def slow_on_kernels(names, fast) -> list:
    """(name, backend): each name on the reference and on the kernels, where those that are not `fast` are slow."""
    assert set(fast) <= set(names)
    slow = [on_triton, pytest.mark.slow]
    return [(name, "reference") for name in names] + [
        pytest.param(name, "triton", marks=on_triton if name in fast else slow) for name in names
    ]


class Variant(NamedTuple):
    """module id, () -> module, (parameters under upstream's names, *inputs) -> y, () -> inputs, the ops that run."""

    module_id: str
    make: object
    equation: object
    inputs: object
    ops: tuple


def lin(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def layer_norm(p, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def attention(q, k, v, heads, scale=None, added=None):
    """Of (B, M, D) and (B, N, D); added to the scores (B, H, M, N)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    s = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    s = s if added is None else s + added
    return (s.softmax(-1) @ v).transpose(1, 2).flatten(2)


def tokens(*shape):
    return lambda: (torch.randn(*shape),)


def randomised(module: nn.Module) -> nn.Module:
    """No parameter at its initial zero or one, which would hide errors."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dim() == 1:
                parameter.normal_(float("norm" in name or "ln_" in name), 0.5)
            elif any(word in name for word in ("query_tokens", "const", "pos_emb", "vit_eos", "visual_query")):
                parameter.normal_()
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module


def doubled(inputs: tuple) -> tuple:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def results(call, parameters: dict, inputs: tuple) -> dict:
    """y, and the gradient of each float input of three axes or two that are no mask, and of each parameter."""
    inputs = tuple(x.detach().requires_grad_(x.is_floating_point() and not is_mask(x)) for x in inputs)
    for parameter in parameters.values():
        parameter.grad = None
    y = call(*inputs)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y))
    grads = {f"input {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    return {"y": y.detach()} | grads | {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


def is_mask(x: torch.Tensor) -> bool:
    return bool(((x == 0) | (x <= -1e9)).all())


def of_module(module, inputs) -> dict:
    return results(module, trained(module), inputs)


def trained(module) -> dict:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def by_hand(variant: Variant, module, inputs, dtype, autocast=None) -> dict:
    """The equation on the module's parameters and buffers under upstream's names."""
    ours = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    ours = {n: t for n, t in ours.items() if n in module.state_dict()}
    upstream = to_upstream(variant.module_id, {n: t.detach() for n, t in ours.items()})
    wants = to_upstream(variant.module_id, {n: torch.tensor(t.requires_grad) for n, t in ours.items()})
    parameters = {n: t.to(dtype, copy=True).requires_grad_(bool(wants[n])) for n, t in upstream.items()}
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)

    def call(*x):
        with torch.autocast(x[0].device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            return variant.equation(parameters, *x)

    found = results(call, parameters, inputs)
    named = to_ours(variant.module_id, {n: t for n, t in found.items() if n in parameters})
    return {n: t for n, t in found.items() if n not in parameters} | named


def made(variant: Variant, device="cpu"):
    return randomised(variant.make()).to(device).eval(), tuple(x.to(device) for x in variant.inputs())


# -- the checks ----------------------------------------------------------------------------------------------------


def check_rule(variant: Variant, backend: str, device: str, autocast=None) -> None:
    """At most twice the plain equation's own error, over ten draws of parameters and inputs, and 4 ulp."""
    module, inputs = made(variant, device)

    def call(*x):
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            return module(*x)

    with use_backend(backend), backends.record() as calls:
        got = results(call, trained(module), inputs)
    assert {(op, backend) for op in variant.ops} == set(calls)
    draws = []
    for draw in range(10):  # few numbers in each: the largest error of five draws still varies
        if draw:
            module, inputs = made(variant, device)
        usual = by_hand(variant, module, inputs, torch.float32, autocast)
        draws.append((usual, by_hand(variant, module, inputs, torch.float64)))
    # an equation by hand need not round where upstream does
    compare.assert_model(got, draws, autocast, dtypes=False)


def check_identity(variant: Variant) -> None:
    """In float64 nothing is left but the order of sums."""
    torch.set_default_dtype(torch.float64)
    try:
        module, inputs = made(variant)
        same_in_float64(of_module(module, inputs), by_hand(variant, module, inputs, torch.float64))
    finally:
        torch.set_default_dtype(torch.float32)


def same_in_float64(got: dict, exact: dict) -> None:
    top = max(float(t.abs().max()) for t in exact.values())
    assert set(got) == set(exact)
    for n, truth in exact.items():
        assert (got[n] - truth).abs().max() <= 256 * ulp(top, torch.float64), n


def check_names(variant: Variant) -> None:
    module, twin = randomised(variant.make()), variant.make()
    upstream = to_upstream(variant.module_id, module.state_dict())
    assert len(upstream) == len(module.state_dict())
    twin.load_state_dict(to_ours(variant.module_id, upstream), strict=True)
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in twin.state_dict().items())
    with pytest.raises(ValueError, match="unknown upstream key 'else.where.other'"):
        to_ours(variant.module_id, {"else.where.other": torch.zeros(1)})


def check_one_graph(variant: Variant, backend: str, device: str, *extra, bits: bool = True) -> None:
    """bits: the compiled numbers are eager's; else as near, for a part that torch itself traces into other sums."""
    module, inputs = made(variant, device)
    call = (lambda *x: module(*x, *extra)) if extra else module
    inputs = inputs[: len(inputs) - len(extra)]
    with use_backend(backend):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        eager, got = results(call, trained(module), inputs), results(compiled, trained(module), inputs)
        with torch.compiler.set_stance("fail_on_recompile"):
            results(compiled, trained(module), inputs)
    top = max(float(t.abs().max()) for t in eager.values())
    for key in eager:
        if bits:
            assert torch.equal(got[key], eager[key]), key
        else:
            assert (got[key] - eager[key]).abs().max() <= 64 * ulp(top, torch.float32), key


def check_checkpointing(variant: Variant, training: bool = False) -> None:
    """The same numbers, with the same dropout."""
    module, inputs = made(variant)
    module.train(training)
    torch.manual_seed(5)
    plain = of_module(module, inputs)
    torch.manual_seed(5)
    got = results(lambda *x: checkpoint(module, *x, use_reentrant=False), trained(module), inputs)
    assert all(torch.equal(got[n], plain[n]) for n in plain)


def check_copies(variant: Variant) -> None:
    module, inputs = made(variant)
    y = module(*inputs)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(*inputs), y)
    assert list(twin.state_dict()) == list(module.state_dict())
    assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in twin.parameters()}


def check_children(variant: Variant) -> None:
    """A LoRA in place of any linear acts, a subclass's forward runs, and every child's hook is called."""
    module, inputs = made(variant)
    module, inputs = module.double(), doubled(inputs)
    plain = module(*inputs).detach()
    top = float(plain.abs().max())
    paths = [n for n, m in module.named_modules() if type(m) is nn.Linear]
    for path in paths:
        twin = copy.deepcopy(module)
        layer = LoRALinear.from_plain(twin.get_submodule(path), 2)
        parent, _, last = path.rpartition(".")
        setattr(twin.get_submodule(parent), last, layer)
        assert (twin(*inputs) - plain).abs().max() <= 256 * ulp(top, torch.float64), path
        nn.init.normal_(layer.adapters["default"].b)
        if not path.endswith(("key", "k_proj")):  # a part of a key's change may be the same for all keys
            assert (twin(*inputs) - plain).abs().max() > 1e-6 * top, path
    for path in [n for n, m in module.named_modules() if type(m) is nn.LayerNorm]:
        twin = copy.deepcopy(module)
        child = twin.get_submodule(path)
        child.__class__ = ShiftedNorm
        moved = (twin(*inputs) - plain).abs().max()
        assert moved > 1e-6 * top, path
    seen = set()
    kinds = (nn.Linear, nn.LayerNorm)
    children = {n: m for n, m in module.named_modules() if isinstance(m, kinds)}
    for name, child in children.items():
        child.register_forward_hook(lambda child, args, y, name=name: seen.add(name))
    assert (module(*inputs) - plain).abs().max() <= 256 * ulp(top, torch.float64)
    assert seen == set(children)


class ShiftedNorm(nn.LayerNorm):
    """Moves channels apart, which no norm or softmax after it takes back."""

    def forward(self, x):
        y = super().forward(x)
        return y + torch.linspace(-1, 2, y.shape[-1], dtype=y.dtype, device=y.device).square() * y.sign()
