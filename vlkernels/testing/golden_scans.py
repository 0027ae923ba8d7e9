"""Goldens of the selective scan and what stands on it: hyper-parameters -> our module, and how to call it."""

from __future__ import annotations

from torch import Tensor, nn

from ..modules import SS2D, MambaLayer, VLMambaL2, VLMambaMLP
from ..ops.selective_scan_2d import selective_scan_2d
from .golden_builders import Builder, Named, Run, _accept, _run_x

_SCAN = ("selective_scan_2d",)


class SelectiveScan(nn.Module):
    """Mamba's functional scan, with its (B, D, L) sequences."""

    def forward(self, u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=True) -> tuple[Tensor, Tensor]:
        # (B, S, L) or (B, G, S, L) -> (B, L, 1, G, S)
        B, C = (t if t.dim() == 4 else t[:, None] for t in (B, C))
        B, C = (t.permute(0, 3, 1, 2).unsqueeze(2) for t in (B, C))
        u, delta, z = (None if t is None else t.transpose(1, 2) for t in (u, delta, z))
        y, last = selective_scan_2d(u, delta, A, B, C, D, z, delta_bias, softplus=softplus)
        return y.transpose(1, 2), last[:, 0]


def _selective_scan(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("batch", "dim", "d_state", "length", "groups", "z", "D", "delta_bias", "delta_softplus")

    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        tensors = [inputs[name] for name in ("u", "delta", "A", "B", "C")]
        given = {name: inputs[name] for name in ("D", "z", "delta_bias") if hp[name]}
        y, last = module(*tensors, **given, softplus=hp["delta_softplus"])
        return {"y": y, "last_state": last}

    return SelectiveScan(), run


def _mamba(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("hidden_size", "state_size", "expand", "conv_kernel", "time_step_rank", "use_bias", "use_conv_bias")
    return MambaLayer(**hp), _run_x


def _ss2d(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d_model", "d_state", "ssm_ratio", "forward_type", "dt_rank")
    return SS2D(**{key: value for key, value in hp.items() if key != "small_scale"}), _run_x


def _grid(hp: Named) -> Run:
    def run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
        return {"output": module(inputs["x"], (hp["grid"], hp["grid"]))}

    return run


def _vl_mamba_l2(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("d_v", "dim", "d_t", "d_state", "scan", "ssm_ratio", "norm_eps", "grid")
    _accept(hp, "scan", "bsm", "csm")
    options = {"ssm_ratio": hp["ssm_ratio"], "eps": hp["norm_eps"]}
    return VLMambaL2(hp["d_v"], hp["dim"], hp["d_t"], hp["d_state"], hp["scan"], **options), _grid(hp)


def _vl_mamba_mlp(hp: Named) -> tuple[nn.Module, Run]:
    hp.only("dim", "d_t", "d_state", "scan", "ssm_ratio", "norm_eps", "grid")
    _accept(hp, "scan", "bsm", "csm")
    options = {"ssm_ratio": hp["ssm_ratio"], "eps": hp["norm_eps"]}
    return VLMambaMLP(hp["dim"], hp["d_t"], hp["d_state"], hp["scan"], **options), _grid(hp)


BUILDERS: dict[str, Builder] = {
    "op.selective_scan": Builder(_selective_scan, ops=_SCAN),
    "op.mamba_layer": Builder(_mamba, ops=_SCAN),
    "ss2d.vmamba": Builder(_ss2d, ops=_SCAN),
    "connector.vl_mamba_l2": Builder(_vl_mamba_l2, ops=("linear_projector", *_SCAN)),
    "connector.vl_mamba_mlp": Builder(_vl_mamba_mlp, ops=("mlp_projector", *_SCAN)),
}
