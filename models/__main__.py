"""`python -m models demo | kernels-check`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError

BACKENDS = ("auto", "reference", "triton", "cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # only now: --help and a bad flag answer at once, and a missing package gets a sentence
    try:
        from . import demo
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed here; `make setup` installs what the demo needs", file=sys.stderr)
        return 2

    try:
        if options.command == "demo":
            return demo.run_demo(
                options.out,
                quick=options.quick,
                seed=options.seed,
                backend=options.backend,
                projector=options.projector,
                resume=options.resume,
                check=options.kernels_check,
            )
        return demo.run_check(
            options.checkpoint, samples=options.samples, backend=options.backend, json_path=options.json
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; finished stages are kept, `--resume` continues after the last one", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models", description="Vision-LLMs on vlkernels.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="train a small LLaVA on handwritten digits, in stages, and report",
        description="Trains a small LLaVA to answer questions about scikit-learn's handwritten digits: two stand-ins "
        "for pretrained backbones, then the projector, then projector + LoRA with vlkernels. "
        "Writes metrics.jsonl, results.json, report.txt, loss.png, accuracy.png and checkpoints/.",
    )
    demo.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--quick", action="store_true", help="few steps: shows that everything runs, learns little")
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: %(default)s")
    demo.add_argument("--backend", choices=BACKENDS, default="auto", help="what runs stage 2; default: %(default)s")
    demo.add_argument(
        "--projector",
        choices=("mlp", "linear", "c-abstractor"),
        default="mlp",
        help="what joins tower and LLM; default: %(default)s",
    )
    demo.add_argument(
        "--resume", action="store_true", help="reuse finished stages 1 and 2 as well (stage 0 is always reused)"
    )
    demo.add_argument("--no-kernels-check", dest="kernels_check", action="store_false", help="leave the last part out")

    check = commands.add_parser(
        "kernels-check",
        help="one micro-batch of a finished demo's stage 2 through the kernels, beside stock peft",
        description="Compares loss, gradients, saved bytes and launches of the kernels with stock peft at dropout 0; "
        "exits 1 where they disagree. Without a GPU set TRITON_INTERPRET=1.",
    )
    check.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the --out of a finished demo")
    check.add_argument("--samples", type=_samples, default=2, metavar="N", help="default: %(default)s")
    check.add_argument("--backend", choices=BACKENDS, default="auto", help="default: %(default)s")
    check.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser


def _seed(text: str) -> int:
    value = _whole(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 to 2^31 - 1")
    return value


def _samples(text: str) -> int:
    value = _whole(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError(f"{text} is outside 1 to 64")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


if __name__ == "__main__":
    sys.exit(main())
