"""Tables and plots from records; figures between markers are replaced, never typed.

    python -m benchmarks.report [--readme README.md] [--json FILE] [--no-plots]

Without --json: for each GPU record in benchmarks/results a <gpu>.md and two plots, and the ladder in
benchmarks/NOTES.md; --readme fills the file's sections `<!-- begin:NAME -->` ... `<!-- end:NAME -->` (support, memory,
speed). With --json: the table and plots of that one file, beside it, from this package's records or pytest-benchmark's
JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from . import record
from .record import RESULTS, Record, load
from .support import gpu_records
from .tables import full_lines, sections

NOTES = Path(__file__).resolve().parent / "NOTES.md"


def fill(text: str, found: dict[str, list[str]]) -> str:
    """The text with every marked section replaced. ValueError for an unknown name or an unpaired marker."""
    begins = re.findall(r"<!-- begin:(\S+) -->", text)
    ends = re.findall(r"<!-- end:(\S+) -->", text)
    if begins != ends or len(set(begins)) < len(begins):
        raise ValueError(f"markers do not pair: begin {begins}, end {ends}")
    unknown = [name for name in begins if name not in found]
    if unknown:
        raise ValueError(f"no section named {unknown[0]!r}; there are {', '.join(found)}")
    for name in begins:
        head, tail = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        before, rest = text.split(head)
        text = before + "\n".join((head, *found[name], tail)) + rest.split(tail)[1]
    return text


def fill_file(path: Path, found: dict[str, list[str]]) -> bool:
    """Fill the file's sections; whether anything changed."""
    before = path.read_text()
    after = fill(before, found)
    if after != before:
        path.write_text(after)
    return after != before


def records_of(path: Path) -> dict:
    """A records file, or the same made of the extra_info in pytest-benchmark's JSON."""
    content = json.loads(path.read_text())
    if "benchmarks" not in content:
        return load(path)
    found = [b["extra_info"] for b in content["benchmarks"] if "record" in b["extra_info"]]
    if not found:
        raise ValueError(f"{path} holds no records of benchmarks/test_bench_ops.py")
    from vlkernels import backends

    from .providers import baseline_of

    records = [Record(**info["record"]) for info in found]
    record.relate(records, {name: baseline_of(op) for name, op in backends.OPS.items()})
    return {
        "schema": record.SCHEMA,
        "runs": {info["run"]["time"]: info["run"] for info in found},
        "records": [vars(r) for r in records],
        "questions": [],
        "checks": {},
        "not_measured": [],
    }


def write(path: Path, content: dict, plots: bool) -> list[Path]:
    """The record's table, and its plots, beside it."""
    devices = sorted({run["device"] for run in content["runs"].values()})
    path.with_suffix(".md").write_text("\n".join(full_lines(content, ", ".join(devices))) + "\n")
    written = [path.with_suffix(".md")]
    if plots:
        from . import plots as drawing

        written += drawing.draw(content, path.with_suffix(""))
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, help="fill this file's sections support, memory, speed")
    parser.add_argument(
        "--json", type=Path, help="one records file or pytest-benchmark JSON, in place of the results folder"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--no-plots", dest="plots", action="store_false")
    options = parser.parse_args(argv)
    if options.json:
        written = write(options.json, records_of(options.json), options.plots)
        print(options.json.with_suffix(".md").read_text())
    else:
        written = [p for path in gpu_records(options.results) for p in write(path, load(path), options.plots)]
        found = sections(options.results)
        targets = [options.readme] if options.readme else []
        targets += [NOTES] if options.results == RESULTS else []
        written += [path for path in targets if fill_file(path, found)]
    print("\n".join(f"wrote {path}" for path in written) or "nothing changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
