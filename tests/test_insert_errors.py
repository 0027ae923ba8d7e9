"""Bad input of insert and remove, of what a batch sets, and of states: a clear error, and the model is as it was."""

import pytest
import torch
from insert_models import FAMILIES, IDS, PAIRS, SYSTEMS, integrator, logits, model, set_batch

import vlkernels

pytestmark = pytest.mark.usefixtures("on_the_reference")
# gated layers and adapters go everywhere
LIMITED = ("AdaptivePrefix", "MemVP", "EpalmTokens", "VisualExpert")
REFUSED = [(s, f) for s, (kind, _, fs) in SYSTEMS.items() for f in FAMILIES if kind in LIMITED and f not in fs]


def picture(m):
    """All that insert may change: names, values, classes, what trains, attributes of modules."""
    tensors = {n: (t, t._version, t.requires_grad) for n, t in m.state_dict(keep_vars=True).items()}
    modules = [(n, type(x), sorted(x.__dict__), sorted(x._modules)) for n, x in m.named_modules()]
    return {n: (id(t), *rest) for n, (t, *rest) in tensors.items()}, modules


class Unchanged:
    """The model's picture, its batch and its logits before and after."""

    def __init__(self, m, family="llama"):
        self.m, self.family = m, family

    def all(self):
        handle = self.m.__dict__.get("vlkernels")
        with torch.no_grad():
            y = logits(self.m, self.family) if handle is None or handle.given.batches else torch.zeros(())
        return picture(self.m), None if handle is None else (handle.given, sorted(handle.integrators)), y

    def __enter__(self):
        self.before = self.all()

    def __exit__(self, *error):
        after = self.all()
        assert after[:2] == self.before[:2] and torch.equal(after[2], self.before[2])


def with_flamingo(**words):
    m = model("llama")
    vlkernels.insert(m, integrator("flamingo", **words))
    set_batch(m, "flamingo", "llama")
    return m


@pytest.mark.parametrize("layers, error, text", [
    ([0, 3], ValueError, r"\[3\] of it out of range; accepted: different numbers from 0 to 2"),
    (-1, ValueError, "out of range"), ([1, 1], ValueError, "twice"), ([], TypeError, "accepted: a number, or numbers"),
    (["0"], TypeError, "accepted"), ([True], TypeError, "accepted"),
])  # fmt: skip
def test_layers(layers, error, text):
    m = model("llama")
    with Unchanged(m), pytest.raises(error, match=text):
        vlkernels.insert(m, integrator("flamingo"), layers=layers)


def test_twice():
    m = with_flamingo()
    with Unchanged(m), pytest.raises(ValueError, match="GatedCrossAttention is inserted as 'gated' already"):
        vlkernels.insert(m, integrator("flamingo"), layers=[0])
    with Unchanged(m), pytest.raises(ValueError, match="inserted as 'gated' already"):
        vlkernels.insert(m.model, integrator("flamingo"), layers=[0])


def test_unknown_family():
    """Named, with the list of those that are known."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    m = transformers.BertModel(config)
    before = picture(m)
    families = "GPT-2, GPT-J, OPT, Llama, T5, BART, DeBERTa-v2, Mamba"
    with pytest.raises(ValueError, match=rf"BertModel \(model_type bert\) has no layers .* models of {families}"):
        vlkernels.insert(m, integrator("flamingo"))
    assert picture(m) == before


@pytest.mark.parametrize("system, family", REFUSED)
def test_family_that_an_integrator_does_not_go_into(system, family):
    m = model(family)
    name = {"opt_post_norm": "OPT", "gpt2": "GPT-2", "gptj": "GPT-J", "deberta": "DeBERTa-v2"}.get(family, family)
    with Unchanged(m, family), pytest.raises(ValueError, match=f"(?i){name}"):
        vlkernels.insert(m, integrator(system))


@pytest.mark.parametrize("family, words, text", [
    ("deberta", dict(kind="lavin"), "no longer at hand"), ("t5", dict(kind="lavin"), "accepted: decoders"),
    ("mamba", dict(kind="par_bn"), "Mamba's decoder has no ffn"), ("llama", dict(at="cross_attention"), "has no cross"),
    ("t5", dict(kind="vl_pet"), "values 24 wide beside 32 channels"),
])  # fmt: skip
def test_places_without_an_adapter(family, words, text):
    m = model(family)
    with Unchanged(m, family), pytest.raises(ValueError, match=text):
        vlkernels.insert(m, vlkernels.Adapters(**words))


def test_several_models_and_none():
    both = torch.nn.ModuleDict({"a": model("llama"), "b": model("gpt2")})
    before = picture(both)
    with pytest.raises(ValueError, match=r"several language models \(a.model.layers, b.transformer.h\)"):
        vlkernels.insert(both, integrator("flamingo"))
    assert picture(both) == before
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        vlkernels.insert("llama", integrator("flamingo"))
    with pytest.raises(TypeError, match="integrator must be a vlkernels integrator, got type"):
        vlkernels.insert(both["a"], vlkernels.GatedCrossAttention)
    with pytest.raises(ValueError, match="goes into none of the layers"):
        vlkernels.insert(both["a"], integrator("flamingo", every=9))


def test_remove_what_was_never_inserted():
    m = model("llama")
    for call in (vlkernels.remove, vlkernels.train_inserted, vlkernels.inserted_state_dict):
        with Unchanged(m), pytest.raises(ValueError, match="nothing was inserted into this LlamaForCausalLM"):
            call(m)
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        vlkernels.remove(None)
    m = with_flamingo()
    with Unchanged(m), pytest.raises(ValueError, match="nothing is inserted as 'prefix'; accepted: gated"):
        vlkernels.remove(m, "prefix")
    vlkernels.remove(m)
    with Unchanged(m), pytest.raises(ValueError, match="nothing was inserted"):
        vlkernels.remove(m)


LOCATIONS = torch.zeros(2, 7, dtype=torch.bool)
LOCATIONS[:, 1] = True


@pytest.mark.parametrize("media, locations, error, text", [
    (torch.ones(2, 2, 3, 20), LOCATIONS[:1], ValueError, "locations is of 1 samples, media of 2"),
    (torch.ones(2, 2, 3, 20), LOCATIONS.float(), TypeError, "dtype torch.float32; accepted: bool"),
    (torch.ones(2, 2, 3, 20), None, TypeError, "locations must be a torch.Tensor, got NoneType"),
    (torch.ones(2, 3, 20), LOCATIONS, ValueError, r"shape \(2, 3, 20\); accepted: \(B, J, n, C\)"),
    (torch.ones(2, 2, 3, 8), LOCATIONS, ValueError, "the last of 20"),
    (torch.ones(2, 1, 3, 20), torch.ones(2, 7, dtype=torch.long), ValueError, "sample 0 has 7 media tokens, media ho"),
    (None, LOCATIONS, ValueError, "locations has media tokens, media is None"),
])  # fmt: skip
def test_media(media, locations, error, text):
    m = with_flamingo()
    with Unchanged(m), pytest.raises(error, match=text):
        m.vlkernels.set_media(media, locations)


def test_media_of_another_text():
    """Locations of another length, a batch that is no multiple, and none at all, are found when the model is called."""
    m = with_flamingo()
    for ids in (IDS[:, :4], torch.cat((IDS, IDS), 1)):
        with (
            Unchanged(m),
            pytest.raises(ValueError, match=f"of 7 tokens, the text of {ids.shape[1]}; accepted: as man"),
        ):
            m(ids)
    with Unchanged(m), pytest.raises(ValueError, match="media of 2 samples were set, the text has 3"):
        m(torch.cat((IDS, IDS[:1])))
    m.vlkernels.clear()
    with Unchanged(m), pytest.raises(RuntimeError, match="vlkernels_gated: nothing was set; call model.vlkernels.set"):
        m(IDS)


def test_more_media_tokens_are_a_choice():
    m = with_flamingo(strict=False)
    m.vlkernels.set_media(torch.ones(2, 1, 3, 20), torch.ones(2, 7, dtype=torch.bool))
    m(IDS)


@pytest.mark.parametrize("mask, error, text", [
    (torch.full((2, 7), 2), ValueError, "the modality mask holds 2; accepted: 0 and 1"),
    (torch.full((2, 7), -1), ValueError, "holds -1"), (torch.ones(2, 7), TypeError, "accepted: bool, or 0 and 1"),
    (torch.ones(7, dtype=torch.long), ValueError, r"shape \(7,\); accepted: \(B, T\)"),
    ([[0, 1]], TypeError, "must be a torch.Tensor, got list"),
])  # fmt: skip
def test_modality(mask, error, text):
    m = model("llama")
    vlkernels.insert(m, integrator("cogvlm"))
    set_batch(m, "cogvlm", "llama")
    with Unchanged(m), pytest.raises(error, match=text):
        m.vlkernels.set_modality(mask)
    with Unchanged(m), pytest.raises(ValueError, match="modality mask's tokens are of 7 tokens, the text of 4"):
        m(IDS[:, :4])


def test_prefix_longer_than_the_cache():
    transformers = pytest.importorskip("transformers")
    m = model("llama")
    with Unchanged(m), pytest.raises(ValueError, match="a prefix of 64 rows; accepted: as long as .* cache, 32"):
        m.config.max_position_embeddings = 32
        try:
            vlkernels.insert(m, vlkernels.AdaptivePrefix(rows=64))
        finally:
            m.config.max_position_embeddings = 64
    vlkernels.insert(m, vlkernels.AdaptivePrefix(rows=9))
    cache = transformers.StaticCache(config=m.config, max_cache_len=8)
    with pytest.raises(ValueError, match="a prefix of 9 rows is longer than the cache, which holds 8"):
        m(IDS, past_key_values=cache)
    vlkernels.remove(m)
    with pytest.raises(ValueError, match="1 to 64 rows"):
        vlkernels.AdaptivePrefix(rows=65)
    m = model("opt")
    vlkernels.insert(m, integrator("epalm"))
    set_batch(m, "epalm", "opt")
    with pytest.raises(ValueError, match="text of 8 rows with its visual token is longer than the cache, which h"):
        m(IDS, past_key_values=transformers.StaticCache(config=m.config, max_cache_len=7))


@pytest.mark.parametrize("make, text", [
    (lambda v: v.GatedCrossAttention(dim_visual=20, every=0), "every is 0"),
    (lambda v: v.GatedCrossAttention(dim_visual=20, name="a b"), "name is 'a b'"),
    (lambda v: v.GatedCrossAttention(dim_visual=20, stack="left"), "accepted: encoder, decoder, both"),
    (lambda v: v.AdaptivePrefix(gate="row"), "accepted: head, scalar"),
    (lambda v: v.MemVP(in_features=0), "in_features 0"), (lambda v: v.MemVP(in_features=3, stack="both"), "one stack"),
    (lambda v: v.EpalmTokens(vis_dim=3, start=0), "1 <= start < end"),
    (lambda v: v.VisualExpert(kind="vit"), "accepted: cogvlm, mplug_owl2"),
    (lambda v: v.Adapters(kind="lora"), "kind is 'lora'; accepted: bottleneck"),
    (lambda v: v.Adapters(at=("mlp",)), "accepted: some of attention, cross_attention, ffn"),
    (lambda v: v.Adapters(kind="seq_bn", options={"original_ln_after": False}), "original_ln_after is False"),
])  # fmt: skip
def test_descriptions(make, text):
    with pytest.raises(ValueError, match=text):
        make(vlkernels)


def test_what_a_batch_is_not_for():
    m = with_flamingo()
    with Unchanged(m), pytest.raises(ValueError, match="modality: taken by none of gated"):
        m.vlkernels.set_modality(torch.zeros(2, 7, dtype=torch.long))
    with Unchanged(m), pytest.raises(ValueError, match="nothing is inserted as 'x'; accepted: gated"):
        m.vlkernels.set_media(None, name="x")
    with Unchanged(m), pytest.raises(ValueError, match="has_image: taken by none of gated"):
        m.vlkernels.set_media(torch.ones(2, 2, 3, 20), LOCATIONS, has_image=torch.ones(2))


@pytest.mark.parametrize("words, text", [
    (dict(has_image=torch.tensor([1, 2])), "has_image holds 2; accepted: 0 and 1"),
    (dict(has_image=torch.tensor([1])), "has_image is of 1 samples, media of 2"),
    (dict(media=torch.ones(2, 7, 20)), "media has 7 rows of a sample; accepted: up to 6"),
])  # fmt: skip
def test_memory(words, text):
    m = model("llama")
    vlkernels.insert(m, integrator("memvp"))
    set_batch(m, "memvp", "llama")
    with Unchanged(m), pytest.raises(ValueError, match=text):
        m.vlkernels.set_media(**({"media": torch.ones(2, 4, 20)} | words))


def test_classes_that_cannot_change():
    """Swapped modules, instances with a forward of their own, a class that changed since."""
    m = model("llama")
    vlkernels.swap(m, fuse_norms=True, strict=False)
    m.model.layers[1].mlp.forward = m.model.layers[1].mlp.forward
    with Unchanged(m), pytest.raises(ValueError, match="layers.1.mlp: the instance carries a forward of its own"):
        vlkernels.insert(m, integrator("cogvlm"), layers=1)
    m = with_flamingo()
    layer = m.model.layers[1]
    kept = type(layer)
    layer.__class__ = type("FSDPLayer", (kept,), {})
    with Unchanged(m), pytest.raises(ValueError, match="its class changed since insert"):
        vlkernels.remove(m)
    layer.__class__ = kept
    vlkernels.remove(m)


def test_states_of_other_modules(tmp_path):
    m = with_flamingo()
    state = vlkernels.inserted_state_dict(m)
    name = next(iter(state))
    for wrong, text in (
        ({k: v for k, v in state.items() if k != name}, "1 names are missing"),
        (state | {"model.x": torch.ones(1)}, r"1 names fit nothing \(model.x"),
        (state | {name: torch.ones(3, 3)}, r"has shape \(3, 3\), accepted"),
    ):
        with Unchanged(m), pytest.raises(ValueError, match=text):
            vlkernels.load_inserted(m, wrong)
    vlkernels.save_inserted(m, tmp_path / "a.safetensors")
    other = model("llama")
    vlkernels.insert(other, integrator("adaption_prompt"))
    with Unchanged(other), pytest.raises(ValueError, match="the file holds GatedCrossAttention"):
        vlkernels.load_inserted(other, tmp_path / "a.safetensors")


def test_pairs_cover_the_families():
    assert {f for _, f in PAIRS} == set(FAMILIES)
