"""README's commands and code run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)


def commands() -> list[str]:
    return [line.split("#")[0].strip() for kind, body in BLOCKS if kind == "bash" for line in body.splitlines() if line]


def run(*command: str, **kwargs) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_swap_example():
    pytest.importorskip("peft")
    code = next(body for kind, body in BLOCKS if kind == "python" and "vlkernels.swap" in body)
    assert "18 modules swapped, 0 left" in run(sys.executable, "-c", code)


def test_insert_example():
    pytest.importorskip("transformers")
    code = next(body for kind, body in BLOCKS if kind == "python" and "vlkernels.insert" in body)
    assert "GatedCrossAttention into Llama: 2 modules" in run(sys.executable, "-c", code)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m vlkernels ")])
def test_short_commands(command):
    out = run(sys.executable, *shlex.split(command)[1:])
    assert "lora_linear" in out and "reference" in out


@pytest.mark.parametrize("command", [c for c in commands() if "testing.goldens" in c])
def test_golden_command(command):
    assert "passed" in run(sys.executable, *shlex.split(command)[1:])


def test_every_command_is_known():
    """What is not run above is run by CI (make test), by another test, or is checked to exist."""
    makefile = (ROOT / "Makefile").read_text()
    for command in commands():
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", makefile, re.M), command
        elif words[:2] == ["python", "-m"]:
            module = ROOT / Path(*words[2].split("."))
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), command
        else:
            assert words[:2] == ["pip", "install"], command
    for target in re.findall(r"`make ([\w-]+)", README):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target
