"""The house: which way imports point, where things are, and what no file says."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vlkernels"
OPS = sorted(p for p in (PACKAGE / "ops").iterdir() if (p / "reference.py").exists())
HEAVY = ("transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets")


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of all modules that a file imports."""
    tree = ast.parse(path.read_text())
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")
            base = base[: len(base) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
    return found


def under(names: set[str], prefix: str) -> set[str]:
    return {n for n in names if n == prefix or n.startswith(prefix + ".")}


@pytest.mark.parametrize("op", OPS, ids=lambda p: p.name)
def test_op_folder(op):
    for name in ("__init__.py", "reference.py", "triton.py", "cases.py"):
        assert (op / name).exists(), f"{op.name} lacks {name}"
    for path in op.glob("*.py"):
        names = imports(path)
        for other in OPS:
            if other != op:
                assert not under(names, f"vlkernels.ops.{other.name}"), f"{path} imports another op"
        assert not under(names, "vlkernels.modules"), f"{path} imports a module"
        assert not any(under(names, heavy) for heavy in HEAVY), path
    assert not under(imports(op / "reference.py"), "triton")
    assert under(imports(PACKAGE / "__init__.py"), f"vlkernels.ops.{op.name}")


def test_modules_know_no_transformers():
    for path in (PACKAGE / "modules").glob("*.py"):
        assert not any(under(imports(path), heavy) for heavy in HEAVY), path


def test_integrations_import_late():
    """transformers and peft are imported inside functions, so importing vlkernels needs neither."""
    for path in PACKAGE.rglob("*.py"):
        names = imports(path, top_level_only=True)
        assert not any(under(names, heavy) for heavy in HEAVY), path


def test_nothing_imports_models():
    for path in PACKAGE.rglob("*.py"):
        for room in ("models", "benchmarks", "tests"):
            assert not under(imports(path), room), path


def test_csrc_keeps_torch_in_one_file():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cu", ".cuh", ".h"):
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
        if path.name.endswith("_torch.cpp"):
            for header in re.findall(r"#include\s*<((?:torch|ATen|c10)/[^>]+)>", path.read_text()):
                assert header.startswith(
                    ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/", "torch/headeronly/")
                ), path


def test_dots_name_their_precision():
    """tl.dot's default is plain tf32 on sm_90 while the interpreter computes true float32."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
                assert any(k.arg == "input_precision" for k in node.keywords), f"{path}:{node.lineno}"


def test_nothing_global_is_patched():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(torch|transformers|peft|triton)(\.\w+)+\s*=[^=]", text, re.M), path


def test_no_file_tells_of_this_machine_or_of_work_in_progress():
    words = re.compile(r"/(work|farm|root|home)/|[.]library/|TODO|FIXME|XXX")
    for path in tracked():
        if path.suffix in (".safetensors", ".png", ".json") or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            assert not words.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_files_stay_short():
    long = {str(p.relative_to(ROOT)): n for p in tracked() if p.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")
            if (n := len(p.read_text().splitlines())) > 600}  # fmt: skip
    assert not long


def test_no_absolute_tolerance():
    """A tolerance comes from the rule, from float64, or is zero; an all-zero tensor passes any other."""
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("atol", "abs"):
                assert isinstance(node.value, ast.Constant) and node.value.value == 0, f"{path}:{node.value.lineno}"
