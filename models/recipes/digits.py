"""LLaVA in miniature: question answering over handwritten digits, trained in the two stages of LLaVA-1.5.

Stage 0 makes the stand-ins for what LLaVA downloads (CLIP and Vicuna); stages 1 and 2 are LLaVA's own.
"""

from ..recipe import Backbone, Lora, Recipe, Stage

RECIPE = Recipe(
    name="digits",
    paper="LLaVA-1.5, arXiv 2310.03744, at toy size",
    # 8x8 grey pixels in 2x2 patches: 16 visual tokens and CLS
    vision=Backbone(
        "clip_vision_model",
        dict(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
        ),
    ),
    feature_layer=-1,  # LLaVA takes the last but one; stage 0 trains this tower's last patch tokens
    llm=Backbone(
        "llama",
        dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
        ),
    ),
    integrators=("mlp2x_gelu",),
    entry="soft prompt",
    stages=(
        Stage(
            "tower",
            "stage 0: tower as a digit classifier",
            part="tower",
            trains=("*",),
            steps=1200,
            batch=64,
            lr=3e-3,
            weight_decay=0.05,
            augment=True,
        ),
        Stage("llm", "stage 0: LLM on the text alone", part="llm", trains=("*",), steps=500, batch=64, lr=3e-3),
        Stage(
            "align",
            "stage 1: projector",
            part="model",
            trains=("*.multi_modal_projector.*",),
            steps=200,
            batch=64,
            lr=3e-3,
            augment=True,
        ),
        Stage(
            "tune",
            "stage 2: projector + LoRA",
            part="model",
            trains=("*.multi_modal_projector.*", "*.lora_A.*", "*.lora_B.*"),
            steps=400,
            batch=64,
            lr=3e-3,
            augment=True,
            # the linear layers of the decoder blocks, as in LLaVA: no lm_head, tower or projector
            lora=Lora(
                r=16,
                alpha=32,
                dropout=0.05,
                target=r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
            ),
        ),
    ),
)
