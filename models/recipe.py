"""What a recipe is: a paper, two backbones, an integrator, where its output enters, and the stages of training.

A stage names the parameters it trains by patterns over parameter names. A pattern that matches nothing is an error:
a silent one would train, and publish, another model than the recipe says.
"""

from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .errors import UserError


@dataclass(frozen=True)
class Backbone:
    """A transformers configuration: its `model_type` and the arguments that differ from its defaults."""

    family: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Lora:
    """peft's `LoraConfig`, cut down to what recipes set; `target` is a regular expression over module names."""

    r: int
    alpha: int
    dropout: float
    target: str


@dataclass(frozen=True)
class Stage:
    """One run of the optimiser. `part` is the module that learns: "tower", "llm" or the whole "model"."""

    name: str
    title: str
    part: str
    trains: tuple[str, ...]
    steps: int
    batch: int
    lr: float
    warmup: float = 0.05
    weight_decay: float = 0.0
    augment: bool = False
    lora: Lora | None = None


@dataclass(frozen=True)
class Recipe:
    """One system, declared.

    `feature_layer` is the tower's layer whose patch tokens are projected, `integrators` name what joins the two
    backbones, `entry` says where its output goes.
    """

    name: str
    paper: str
    vision: Backbone
    feature_layer: int
    llm: Backbone
    integrators: tuple[str, ...]
    entry: str
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"recipe {self.name} has no stage {name!r}, only {[stage.name for stage in self.stages]}")

    def shortened(self, share: float) -> "Recipe":
        """The same recipe with every stage's steps cut to `share`, for a quick look."""
        stages = tuple(replace(stage, steps=max(1, round(stage.steps * share))) for stage in self.stages)
        return replace(self, stages=stages)

    def with_integrator(self, name: str) -> "Recipe":
        """The same recipe with another integrator between the backbones."""
        return replace(self, integrators=(name,))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train_only(module: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Make exactly the parameters whose name matches a pattern trainable; return their names.

    Patterns are shell patterns (`*.lora_A.*`) over `module.named_parameters()`.
    """
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"freezing rule {pattern!r} matches none of the {len(names)} parameters of {type(module).__name__}; "
                f"their names look like {', '.join(names[:2] + names[-2:])}"
            )
    if not patterns:
        raise UserError(f"a stage that trains nothing of {type(module).__name__}: give it at least one rule")
    trained = []
    for name, parameter in module.named_parameters():
        chosen = any(fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(chosen)
        if chosen:
            trained.append(name)
    return trained


def count(module: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, or of those that are trainable now."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)
