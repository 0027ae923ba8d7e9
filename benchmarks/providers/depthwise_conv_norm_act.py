"""depthwise_conv_norm_act beside plain PyTorch and torch.compile: a convolution of a channels-last view, and a norm."""

from __future__ import annotations

from vlkernels.ops.depthwise_conv_norm_act import reference

from . import Provider, compiled, plain

BASELINE = "eager"
PROVIDERS = (Provider("eager", plain(reference.forward)), Provider("compile", plain(compiled(reference.forward))))
PEERS: tuple[Provider, ...] = ()
