"""The two stand-ins for pretrained backbones, as transformers builds them from a configuration.

Shapes: B batch, N visual tokens, C vision width.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..recipe import Backbone

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


def configuration(backbone: Backbone, **extra: object) -> "PreTrainedConfig":
    """The transformers configuration that a recipe's backbone stands for."""
    from transformers import AutoConfig

    return AutoConfig.for_model(backbone.family, **backbone.config, **extra)


def token_ids(tokenizer: "PreTrainedTokenizerFast") -> dict[str, int]:
    """What an LLM's configuration has to know about a tokenizer."""
    return dict(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


class TowerClassifier(nn.Module):
    """A vision tower under a linear classifier of the mean of its patch tokens.

    CLIP classifies by its CLS token; in a tower this small the patch tokens, which are what a projector gets, then
    say too little about the image.
    """

    def __init__(self, backbone: Backbone, feature_layer: int, classes: int) -> None:
        super().__init__()
        from transformers import AutoModel

        config = configuration(backbone)
        self.feature_layer = feature_layer
        self.tower = AutoModel.from_config(config)
        self.head = nn.Linear(config.hidden_size, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 1, H, W) to logits (B, classes)."""
        layers = self.tower(pixel_values, output_hidden_states=True).hidden_states
        # (B, 1 + N, C), CLS first
        return self.head(layers[self.feature_layer][:, 1:].mean(1))


def language_model(backbone: Backbone, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """A causal LM with fresh weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(configuration(backbone, **token_ids(tokenizer)))
