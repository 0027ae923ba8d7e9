"""Inserted models that generate: with a cache and without, by beams, behind padding, and step by step."""

import pytest
import torch
import transformers
from insert_models import IDS, PAIRS, close, inserted, integrator, model, set_batch, stir, words_of

import vlkernels

pytestmark = pytest.mark.usefixtures("on_the_reference")


@pytest.mark.parametrize("system, family", [(s, f) for s, f in PAIRS if f != "deberta"])
@torch.no_grad()
def test_generate(system, family):
    """With and without a cache, and by beams, the same text."""
    m = inserted(system, family)
    stir(m)
    set_batch(m, system, family)
    words = words_of(family, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    whole = m.generate(**words, use_cache=False)
    assert torch.equal(m.generate(**words, use_cache=True), whole)
    if family in ("llama", "t5", "mamba"):
        beams = dict(words, num_beams=2)
        assert torch.equal(m.generate(**beams, use_cache=True), m.generate(**beams, use_cache=False))


@pytest.mark.parametrize("system, family", [p for p in PAIRS if p[1] in ("llama", "opt", "gpt2", "gptj", "mamba")])
@torch.no_grad()
def test_cached_step(system, family):
    """The logits of one more token behind a cache are those of the whole text, which is longer than what was set."""
    m = model(family)
    # behind the last layer that gets a token, position 0 has seen all of the text, and a longer one differently
    vlkernels.insert(m, integrator(system, **({"end": 3} if system == "epalm" else {})))
    stir(m)
    set_batch(m, system, family)
    more = torch.tensor([[41], [42]])
    name = "cache_params" if family == "mamba" else "past_key_values"
    cache = getattr(m(IDS, use_cache=True), name)
    step = m(more, use_cache=True, **{name: cache}).logits
    assert close(step[:, -1], m(torch.cat((IDS, more), 1), use_cache=False).logits[:, -1])


@pytest.mark.parametrize("system, family", [(s, "llama") for s in ("flamingo", "llama_adapter", "mplug_owl2", "lavin")]
                         + [("epalm", "opt")])  # fmt: skip
@torch.no_grad()
def test_static_cache(system, family):
    m = inserted(system, family)
    stir(m)
    set_batch(m, system, family)
    words = words_of(family, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    want = m.generate(**words)
    # eP-ALM's token needs room, too
    cache = transformers.StaticCache(config=m.config, max_cache_len=12)
    assert torch.equal(m.generate(**words, past_key_values=cache), want)


@pytest.mark.parametrize("system, family", [("flamingo", "llama"), ("idefics", "gpt2"), ("mplug_owl2", "llama")])
@torch.no_grad()
def test_padding_on_the_left(system, family):
    """Locations and masks are of the padded text."""
    m = inserted(system, family)
    stir(m)
    mask = torch.tensor([[0, 1, 0, 0, 1, 0, 0]])
    media = torch.randn(1, 2, 3, 20)
    found = []
    for pad in (0, 3):
        before = torch.zeros(1, pad, dtype=torch.long)
        marks, ids, seen = (torch.cat((before, t), 1) for t in (mask, IDS[:1], torch.ones_like(mask)))
        if system == "mplug_owl2":
            m.vlkernels.set_modality(marks)
        else:
            m.vlkernels.set_media(media, marks)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        found.append(m(ids, attention_mask=seen, position_ids=positions).logits[:, pad:])
    assert close(found[1], found[0])


def test_media_of_beams_are_their_sample():
    """A batch with each sample twice is what beams are, and gives each sample's logits twice."""
    m = inserted("flamingo", "llama")
    stir(m)
    set_batch(m, "flamingo", "llama")
    with torch.no_grad():
        one, two = m(IDS).logits, m(IDS.repeat_interleave(2, 0)).logits
    assert close(two, one.repeat_interleave(2, 0))
