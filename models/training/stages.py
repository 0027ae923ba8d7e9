"""The staged loop: make the backbones, align the projector, tune with LoRA; each stage is kept once it is finished.

Every stage draws its weights, its batches and its dropout from seeds of its own, so that a run which continues after
a finished stage gives what an uninterrupted run gives.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import build
from ..backbones.tiny import TowerClassifier, language_model
from ..data.digits import DigitsQA
from ..errors import UserError
from ..recipe import Recipe, Stage, count, train_only
from . import checkpoints
from .log import MetricsLog

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration, PreTrainedModel

# which finished stages are taken from disk: the two backbones, all of them, or all of them with an error if missing
REUSE = ("backbones", "all", "required")


@dataclass(frozen=True)
class Outcome:
    """What a finished stage leaves besides its weights."""

    stage: Stage
    trainable: int
    total: int
    losses: list[float]
    ms_per_step: float  # median
    device: str
    reused: bool = False


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then a cosine to zero; steps count from 0."""
    warmup = max(1, round(stage.steps * stage.warmup))
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, stage.steps - warmup)))


def optimise(
    module: nn.Module, stage: Stage, batches: Iterator[Any], loss_of: Callable[[Any], Tensor], log: MetricsLog | None
) -> tuple[list[float], float]:
    """Train the trainable parameters of `module`; returns the loss of every step and the median ms per step."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=stage.weight_decay)
    losses, times = [], []
    module.train()
    # no bar where nobody watches: a log file gets one line per stage instead
    with tqdm(total=stage.steps, desc=stage.title, unit="step", disable=None, leave=False) as bar:
        for step in range(stage.steps):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(stage, step)
            loss = loss_of(next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())  # waits for the device, so that the time below is the step's
            times.append((time.perf_counter() - start) * 1e3)
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"{stage.title}: the loss became {losses[-1]} at step {step}")
            if log is not None:
                lr = optimizer.param_groups[0]["lr"]
                log.write(stage=stage.name, step=step, loss=losses[-1], lr=lr, ms=round(times[-1], 3))
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
    module.eval()
    return losses, statistics.median(times)


class StagedRun:
    """One recipe, one folder, one seed. Call the stages in order; each returns the model and its Outcome."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        seed: int = 0,
        device: str = "cpu",
        reuse: str = "backbones",
        backend: str = "auto",
        log: MetricsLog | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        if reuse not in REUSE:
            raise ValueError(f"reuse is {reuse!r}; accepted: {', '.join(REUSE)}")
        self.recipe, self.folder, self.seed, self.device = recipe, Path(folder), seed, device
        self.reuse, self.backend, self.log, self.say = reuse, backend, log, say
        self.qa = DigitsQA()
        names = [stage.name for stage in recipe.stages]
        self._seeds = {name: seed * len(names) + i for i, name in enumerate(names)}

    def tower(self) -> tuple[TowerClassifier, Outcome]:
        """Stage 0: the vision tower, pretrained as a classifier."""
        stage = self._begin("tower")
        module = TowerClassifier(self.recipe.vision, self.recipe.feature_layer, classes=10)
        batches = self.qa.labelled_images(stage.batch, self._seeds[stage.name], stage.augment)

        def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
            images, digits = batch
            return F.cross_entropy(module(images.to(self.device)), digits.to(self.device))

        return module, self._finish(stage, module, batches, loss_of)

    def llm(self) -> tuple["PreTrainedModel", Outcome]:
        """Stage 0: the language model, pretrained on text."""
        stage = self._begin("llm")
        module = language_model(self.recipe.llm, self.qa.tokenizer)
        batches = self.qa.texts(stage.batch, self._seeds[stage.name])
        return module, self._finish(stage, module, batches, lambda batch: module(**batch.inputs(self.device)).loss)

    def unaligned(self, tower: TowerClassifier, llm: "PreTrainedModel") -> "LlavaForConditionalGeneration":
        """The vision-LLM before stage 1: both backbones and a fresh projector."""
        self._begin("align")
        return build.llava(self.recipe, tower, llm, self.qa.tokenizer).to(self.device).eval()

    def align(self, model: "LlavaForConditionalGeneration") -> Outcome:
        """Stage 1: the projector alone."""
        return self._vision_language("align", model)

    def with_lora(self, model: "LlavaForConditionalGeneration") -> "PeftModel":
        """The model of stage 1 with fresh LoRA layers; where vlkernels is swapped in comes between this and `tune`."""
        stage = self._begin("tune")
        return build.with_lora(model, stage.lora).to(self.device)

    def tune(self, model: "PeftModel", context: Callable[[], AbstractContextManager] = nullcontext) -> Outcome:
        """Stage 2: projector and LoRA, inside `context`, which says on which backend."""
        with context():
            return self._vision_language("tune", model)

    def finished_model(self) -> "PeftModel":
        """The model after stage 2."""
        model = self.unaligned(self.tower()[0], self.llm()[0])
        self.align(model)
        model = self.with_lora(model)
        self.tune(model)
        return model

    def _vision_language(self, name: str, module: nn.Module) -> Outcome:
        stage = self.recipe.stage(name)
        torch.manual_seed(self._seeds[name])  # dropout draws from here, whatever was drawn while building
        batches = self.qa.questions(stage.batch, self._seeds[name], stage.augment)
        return self._finish(stage, module, batches, lambda batch: module(**batch.inputs(self.device)).loss)

    def _begin(self, name: str) -> Stage:
        torch.manual_seed(self._seeds[name])
        return self.recipe.stage(name)

    def _key(self, stage: Stage) -> str:
        """Digest of all that the stage's result depends on; for a stage on the whole model, of everything before."""
        whole = self.recipe.as_dict()
        if stage.part == "model":
            upto = [s.name for s in self.recipe.stages].index(stage.name) + 1
            declared = {**whole, "stages": whole["stages"][:upto], "backend": self.backend if stage.lora else None}
        else:
            backbone = (whole["vision"], whole["feature_layer"]) if stage.part == "tower" else whole["llm"]
            declared = {"backbone": backbone, "stage": asdict(stage)}
        return checkpoints.key(declared, self.seed)

    def _finish(
        self, stage: Stage, module: nn.Module, batches: Iterator[Any], loss_of: Callable[[Any], Tensor]
    ) -> Outcome:
        """Take the stage from disk if allowed and possible, else train it and write it to disk."""
        module.to(self.device)
        names = train_only(module, stage.trains)
        key = self._key(stage)
        path = self.folder / "checkpoints" / f"{stage.name}-{key}.safetensors"
        outcome = Outcome(stage, count(module, trainable_only=True), count(module), [], 0.0, self.device)
        if path.exists() and (stage.part != "model" or self.reuse != "backbones"):
            try:
                facts = checkpoints.load(path, module, names, key)
            except checkpoints.Unusable as reason:
                if self.reuse == "required":
                    raise UserError(f"{path} cannot be used: {reason}") from reason
                self.say(f"{stage.title}: {path} cannot be used: {reason}. It is trained again.")
            else:
                module.eval()
                self._replay(stage, facts["losses"])
                if self.reuse != "required":
                    self.say(f"{stage.title}: taken from {path}")
                return replace(outcome, **facts, reused=True)
        elif self.reuse == "required":
            raise UserError(f"{path} is not there; run `python -m models demo --out {self.folder}` to its end first")
        losses, ms = optimise(module, stage, batches, loss_of, self.log)
        checkpoints.save(path, module, names, key, {"losses": losses, "ms_per_step": ms, "device": self.device})
        tail = statistics.mean(losses[-20:])
        self.say(
            f"{stage.title}: {stage.steps} steps, {outcome.trainable:,} of {outcome.total:,} parameters trained, "
            f"loss {losses[0]:.3f} to {tail:.3f}, {ms:.0f} ms per step"
        )
        return replace(outcome, losses=losses, ms_per_step=ms)

    def _replay(self, stage: Stage, losses: list[float]) -> None:
        if self.log is not None:
            for step, loss in enumerate(losses):
                self.log.write(stage=stage.name, step=step, loss=loss, reused=True)
