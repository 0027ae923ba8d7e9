"""Parts that stay plain PyTorch: a fused op would take less than a tenth off a layer, and NOTES.md has the counts."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import report, unfused

NOTES = Path(report.__file__).with_name("NOTES.md").read_text()


def test_a_fused_op_would_not_pay():
    found = unfused.measure()
    rows = re.findall(r"^\| `(?:ladder_mix|memory_ffn)`.*$", NOTES, re.M)
    assert len(rows) == len(found)
    for figure, row in zip(found, rows, strict=True):
        assert 0 < figure.could_keep < 0.1 and 0 < figure.could_move < 0.1, figure
        wanted = [
            f"{figure.kept:.0f}", f"{figure.least:.0f}", f"{100 * figure.could_keep:.1f} %",
            f"{figure.moved / 1024:.1f}", f"{figure.floor / 1024:.1f}", f"{100 * figure.could_move:.1f} %",
        ]  # fmt: skip
        assert [cell.strip() for cell in row.split("|")][2:-1] == wanted
