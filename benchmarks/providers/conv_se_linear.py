"""conv_se_linear beside plain PyTorch and torch.compile: convolution, norms, squeeze-excitation and product apart."""

from __future__ import annotations

from vlkernels.ops.conv_se_linear import reference

from . import Provider, compiled, plain

BASELINE = "eager"
PROVIDERS = (Provider("eager", plain(reference.forward)), Provider("compile", plain(compiled(reference.forward))))
PEERS: tuple[Provider, ...] = ()
