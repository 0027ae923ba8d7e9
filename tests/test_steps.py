"""The steps of whole models that a GPU is to time, at a 64th of their sizes: all of it runs, both versions agree."""

import json

import pytest
import torch

from benchmarks import layer, steps, tables


@pytest.mark.parametrize("name", steps.STEPS)
def test_both_versions_are_the_same_model(name, on_the_reference):
    """The same loss and gradients from the same seed, but for what bf16 rounds, and one for everything that is trained.

    BLIP-2 draws its negatives: its gradients are compared in its own tests."""
    losses, trained, gradients = [], [], []
    for swapped in (False, True):
        step = steps.STEPS[name](swapped, "cpu", 64, 0.0)
        torch.manual_seed(1)
        loss = step.loss()
        loss.backward()
        losses.append(float(loss.detach()))
        trained.append({n for n, p in step.model.named_parameters() if p.requires_grad})
        without = {n for n, p in step.model.named_parameters() if p.requires_grad and p.grad is None}
        assert not without, without
        gradients.append(torch.cat([p.grad.float().flatten() for p in step.model.parameters() if p.requires_grad]))
    assert trained[0] == trained[1]
    assert abs(losses[0] - losses[1]) <= 2**-6 * abs(losses[0])
    if name != "blip2":
        assert (gradients[0] - gradients[1]).norm() <= 0.1 * gradients[0].norm()


def test_records_and_table(tmp_path, on_the_reference):
    path = tmp_path / "steps.json"
    assert steps.main(["--only", "flamingo", "--shrink", "64", "--minutes", "0.001", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    stock, ours = content["steps"]
    assert [stock["version"], ours["version"]] == list(steps.VERSIONS) and content["run"]["shrink"] == 64
    assert ours["of_unswapped"] == ours["ms"] / stock["ms"] and ours["profile"] and stock["tokens"] == ours["tokens"]
    lines = tables.step_lines(tmp_path)
    assert len(lines) == 6 and "flamingo | swapped" in lines[3] and content["run"]["commit"] in lines[-1]
    assert tables.step_lines(tmp_path / "none") == [tables.NOT_MEASURED]


def test_running_out_of_memory_is_recorded(monkeypatch):
    """And the next step is measured all the same."""

    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setitem(steps.STEPS, "llava", full)
    figure = steps.measure("llava", "swapped", "cpu")
    assert figure.failure.startswith("out of memory: CUDA out of memory") and figure.ms is None
    assert "out of memory" in steps.line(figure)


def test_unknown_steps_are_named(capsys):
    with pytest.raises(SystemExit):
        steps.main(["--only", "gpt"])
    assert "--only names gpt; accepted: llava, flamingo, blip2" in capsys.readouterr().err


def test_the_layers_clock():
    """The timing of the Llama layer, which only a GPU run asks for."""
    assert layer.timed(layer.plain("cpu", 32), 8, 0.01) > 0
