"""Assemble a vision-LLM from its trained parts, and add LoRA to it."""

import warnings
from typing import TYPE_CHECKING

from torch import nn

from vlkernels.modules import CAbstractor, LlavaProjector

from .backbones.tiny import TowerClassifier, configuration, token_ids
from .data.digits import IMAGE_TOKENS
from .errors import UserError
from .recipe import Lora, Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerFast


def llava(
    recipe: Recipe, tower: TowerClassifier, llm: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast"
) -> "LlavaForConditionalGeneration":
    """transformers' LLaVA with copies of the tower's and the LLM's weights and a fresh projector."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=configuration(recipe.vision),
        text_config=configuration(recipe.llm, **token_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=recipe.feature_layer,
    )
    model = LlavaForConditionalGeneration(config)
    (integrator,) = recipe.integrators
    if integrator == "linear":
        # LLaVA 1.0's projector; transformers' class is the two-layer one of LLaVA-1.5
        model.model.multi_modal_projector = LlavaProjector(
            "linear", config.vision_config.hidden_size, config.text_config.hidden_size
        )
    elif integrator == "c_abstractor":
        # Honeybee's: convolutions over the map on both sides of the pooling, which here keeps the number of tokens
        width = config.vision_config.hidden_size
        model.model.multi_modal_projector = CAbstractor(
            IMAGE_TOKENS,
            width,
            config.text_config.hidden_size,
            hidden_size=width,
            depth=1,
            num_query_tokens=IMAGE_TOKENS,
        )
    elif integrator != "mlp2x_gelu":
        known = "linear, mlp2x_gelu, c_abstractor"
        raise UserError(f"recipe {recipe.name} names the integrator {integrator!r}; known: {known}")
    model.model.vision_tower.load_state_dict(tower.tower.state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def with_lora(model: nn.Module, lora: Lora) -> "PeftModel":
    """peft's model around `model`, with fresh LoRA layers on the recipe's targets."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target)
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads an attribute that transformers 5.23 has renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"LoRA target {lora.target!r} fits no module: {error}") from error
