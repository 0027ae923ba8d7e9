"""What the demo shows: one accuracy table, the kernels beside stock peft, two plots, digits drawn in the terminal."""

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..data.digits import QUESTIONS, Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHADES = " .:-=+*#%@"
NOT_MEASURED = "not measured"


def write(folder: Path, results: dict[str, Any], run_report: str) -> None:
    """Print the report and leave report.txt, results.json, loss.png and accuracy.png in the folder."""
    kernels = results["kernels"]
    parts = [accuracy_table(results), run_report, kernel_table(kernels), summary(results)]
    text = "\n".join(_wrap(line) for line in "\n\n".join(parts).splitlines())
    print("\n" + text)
    (folder / "report.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    loss_plot(results["stages"]).savefig(folder / "loss.png", dpi=120)
    accuracy_plot(results["rows"]).savefig(folder / "accuracy.png", dpi=120)
    print(f"\nWritten to {folder}: report.txt, results.json, metrics.jsonl, loss.png, accuracy.png")


def accuracy_table(results: dict[str, Any]) -> str:
    """Held-out accuracy per row and question, with the parameters trained and the time of a step."""
    names = [*results["questions"], "all"]
    head = ["held-out accuracy, %", "trained", "ms/step", *names]
    body = []
    for row in results["rows"]:
        trained = f"{row['trainable']:,}" if "trainable" in row else ""
        ms = f"{row['ms']:.0f}" if "ms" in row else ""
        body.append([row["label"], trained, ms, *(f"{100 * row['scores'][name]:.1f}" for name in names)])
    title = (
        f"{results['held_out']} held-out digits x {len(results['questions'])} questions; the model has "
        f"{results['parameters']:,} parameters; "
        f"its tower's own classifier names {100 * results['tower_classifier']:.1f} % of the digits"
    )
    return title + "\n" + _table(head, body)


def kernel_table(check: dict[str, Any]) -> str:
    """Stock peft and the kernels on one micro-batch of stage 2."""
    if "skipped" in check:
        return f"Kernels beside stock peft: left out, {check['skipped']}"
    if "failed" in check:
        return f"Kernels beside stock peft: FAILED. {check['failed']}"
    stock, ours = check["stock"], check["ours"]
    where = "Triton's interpreter" if check["interpreted"] else check["device"]
    head = ["", "loss", "saved bytes", f"at dropout {check['dropout']}", "launches", "of which Triton", "step time"]
    body = []
    for label, side in (("stock peft", stock), ("vlkernels", ours)):
        time = NOT_MEASURED if side["ms"] is None else f"{side['ms']:.2f} ms"
        kernels = sum(side["kernels"].values())
        saved = (f"{side['saved_bytes']:,}", f"{side['saved_bytes_dropout']:,}")
        body.append([label, f"{side['loss']:.7f}", *saved, f"{side['launches']:,}", str(kernels), time])
    lines = [
        f"Kernels beside stock peft: one micro-batch of stage 2 ({check['samples']} samples, "
        f"{check['tokens']} tokens), fp32, dropout 0, in {where}",
        _table(head, body),
        *(f"  {name} x {n}" for name, n in sorted(ours["kernels"].items())),
        f"loss differs by {check['loss_difference']:.1e} of itself; worst gradient differs by "
        f"{check['gradient_difference']:.1e} of its largest element ({check['gradient']}); "
        f"{'within' if check['agree'] else 'NOT within'} {check['tolerance']:.0e}",
        check["report"],
    ]
    if not ours["kernels"]:
        lines.append("no kernel was launched: the swapped modules ran stock")
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """Whether the goal is reached, against the text-only LLM and the blank image."""
    overall = {row["name"]: row["scores"]["all"] for row in results["rows"]}
    verdict = "reached" if overall["tune"] >= results["goal"] else "not reached"
    if results["settings"]["quick"]:
        verdict += " (--quick takes too few steps for it)"
    return (
        f"Held out {100 * overall['tune']:.1f} %, goal {100 * results['goal']:.0f} % {verdict}; "
        f"text-only LLM {100 * overall['text']:.1f} %, blank image {100 * overall['tune_blank']:.1f} %; "
        f"{results['seconds']:.0f} s in all"
    )


def ascii_image(image: Tensor) -> list[str]:
    """(1, H, W) in [-1, 1] as H lines of 2 W characters, ink dark."""
    levels = ((image[0] + 1) / 2 * (len(SHADES) - 1)).round().clamp(0, len(SHADES) - 1).int()
    return ["".join(SHADES[level] * 2 for level in line) for line in levels.tolist()]


def picture_samples(samples: list[dict[str, Any]], held: Split) -> str:
    """Each digit drawn, the model's own words beside it."""
    blocks = ["Sample answers (held out)"]
    for sample in samples:
        drawn = ascii_image(held.images[sample["image"]])
        said = []
        for question, answer in zip(QUESTIONS, sample["said"], strict=True):
            right = question.answer(sample["digit"])
            remark = "" if answer == right else f"WRONG, it is {right}"
            said.append(f"{question.text:<24} {answer:<4} {remark}".rstrip())
        beside = [f"it is a {sample['digit']}", "", *said]
        width = len(drawn[0])
        frame = "+" + "-" * width + "+"
        lines = [f"|{line}|   {beside[i] if i < len(beside) else ''}".rstrip() for i, line in enumerate(drawn)]
        blocks.append("\n".join([frame, *lines, frame]))
    return "\n".join(blocks)


def loss_plot(stages: list[dict[str, Any]]) -> "Figure":
    """The loss of every step, one panel per stage: their losses are of different tasks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axis, stage in zip(figure.subplots(1, len(stages)), stages, strict=True):
        losses = stage["losses"]
        axis.plot(losses, color="0.8", linewidth=0.8)
        axis.plot(_smooth(losses), color="tab:blue")
        axis.set(title=stage["title"], xlabel="step", yscale="log")
        axis.title.set_fontsize(9)
    figure.axes[0].set_ylabel("loss")
    return figure


def accuracy_plot(rows: list[dict[str, Any]]) -> "Figure":
    """A bar per row for all questions, a mark per question type."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(rows):
        scores = row["scores"]
        axis.barh(i, 100 * scores["all"], color="tab:blue" if "trainable" in row else "0.75")
        axis.text(101, i, f"{100 * scores['all']:.1f}", va="center", fontsize=8)
    for j, name in enumerate(question.name for question in QUESTIONS):
        points = [100 * row["scores"][name] for row in rows]
        axis.plot(points, range(len(rows)), "ov^sD"[j], markersize=4, color=f"C{j + 1}", label=name)
    axis.set_yticks(range(len(rows)), [row["label"].strip() for row in rows])
    axis.invert_yaxis()
    axis.set(xlim=(0, 108), xlabel="held-out accuracy, %")
    axis.legend(fontsize=8, ncols=len(QUESTIONS), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    return figure


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    smoothed, mean = [], 0.0
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**i))
    return smoothed


def _wrap(line: str, width: int = 118) -> str:
    """Long sentences in lines that a terminal shows whole; what fits, tables included, stays as it is."""
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _table(head: list[str], body: list[list[str]]) -> str:
    """First column left, the others right."""
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *body]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
