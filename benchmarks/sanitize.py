"""One small forward and backward of every op on one backend: what runs under compute-sanitizer.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize --backend triton
python -m benchmarks.sanitize --repeat        two runs of each must agree in every bit
"""

from __future__ import annotations

import argparse
import sys

import torch

from vlkernels import backends
from vlkernels.op import Op
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Case, Make

from . import check, providers


def small_case(op: Op) -> Case:
    """The case that drops and halves every term in the tests: several tiles along every axis and all options."""
    return next(c for c in compare.cases_of(op).CASES if "sharp" in c.tags)


def runnable(op: Op, device: str, precision: str = "bf16") -> list[str]:
    """Backends with kernels that can run the small case here."""
    values = op.values(**compare.cases_of(op).inputs(small_case(op), Make(PRECISIONS[precision], 0, device)))
    built = [name for name in backends.ORDER if name != "reference" and providers.is_built(op, name)]
    return [name for name in built if backends.verdict(op, name, values) is None]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend", choices=[b for b in backends.ORDER if b != "reference"], help="default: all that run"
    )
    parser.add_argument("--precision", default="bf16", choices=sorted(PRECISIONS))
    parser.add_argument("--repeat", action="store_true", help="run twice and compare bits")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    precision, bad = PRECISIONS[options.precision], 0
    for name, op in sorted(backends.OPS.items()):
        for backend in runnable(op, options.device, options.precision):
            if options.backend not in (None, backend):
                continue
            case = small_case(op)
            if options.repeat:
                differing = check.repeats(op, backend, case, precision, options.device)
                bad += differing is not None
                print(
                    f"{name} {backend} {case} [{precision}]: "
                    + (f"differs in {differing}" if differing else "same bits twice")
                )
                continue
            with meter.launches() as launched:
                arguments = compare.cases_of(op).inputs(case, Make(precision, 0, options.device))
                compare.run(op, arguments, precision, backend, 0)
            if options.device != "cpu":
                torch.cuda.synchronize()
            print(f"{name} {backend} {case} [{precision}]: ran {', '.join(sorted(launched)) or 'compiled kernels'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
