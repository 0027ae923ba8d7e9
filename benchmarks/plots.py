"""Two plots of a records file: how far from the roofline, and how much faster than the baseline."""

from __future__ import annotations

import sys
from pathlib import Path

from vlkernels import backends
from vlkernels.testing import compare
from vlkernels.testing.case import PRECISIONS

from .record import rows

COLOURS = {
    "triton": "#1b7837", "cuda": "#5aae61", "peft": "#762a83", "eager": "#9970ab", "compile": "#c2a5cf",
    "frozen linear": "#999999", "unsloth": "#e08214", "lorafusion": "#fdb863", "reference": "#2166ac",
}  # fmt: skip


def draw(content: dict, stem: Path) -> list[Path]:
    """Writes <stem>_roofline.png and <stem>_speedup.png; says so when matplotlib is absent."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no plots", file=sys.stderr)
        return []
    written = []
    for name, draw_one in (("roofline", _roofline), ("speedup", _speedup)):
        figure = draw_one(plt, content)
        if figure is not None:
            path = stem.with_name(f"{stem.name}_{name}.png")
            figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            written.append(path)
    return written


def _timed(content: dict) -> list[dict]:
    return [r for r in rows(content) if r["ms"] is not None and r["mode"] == "forward+backward"]


def _title(content: dict) -> str:
    runs = list(content["runs"].values())
    return (
        f"{runs[-1]['device']}, torch {runs[-1]['torch']}, vlkernels {', '.join(sorted({r['commit'] for r in runs}))}"
    )


def _roofline(plt, content: dict):
    """TFLOP/s over FLOPs per byte that must move, under the ceilings of the run."""
    points = [
        r for r in _timed(content) if r["tflops"] and r["ceilings"] and PRECISIONS[r["precision"]].compute.itemsize == 2
    ]
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5))
    measured = points[-1]["ceilings"]
    ridge = measured["bf16_tflops"] / measured["copy_tbs"]
    edges = [ridge / 8, ridge, max(ridge * 32, 4000)]
    axes.plot(
        edges, [min(measured["bf16_tflops"], e * measured["copy_tbs"]) for e in edges], color="black", linewidth=1
    )
    seen = set()
    for r in points:
        cases = compare.cases_of(backends.OPS[r["op"]])
        case = next((c for c in cases.CASES if c.name == r["case"]), None)
        if case is None:
            continue
        intensity = sum(cases.flops(case).values()) / sum(cases.floor_bytes(case, 2).values())
        label = r["provider"] if r["provider"] not in seen else None
        seen.add(r["provider"])
        colour = COLOURS.get(r["provider"], "#000000")
        axes.plot(intensity, r["tflops"], "o", markersize=5, color=colour, label=label, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="TFLOP/s, forward + backward")
    axes.set_title(_title(content), fontsize=8)
    axes.legend(fontsize=8)
    return figure


def _speedup(plt, content: dict):
    """Baseline's time over each provider's; bars left of 1 are losses."""
    groups: dict[str, list[dict]] = {}
    for r in _timed(content):
        if r["ratio_baseline"] and r["kind"] != "bound":
            groups.setdefault(f"{r['case']} [{r['precision']}]", []).append(r)
    groups = {k: v for k, v in groups.items() if len(v) > 1}
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.2 * sum(len(group) for group in groups.values())))
    place, ticks, seen = 0.0, {}, set()
    for name, group in groups.items():
        shown = [r for r in group if r["ratio_baseline"] != 1.0]
        ticks[name] = place + (len(shown) - 1) / 2
        for r in shown:
            label = r["provider"] if r["provider"] not in seen else None
            seen.add(r["provider"])
            axes.barh(place, 1 / r["ratio_baseline"], 0.9, color=COLOURS.get(r["provider"], "#000000"), label=label)
            place += 1
        place += 0.7
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_yticks(list(ticks.values()), list(ticks), fontsize=7)
    axes.set_xlabel("speed over the baseline, forward + backward (above 1 is faster)")
    axes.set_title(_title(content), fontsize=8)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
