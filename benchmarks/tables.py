"""Markdown tables from records. Nothing here measures, and no figure is typed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from vlkernels import backends
from vlkernels.testing import compare
from vlkernels.testing.case import PRECISIONS

from . import ceilings, model, plans, providers
from .ops import MAIN_PRECISIONS, ON_CPU
from .record import NOT_AVAILABLE, RESULTS, load, rows
from .support import gpu_records, support_lines

NOT_MEASURED = "not yet measured"
NO_MODULES = "not counted yet: `python -m benchmarks.modules`"
NOT_COUNTED = "not counted yet: `python -m benchmarks.plans`"
COLUMNS = (
    "peft", "eager", "compile", "triton", "triton two_source", "triton packed", "cuda", "cuda two_source", "unsloth",
    "lorafusion", "frozen linear",
)  # fmt: skip


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(line)} |" for line in body)]


# -- memory --------------------------------------------------------------------------------------------------------


def memory_lines(record: dict) -> list[str]:
    """The memory report: ours beside the baseline, per token and per call, and ratios on the case's rows."""
    body = []
    for e in record["entries"]:
        ours, base, ratio = e["ours"], e["baseline"], e["ratio"]
        body.append(
            [
                e["name"] if e["kind"] == "module" else f"`{e['op']}`",
                e["case"],
                e["precision"],
                f"{_line(ours['saved'], 1, 'B')}{'*' * ours['keeps_input']}",
                f"{_line(base['saved'], 1, 'B')}{'*' * base['keeps_input']}",
                _ratio(ratio["saved"]),
                _ratio(e["budget"]["saved_per_token"], 0) + (" **over**" if e["budget"]["over"] else ""),
                _ratio(ratio["flops"], 3),
                _line(_both(ours["moved"]), 1024, "MiB"),
                _line(_both(base["moved"]), 1024, "MiB"),
                _ratio(ratio["moved"]),
                f"{_launches(ours)} / {_launches(base)}",
            ]
        )
    baselines = sorted({e["baseline_name"] for e in record["entries"]})
    counted = sorted({tuple(e["rows_counted"]) for e in record["entries"]})
    head = (
        "what", "case", "precision", "saved, B/token (+ call)", "baseline", "ratio", "budget, B/token", "FLOPs ratio",
        "moved, KiB/token (+ call)", "baseline", "ratio", "launches",
    )  # fmt: skip
    return [
        *table(head, body),
        "",
        f"Baseline: {', '.join(baselines)}. FLOPs and bytes moved are forward and backward together, launches forward "
        f"+ backward, ours / baseline. Counted at full width on {' and '.join(map(str, counted[0]))} rows, with the "
        "tiles of the case's row count (M in its name); counts are linear in the rows, ratios are on all of them. "
        "Saved: distinct storages kept for backward beyond parameters and the op's input; `*`: that input is kept too. "
        "A float32 product in three tf32 passes counts once.",
        f"vlkernels {record['package']}, torch {record['torch']}; `python -m benchmarks.memory`.",
    ]


def _both(moved: dict) -> tuple[float, float]:
    return tuple(sum(part) for part in zip(moved["forward"], moved["backward"], strict=True))


def _line(line: tuple[float, float], per_token: int, unit: str) -> str:
    """Bytes per token in units of `per_token` bytes, and per call in bytes or MiB."""
    slope, fixed = line
    call = fixed / {"B": 1, "MiB": 2**20}[unit]
    if abs(call) >= 2**17 and unit == "B":
        call, unit = call / 2**20, "MiB"
    each = slope / per_token
    return (f"{each:.0f}" if each >= 100 else f"{each:.4g}") + (f" (+ {call:.3g} {unit})" if call >= 0.05 else "")


def _ratio(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _launches(side: dict) -> str:
    return " + ".join(str(sum(side["launches"][d].values())) for d in ("forward", "backward"))


def plan_lines(counted: dict) -> list[str]:
    """Bytes of lora_linear's plans over the two floors of benchmarks.plans, a line a case and plan."""
    by_name = {case.name: case for case in plans.cases()}
    body = []
    for entry in counted["entries"]:
        found, moved = plans.floors(by_name[entry["case"]]), entry["moved"]
        ratios = [f"{moved[d] / floor[d]:.2f}" for d in ("forward", "backward") for floor in found.values()] + [
            f"{sum(moved.values()) / sum(floor.values()):.2f}" for floor in found.values()
        ]
        mib = (f"{moved[d] / 2**20:.0f}" for d in ("forward", "backward"))
        body.append([entry["case"], entry["plan"], *mib, *ratios])
    head = (
        "case", "plan", "forward, MiB", "backward, MiB", "forward / floor", "/ plan floor", "backward / floor",
        "/ plan floor", "sum / floor", "/ plan floor",
    )  # fmt: skip
    return table(head, body)


# -- speed ---------------------------------------------------------------------------------------------------------


def condition_lines(content: dict) -> list[str]:
    """Machine, software and ceilings of each run of a records file."""
    lines = []
    for run in content["runs"].values():
        measured = run["ceilings"]
        text = (
            f"{run['device']} {run['capability']}, driver {run['driver'] or '-'}, CUDA {run['cuda'] or '-'}, "
            f"torch {run['torch']}, triton {run['triton']}, peft {run['peft']}, Python {run['python']}, "
            f"vlkernels {run['package']} at {run['commit']}, compiled library: {run['library']}, {run['time']}."
        )
        if measured:
            text += (
                f" Ceilings measured in the same run: copy {measured['copy_tbs']:.2f} TB/s, bf16 product "
                f"{measured['bf16_tflops']:.0f} TFLOP/s, fp32 product {measured['fp32_tflops']:.0f} TFLOP/s."
            )
        lines.append(text if run["capability"] else f"{text} {ON_CPU}")
    return lines


def speed_lines(
    content: dict, precisions: tuple[str, ...] | None = MAIN_PRECISIONS, modes=("forward+backward",)
) -> list[str]:
    """Milliseconds of every provider, a line a case: losses stay in."""
    groups: dict[tuple, dict[str, dict]] = {}
    for r in rows(content):
        if (precisions is None or r["precision"] in precisions) and r["mode"] in modes:
            groups.setdefault((r["op"], r["case"], r["precision"], r["mode"]), {})[r["provider"]] = r
    present = {name for group in groups.values() for name in group}
    names = [n for n in COLUMNS if n in present] + sorted(present - set(COLUMNS))
    body = []
    for (op, case, precision, mode), group in groups.items():
        best = _best(group)
        body.append(
            [
                f"`{op}` {case}",
                precision,
                *([mode] if len(modes) > 1 else []),
                *(_milliseconds(group.get(n)) for n in names),
                _ratio(best["ratio_baseline"]) if best else "-",
                _ratio(best["ratio_floor"]) if best else "-",
                f"{best['tflops']:.0f}" if best else "-",
            ]
        )
    head = ["case", "precision", *(["mode"] if len(modes) > 1 else []), *(f"{n}, ms" for n in names)]
    return table([*head, "ours / baseline", "ours / floor", "TFLOP/s"], body) if body else [NOT_MEASURED]


def _best(group: dict[str, dict]) -> dict | None:
    ours = [r for r in group.values() if r["kind"] == "ours" and r["ms"] is not None]
    return min(ours, key=lambda r: r["ms"]) if ours else None


def _milliseconds(r: dict | None) -> str:
    if r is None:
        return "-"
    if r["ms"] is None:
        return "n/a" if (r["failure"] or "").startswith(NOT_AVAILABLE) else "failed"
    return f"{r['ms']:.3f}"


def readme_speed_lines(results: Path = RESULTS) -> list[str]:
    """Forward + backward of every measured op, a table a GPU, or that nothing was measured."""
    lines = []
    for path in gpu_records(results):
        content = load(path)
        lines += [
            *condition_lines(content),
            "",
            *speed_lines(content),
            "",
            "Forward + backward, median of device-event times, random data rotated past the L2 cache; each provider "
            'was checked against float64 first. "ours / baseline" below 1 is faster than what users run today (stock '
            "peft for lora_linear), above 1 slower. All modes, spreads, memory, and what was not measured: "
            f"[benchmarks/results/{path.stem}.md](benchmarks/results/{path.stem}.md).",
            "",
        ]
    return lines[:-1] or [NOT_MEASURED]


def full_lines(content: dict, name: str) -> list[str]:
    """Everything of one records file."""
    detail = []
    for r in rows(content):
        figures = ["-"] * 9 if r["ms"] is None else [
            f"{r['ms']:.4f}", f"{r['ms_p20']:.4f} to {r['ms_p80']:.4f}", str(r["n"]),
            *(_ratio(r[k]) for k in ("ratio_floor", "ratio_baseline")), _number(r["tflops"]), _number(r["tbs"]),
            _mib(r["peak_bytes"]), _mib(r["saved_bytes"]),
        ]  # fmt: skip
        where = [f"`{r['op']}` {r['case']}", r["precision"], r["mode"], r["provider"]]
        detail.append([*where, *figures, _ratio(r["error_share"]), (r["failure"] or "").replace("|", "/")])
    head = (
        "case", "precision", "mode", "provider", "ms", "p20 to p80", "n", "/ floor", "/ baseline", "TFLOP/s", "TB/s",
        "peak MiB", "saved MiB", "error / limit", "failure",
    )  # fmt: skip
    lines = [f"# {name}", "", *condition_lines(content), "", "## Milliseconds", ""]
    lines += speed_lines(content, None, ("forward", "forward+backward"))
    lines += ["", "## Records", "", *table(head, detail)]
    if content["questions"]:
        lines += ["", "## Predictions and measurements", "", *question_lines(content["questions"])]
    if content["checks"]:
        lines += [
            "",
            "## Checks",
            "",
            *(f"- {k}: {v['outcome']} {v.get('detail', '')}" for k, v in content["checks"].items()),
        ]
    if content["not_measured"]:
        lines += ["", "## Not measured for want of time", "", *(f"- {text}" for text in content["not_measured"])]
    return lines


def question_lines(questions: list[dict]) -> list[str]:
    return table(
        ("question", "predicted", "measured"), ([q["question"], q["prediction"], q["measured"]] for q in questions)
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"


# -- the ladder of versions ----------------------------------------------------------------------------------------


def ladder_lines(memory: dict, results: Path = RESULTS) -> list[str]:
    """Each op's versions on its first bench case: predicted beside measured milliseconds."""
    measured = [r for path in gpu_records(results) for r in rows(load(path))]
    lines = []
    for name, op in sorted(backends.OPS.items()):
        module = providers.module_of(op)
        if module is None or not hasattr(module, "LADDER"):
            continue
        case = next(c for c in compare.cases_of(op).CASES if "bench" in c.tags)
        found = [e for e in memory["entries"] if (e["op"], e["kind"], e["case"]) == (name, "module", case.name)]
        entries = {e["precision"]: e for e in found}
        body = []
        for what, precision, side, provider in module.LADDER:
            entry = entries.get(precision)
            if entry is None:
                continue
            itemsize = PRECISIONS[precision].compute.itemsize
            times = [model.predict(entry, side, d, module.big_product(case, itemsize)) for d in ("forward", "backward")]
            flops, fewest = (getattr(compare.cases_of(op), f) for f in ("flops", "floor_bytes"))
            floor = sum(
                ceilings.floor_ms(flops(case)[d], fewest(case, itemsize)[d], False, model.CEILINGS)
                for d in ("forward", "backward")
            )
            found = [
                r for r in measured if (r["case"], r["precision"], r["provider"]) == (case.name, precision, provider)
            ]
            by_mode = {r["mode"]: r for r in found if r["ms"] is not None}
            body.append(
                [what, precision, *(f"{t:.3f}" for t in times), f"{sum(times) / floor:.2f}", _measured(by_mode)]
            )
        head = ("version", "precision", "predicted forward, ms", "backward, ms", "sum / floor", "measured")
        lines += [f"`{name}`, {case.name}, dropout {case.get('p', 0.0)}:", "", *table(head, body), ""]
    return lines[:-1]


def _measured(by_mode: dict[str, dict]) -> str:
    if len(by_mode) < 2:
        return NOT_MEASURED
    forward, both = by_mode["forward"], by_mode["forward+backward"]
    times = f"{forward['ms']:.3f} + {both['ms'] - forward['ms']:.3f} ms"
    return f"{times}, {_ratio(both['ratio_floor'])} of floor ({both['device']})"


# -- modules -------------------------------------------------------------------------------------------------------


def module_lines(record: dict) -> list[str]:
    """Resampler and Q-Former at published sizes."""
    names = {"resampler": "OpenFlamingo's resampler"} | {
        f"qformer, {d}": f"BLIP-2's Q-Former, {d}" for d in record["qformer"]
    }
    found = {"resampler": record["resampler"]} | {f"qformer, {d}": figures for d, figures in record["qformer"].items()}
    body = []
    for key, versions in found.items():
        for f in versions:
            (one, each), (of_one, of_each) = f["saved"], f["of"]
            body.append([
                names[key], f["version"], f"{one:.2f} ({of_one:.3f})", f"{each:.2f} ({of_each:.3f})",
                _ratio(f["flops"], 3), "-" if f["launches"] is None else " + ".join(map(str, f["launches"])),
            ])  # fmt: skip
    head = (
        "module", "version", "saved of one image, MiB (of eager)", f"of each of {record['batch']}", "FLOPs of eager",
        "launches",
    )  # fmt: skip
    unsplit = record["resampler forward launches, unsplit"]
    stage1 = ", ".join(f"{ratio:.3f} with {name}" for name, ratio in record["stage1"].items())
    return [
        *table(head, body),
        "",
        "bf16, published sizes, x frozen and not counted, a GPU's fused dropout; FLOPs and launches of one image, "
        "forward + backward, the Q-Former's of two layers. Where a batch fills the device the resampler's forward has "
        f"{unsplit['level 0']} launches, eager's {unsplit['eager']}. BLIP-2's stage 1, FLOPs of a step over LAVIS': "
        f"{stage1}. `python -m benchmarks.modules`.",
    ]


def kept_lines(record: dict) -> list[str]:
    """What modules keep beside upstream's own code."""
    body = []
    for module in record["kept"].values():
        for f in module["figures"]:
            size = f["bytes"] / 2**20
            size = f"{size:.2f} MiB" if size >= 1 else f"{f['bytes'] / 2**10:.1f} KiB"
            shares = " / ".join(f"{share:.3f}" for share in f.get("of", [])) or "-"
            body.append([module["title"], f["version"], f"{size} per {module['per']}", shares])
    return [
        *table(("module", "version", "saved for backward", "of eager (each version)"), body),
        "",
        "bf16, published sizes, weights and media apart, inputs counted where eager keeps them; eager is upstream's "
        "code in plain PyTorch, ours with torch's fused attention and RMSNorm. "
        "`python -m benchmarks.modules --only kept`.",
    ]


def layer_lines(record: dict) -> list[str]:
    """A Llama layer with LoRA on its seven linears."""
    body = [[f["version"], f"{f['saved_kb']:.0f}", str(f["launches"])] for f in record["layer"]]
    return table(("Llama-7B's layer, r = 128", "saved, KB a token", "launches"), body)


def step_lines(results: Path) -> list[str]:
    """Whole models' steps, as benchmarks.steps measured them on a GPU."""
    path = results / "steps.json"
    if not path.exists():
        return [NOT_MEASURED]
    content = json.loads(path.read_text())
    body = [
        [
            f["step"], f["version"], f["failure"] or f"{f['ms']:.1f}", _ratio(f["of_unswapped"], 3),
            *("-" if f[n] is None else f"{f[n]:{form}}" for n, form in (("tokens_per_s", ".0f"), ("peak_gib", ".1f"))),
        ]
        for f in content["steps"]
    ]  # fmt: skip
    run = content["run"]
    return [
        *table(("step", "version", "ms", "of unswapped", "tokens/s", "peak, GiB"), body),
        "",
        f"{run['device']}, torch {run['torch']}, commit {run['commit']}; `python -m benchmarks.steps`.",
    ]


def tuning_lines(record: dict) -> list[str]:
    """What training T5-base keeps, by method and text length."""
    if "tuning" not in record:
        return [NO_MODULES]
    gib = 1024
    body = [
        [
            f["method"], str(f["text"]), f"{f['trained'] / 1e6:.1f}",
            *(f"{f[name] / gib:.2f}" for name in ("saved", "gradients", "optimizer", "kept", "peak")),
            *("-" if f["method"] == "ladder" else f"{f[n]:.3f}" for n in ("ladder_of", "ladder_of_peak")),
        ]
        for f in record["tuning"]
    ]  # fmt: skip
    head = (
        "T5-base", "words", "trained, M", "saved, GiB", "gradients", "AdamW", "sum", "with weights", "ladder / sum",
        "/ with weights",
    )  # fmt: skip
    one = record["tuning"][0]
    return [
        *table(head, body),
        "",
        f"{one['batch']} samples, each with {one['images']} image tokens and {one['target']} words of answer; float32, "
        "dropout 0.1, eager attention, counted on meta tensors. `python -m benchmarks.tuning`.",
    ]


def sections(results: Path = RESULTS) -> dict[str, list[str]]:
    """What stands between the markers, by marker name."""
    path = results / "modules.json"
    modules = json.loads(path.read_text()) if path.exists() else None
    path = results / "memory.json"
    memory = json.loads(path.read_text()) if path.exists() else None
    counted = results / "plans.json"
    return {
        "support": support_lines(results),
        "memory": memory_lines(memory) if memory else ["not counted yet: `python -m benchmarks.memory`"],
        "modules": module_lines(modules) if modules else [NO_MODULES],
        "kept": kept_lines(modules) if modules else [NO_MODULES],
        "layer": layer_lines(modules) if modules else [NO_MODULES],
        "tuning": tuning_lines(modules) if modules else [NO_MODULES],
        "speed": readme_speed_lines(results),
        "steps": step_lines(results),
        "ladder": ladder_lines(memory, results) if memory else [NOT_MEASURED],
        "plans": plan_lines(json.loads(counted.read_text())) if counted.exists() else [NOT_COUNTED],
    }
