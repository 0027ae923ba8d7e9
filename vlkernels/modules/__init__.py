"""Drop-in modules that stand alone: plain parameter names; `from_plain(m)` shares the parameters of a plain module."""

from .lora import LoRALinear

__all__ = ["LoRALinear"]
