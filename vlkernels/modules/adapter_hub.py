"""adapter-hub's bottleneck adapters: Pfeiffer's, Houlsby's and the parallel one. How they are called: `adapters.py`."""

from __future__ import annotations

from torch import Tensor, nn

from ._adapter import Activation, SublayerAdapter, bottleneck, normed_sum, rank_of, scaling

_BN = {
    "original_ln_before": False, "original_ln_after": True, "residual_before_ln": True,
    "adapter_residual_before_ln": False, "ln_before": False, "ln_after": False, "use_gating": False,
    "is_parallel": False, "scaling": 1.0, "init_weights": "bert",
}  # fmt: skip
# configs of adapter-hub's `adapters`
CONFIGS = {
    "seq_bn": {**_BN, "original_ln_before": True, "non_linearity": "relu", "reduction_factor": 16},
    "double_seq_bn": {**_BN, "non_linearity": "swish", "reduction_factor": 16},
    "par_bn": {
        **_BN, "non_linearity": "relu", "reduction_factor": 2, "is_parallel": True, "scaling": 4.0,
        "init_weights": "mam_adapter",
    },
}  # fmt: skip


class AdapterHubAdapter(SublayerAdapter):
    """adapter-hub's bottleneck adapter; D = up(act(down([LN_before] .))) times the scaling and the gate.

        seq_bn (Pfeiffer)          z = norm(h + r);  y = norm(D(z) + h + r)
        double_seq_bn (Houlsby)    y = norm(D(h) + h + r)
        par_bn (He et al.)         y = norm(D(r) + h + r)

    Args:
        width: D. config: one of CONFIGS, whose entries `options` change:
        reduction_factor, non_linearity: of the bottleneck, R = D // reduction_factor.
        original_ln_before: D reads z = norm(h + r), not h. original_ln_after: False ends without r and norm.
        residual_before_ln: with original_ln_before, True adds h, False z, "post_add" h + r.
        ln_before, ln_after: LayerNorms `adapter_norm_before` (of D's input) and `adapter_norm_after` (of its output;
            of output and h with adapter_residual_before_ln, which par_bn does not know).
        scaling: a number or "learned", the parameter `scaling` (1), 1 at the start.
        use_gating: D's output times the mean over the sequence of sigmoid(gate(D's input)), padding included.
        init_weights: "bert" (weights N(0, 0.02)), "houlsby" (N(0, 0.01), cut at two of them), "mam_adapter" (up zero:
            y = norm(h + r) at the start, bit for bit).

    Parameters: `adapter_down.0` (R, D), `.1` with ln_before, where `.0` is `adapter_norm_before`; `adapter_up` (D, R),
    `adapter_norm_after`, `gate` (1, D), `scaling`. Source: adapters/methods/modeling.py.
    """

    def __init__(self, width: int, config: str = "double_seq_bn", *, device=None, dtype=None, **options):
        super().__init__(width)
        made = {"device": device, "dtype": dtype}
        if config not in CONFIGS:
            raise ValueError(f"config is {config!r}; accepted: {', '.join(CONFIGS)}")
        unknown = [key for key in options if key not in CONFIGS[config]]
        if unknown:
            raise ValueError(f"{config} has no option {unknown[0]!r}; accepted: {', '.join(CONFIGS[config])}")
        c = CONFIGS[config] | options
        self.config, self.options = config, c
        if c["residual_before_ln"] not in (True, False, "post_add") or (
            c["residual_before_ln"] == "post_add" and not c["original_ln_before"]
        ):
            raise ValueError(
                f"residual_before_ln is {c['residual_before_ln']!r}; accepted: True, False, and 'post_add' with "
                "original_ln_before"
            )
        self.needs_norm = c["original_ln_before"] and not c["is_parallel"]
        self.needs_residual = self.needs_norm or c["is_parallel"]
        rank = rank_of(width, c["reduction_factor"])
        if c["ln_before"]:
            self.adapter_norm_before = nn.LayerNorm(width, **made)
        before = [self.adapter_norm_before] if c["ln_before"] else []
        self.adapter_down = nn.Sequential(*before, nn.Linear(width, rank, **made), Activation(c["non_linearity"]))
        self.adapter_up = nn.Linear(rank, width, **made)
        self.factor, self.scaling = scaling(c["scaling"], made)
        if c["ln_after"]:
            self.adapter_norm_after = nn.LayerNorm(width, **made)
        self.gate = nn.Linear(width, 1, **made) if c["use_gating"] else None
        self._initialise(c["init_weights"])

    def _initialise(self, kind: str) -> None:
        if kind not in ("bert", "houlsby", "mam_adapter"):
            raise ValueError(f"init_weights is {kind!r}; accepted: bert, houlsby, mam_adapter")
        down, up = self.adapter_down[-2], self.adapter_up
        for linear in (down, up, self.gate):
            if linear is not None:
                if kind == "bert" or linear is self.gate:
                    nn.init.normal_(linear.weight, std=0.02)
                elif kind == "houlsby":
                    nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
                nn.init.zeros_(linear.bias)
        if kind == "mam_adapter":
            nn.init.zeros_(up.weight)

    def _end(self, hidden, residual, norm, add):
        c = self.options
        add = add and c["original_ln_after"]
        if c["is_parallel"]:
            return self._added(residual, hidden, residual if add else None)
        if not c["original_ln_before"]:
            return self._added(hidden, hidden, residual if add else None)
        s = hidden + residual
        # h and r are added, as s, which is at hand; but where LN_after takes h in, apart
        apart = c["ln_after"] and c["adapter_residual_before_ln"]
        kept, more = (s, None) if add and not apart else (hidden, residual if add else None)
        if c["residual_before_ln"] == "post_add":
            kept, more = s, residual if add else None
        elif not c["residual_before_ln"]:
            z = s if norm is None else norm(s)
            return self._added(z, z, residual if add else None)
        return self._added(s, kept, more, norm)

    def _added(self, x: Tensor, kept: Tensor, more: Tensor | None, norm: nn.Module | None = None) -> Tensor:
        """D(norm(x)) + kept + more."""
        c, before, after = self.options, *self._norms()
        if norm is not None and (before is not None or self.gate is not None):
            x, norm = norm(x), None
        gate = None
        if self.gate is not None:
            if x.dim() != 3:
                raise ValueError(f"hidden has shape {tuple(x.shape)}; accepted with use_gating: (B, L, D)")
            gate = self.gate(x).sigmoid().mean(1, keepdim=True)
        if self.scaling is not None:
            gate = self.scaling if gate is None else gate * self.scaling

        def d(**added: Tensor | None) -> Tensor:
            return bottleneck(
                x, self.adapter_down[-2], self.adapter_up, self.adapter_down[-1], gate=gate, scale=self.factor,
                norm=before if norm is None else norm, around=(self.adapter_down,),
                whole=lambda t: self.adapter_up(self.adapter_down(t if norm is None else norm(t))), **added,
            )  # fmt: skip

        if after is None:
            return d(skip="add", residual=more) if kept is x else d(base=kept, residual=more)
        if c["adapter_residual_before_ln"] and not c["is_parallel"]:
            return normed_sum(d(base=kept), after, more)
        return normed_sum(d(), after, kept if more is None else kept + more)

    def _norms(self) -> tuple[nn.Module | None, nn.Module | None]:
        return getattr(self, "adapter_norm_before", None), getattr(self, "adapter_norm_after", None)

    def branch(self, hidden, residual=None, norm=None):
        if not self.options["original_ln_after"]:
            raise ValueError("with original_ln_after=False nothing is added after the adapter; accepted: adapter(h, r)")
        return super().branch(hidden, residual, norm)

    def forward(self, hidden, residual=None, norm=None):
        self._check(hidden, residual)
        y = self._end(hidden, residual, norm, residual is not None)
        return y if norm is None or not self.options["original_ln_after"] else norm(y)

    def extra_repr(self) -> str:
        return self.config
