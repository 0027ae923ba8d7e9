"""models/: the digits, the freezing rules, the staged loop with its checkpoints, and the demo from end to end."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("transformers", "peft", "sklearn", "matplotlib", "tqdm", "safetensors"):
    pytest.importorskip(package)

import numpy as np  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import vlkernels  # noqa: E402
from models import demo  # noqa: E402
from models.__main__ import main  # noqa: E402
from models.data import digits as data  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.evaluation import answers, kernels  # noqa: E402
from models.recipe import train_only  # noqa: E402
from models.recipes.digits import RECIPE  # noqa: E402
from models.reports import demo as report  # noqa: E402
from models.training import checkpoints, log  # noqa: E402
from models.training.stages import StagedRun, learning_rate  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TINY = 0.005  # 6, 2, 1 and 2 steps
PROJECTOR = {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def qa():
    return data.DigitsQA()


def staged(folder, **options):
    """A staged run of a few steps on the CPU, and what it says."""
    said: list[str] = []
    return StagedRun(RECIPE.shortened(TINY), folder, say=said.append, **options), said


def states(model):
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


# -- data --------------------------------------------------------------------------------------------------------------


def test_split_is_fixed_complete_and_stratified(qa):
    train, held = qa.train, qa.held_out
    assert (len(train), len(held)) == (1437, 360)
    again = data.load()
    assert torch.equal(again[0].images, train.images) and torch.equal(again[1].digits, held.digits)

    bunch = load_digits()
    together = torch.cat([train.images, held.images]).flatten(1)
    original = torch.tensor(bunch.images, dtype=torch.float32).flatten(1) / 8 - 1
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, original.tolist()))
    whole = np.bincount(bunch.target)
    shares = np.bincount(held.digits.numpy()) - whole * 360 / 1797
    assert np.abs(shares).max() < 1


def test_ground_truth_answers():
    truth = {
        "digit": "0 1 2 3 4 5 6 7 8 9",
        "even": "yes no yes no yes no yes no yes no",
        "above 4": "no no no no no yes yes yes yes yes",
        "next": "1 2 3 4 5 6 7 8 9 10",
        "loop": "yes no no no no no yes no yes yes",
    }
    assert {q.name for q in data.QUESTIONS} == set(truth)
    for question in data.QUESTIONS:
        assert [question.answer(d) for d in range(10)] == truth[question.name].split()
        assert set(truth[question.name].split()) == set(question.answers)
        with pytest.raises(ValueError, match="between 0 and 9"):
            question.answer(10)


def test_labels_are_on_the_answer_only(qa):
    digits, questions = torch.tensor([9, 3, 4]), torch.tensor([3, 1, 2])  # prompts of different lengths
    images = qa.train.images[:3]
    batch = qa.collate(digits, questions, images)
    ids, labels = batch.input_ids, batch.labels
    image, end = qa.tokenizer.convert_tokens_to_ids(["<image>", "</s>"])
    assert ((ids == image).sum(1) == data.IMAGE_TOKENS).all()
    lengths = batch.attention_mask.sum(1).tolist()
    assert len(set(lengths)) > 1
    for row, answer in enumerate(("10", "no", "no")):
        last = lengths[row]
        marked = (labels[row] != data.IGNORE).nonzero().flatten().tolist()
        assert marked == [last - 2, last - 1]
        assert labels[row, marked].tolist() == [qa.tokenizer.convert_tokens_to_ids(answer), end]
        assert torch.equal(labels[row, marked], ids[row, marked])
        assert (ids[row, last:] == qa.tokenizer.pad_token_id).all()
    assert qa.tokenizer.decode(ids[0, : lengths[0]]).replace("<image>", "").split()[-2:] == ["10", "</s>"]
    assert qa.tokenizer.unk_token_id not in ids


def test_texts_have_labels_on_every_token_and_half_name_no_digit(qa):
    batch = next(qa.texts(400, seed=0))
    assert batch.pixel_values is None
    real = batch.attention_mask.bool()
    assert torch.equal(batch.labels[real], batch.input_ids[real]) and (batch.labels[~real] == data.IGNORE).all()
    named = batch.input_ids[:, 3]  # <s> USER : and then the subject, or the question
    words = [qa.tokenizer.convert_ids_to_tokens(i) for i in named.tolist()]
    share = sum(word.isdigit() for word in words) / len(words)
    assert 0.4 < share < 0.6


def test_batches_cover_every_pair_once_per_epoch_and_repeat_with_the_seed(qa):
    dealt = qa._dealt(5, 64, seed=3)
    pairs = []
    while len(pairs) < 1437 * 5:
        index, question, _ = next(dealt)
        pairs += zip(index.tolist(), question.tolist(), strict=True)
    assert len(pairs) == len(set(pairs)) == 1437 * 5
    first, second, other = (next(qa.questions(8, seed, augmented=True)) for seed in (1, 1, 2))
    assert torch.equal(first.pixel_values, second.pixel_values)
    assert not torch.equal(first.pixel_values, other.pixel_values)


def test_bad_batches_are_refused(qa):
    with pytest.raises(ValueError, match="at least one"):
        qa.collate(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="not both"):
        qa.collate(torch.tensor([1]), torch.tensor([0]), qa.train.images[:1], named=torch.tensor([1]))


# -- freezing ----------------------------------------------------------------------------------------------------------


def test_a_rule_that_matches_nothing_raises():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    assert train_only(module, ("0.*",)) == ["0.weight", "0.bias"]
    assert [p.requires_grad for p in module.parameters()] == [True, True, False, False]
    for rules in (("0.*", "projector.*"), ("lora_A",)):
        with pytest.raises(UserError, match="matches none of the 4 parameters"):
            train_only(module, rules)
    assert [p.requires_grad for p in module.parameters()] == [True, True, False, False]
    with pytest.raises(UserError, match="trains nothing"):
        train_only(module, ())


def test_a_lora_target_that_fits_nothing_raises(tmp_path):
    run, _ = staged(tmp_path)
    model = run.unaligned(run.tower()[0], run.llm()[0])
    tune = run.recipe.stages[-1]
    wrong = dataclasses.replace(tune, lora=dataclasses.replace(tune.lora, target=r".*\.query"))
    run.recipe = dataclasses.replace(run.recipe, stages=(*run.recipe.stages[:-1], wrong))
    with pytest.raises(UserError, match="fits no module"):
        run.with_lora(model)


def test_stages_train_exactly_their_parameters(tmp_path):
    run, _ = staged(tmp_path)
    model = run.unaligned(run.tower()[0], run.llm()[0])
    before = states(model)
    run.align(model)
    after = states(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"model.{n}" for n in PROJECTOR}
    assert {name for name in before if not torch.equal(before[name], after[name])} == {f"model.{n}" for n in PROJECTOR}

    model = run.with_lora(model)
    vlkernels.swap(model)
    before = states(model)
    run.tune(model, lambda: vlkernels.use_backend("reference"))
    after = states(model)
    prefix = "base_model.model.model."
    lora = {
        f"{prefix}language_model.layers.{layer}.{linear}.lora_{x}.default.weight"
        for layer in range(2)
        for linear in LINEARS
        for x in "AB"
    }
    expected = lora | {prefix + n for n in PROJECTOR}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected
    layer = model.base_model.model.model.language_model.layers[0].mlp.up_proj
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (16, 2.0, 0.05)


# -- the image's way to the answer -------------------------------------------------------------------------------------


def test_the_assembled_model_holds_the_trained_backbones(tmp_path):
    run, _ = staged(tmp_path)
    tower, llm = run.tower()[0], run.llm()[0]
    model = run.unaligned(tower, llm)
    assert_same(states(model.model.vision_tower), states(tower.tower))
    assert_same(states(model.model.language_model), states(llm.model))
    assert_same(states(model.lm_head), states(llm.lm_head))


def test_the_image_reaches_the_answer_and_a_blank_one_is_the_same_for_all(qa, tmp_path):
    run, _ = staged(tmp_path)
    model = run.unaligned(run.tower()[0], run.llm()[0])
    images = qa.held_out.images[:6]
    empty = data.blank(images)
    assert (empty == images.min()).all()  # paper, as around every digit
    batch = qa.collate(torch.full((6,), 7), torch.zeros(6, dtype=torch.long), images)
    first = batch.input_ids[0].tolist().index(model.config.image_token_id)
    with torch.no_grad():
        real = model(**batch.inputs()).logits
        blank = model(**dataclasses.replace(batch, pixel_values=empty).inputs()).logits
    assert torch.equal(real[:, :first], blank[:, :first])  # the text before the image knows nothing of it
    assert (real[:, -2] != blank[:, -2]).any(-1).all()
    assert blank[:, -2].std(0).max() < 1e-3 * real[:, -2].std(0).max()
    assert len({tuple(row) for row in real[:, -2].tolist()}) == 6


def test_whole_answers_count():
    labels = torch.tensor([[-100, 3, 1], [-100, 3, 1], [-100, 3, 1]])
    logits = torch.zeros(3, 3, 5)
    for row, guesses in enumerate(((3, 1), (3, 2), (4, 1))):
        logits[row, 0, guesses[0]] = logits[row, 1, guesses[1]] = 1
    assert answers.right(logits, labels).tolist() == [True, False, False]


def test_chance_and_majority(qa):
    assert answers.chance() == {"digit": 0.1, "even": 0.5, "above 4": 0.5, "next": 0.1, "loop": 0.5, "all": 0.34}
    majority = answers.majority(qa)
    counts = torch.bincount(qa.held_out.digits)
    assert majority["loop"] == (360 - counts[list(data.LOOPS)].sum().item()) / 360
    often = torch.bincount(qa.train.digits)
    assert majority["digit"] in [n / 360 for n in counts[often == often.max()].tolist()]


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_finished_backbone_is_taken_from_disk_bit_for_bit(tmp_path):
    run, said = staged(tmp_path)
    tower, outcome = run.tower()
    assert not outcome.reused and len(outcome.losses) == 6

    again, said = staged(tmp_path)
    copy, reused = again.tower()
    assert reused.reused and reused.losses == outcome.losses and "taken from" in said[0]
    assert_same(states(tower), states(copy))

    other, said = staged(tmp_path, seed=1)
    assert not other.tower()[1].reused


@pytest.mark.parametrize("damage", ["truncated", "text", "flipped", "foreign"])
def test_an_unusable_file_is_named_and_the_stage_trained_again(tmp_path, damage):
    run, _ = staged(tmp_path)
    tower, _ = run.tower()
    [path] = (tmp_path / "checkpoints").glob("tower-*")
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "flipped":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        staged(tmp_path / "other", seed=5)[0].tower()
        [foreign] = (tmp_path / "other" / "checkpoints").glob("tower-*")
        shutil.copy(foreign, path)
    again, said = staged(tmp_path)
    copy, outcome = again.tower()
    assert not outcome.reused
    reason = {"flipped": "digest", "foreign": "another configuration"}.get(damage, "no readable")
    assert str(path) in said[0] and reason in said[0] and "trained again" in said[0]
    assert_same(states(tower), states(copy))
    assert staged(tmp_path)[0].tower()[1].reused
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_file_of_other_shapes_leaves_the_module_alone(tmp_path):
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)
    checkpoints.save(tmp_path / "a.safetensors", large, ["weight"], "key", {"losses": []})
    before = states(small)
    for names, reason in ((["weight"], "shape"), (["bias"], "other names")):
        with pytest.raises(checkpoints.Unusable, match=reason):
            checkpoints.load(tmp_path / "a.safetensors", small, names, "key")
    assert_same(before, states(small))


def test_continuing_after_an_interruption_gives_the_uninterrupted_run(tmp_path, monkeypatch):
    def whole(folder, reuse, drawn=0):
        run, _ = staged(folder, reuse=reuse)
        model = run.unaligned(run.tower()[0], run.llm()[0])
        run.align(model)
        model = run.with_lora(model)
        torch.rand(drawn)  # what others draw in between changes nothing
        run.tune(model)
        return model

    expected = whole(tmp_path / "straight", "backbones")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StagedRun, "tune", interrupt)
        whole(tmp_path / "broken", "backbones")
    assert len(list((tmp_path / "broken" / "checkpoints").iterdir())) == 3
    assert_same(states(expected), states(whole(tmp_path / "broken", "all", drawn=3)))
    required, _ = staged(tmp_path / "broken", reuse="required")
    assert_same(states(expected), states(required.finished_model()))
    with pytest.raises(UserError, match="first"):
        staged(tmp_path / "empty", reuse="required")[0].tower()


def test_learning_rate_warms_up_and_falls_to_zero():
    stage = dataclasses.replace(RECIPE.stages[0], steps=100, warmup=0.1, lr=1.0)
    rates = [learning_rate(stage, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3


# -- kernels beside stock peft -----------------------------------------------------------------------------------------


def test_worst_difference_sees_half_a_gradient_and_nan():
    expected = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1e-6, 0.0])}
    assert kernels.worst_difference(expected, expected)[1] == 0
    assert kernels.worst_difference(expected, {**expected, "b": expected["b"] / 2}) == ("b", 0.5)
    name, worst = kernels.worst_difference(expected, {**expected, "a": torch.tensor([1.0, float("nan")])})
    assert name == "a" and worst != worst
    silent = {"a": torch.zeros(2)}
    assert kernels.worst_difference(silent, {"a": torch.ones(2)})[1] == float("inf")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with all four stages of a few steps; LoRA's B is made large enough to matter."""
    folder = tmp_path_factory.mktemp("finished")
    run, _ = staged(folder)
    model = run.finished_model()
    [path] = (folder / "checkpoints").glob("tune-*")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.1)
    facts = {"losses": [1.0, 1.0], "ms_per_step": 1.0, "device": "cpu"}
    checkpoints.save(path, model, names, run._key(run.recipe.stages[-1]), facts)
    return folder


@pytest.mark.interpreter
def test_kernels_agree_with_stock_peft_and_a_broken_kernel_does_not(finished, device, monkeypatch):
    run, _ = staged(finished, reuse="required", device=device)
    backend = "triton"
    result = kernels.compare(run, 1, backend)
    assert result["agree"], result
    assert result["stock"]["kernels"] == {} and sum(result["ours"]["kernels"].values()) >= 14 * 3
    assert result["ours"]["launches"] < result["stock"]["launches"]
    assert result["ours"]["saved_bytes"] <= result["stock"]["saved_bytes"]
    assert result["ours"]["saved_bytes_dropout"] < result["stock"]["saved_bytes_dropout"]
    table = report.kernel_table(json.loads(json.dumps(result)))
    assert "within" in table and (report.NOT_MEASURED in table) == (device == "cpu")

    kernel = vlkernels.lora_linear.kernels["triton"]
    exact = kernel.backward

    def without_half_of_db(*arguments, **options):
        return {name: g / 2 if name == "b" else g for name, g in exact(*arguments, **options).items()}

    monkeypatch.setattr(kernel, "backward", without_half_of_db)
    broken = kernels.compare(run, 1, backend)
    assert not broken["agree"] and "lora_B" in broken["gradient"]
    assert "NOT within" in report.kernel_table(broken)


# -- the command -------------------------------------------------------------------------------------------------------


def test_bad_flags_and_folders_get_a_sentence(tmp_path, capsys, monkeypatch):
    for flags in (["--seed", "x"], ["--seed", "-1"], ["--backend", "tpu"], ["--samples", "2"]):
        with pytest.raises(SystemExit) as stop:
            main(["demo", "--out", str(tmp_path / "out"), *flags])
        assert stop.value.code == 2
    assert not (tmp_path / "out").exists()
    occupied = tmp_path / "file"
    occupied.write_text("")
    capsys.readouterr()
    assert main(["demo", "--out", str(occupied)]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not torch.cuda.is_available():
        assert main(["demo", "--out", str(tmp_path / "out"), "--backend", "triton"]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
    assert main(["kernels-check", "--checkpoint", str(tmp_path)]) == 2
    assert "holds no finished demo" in capsys.readouterr().err
    monkeypatch.setattr(demo, "NEEDS", ("transformers", "no_such_package"))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "no_such_package" in capsys.readouterr().err


def test_ctrl_c_is_quiet_and_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "QUICK", TINY)
    monkeypatch.setattr(StagedRun, "llm", interrupt)
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 130
    assert "--resume" in capsys.readouterr().err
    assert len(list((tmp_path / "checkpoints").glob("tower-*"))) == 1
    assert len(log.read(tmp_path / "metrics.jsonl")) >= 6


def test_demo_reports_and_fails_where_the_kernels_disagree(tmp_path, capsys, monkeypatch):
    side = {"loss": 1.0, "saved_bytes": 1, "saved_bytes_dropout": 2, "launches": 3, "kernels": {"k": 1}, "ms": None}
    check = {"stock": side, "ours": side, "samples": 1, "tokens": 2, "dropout": 0.05, "device": "cpu"}
    check |= {"loss_difference": 0.0, "gradient_difference": 0.5, "gradient": "w", "tolerance": 1e-4, "report": ""}
    monkeypatch.setattr(demo, "QUICK", TINY)
    monkeypatch.setattr(
        kernels, "in_subprocess", lambda *_: {**check, "interpreted": True, "agree": False}, raising=True
    )
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count("it is a ") == 3 and "NOT within" in out and "swapped Linear x 14" in out

    rows = log.read(tmp_path / "metrics.jsonl")
    steps = [row["stage"] for row in rows if "step" in row]
    assert steps == ["tower"] * 6 + ["llm"] * 2 + ["align"] + ["tune"] * 2
    assert all(row["loss"] > 0 and row["ms"] > 0 and row["lr"] > 0 for row in rows if "step" in row)
    text = (tmp_path / "report.txt").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    labels = [row["label"] for row in results["rows"]]
    assert len(labels) == 8 and all(label in text for label in labels)
    logged = [row["name"] for row in rows if row.get("event") == "accuracy" and "digit" in row]
    assert logged == [row["name"] for row in results["rows"]] and len(set(logged)) == 8
    for row in results["rows"]:
        assert set(row["scores"]) == {q.name for q in data.QUESTIONS} | {"all"}
        assert all(0 <= score <= 1 for score in row["scores"].values())
    panels = report.loss_plot(results["stages"]).axes
    assert [panel.lines[0].get_ydata().tolist() for panel in panels] == [s["losses"] for s in results["stages"]]
    bars = report.accuracy_plot(results["rows"]).axes[0].patches
    assert [bar.get_width() for bar in bars] == [100 * row["scores"]["all"] for row in results["rows"]]
    for name in ("loss.png", "accuracy.png"):
        picture = imread(tmp_path / name)
        assert picture.shape[0] > 300 and picture.shape[1] > 800 and len(np.unique(picture.reshape(-1, 4), axis=0)) > 50

    monkeypatch.setattr(kernels, "in_subprocess", lambda *_: {"failed": "it did not start"})
    assert main(["demo", "--quick", "--out", str(tmp_path), "--resume"]) == 1
    out = capsys.readouterr().out
    assert "it did not start" in out and out.count("taken from") == 4


def test_digits_are_drawn_with_ink_dark():
    image = torch.full((1, 8, 8), -1.0)
    image[0, 2, 3] = 1
    lines = report.ascii_image(image)
    assert len(lines) == 8 and all(len(line) == 16 for line in lines)
    assert lines[2] == " " * 6 + "@@" + " " * 8 and "".join(lines).count("@") == 2


@pytest.mark.slow
def test_quick_demo_from_end_to_end(tmp_path):
    command = [sys.executable, "-m", "models", "demo", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["kernels"]["agree"] and sum(results["kernels"]["ours"]["kernels"].values()) > 0
    assert len([row for row in log.read(tmp_path / "metrics.jsonl") if "step" in row]) == sum(
        stage.steps for stage in RECIPE.shortened(demo.QUICK).stages
    )
    assert "held-out accuracy, %" in done.stdout and "Kernels beside stock peft" in done.stdout


# -- the other projector -----------------------------------------------------------------------------------------------


def test_a_linear_projector_is_a_recipe_of_its_own(tmp_path):
    """LLaVA 1.0's projector: one linear between tower and LLM, trained alone in stage 1; unknown ones are named."""
    recipe = demo.chosen_recipe(False, "linear").shortened(TINY)
    run = StagedRun(recipe, tmp_path, say=lambda text: None)
    model = run.unaligned(run.tower()[0], run.llm()[0])
    assert type(model.model.multi_modal_projector).__name__ == "LlavaProjector"
    before = states(model)
    outcome = run.align(model)
    changed = {name for name, p in states(model).items() if not torch.equal(p, before[name])}
    assert changed == {"model.multi_modal_projector.weight", "model.multi_modal_projector.bias"}
    assert outcome.trainable == 64 * 64 + 64
    wrong = StagedRun(recipe.with_integrator("qformer"), tmp_path, say=lambda text: None)
    with pytest.raises(UserError, match="'qformer'; known: linear, mlp2x_gelu, c_abstractor"):
        wrong.unaligned(wrong.tower()[0], wrong.llm()[0])


def test_a_convolutional_abstractor_is_tuned_alone(tmp_path, on_the_reference):
    """Single-stage tuning of a C-Abstractor: all of its parameters learn, and none of tower or LLM."""
    recipe = demo.chosen_recipe(False, "c-abstractor").shortened(TINY)
    run = StagedRun(recipe, tmp_path, say=lambda text: None)
    model = run.unaligned(run.tower()[0], run.llm()[0])
    before = states(model)
    outcome = run.align(model)
    changed = {name for name, p in states(model).items() if not torch.equal(p, before[name])}
    projector = model.model.multi_modal_projector
    assert changed == {f"model.multi_modal_projector.{name}" for name, _ in projector.named_parameters()}
    assert outcome.trainable == sum(p.numel() for p in projector.parameters())
