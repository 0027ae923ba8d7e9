"""The golden runner over tests/goldens/, and that it fails when it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlkernels.testing import goldens

DIR = Path(__file__).with_name("goldens")
R3 = DIR / "lora_linear_r3.safetensors"
KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
on_triton = pytest.mark.skipif(not KERNELS_RUN, reason="neither a GPU nor Triton's interpreter")
BACKENDS = ["reference", pytest.param("triton", marks=on_triton)]
# the ops of a file, by the first beginning of its name that fits
OPS = {
    **dict.fromkeys(("adapterhub", "frozenbilm", "lavin_block", "lavin_router", "magma_normal", "magma_scaled",
                     "vladapter", "vlpet"), ("bottleneck_adapter",)),
    # nothing to fuse in them
    **dict.fromkeys(("epalm", "fp4", "fromage", "llava_linear", "lora_embedding", "lst", "magma", "nf4",
                     "vl_adapter"), ()),
    "lora_attention_bias": ("lora_qkv",),
    "lora_llama_layer_r5": ("lora_linear", "lora_mlp", "lora_qkv"),
    "lora_llama_layer_some": ("lora_mlp", "lora_qkv"),
    "lora_mlp": ("lora_mlp",),
    "lora_qkvo": ("lora_linear", "lora_qkv"),
    "dora": ("dora_linear",),
    **dict.fromkeys(("lora", "qlora"), ("lora_linear",)),
    "minigptv2": (),
    "honeybee_c_abstractor__p1": ("conv_se_linear", "mlp_projector"),
    "honeybee_c": ("conv_se_linear",),
    "mobilevlm_ldpv2": ("depthwise_conv_norm_act", "pooled_mlp"),
    "mobilevlm_ldp": ("conv_se_linear", "mlp_projector"),
    **dict.fromkeys(("hf_blip2", "hf_instructblip", "lavis_qformer", "minigpt4", "video_llama", "x_llm"),
                    ("cross_attention", "linear_projector", "mlp_projector", "multi_layer_kv", "norm_residual")),
    **dict.fromkeys(("clipcap_mlp", "esper"), ()),
    **dict.fromkeys(("minicpmv26", "omnilmm", "qwen_vl"), ("cross_attention", "linear_projector")),
    **dict.fromkeys(("clipcap", "llama_adapter_v2_visual", "mapl"),
                    ("cross_attention", "linear_projector", "mlp_projector")),
    "meta_mapper": ("cross_attention", "linear_projector", "norm_residual"),
    **dict.fromkeys(("cogvlm_layer", "mplug_owl2_layer"), ("modality_linear",)),
    "honeybee_d": ("cross_attention", "deformable_attention", "linear_projector", "mlp_projector", "multi_layer_kv",
                   "norm_residual"),
    "ms_deform_attn": ("deformable_attention",),
    **dict.fromkeys(("honeybee_resampler", "mplug_owl"),
                    ("cross_attention", "linear_projector", "multi_layer_kv", "norm_residual")),
    **dict.fromkeys(("idefics_", "mllama", "openflamingo_all", "openflamingo_immediate"),
                    ("gated_residual", "linear_projector", "media_cross_attention", "mlp_projector", "multi_layer_kv")),
    **dict.fromkeys(("hf_idefics", "llava_next_perceiver", "lucidrains", "openflamingo"),
                    ("cross_attention", "linear_projector", "mlp_projector", "multi_layer_kv")),
    **dict.fromkeys(("hf_mamba", "selective_scan", "vmamba"), ("selective_scan_2d",)),
    "vl_mamba_vss_l2": ("linear_projector", "selective_scan_2d"),
    "vl_mamba_vss_mlp": ("mlp_projector", "selective_scan_2d"),
    **dict.fromkeys(("llama_adapter_v1", "llama_adapter_v2_small", "peft_adaption"), ("prefix_attention",)),
    "llama_adapter_v2_lora": ("lora_linear", "lora_mlp", "lora_qkv", "prefix_attention"),
    **dict.fromkeys(("llama_adapter_v2_scale", "memvp_clip", "peft_pr", "vpt"), ()),
    "": ("mlp_projector",),
}  # fmt: skip
# a quantisation and nothing to differentiate
NO_GRADIENT = ("fp4", "nf4")


def edited(folder: Path, change, source: Path = R3) -> Path:
    """A folder with one golden, `source` after change(tensors, metadata)."""
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, folder / "edited.safetensors", metadata)
    return folder


def run(capsys, folder: Path, *options: str) -> tuple[int, str]:
    """Exit status and what was printed."""
    status = goldens.main([str(folder), *options])
    return status, capsys.readouterr().out


FILES = sorted(path.name for path in DIR.glob("*.safetensors"))


# 20 s and more in the interpreter; smaller files of the same modules run always
LONG = ("lavis_qformer_text__p1", "hf_instructblip_qformer__p1", "honeybee_d_abstractor__ps")
RUNS = [
    pytest.param(f, b, marks=[pytest.mark.slow, on_triton], id=f"{f}-{b}") if b == "triton" and f.startswith(LONG)
    else pytest.param(f, b, marks=[on_triton] if b == "triton" else [], id=f"{f}-{b}")
    for f in FILES for b in ("reference", "triton")
]  # fmt: skip


@pytest.mark.parametrize("file, backend", RUNS)
def test_passes(capsys, tmp_path, file, backend):
    """One file each: the interpreter takes seconds for some."""
    if file.startswith("lst"):
        pytest.importorskip("transformers")
    (tmp_path / file).symlink_to(DIR / file)
    status, out = run(capsys, tmp_path, "--backend", backend, "--json", str(tmp_path / "records.json"))
    assert status == 0, out
    line, summary = out.splitlines()
    ops = next(ops for beginning, ops in OPS.items() if file.startswith(beginning))
    says = " ".join(f"{op}={backend}" for op in ops) or "none"
    assert line.startswith(f"{file}: ") and line.endswith(f"; ops run: {says}; passed")
    assert summary == "1 passed, 0 failed, 0 no such module"
    (record,) = json.loads((tmp_path / "records.json").read_text())
    assert record["file"] == file and record["outputs"]
    assert bool(record["gradients"]) != file.startswith(NO_GRADIENT)
    assert record["ops"] == [[op, backend] for op in ops]


def test_all_pass(capsys):
    """The whole folder at once, on the reference."""
    pytest.importorskip("transformers")  # ladders stand on its T5
    status, out = run(capsys, DIR, "--backend", "reference")
    assert status == 0, out
    assert out.splitlines()[-1] == f"{len(FILES)} passed, 0 failed, 0 no such module"
    assert len(FILES) >= 67


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run on it")
def test_triton_without_a_gpu_starts_the_interpreter():
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VLKERNELS_BACKEND")}
    options = ["--module", "lora.conv", "--backend", "triton"]
    command = [sys.executable, "-m", "vlkernels.testing.goldens", str(DIR), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=DIR.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TRITON_INTERPRET=1" in done.stdout and "ops run: lora_linear=triton" in done.stdout


def shift(key: str, fraction: float):
    """Move one element by a fraction of the tensor's largest."""

    def change(tensors, metadata):
        tensors[key].view(-1)[3] += fraction * tensors[key].abs().max()

    return change


@pytest.mark.parametrize(
    "key", ["param.lora_A.default.weight", "param.base_layer.bias", "in.x", "out.y", "out.delta_weight.default"]
)
def test_a_changed_tensor_fails(capsys, tmp_path, key):
    status, out = run(capsys, edited(tmp_path, shift(key, 1e-3)))
    assert status == 1 and "; failed (" in out and "0 passed, 1 failed" in out


@pytest.mark.parametrize("key", ["grad_in.x", "grad_param.lora_B.default.weight", "grad_param.base_layer.weight"])
def test_a_changed_gradient_fails_and_is_named(capsys, tmp_path, key):
    status, out = run(capsys, edited(tmp_path, shift(key, 1e-3)))
    assert status == 1 and f"of its limit at {key}[" in out


def test_the_limits_are_those_of_the_goldens(capsys, tmp_path):
    """An element off by 0.9 of 2e-5 (outputs) and 1e-4 (gradients) of the largest passes, by 1.1 it fails."""
    for key, limit in (("out.y", 2e-5), ("grad_in.x", 1e-4)):
        for factor, status in ((0.9, 0), (1.1, 1)):
            # the largest gradient of the file is not the floor here
            assert run(capsys, edited(tmp_path, shift(key, factor * limit)))[0] == status, (key, factor)


def test_the_two_gradient_rules():
    small = torch.tensor([1.0, -2.0])
    assert goldens.gradient_limit(small, 100.0, in_block=True) == pytest.approx(1e-4 * 2)
    assert goldens.gradient_limit(small, 1000.0, in_block=True) == pytest.approx(1e-4 * 10)
    assert goldens.gradient_limit(small, 1000.0, in_block=False) == pytest.approx(1e-4 * 2 + 1e-6 * 1000)
    assert goldens.output_limit(small) == pytest.approx(2e-5 * 2)
    assert goldens.output_limit(torch.tensor([7])) == 0


def test_which_rule_a_file_gets(tmp_path):
    assert goldens.read(R3, torch.device("cpu")).in_block

    def out_of_block(tensors, metadata):
        del metadata["kind"], metadata["set"]

    edited(tmp_path, out_of_block)
    assert not goldens.read(tmp_path / "edited.safetensors", torch.device("cpu")).in_block


def test_differences():
    truth = torch.tensor([[1.0, float("inf")], [0.0, -1.0]])
    assert goldens.difference("y", truth.clone(), truth, 0.1).fraction == 0
    moved = truth.clone()
    moved[1, 1] += 0.2
    found = goldens.difference("y", moved, truth, 0.1)
    assert found.where == (1, 1) and found.fraction == pytest.approx(2) and not found.ok
    moved[1, 0] = float("nan")
    found = goldens.difference("y", moved, truth, 0.1)
    assert found.where == (1, 0) and not found.ok
    assert not goldens.difference("y", torch.zeros(2), torch.zeros(2, 2), 0.1).ok
    assert not goldens.difference("y", None, truth, 0.1).ok
    codes = torch.tensor([3, 4])
    assert goldens.difference("codes", codes, codes, 0.0).ok
    assert not goldens.difference("codes", codes + 1, codes, 0.0).ok


def metadata_is(**changes):
    def change(tensors, metadata):
        for key, value in changes.items():
            if value is None:
                del metadata[key]
            else:
                metadata[key] = value

    return change


def hyperparameters(**changes):
    def change(tensors, metadata):
        metadata["hyperparameters"] = json.dumps(json.loads(metadata["hyperparameters"]) | changes)

    return change


def renamed(old: str, new: str | None):
    def change(tensors, metadata):
        value = tensors.pop(old)
        if new is not None:
            tensors[new] = value

    return change


@pytest.mark.parametrize(
    "change, says",
    [
        (metadata_is(module=None), "no field 'module'"),
        (metadata_is(hyperparameters=None), "'hyperparameters' is missing"),
        (metadata_is(hyperparameters="{"), "'hyperparameters' is missing or no JSON"),
        (metadata_is(hyperparameters="[1]"), "no JSON object"),
        (metadata_is(dtype="bfloat16"), "'bfloat16'"),
        (hyperparameters(rank=3), "unknown hyper-parameter rank"),
        (hyperparameters(adapters={"default": {"r": 3, "lora_alpha": 6, "use_dora": True}}), "use_dora"),
        (hyperparameters(adapters={"default": {"lora_alpha": 6}}), "no adapters.default.r"),
        (hyperparameters(adapters={"default": {"r": 4, "lora_alpha": 6}}), "size mismatch"),
        (hyperparameters(base="conv1d"), "accepted: 'linear'"),
        (renamed("in.x", None), "the file has grad_in.x but no in.x"),
        (renamed("in.x", "in.z"), "no in.x"),
        (renamed("out.y", None), "the file has cot.y but no out.y"),
        (renamed("cot.y", None), "no cot"),
        (renamed("out.y", "y"), "unknown key 'y'"),
        (renamed("param.base_layer.bias", "param.base_layer.beta"), "base_layer.b"),
        (renamed("param.lora_A.default.weight", "param.lora_A.default.w"), "lora_A.default.w"),
        (renamed("out.merged_weight", "out.folded_weight"), "folded_weight (the module gives none)"),
    ],
)
def test_a_bad_file_fails_in_one_line(capsys, tmp_path, change, says):
    status, out = run(capsys, edited(tmp_path, change))
    line, summary = out.splitlines()
    assert status == 1 and says in line and "failed" in line and summary.startswith("0 passed, 1 failed")


def test_a_missing_parameter_is_named_as_upstream_does(capsys, tmp_path):
    def change(tensors, metadata):
        del tensors["param.lora_B.default.weight"], tensors["grad_param.lora_B.default.weight"]

    status, out = run(capsys, edited(tmp_path, change))
    assert status == 1 and "no param.lora_B.default.weight" in out


def test_a_corrupt_file_fails_and_the_others_still_run(capsys, tmp_path):
    edited(tmp_path, lambda tensors, metadata: None)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "cut.safetensors").write_bytes(R3.read_bytes()[:100])
    status, out = run(capsys, tmp_path, "--module", "lora.linear", "--json", str(tmp_path / "records.json"))
    assert status == 1 and "1 passed, 1 failed" in out
    assert "below/cut.safetensors: ?: failed (not a safetensors file" in out
    assert [r["verdict"] for r in json.loads((tmp_path / "records.json").read_text())] == ["failed", "passed"]


def test_nan_in_the_file_fails_and_json_stays_json(capsys, tmp_path):
    folder = edited(tmp_path, shift("out.y", float("nan")))
    status, _ = run(capsys, folder, "--json", str(tmp_path / "records.json"))
    record = json.loads((tmp_path / "records.json").read_text(), parse_constant=lambda name: pytest.fail(name))[0]
    assert status == 1 and any(row["error"] == "nan" for row in record["outputs"])


def test_an_unknown_module_id(capsys, tmp_path):
    edited(tmp_path, metadata_is(module="lora.nothing"))
    status, out = run(capsys, tmp_path)
    assert status == 1 and out.splitlines()[0] == "edited.safetensors: lora.nothing: no such module"
    assert "1 no such module" in out


def test_no_file_of_the_prefix(capsys, tmp_path):
    status, out = run(capsys, DIR, "--module", "nothing")
    assert status == 1 and out.startswith("no golden of a module that starts with 'nothing'")
    assert run(capsys, tmp_path)[0] == 1
    status, out = run(capsys, tmp_path / "nowhere")
    assert status == 1 and "is not a directory" in out


def test_an_op_that_did_not_run_fails(capsys, tmp_path, monkeypatch):
    """Right numbers from plain PyTorch are not enough."""
    from vlkernels.modules import lora

    monkeypatch.setattr(lora, "lora_linear", lora.lora_linear.reference.forward)
    status, out = run(capsys, edited(tmp_path, lambda tensors, metadata: None))
    assert status == 1 and "ops run: none" in out and "the op lora_linear did not run" in out


@on_triton
def test_a_chosen_kernel_that_was_not_launched_fails(capsys, tmp_path, monkeypatch):
    from vlkernels import lora_linear

    monkeypatch.setattr(lora_linear, "_operator", lambda *values: (lora_linear.reference.forward(*values[:-1]),))
    status, out = run(capsys, edited(tmp_path, lambda tensors, metadata: None), "--backend", "triton")
    assert status == 1 and "the operator lora_linear was not launched on triton" in out


def test_a_backend_that_refuses_is_a_failure_with_its_reason(capsys, monkeypatch):
    from vlkernels import lora_linear

    monkeypatch.setitem(lora_linear.kernels, "cuda", "not built")
    status, out = run(capsys, DIR, "--module", "lora.conv1d", "--backend", "cuda")
    assert status == 1 and "refuses: not built" in out
