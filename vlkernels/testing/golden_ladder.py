"""Goldens of ladder side tuning: hyper-parameters -> transformers' T5 with a ladder."""

from __future__ import annotations

from torch import Tensor, nn

from ..integrations.ladder import add_ladder
from .golden_builders import Builder, GoldenError, Named, Run

# what the files' names call upstream's switches
_SWITCHES = {
    "enc_side": "encoder_layers", "dec_side": "decoder_layers", "add_residual_after": "add_residual_after",
    "gate_T": "gate_T", "gate_alpha": "gate_alpha", "use_gate": "gate", "gate": "gate", "pool": "pool",
    "side_downsample_pool": "pool", "add_bias_sampling": "bias",
}  # fmt: skip
_T5 = ("vocab", "d", "d_kv", "ff", "heads", "layers", "reduction", "src_lens")


def _t5(hp: Named, **options) -> nn.Module:
    try:
        from transformers import T5Config, T5ForConditionalGeneration
    except ImportError as error:
        raise GoldenError(f"transformers is not installed: {error}") from error
    for name, switch in _SWITCHES.items():
        if name in hp and hp[name] is not None:
            options[switch] = hp[name]
    gate = options.get("gate", "learned")
    options["gate"] = "learned" if gate == "learnable" else "schedule" if "schedule" in gate else gate
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=hp["vocab"], d_model=hp["d"], d_kv=hp["d_kv"], d_ff=hp["ff"], num_heads=hp["heads"],
            num_layers=hp["layers"], num_decoder_layers=hp.get("decoder_layers", hp["layers"]),
            relative_attention_num_buckets=hp.get("buckets", 8), relative_attention_max_distance=128,
            feed_forward_proj="relu", decoder_start_token_id=0, pad_token_id=0, tie_word_embeddings=True,
        )
    )  # fmt: skip
    return add_ladder(model, hp["reduction"], init="random", **options)


def _run(module: nn.Module, inputs: Named) -> dict[str, Tensor]:
    image = {"vis_feats", "boxes", "vis_attention_mask"} & inputs.keys()
    encoded = module.encoder(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **{name: inputs[name] for name in image}
    )
    found = module(
        encoder_outputs=encoded,
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=inputs["decoder_input_ids"],
        vis_attention_mask=inputs.get("vis_attention_mask"),
    )
    return {
        "enc_backbone": encoded.last_hidden_state,
        "enc_side": encoded["last_side_hidden_state"],
        "logits": found.logits,
    }


def _text(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(*_T5, *_SWITCHES, "buckets", "decoder_layers")
    return _t5(hp, upstream_text_quirks=True), _run


def _vision(hp: Named) -> tuple[nn.Module, Run]:
    hp.only(*_T5, *_SWITCHES, "buckets", "decoder_layers", "feat_dim", "n_images", "N", "vis_lens")
    return _t5(hp, visual={"feat_dim": hp["feat_dim"], "n_images": hp.get("n_images", 2)}), _run


BUILDERS: dict[str, Builder] = {"ladder.t5": Builder(_text), "ladder.vlt5": Builder(_vision)}
