"""Op: from an op's annotated reference to schema, fake, autograd, autocast rule and registry."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import types
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import _autocast, _library, backends

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
    torch.dtype | None: "ScalarType?",
    list[Tensor]: "Tensor[]",
    list[int]: "SymInt[]",
}


class Op:
    """A differentiable operator with one specification and several backends.

    The folder holds `reference.py` with `forward` (annotated: it gives the schema), `check` (the arguments, or an
    error), `draw` (fills in random seeds), `residuals` (what kernels save besides arguments) and, where tracing
    `forward` takes long, `shapes` (empty outputs), and kernel modules `triton.py`, `cuda.py` with

        refuses(*values) -> str | None        why this call cannot run here
        declines(*values) -> str | None       why it is not worth running here
        note(*values) -> str                  optional: what explain() adds about how it runs
        forward(*values) -> (outputs..., residuals...)
        backward(grads, saved: dict, *other values, needs: dict) -> dict of gradients by argument name

    On the reference the plain function runs, so autograd, Inductor and functorch see ordinary PyTorch. A kernel runs
    through `torch.ops.vlkernels.<name>`, whose backward is `torch.ops.vlkernels.<name>_backward` on the same backend.

    saves: names of the arguments and residuals that backward needs, residuals last; "y" before them is the output of
        an op that has one (empty where the reference's `keeps_y(*values)` says that this call needs none). Every
        argument that can get a gradient must be among them (its shape is needed); a parameter costs nothing there.
    like: arguments that are not kept: their gradient has shape and dtype of the gradient of output number like[name].
        Where the reference's `direct(**others)` names them, it is that very gradient, without a copy.
    parts: argument -> the argument that lists the tensors that it is made of: their concatenation, or what the
        reference's `joined(argument, tensors, others)` says. Where that list is not empty, they are kept for backward
        and joined again there; they get no gradient by themselves.
    """

    def __init__(
        self,
        module: str,
        saves: tuple[str, ...],
        like: Mapping[str, int] | None = None,
        parts: Mapping[str, str] | None = None,
    ):
        self.name = module.rpartition(".")[2]
        self.saves = saves
        self.like, self.parts = like or {}, parts or {}
        self.reference = importlib.import_module(module + ".reference")
        self.__doc__ = self.reference.forward.__doc__
        signature = inspect.signature(self.reference.forward, eval_str=True)
        self.__signature__ = signature
        self.types = {name: _SCHEMA_TYPES[p.annotation] for name, p in signature.parameters.items()}
        self.names = tuple(self.types)
        self.defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
        self.residuals = tuple(name for name in saves if name not in self.types and name != "y")
        self.outputs = 1 if signature.return_annotation is Tensor else len(signature.return_annotation.__args__)
        self.others = tuple(name for name, kind in self.types.items() if not kind.startswith("Tensor"))
        self.kernels = {
            backend: _kernel_module(module, backend) for backend in backends.ORDER if backend != "reference"
        }
        if any(isinstance(kernel, types.ModuleType) for kernel in self.kernels.values()):
            self._operator = self._register()
        backends.OPS[self.name] = self

    def __repr__(self) -> str:
        return f"<vlkernels op {self.name}>"

    def values(self, *args, **kwargs) -> tuple:
        """All argument values in schema order, checked, with defaults and autocast's dtype; seeds not yet drawn."""
        if len(args) > len(self.names):
            raise TypeError(f"{self.name} takes at most {len(self.names)} arguments, got {len(args)}")
        values = list(args)
        for name in self.names[len(args) :]:
            if name in kwargs:
                values.append(kwargs[name])
            elif name in self.defaults:
                values.append(self.defaults[name])
            else:
                raise TypeError(f"{self.name} misses the argument {name!r}")
        unknown = [name for name in kwargs if name not in self.names[len(args) :]]
        if unknown:
            raise TypeError(
                f"{self.name} got {unknown[0]!r} twice or does not know it; it takes {', '.join(self.names)}"
            )
        known = "dtype" in self.types and isinstance(values[0], Tensor)
        if known and (dtype := _autocast.compute_dtype(values[0])) is not None:
            values[self.names.index("dtype")] = dtype
        return self.reference.check(*values)

    def __call__(self, *args, backend: str | None = None, **kwargs) -> Tensor | tuple[Tensor, ...]:
        values = self.values(*args, **kwargs)
        return self.run(values, backends.choose(self, values, backend))

    def run(self, values: tuple, backend: str) -> Tensor | tuple[Tensor, ...]:
        """The op on checked values and a chosen backend. Seeds are drawn here, after the choice: a caller that leaves
        the op to someone else's plain code must find torch's generator untouched."""
        values = self.reference.draw(*values)
        if backend == "reference":
            return self.reference.forward(*values)
        out = _tuple(self._operator(*values, backend))
        return out[0] if self.outputs == 1 else out[: self.outputs]

    # -- registration ---------------------------------------------------------------------------------------------

    def _register(self) -> Callable:
        arguments = ", ".join(f"{kind} {name}" for name, kind in self.types.items())
        results = ", ".join(["Tensor"] * (self.outputs + len(self.residuals)))
        forward = torch.library.custom_op(
            f"vlkernels::{self.name}",
            self._forward,
            mutates_args=(),
            schema=f"({arguments}, str backend) -> ({results})",
        )
        forward.register_fake(self._fake)

        grads = ", ".join(f"Tensor? grad_{i}" for i in range(self.outputs))
        saved = ", ".join(f"{self.types.get(name, 'Tensor')} {name}" for name in self.saves)
        others = "".join(f", {self.types[name]} {name}" for name in self.others)
        backward = torch.library.custom_op(
            f"vlkernels::{self.name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"({grads}, {saved}{others}, bool[] needs, str backend) -> Tensor[]",
        )
        backward.register_fake(self._backward_fake)
        backward.register_autograd(self._refuse_double_backward)
        self._backward_operator = backward
        forward.register_autograd(self._autograd, setup_context=self._save)
        return forward

    def _forward(self, *values_and_backend):
        *values, backend = values_and_backend
        # kernels choose their dtypes themselves; a product inside an operator's body would be autocast once more
        with _autocast.off(values[0]):
            return _single(self.kernels[backend].forward(*values))

    def _fake(self, *values_and_backend):
        *values, _ = values_and_backend
        with _autocast.off(values[0]):
            # a reference of many steps says its shapes apart
            out = getattr(self.reference, "shapes", self.reference.forward)(*values)
        outputs = (out,) if self.outputs == 1 else tuple(out)
        return _single(tuple(o.contiguous() for o in outputs) + tuple(self.reference.residuals(*values)))

    def _save(self, ctx, inputs, output) -> None:
        *values, ctx.backend = inputs
        output = _tuple(output)
        keeps_y = getattr(self.reference, "keeps_y", None)
        y = output[0] if keeps_y is None or keeps_y(*values) else output[0].new_empty(0)
        by_name = {"y": y, **dict(zip(self.names, values, strict=True))}
        ctx.others = tuple(by_name[name] for name in self.others)
        by_name.update(zip(self.residuals, output[self.outputs :], strict=True))
        ctx.mark_non_differentiable(*output[self.outputs :])
        ctx.set_materialize_grads(False)
        kept = [tuple(by_name[self.parts[n]]) if n in self.parts else () for n in self.saves]
        ctx.pieces = tuple(len(pieces) for pieces in kept)
        saved = [pieces or (by_name[n],) for n, pieces in zip(self.saves, kept, strict=True)]
        ctx.save_for_backward(*(t for group in saved for t in group))

    def _autograd(self, ctx, *grads):
        grads = grads[: self.outputs]
        listed = dict(zip(self.names, ctx.needs_input_grad, strict=False))
        # a list of tensors wants a list of its own
        none = {n: [None] * len(need) if isinstance(need, (list, tuple)) else None for n, need in listed.items()}
        needs = [none[n] is None and bool(listed[n]) for n in self.names]
        if all(g is None for g in grads):
            return (*none.values(), None)
        if hasattr(self.reference, "direct"):
            direct = self.reference.direct(**dict(zip(self.others, ctx.others, strict=True)))
            none |= {n: grads[self.like[n]] for n in direct if listed[n]}
            needs = [need and n not in direct for n, need in zip(self.names, needs, strict=True)]
        if not any(needs):
            return (*none.values(), None)
        kept = iter(ctx.saved_tensors)
        saved = [
            self._joined(name, [next(kept).detach() for _ in range(n)], ctx.others) if n else next(kept)
            for name, n in zip(self.saves, ctx.pieces, strict=True)
        ]
        results = iter(self._backward_operator(*grads, *saved, *ctx.others, needs, ctx.backend))
        return (*(next(results) if need else none[n] for n, need in zip(self.names, needs, strict=True)), None)

    def _joined(self, name: str, pieces: list[Tensor], others: tuple) -> Tensor:
        join = getattr(self.reference, "joined", None)
        return torch.cat(pieces) if join is None else join(name, pieces, dict(zip(self.others, others, strict=True)))

    def _backward(self, *values):
        *values, needs, backend = values
        grads, saved = values[: self.outputs], values[self.outputs : self.outputs + len(self.saves)]
        saved = dict(zip(self.saves, saved, strict=True))
        needed = dict(zip(self.names, needs, strict=True))
        others = dict(zip(self.others, values[self.outputs + len(self.saves) :], strict=True))
        with _autocast.off(saved[self.saves[0]]):
            results = self.kernels[backend].backward(*grads, saved=saved, needs=needed, **others)
        return [results[name] for name, need in needed.items() if need]

    def _backward_fake(self, *values):
        *values, needs, _ = values
        shapes = dict(zip(self.saves, values[self.outputs :], strict=False))
        given = [g for g in values[: self.outputs] if g is not None]
        shapes |= {n: given[0] if values[output] is None else values[output] for n, output in self.like.items()}
        return [
            torch.empty_like(shapes[name], memory_format=torch.contiguous_format)
            for name, need in zip(self.names, needs, strict=True)
            if need
        ]

    def _refuse_double_backward(self, ctx, *grads):
        raise RuntimeError(
            f"{self.name}: its kernels have no second derivative; run the forward under "
            'vlkernels.use_backend("reference") to differentiate twice'
        )


def _single(results: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """As an operator returns them: one result is no tuple."""
    return results[0] if len(results) == 1 else results


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def _kernel_module(module: str, backend: str) -> types.ModuleType | str:
    """The op's kernel module, or why there is none. Imported early, for dynamo cannot import while it traces."""
    if importlib.util.find_spec(f"{module}.{backend}") is None:
        return f"this op has no {backend} kernel"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if backend == "cuda" and (reason := _library.load()) is not None:
        return reason
    try:
        return importlib.import_module(f"{module}.{backend}")
    except ImportError as error:
        return f"importing {module}.{backend} failed: {error}"
