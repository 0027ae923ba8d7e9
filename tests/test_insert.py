"""insert and remove: the base model at step 0, its state dict, generation, checkpointing, copies, peft, saving."""

import copy
import io

import pytest
import torch
from insert_models import (
    ANSWER,
    ENCODER_DECODERS,
    FAMILIES,
    IDS,
    PAIRS,
    close,
    inserted,
    integrator,
    logits,
    model,
    set_batch,
    set_neutral,
    still,
    stir,
    words_of,
)

import vlkernels
from vlkernels.testing import meter

pytestmark = pytest.mark.usefixtures("on_the_reference")
each = pytest.mark.parametrize("system, family", PAIRS)


def state(m):
    return {k: (v.clone(), v.data_ptr()) for k, v in m.state_dict().items()}


@each
@torch.no_grad()
def test_step_0_and_back(system, family):
    """The base model bit for bit after insert; its state dict kept; removed, nothing is left."""
    m = model(family)
    base, before = logits(m, family), state(m)
    classes = [type(x) for x in m.modules()]
    report = vlkernels.insert(m, integrator(system))
    assert report and len(report) == len(report.inserted) and all(p in str(report) for p in report.inserted)
    set_neutral(m, system, family)
    assert torch.equal(logits(m, family), base)
    after = state(m)
    assert all(torch.equal(after[k][0], v) and after[k][1] == ptr for k, (v, ptr) in before.items())
    assert all("vlkernels_" in k for k in after.keys() - before.keys())
    trained = [n for n, p in m.named_parameters() if p.requires_grad]
    assert trained and all("vlkernels_" in n for n in trained)
    stir(m)
    set_batch(m, system, family)
    assert not torch.equal(logits(m, family)[:, -6:], base[:, -6:])
    assert vlkernels.remove(m) >= len(report)
    now = state(m)
    assert list(now) == list(before) and all(torch.equal(now[k][0], v) for k, (v, _) in before.items())
    assert [type(x) for x in m.modules()] == classes and torch.equal(logits(m, family), base)
    assert all(p.requires_grad for p in m.parameters())
    assert not any("vlkernels" in k for x in m.modules() for k in x.__dict__)


def gradients(m, media, locations, labels):
    """Two passes with media of their own before one backward, and nothing set any more when it runs."""
    m.zero_grad()
    media = media.detach().requires_grad_()
    loss = 0.0
    for factor, flipped in ((1.0, locations), (2.0, locations.flip(0))):
        m.vlkernels.set_media(media * factor, flipped)
        loss = loss + m(**labels).loss
    m.vlkernels.clear()
    loss.backward()
    return [media.grad] + [p.grad.clone() for p in m.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(family, reentrant):
    """Recomputed layers read the media of their own pass, also where it is no longer set."""
    m = still(inserted("flamingo", family))
    stir(m)
    labels = {"labels": ANSWER} if family in ENCODER_DECODERS else {"labels": IDS}
    locations = torch.zeros(2, labels["labels"].shape[1], dtype=torch.bool)
    locations[0, 1] = locations[1, 3] = True
    media, words = torch.randn(2, 2, 3, 20), words_of(family, **labels)
    plain = gradients(m, media, locations, words)
    calls = []
    m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        m.enable_input_require_grads()
    block = next(x for n, x in m.named_modules() if n.endswith("vlkernels_gated"))
    block.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(m, media, locations, words)
    # once more in backward: the inserted block is recomputed with its layer
    assert len(calls) == 4 and len(found) == len(plain)
    for a, b in zip(found, plain, strict=True):
        assert close(a, b)


@each
def test_checkpointing_of_each(system, family):
    m = still(inserted(system, family))
    stir(m)

    def step():
        set_batch(m, system, family)
        torch.manual_seed(5)
        m.zero_grad()
        logits(m, family).square().mean().backward()
        return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

    plain = step()
    m.gradient_checkpointing_enable({"use_reentrant": False})
    found = step()
    assert plain and plain.keys() == found.keys() and all("vlkernels_" in n for n in plain)
    unused = [n for n, p in m.named_parameters() if p.requires_grad and n not in plain]
    # a vision layer that no layer takes; adapters of another task
    assert all("epalm" in n or ".adapters.a." in n for n in unused), unused
    for n, g in plain.items():
        assert close(found[n], g), n


@pytest.mark.parametrize("system, family", [("memvp", "llama"), ("epalm", "opt"), ("flamingo", "llama")])
def test_a_graph_for_each_pass(system, family):
    """Two backward passes after one set_media: what layers share is computed in each pass, also after one without."""
    m = inserted(system, family)
    stir(m)
    set_batch(m, system, family)
    with torch.no_grad():
        logits(m, family)
    found = []
    for _ in range(2):
        m.zero_grad()
        logits(m, family).square().mean().backward()
        found.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
    # of eP-ALM's linears one is of a vision layer that no layer here takes
    assert len(found[0]) >= sum(p.requires_grad for p in m.parameters()) - 2 * (system == "epalm")
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("system, family", [p for p in PAIRS if p[1] in ("llama", "bart") or p[0] == "flamingo"])
@torch.no_grad()
def test_copies(system, family):
    """deepcopy and pickle give models of their own that compute the same."""
    m = inserted(system, family)
    stir(m)
    set_batch(m, system, family)
    want = logits(m, family)
    held = io.BytesIO()
    torch.save(m, held)
    held.seek(0)
    for twin in (copy.deepcopy(m), torch.load(held, weights_only=False)):
        assert twin.vlkernels is not m.vlkernels and not twin.vlkernels.given.batches
        set_batch(twin, system, family)
        assert torch.equal(logits(twin, family), want)
        vlkernels.remove(twin)
    assert torch.equal(logits(m, family), want)


@pytest.mark.parametrize("system", ["flamingo", "llama_adapter", "cogvlm", "memvp"])
@torch.no_grad()
def test_compile(system):
    """The whole model is one graph."""
    torch._dynamo.reset()
    m = inserted(system, "llama")
    stir(m)
    set_batch(m, system, "llama")
    want = m(IDS, use_cache=False).logits
    found = torch.compile(m, backend="aot_eager", fullgraph=True)(IDS, use_cache=False).logits
    assert close(found, want)


@pytest.mark.parametrize("system", ["flamingo", "llama_adapter", "cogvlm"])
@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_peft(system, first):
    """LoRA before and after insert: both train, both act, and each saves its own."""
    peft = pytest.importorskip("peft")
    m = model("llama")
    targets = dict(target_modules=["q_proj", "o_proj", "down_proj"], exclude_modules=r".*vlkernels_.*")
    config = peft.LoraConfig(r=2, init_lora_weights=False, **targets)
    if first:
        m = peft.get_peft_model(m, config)
        vlkernels.insert(m, integrator(system))
    else:
        vlkernels.insert(m, integrator(system))
        m = peft.get_peft_model(m, config)
        assert not any(p.requires_grad for n, p in m.named_parameters() if "vlkernels_" in n)
        assert vlkernels.train_inserted(m) > 0
    trained = [n for n, p in m.named_parameters() if p.requires_grad]
    assert any("lora_A" in n for n in trained) and any("vlkernels_" in n for n in trained)
    assert all("lora_" in n or "vlkernels_" in n for n in trained)
    set_batch(m, system, "llama")
    at_start = m(IDS).logits
    with m.disable_adapter():
        assert torch.equal(m(IDS).logits, model("llama")(IDS).logits)
    stir(m)
    both = m(IDS).logits
    with m.disable_adapter():
        alone = m(IDS).logits
    assert not torch.equal(both, at_start) and not torch.equal(both, alone)
    saved = vlkernels.inserted_state_dict(m)
    assert not any("lora" in n or "base_model" in n or "base_layer" in n for n in saved)
    other = inserted(system, "llama")
    vlkernels.load_inserted(other, saved)
    set_batch(other, system, "llama")
    assert torch.equal(other(IDS).logits, alone)
    vlkernels.remove(m)
    assert any(p.requires_grad for n, p in m.named_parameters() if "lora_" in n)


@each
@torch.no_grad()
def test_save_and_load(system, family, tmp_path):
    """Only what is trained, from one model into another with the same base."""
    m = inserted(system, family)
    stir(m)
    set_batch(m, system, family)
    want = logits(m, family)
    vlkernels.save_inserted(m, tmp_path / "a.safetensors")
    names = vlkernels.inserted_state_dict(m)
    assert names and all("vlkernels_" in n for n in names)
    other = inserted(system, family)
    assert sorted(vlkernels.load_inserted(other, tmp_path / "a.safetensors")) == sorted(names)
    set_batch(other, system, family)
    assert torch.equal(logits(other, family), want)


def test_trained_base_parameters_are_saved():
    m = inserted("flamingo", "llama")
    m.model.embed_tokens.weight.requires_grad_(True)
    saved = vlkernels.inserted_state_dict(m)
    assert "model.embed_tokens.weight" in saved and "model.layers.0.mlp.up_proj.weight" not in saved
    saved = {n: t + 1 for n, t in saved.items()}
    other = inserted("flamingo", "llama")
    vlkernels.load_inserted(other, saved)
    assert torch.equal(other.model.embed_tokens.weight, saved["model.embed_tokens.weight"])


def test_two_of_them():
    """Several integrators in one model, taken out one by one."""
    m = model("llama")
    base = m(IDS).logits
    vlkernels.insert(m, integrator("flamingo"))
    vlkernels.insert(m, integrator("flamingo", name="second", every=3))
    vlkernels.insert(m, integrator("adaption_prompt"))
    set_batch(m, "flamingo", "llama")
    assert torch.equal(m(IDS).logits, base)
    assert all(p.requires_grad == ("vlkernels_" in n) for n, p in m.named_parameters())
    stir(m)
    changed = m(IDS).logits
    assert vlkernels.remove(m, "second") == 1 and not torch.equal(m(IDS).logits, changed)
    assert not any(p.requires_grad for n, p in m.named_parameters() if "vlkernels_" not in n)
    vlkernels.remove(m)
    assert torch.equal(m(IDS).logits, base)


def test_freeze_is_a_choice():
    m = model("opt")
    m.lm_head.weight.requires_grad_(False)
    vlkernels.insert(m, integrator("flamingo"), freeze=False)
    assert m.model.decoder.layers[0].fc1.weight.requires_grad
    vlkernels.remove(m)
    vlkernels.insert(m, integrator("flamingo"), layers=[0, 2], dtype=torch.float64)
    assert m.model.decoder.layers[2].vlkernels_gated.attn_gate.dtype == torch.float64
    vlkernels.remove(m)
    assert not m.lm_head.weight.requires_grad and m.model.decoder.layers[0].fc1.weight.requires_grad


@torch.no_grad()
def test_inside_another_model():
    """The language model of a vision-language model is found, and its outputs are recorded as before."""
    m = torch.nn.ModuleDict({"tower": torch.nn.Linear(3, 3), "llm": model("llama", "eager")})
    want = m["llm"](IDS, output_attentions=True, output_hidden_states=True)
    report = vlkernels.insert(m, integrator("flamingo"), layers=1)
    assert report.inserted == ["llm.model.layers.1.vlkernels_gated"]
    set_batch(m, "flamingo", "llama")
    found = m["llm"](IDS, output_attentions=True, output_hidden_states=True)
    for a, b in zip(found.attentions + found.hidden_states, want.attentions + want.hidden_states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="runs in the interpreter")
@pytest.mark.parametrize("system, kernel", [
    ("flamingo", "media_cross_attention_fwd_kernel"), ("llama_adapter", "prefix_attention"),
    ("bottleneck", "bottleneck_adapter"), ("lavin", "bottleneck_adapter"), ("mplug_owl2", "modality_linear"),
])  # fmt: skip
@torch.no_grad()
def test_kernels_run(system, kernel):
    """On kernels, too, step 0 is the base model bit for bit; and what they compute is the reference's."""
    m = inserted(system, "llama")
    base = model("llama")(IDS).logits
    if system == "mplug_owl2":
        m.vlkernels.set_modality(torch.zeros_like(IDS))
    else:
        set_batch(m, system, "llama")
    with vlkernels.use_backend("triton"):
        assert torch.equal(m(IDS).logits, base)
    stir(m)
    set_batch(m, system, "llama")
    want = m(IDS).logits
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        found = m(IDS).logits
    assert close(found, want) and any(name.startswith(kernel) for name in counts), list(counts)


@pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="runs in the interpreter")
@torch.no_grad()
def test_swap_after_insert():
    """LoRA on the base, blocks inserted, and both on kernels; what was swapped is in the report."""
    peft = pytest.importorskip("peft")
    m = peft.get_peft_model(model("llama"), peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    vlkernels.insert(m, integrator("flamingo"))
    vlkernels.insert(m, integrator("bottleneck"))
    stir(m)
    set_batch(m, "flamingo", "llama")
    want = m(IDS).logits
    report = vlkernels.swap(m)
    assert len(report) >= 3 and not any("vlkernels_" in path for path in report.swapped)
    with vlkernels.use_backend("triton"), meter.launches() as counts:
        found = m(IDS).logits
    assert counts["media_cross_attention_fwd_kernel"] and any("lora" in name for name in counts)
    assert close(found, want)
    vlkernels.unswap(m)
    vlkernels.remove(m)


@torch.no_grad()
def test_peft_prefix():
    """The rows of peft's prefix tuning are no tokens of the text: media stand where they stood."""
    peft = pytest.importorskip("peft")
    m = peft.get_peft_model(model("llama"), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    vlkernels.insert(m, integrator("flamingo"))
    stir(m)
    set_batch(m, "flamingo", "llama")
    block, times = next(x for n, x in m.named_modules() if n.endswith("vlkernels_gated")), []
    block.register_forward_pre_hook(lambda _, args, words: times.append(words["context"].mask.span), with_kwargs=True)
    m(IDS)
    m(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    # one medium from token 1 on, the second from token 4 on
    assert all(t[0, :, 1].tolist() == [0, 1, 1, 1, 2, 2, 2] for t in times) and len(times) == 2


@pytest.mark.parametrize("system, family", [(s, "llama") for s in ("flamingo", "llama_adapter", "memvp", "bottleneck",
                                            "lavin")] + [("flamingo", "mamba"), ("parallel", "deberta")])  # fmt: skip
@pytest.mark.parametrize("base, new", [(torch.bfloat16, torch.float32), (torch.float16, None)])
def test_dtypes(system, family, base, new):
    """New parameters of the base's dtype, or float32 ones over it; the residual stream keeps its own."""
    m = model(family).to(base)
    want = logits(m, family)
    vlkernels.insert(m, integrator(system), dtype=new)
    trained = [p for n, p in m.named_parameters() if "vlkernels_" in n]
    assert all(p.dtype == (new or base) for p in trained)
    if system != "memvp":
        set_neutral(m, system, family)
    found = logits(m, family)
    assert found.dtype == want.dtype and torch.equal(found, want)
    stir(m)
    logits(m, family).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in trained if p.grad is not None) and any(
        p.grad is not None for p in trained
    )
