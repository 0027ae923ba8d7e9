"""Writes the goldens `lst_*__own.safetensors` of this folder by running ylsung/Ladder-Side-Tuning (commit 1798e82):

    python tests/goldens/make_ladder.py CHECKOUT

where transformers 4.2.1 can be imported. All parameters are random; the schedule's gates too.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

TEXT = {"vocab": 13, "d": 8, "d_kv": 4, "ff": 12, "heads": 2, "layers": 3, "reduction": 2, "B": 2, "S": 5, "T": 4,
        "src_lens": [5, 3]}  # fmt: skip
CASES = {
    "lst_t5_drop_after__own": TEXT
    | {"enc_side": [1, 2], "dec_side": [0, 2], "add_residual_after": True, "gate_T": 1.0},
    "lst_vlt5_schedule_drop__own": TEXT
    | {"feat_dim": 3, "N": 3, "vis_lens": [3, 1], "use_gate": "schedule", "enc_side": [1], "dec_side": [0, 1]},
}
SEEDS = {"lst_t5_drop_after__own": 2, "lst_vlt5_schedule_drop__own": 3}
OFF = (
    "use_adapter", "use_compacter", "use_lradapter", "use_hyperformer", "use_lora", "add_adapter_cross_attn",
    "downsample", "oneddownsample", "sparse_sample", "use_lm_head_adapter",
)  # fmt: skip


def config(hp: dict):
    from side_transformers import SideConfig
    from transformers import T5Config

    made = T5Config(
        vocab_size=hp["vocab"], d_model=hp["d"], d_kv=hp["d_kv"], d_ff=hp["ff"], num_heads=hp["heads"],
        num_layers=hp["layers"], relative_attention_num_buckets=8, dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    none = dict.fromkeys(("adapter_config", "lora_config", "encoder_prompt_config", "decoder_prompt_config"))
    visual = {"feat_dim": hp.get("feat_dim", 1), "pos_dim": 4, "n_images": 2, "n_boxes": hp.get("N", 1),
              "individual_vis_layer_norm": True, "use_vis_layer_norm": True, "use_vis_order_embedding": True,
              "additional_visual_embedding_layers": 0}  # fmt: skip
    for name, value in {**none, **visual, **dict.fromkeys(OFF, False)}.items():
        setattr(made, name, value)
    made.side_config = side = SideConfig()
    side.task_reduction_factor, side.use_gate = hp["reduction"], hp.get("use_gate", "learnable")
    side.encoder_side_layers, side.decoder_side_layers = hp.get("enc_side"), hp.get("dec_side")
    side.add_residual_after, side.gate_T = hp.get("add_residual_after", False), hp.get("gate_T", 0.1)
    return made


def fill(model: torch.nn.Module, g: torch.Generator) -> None:
    """Random values whose attentions are neither flat nor saturated."""
    for name, p in model.named_parameters():
        wide = p.dim() < 2 or "relative" in name or "order" in name
        p.data = torch.randn(p.shape, generator=g) * (1.0 if wide else p.shape[-1] ** -0.5) + ("norm.weight" in name)
        p.data *= 0.1 if "gate" in name else 0.7 if ".q." in name or ".k." in name else 1.0
        p.requires_grad_("side" in name or ("visual_embedding" in name and "obj_order" not in name))
    for name, b in model.named_buffers():
        if "side_gate" in name:
            b.copy_(torch.rand(1, generator=g))
    model.lm_head.weight = model.shared.weight


def main(checkout: str) -> None:
    sys.path.insert(0, str(Path(checkout) / "VL-T5" / "src"))
    from modeling_t5 import VLT5
    from my_transformers.modeling_t5 import T5ForConditionalGeneration

    def mask(lens: list, n: int) -> torch.Tensor:
        return (torch.arange(n) < torch.tensor(lens)[:, None]).long()

    for name, hp in CASES.items():
        torch.manual_seed(SEEDS[name])
        g = torch.Generator().manual_seed(SEEDS[name])
        image = "feat_dim" in hp
        model = (VLT5 if image else T5ForConditionalGeneration)(config(hp)).eval()
        fill(model, g)
        B, N = hp["B"], hp.get("N", 0)
        ins = {
            "input_ids": torch.randint(1, hp["vocab"], (B, hp["S"]), generator=g),
            "attention_mask": mask(hp["src_lens"], hp["S"]),
            "decoder_input_ids": torch.randint(1, hp["vocab"], (B, hp["T"]), generator=g),
        }
        seen = {}
        if image:
            seen = {"vis_attention_mask": mask(hp["vis_lens"], N)}
            ins["vis_feats"] = torch.randn(B, N, hp["feat_dim"], generator=g)
            ins["boxes"] = torch.rand(B, N, 4, generator=g)
            ins |= seen
        encoded = model.encoder(
            input_ids=ins["input_ids"], attention_mask=ins["attention_mask"], return_dict=True,
            **(seen | {"vis_inputs": (ins["vis_feats"], ins["boxes"])} if image else {}),
        )  # fmt: skip
        found = model(
            encoder_outputs=encoded, attention_mask=ins["attention_mask"], return_dict=True,
            decoder_input_ids=ins["decoder_input_ids"], **seen,
        )  # fmt: skip
        outs = {"enc_backbone": encoded.last_hidden_state, "enc_side": encoded.last_side_hidden_state,
                "logits": found.logits}  # fmt: skip
        cots = {k: torch.randn(v.shape, generator=g) for k, v in outs.items() if k != "enc_backbone"}
        sum((outs[k] * c).sum() for k, c in cots.items()).backward()
        kinds = {"in": ins, "out": outs, "cot": cots, "param": model.state_dict(),
                 "grad_param": {k: p.grad for k, p in model.named_parameters() if p.grad is not None}}  # fmt: skip
        tensors = {
            f"{kind}.{k}": v.detach().clone().contiguous() for kind, some in kinds.items() for k, v in some.items()
        }
        save_file(
            tensors, Path(__file__).with_name(f"{name}.safetensors"),
            {"module": "ladder.vlt5" if image else "ladder.t5", "hyperparameters": json.dumps(hp), "kind": "lst",
             "set": "own", "dtype": "float32", "upstream": "ylsung/Ladder-Side-Tuning", "transformers": "4.2.1"},
        )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
