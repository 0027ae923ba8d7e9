"""`python -m benchmarks` (`make bench`): time every op here, then make the table and plots.

With pytest-benchmark where it is installed, else with the engine itself. Without a GPU this is a tiny smoke
run. Everything lands in build/bench/; `python -m benchmarks.gpu` is what writes benchmarks/results/.
"""

import importlib.util
import subprocess
import sys

from . import ops, report
from .record import ROOT


def main() -> int:
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.json"
    path.unlink(missing_ok=True)
    if importlib.util.find_spec("pytest_benchmark"):
        command = [sys.executable, "-m", "pytest", "benchmarks/test_bench_ops.py", "-q", "-p", "no:cacheprovider"]
        status = subprocess.run([*command, f"--benchmark-json={path}"], cwd=ROOT, check=False).returncode
    else:
        print("pytest-benchmark is not installed: timing with python -m benchmarks.ops")
        status = ops.main(["--json", str(path)])
    if path.exists():
        report.main(["--json", str(path)])
    return status


if __name__ == "__main__":
    sys.exit(main())
