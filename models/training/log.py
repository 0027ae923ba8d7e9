"""The metrics log: one JSON object per line, written as it happens."""

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Rows of `metrics.jsonl`: {"stage", "step", "loss", "lr", "ms"} per step, {"event": ...} for everything else."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # line buffered: an interrupted run keeps its rows
        self._file = path.open("w", buffering=1, encoding="utf-8")

    def write(self, **row: Any) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
