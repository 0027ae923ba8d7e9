"""`python -m models demo` and `kernels-check`: run a recipe's stages, judge each, report."""

import importlib.util
import json
import os
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import vlkernels

from .data.digits import QUESTIONS, blank
from .errors import UserError
from .evaluation import answers, kernels
from .recipe import Recipe, count
from .recipes.digits import RECIPE
from .reports import demo as report
from .training.log import MetricsLog
from .training.stages import Outcome, StagedRun

GOAL = 0.92
# LLaVA-1.5's, LLaVA 1.0's and Honeybee's
PROJECTORS = {"mlp": "mlp2x_gelu", "linear": "linear", "c-abstractor": "c_abstractor"}
NEEDS = ("transformers", "peft", "safetensors", "tokenizers", "sklearn", "matplotlib", "tqdm")
QUICK = 0.06  # share of the steps: the whole pipeline in half a minute, the accuracy is not the recipe's


def run_demo(
    folder: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    backend: str = "auto",
    projector: str = "mlp",
    resume: bool = False,
    check: bool = True,
) -> int:
    """Train, judge, report. Returns the exit status: 1 where the kernels disagree with stock peft."""
    started = time.perf_counter()
    require_packages()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # on a busy machine two threads wait for each other
    if backend == "auto":
        backend = os.environ.get("VLKERNELS_BACKEND") or "auto"
    forced = training_backend(device, backend)
    folder = writable(folder)
    recipe = chosen_recipe(quick, projector)
    log = MetricsLog(folder / "metrics.jsonl")
    run = StagedRun(
        recipe, folder, seed=seed, device=device, reuse="all" if resume else "backbones", backend=backend, log=log
    )
    settings = {"recipe": recipe.name, "quick": quick, "seed": seed, "backend": backend, "projector": projector}
    (folder / "run.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
    try:
        results, run_report = _train_and_judge(run, forced, log)
    finally:
        log.close()
    if check:
        print("One micro-batch of stage 2 through the kernels, beside stock peft ...", flush=True)
        samples = 1 if quick else 2
        results["kernels"] = kernels.in_subprocess(folder, samples, device, backend)
    else:
        results["kernels"] = {"skipped": "--no-kernels-check"}
    results |= {"settings": settings, "goal": GOAL, "seconds": time.perf_counter() - started}
    report.write(folder, results, run_report)
    return 1 if "failed" in results["kernels"] or results["kernels"].get("agree") is False else 0


def chosen_recipe(quick: bool, projector: str) -> Recipe:
    """The digits recipe with one of PROJECTORS, and few steps where quick."""
    recipe = RECIPE.with_integrator(PROJECTORS[projector])
    return recipe.shortened(QUICK) if quick else recipe


def run_check(folder: Path, *, samples: int, backend: str, json_path: Path | None) -> int:
    """The kernels against stock peft on the finished model in `folder`."""
    require_packages()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forced = kernels.backend_here(device, backend)
    torch.set_num_threads(1)
    try:
        settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        recipe = chosen_recipe(settings["quick"], settings["projector"])
        seed, trained_on = settings["seed"], settings["backend"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} holds no finished demo ({error}); run `python -m models demo --out {folder}` first"
        ) from error
    run = StagedRun(recipe, folder, seed=seed, device=device, reuse="required", backend=trained_on)
    result = kernels.compare(run, samples, forced)
    if json_path is not None:
        json_path.write_text(json.dumps(result), encoding="utf-8")
    print(report.kernel_table(result))
    return 0 if result["agree"] else 1


def _train_and_judge(run: StagedRun, forced: str | None, log: MetricsLog) -> tuple[dict[str, Any], str]:
    """All stages and their accuracies; the second value says which backend ran what."""
    held = run.qa.held_out
    rows: list[dict[str, Any]] = []
    outcomes = []

    def row(name: str, label: str, scores: answers.Scores, outcome: Outcome | None = None) -> None:
        about = {"trainable": outcome.trainable, "ms": outcome.ms_per_step} if outcome else {}
        rows.append({"name": name, "label": label, "scores": scores, **about})
        log.write(event="accuracy", name=name, **scores)

    row("chance", "guessing among the answers", answers.chance())
    row("majority", "most frequent answer", answers.majority(run.qa))
    tower, outcome = run.tower()
    outcomes.append(outcome)
    classifier = answers.classifier_accuracy(tower, run.qa)
    log.write(event="accuracy", name="tower", all=classifier)
    llm, outcome = run.llm()
    outcomes.append(outcome)
    row("text", "stage 0: text-only LLM", answers.accuracy(llm, run.qa, None), outcome)
    model = run.unaligned(tower, llm)
    row("untrained", "stage 0: untrained projector", answers.accuracy(model, run.qa, held.images))
    outcomes.append(run.align(model))
    row("align", "stage 1: projector", answers.accuracy(model, run.qa, held.images), outcomes[-1])
    row("align_blank", "stage 1: on a blank image", answers.accuracy(model, run.qa, blank(held.images)))

    model = run.with_lora(model)
    swap_report = vlkernels.swap(model)

    def context():
        return nullcontext() if forced is None else vlkernels.use_backend(forced)

    outcomes.append(run.tune(model, context))
    with context():
        row("tune", "stage 2: projector + LoRA", answers.accuracy(model, run.qa, held.images), outcomes[-1])
        row("tune_blank", "stage 2: on a blank image", answers.accuracy(model, run.qa, blank(held.images)))
        chosen = random.Random(run.seed).sample(range(len(held)), 3)
        samples = [
            {"digit": int(held.digits[i]), "image": i, "said": answers.generate(model, run.qa, held.images[i])}
            for i in chosen
        ]
        decisions = str(swap_report)
    stages = [
        {"name": o.stage.name, "title": o.stage.title, "losses": o.losses, "ms": o.ms_per_step, "reused": o.reused}
        for o in outcomes
    ]
    results = {
        "questions": [question.name for question in QUESTIONS],
        "held_out": len(held),
        "parameters": count(model),
        "device": run.device,
        "tower_classifier": classifier,
        "rows": rows,
        "stages": stages,
        "samples": samples,
    }
    return results, report.picture_samples(samples, held) + "\n\nWhat ran stage 2\n" + decisions


def training_backend(device: str, requested: str) -> str | None:
    """The backend to force in stage 2, or None to let vlkernels choose; refuses what cannot train here."""
    if device == "cpu" and requested in ("triton", "cuda"):
        raise UserError(
            f"backend {requested} needs a CUDA device and none is here. Without one the demo trains on the reference "
            "(--backend auto) and sends one micro-batch through the Triton kernels in the interpreter"
        )
    if requested == "auto":
        # the interpreter would take half a minute per step
        return "reference" if os.environ.get("TRITON_INTERPRET") == "1" else None
    return requested


def require_packages() -> None:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} cannot be imported by {sys.executable}; `make setup` installs what the demo needs"
        )


def writable(folder: Path) -> Path:
    """The folder, made and tried out."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written to: {error.strerror or error}") from error
    return folder
