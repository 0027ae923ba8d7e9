"""Tiny language models of the survey's families, and what is inserted into them."""

import torch
import transformers

import vlkernels

# the same in all: 32 channels, 4 heads, 50 words
_OPT = dict(vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4)
CONFIGS = {
    "llama": ("Llama", dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)),
    "opt": ("OPT", dict(_OPT, max_position_embeddings=64, word_embed_proj_dim=32)),
    "opt_post_norm": ("OPT", dict(_OPT, max_position_embeddings=64, word_embed_proj_dim=16,
                                  do_layer_norm_before=False)),
    "gpt2": ("GPT2", dict(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1,
                          eos_token_id=2)),
    "gptj": ("GPTJ", dict(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, bos_token_id=1,
                          eos_token_id=2)),
    "t5": ("T5", dict(vocab_size=50, d_model=32, d_kv=6, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0)),
    "bart": ("Bart", dict(vocab_size=50, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
                          decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
                          pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
                          forced_eos_token_id=None)),
    "deberta": ("DebertaV2", dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                  intermediate_size=48, max_position_embeddings=64, relative_attention=True,
                                  pos_att_type=["p2c", "c2p"], position_buckets=8)),
    "mamba": ("Mamba", dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, state_size=4, bos_token_id=1,
                            eos_token_id=2, pad_token_id=0)),
}  # fmt: skip
FAMILIES = tuple(CONFIGS)
_HEADS = {"T5": "ForConditionalGeneration", "Bart": "ForConditionalGeneration", "DebertaV2": "ForMaskedLM",
          "GPT2": "LMHeadModel"}  # fmt: skip
ENCODER_DECODERS = ("t5", "bart")

ATTENTION = ("llama", "opt", "opt_post_norm", "gpt2", "gptj", "t5", "bart")
# system -> (the description's class, its words, the families that it goes into)
SYSTEMS = {
    "flamingo": ("GatedCrossAttention", dict(dim_visual=20, every=2, dim_head=8, heads=2, ff_mult=2), FAMILIES),
    "flamingo_all": ("GatedCrossAttention", dict(dim_visual=20, every=1, dim_head=8, heads=2, ff_mult=2,
                                                 immediate=False), ("llama",)),
    "idefics": ("IdeficsCrossAttention", dict(dim_visual=20, every=2, heads=4, alpha_type="vector",
                                              qk_layer_norms=True), FAMILIES),
    "llama_adapter": ("AdaptivePrefix", dict(rows=3, top=2, visual=True, new_gate=True), ATTENTION),
    "adaption_prompt": ("AdaptivePrefix", dict(rows=3, top=2, gate="scalar"), ATTENTION),
    "memvp": ("MemVP", dict(in_features=20, rows=6, hidden=5), ATTENTION),
    "epalm": ("EpalmTokens", dict(vis_dim=20, tokens=2, start=1, end=2), ("opt", "opt_post_norm", "bart")),
    "bottleneck": ("Adapters", dict(options=dict(reduction=4)), FAMILIES),
    "parallel": ("Adapters", dict(kind="par_bn"), ATTENTION + ("deberta",)),
    "pfeiffer": ("Adapters", dict(kind="seq_bn", options=dict(reduction_factor=4)), ("llama", "bart", "deberta")),
    "houlsby": ("Adapters", dict(kind="double_seq_bn", options=dict(reduction_factor=4)), ("opt_post_norm", "gpt2")),
    "magma": ("Adapters", dict(kind="magma", options=dict(parallel=True), at=("attention", "ffn")), ("gptj", "opt")),
    "vl_adapter": ("Adapters", dict(kind="vl_adapter", options=dict(tasks=("a", "b"), share_down=True)), ("t5",)),
    "compacter": ("Adapters", dict(kind="compacter", options=dict(k=2), shared_rule=True), ("t5", "bart")),
    "hyperformer": ("Adapters", dict(kind="hyperformer", options=dict(task_dim=4, hidden=6, proj_dim=5)), ("bart",)),
    "vl_pet": ("Adapters", dict(kind="vl_pet", options=dict(r=8, heads=2, gate="middleY")), ("bart",)),
    "lavin": ("Adapters", dict(kind="lavin", options=dict(r=4), at=("attention", "ffn")),
              ("llama", "opt", "gpt2", "mamba")),
    "frozenbilm": ("Adapters", dict(kind="frozenbilm"), ("deberta",)),
    "cogvlm": ("VisualExpert", dict(vision_bias=True), ("llama",)),
    "mplug_owl2": ("VisualExpert", dict(kind="mplug_owl2"), ("llama",)),
}  # fmt: skip
# their adapters start small, not at zero
SMALL = ("pfeiffer", "houlsby", "magma", "vl_adapter", "compacter", "hyperformer", "vl_pet", "frozenbilm")
_UP = ("adapter_up", "up_sampler", "multihead_up", "ia3_add", ".up.", "adapter.2.")
PAIRS = [(system, family) for system, (_, _, families) in SYSTEMS.items() for family in families]

IDS = torch.tensor([[5, 7, 9, 11, 13, 15, 17], [6, 8, 10, 12, 14, 16, 18]])
ANSWER = torch.tensor([[21, 22, 23, 24, 25, 26], [31, 32, 33, 34, 35, 36]])


def close(a, b) -> bool:
    """Up to float32's rounding over a few layers, as a share of the largest value."""
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def model(family: str, attention: str = "sdpa"):
    name, words = CONFIGS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**words)
    if family not in ("deberta", "mamba", "gptj"):
        config._attn_implementation = attention
    return getattr(transformers, name + _HEADS.get(name, "ForCausalLM"))(config).eval()


def still(m):
    """In training mode, without anything random."""
    for module in m.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)
    return m.train()


def integrator(system: str, **more):
    name, words, _ = SYSTEMS[system]
    return getattr(vlkernels, name)(**(words | more))


def inserted(system, family, **words):
    m = model(family)
    vlkernels.insert(m, integrator(system), **words)
    return m


def words_of(family: str, **more) -> dict:
    found = {"input_ids": IDS} | more
    return found | ({"decoder_input_ids": ANSWER} if family in ENCODER_DECODERS and "labels" not in found else {})


def logits(m, family: str):
    return m(**words_of(family)).logits


def set_batch(m, system: str, family: str, seed: int = 3) -> None:
    """Media, or a mask, for IDS (ANSWER where that is the decoder's text)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    length = (ANSWER if family in ENCODER_DECODERS else IDS).shape[1]
    kind = SYSTEMS[system][0]
    if kind in ("GatedCrossAttention", "IdeficsCrossAttention"):
        locations = torch.zeros(2, length, dtype=torch.bool)
        locations[0, 1] = locations[0, 4] = locations[1, 3] = True
        m.vlkernels.set_media(drawn(2, 2, 3, 20), locations)
    elif kind == "VisualExpert":
        mask = torch.zeros(2, length, dtype=torch.long)
        mask[0, 1:4] = mask[0, 5:] = 1
        m.vlkernels.set_modality(mask)
    elif kind == "MemVP":
        m.vlkernels.set_media(drawn(2, 4, 20), has_image=torch.tensor([1, 0]))
    elif kind == "EpalmTokens":
        m.vlkernels.set_media(drawn(3, 2, 5, 20))
    elif system == "vl_adapter":
        m.vlkernels.set_task("b")
    elif system == "llama_adapter":
        m.vlkernels.set_media(drawn(2, 1, 32))


def set_neutral(m, system: str, family: str) -> None:
    """Step 0, where the model is the base: MemVP's image and eP-ALM's token are not neutral, nor small adapters."""
    for path, p in m.named_parameters() if system in SMALL else ():
        if "vlkernels_" in path and any(name in path for name in _UP):
            torch.nn.init.zeros_(p)
    if SYSTEMS[system][0] in ("MemVP", "EpalmTokens"):
        m.vlkernels.set_media(None)
    else:
        set_batch(m, system, family)


def stir(m) -> None:
    """Inserted parameters far from their start."""
    torch.manual_seed(7)
    for path, p in m.named_parameters():
        if "vlkernels_" in path:
            torch.nn.init.normal_(p, std=0.4)


class Seen:
    """Inputs and outputs of a model's real modules, by path."""

    def __init__(self, m, paths):
        self.inputs, self.outputs = {}, {}
        for path in paths:
            m.get_submodule(path).register_forward_hook(self.hook(path), with_kwargs=True)

    def hook(self, path):
        def see(module, args, kwargs, y):
            self.inputs[path] = args[0] if args else kwargs["hidden_states"]
            self.outputs[path] = y[0] if isinstance(y, tuple) else y

        return see
