"""Question answering over scikit-learn's 1,797 handwritten digits.

Shapes: B batch, L text tokens (with the 16 image placeholders where there is an image), images (B, 1, 8, 8).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_OUT = 360
SPLIT_SEED = 0
IMAGE_TOKENS = 16
IGNORE = -100  # the label that transformers' loss leaves out

YES_NO = ("yes", "no")
NUMBERS = tuple(str(n) for n in range(11))
LOOPS = (0, 6, 8, 9)  # a 4 is written open in most of this set


@dataclass(frozen=True)
class Question:
    """One question type: a short name for tables, the words, and what may be answered."""

    name: str
    text: str
    answers: tuple[str, ...]

    def answer(self, digit: int) -> str:
        """The right answer for a digit between 0 and 9."""
        if not 0 <= digit <= 9:
            raise ValueError(f"digit must lie between 0 and 9, got {digit}")
        if self.name == "digit":
            return str(digit)
        if self.name == "next":
            return str(digit + 1)
        true = {"even": digit % 2 == 0, "above 4": digit > 4, "loop": digit in LOOPS}[self.name]
        return YES_NO[0] if true else YES_NO[1]


QUESTIONS = (
    Question("digit", "Which digit is this?", NUMBERS[:10]),
    Question("even", "Is it even?", YES_NO),
    Question("above 4", "Is it larger than 4?", YES_NO),
    Question("next", "What comes after it?", NUMBERS[1:]),
    Question("loop", "Has it a closed loop?", YES_NO),
)


@dataclass(frozen=True)
class Split:
    """images (n, 1, 8, 8) in [-1, 1], -1 is paper and +1 is ink; digits (n,)."""

    images: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.digits)


def load() -> tuple[Split, Split]:
    """(train, held out): 1,437 and 360 digits, the same for every seed, each digit in its share of both."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    train, held = train_test_split(
        range(len(bunch.target)), test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=bunch.target
    )
    # pixels are counts from 0 to 16
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    digits = torch.tensor(bunch.target)
    return Split(images[train], digits[train]), Split(images[held], digits[held])


def blank(images: Tensor) -> Tensor:
    """Empty sheets of paper in the shape of `images`."""
    return torch.full_like(images, -1.0)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move, turn and stretch each image a little: (B, 1, 8, 8) to the same."""
    B = len(images)
    turn, stretch, dx, dy = (torch.rand(4, B, generator=generator) * 2 - 1).unbind()
    # about 11 degrees, 10 % and one pixel (0.25 in grid units) at most
    angle, scale = turn * math.pi / 16, 1 + 0.1 * stretch
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, 0.25 * dx, sin, cos, 0.25 * dy], dim=1).view(B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # +1: what enters from outside is paper


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A word-level tokenizer over the words of the prompts and answers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Whitespace()
    texts = [prompt(question) for question in QUESTIONS] + [" ".join(NUMBERS + YES_NO)]
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text.replace("<s>", ""))})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def prompt(question: Question, subject: str = "") -> str:
    """The text before the answer, in the turns of Vicuna and LLaVA; `subject` stands where LLaVA has its image."""
    return f"<s>USER: {subject + ' ' if subject else ''}{question.text} ASSISTANT:"


@dataclass(frozen=True)
class Batch:
    """What a causal LM is trained on; `pixel_values` is None where there is text only."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L)
    labels: Tensor  # (B, L), IGNORE where nothing is to be learnt
    pixel_values: Tensor | None  # (B, 1, 8, 8)

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in vars(self).items() if value is not None}


class DigitsQA:
    """Turns (digit, question) pairs into token tensors, and deals out batches."""

    def __init__(self) -> None:
        self.train, self.held_out = load()
        self.tokenizer = make_tokenizer()
        self._known: dict[str, list[int]] = {}  # some hundred texts in all; tokenizing them again costs 4 ms a batch

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def collate(
        self, digits: Tensor, questions: Tensor, images: Tensor | None = None, named: Tensor | None = None
    ) -> Batch:
        """Examples as tensors, with labels on the answer and its end-of-turn token only.

        digits (B,); questions (B,) are positions in QUESTIONS; images (B, 1, 8, 8) or None for text only; named (B,):
        how often the text itself names the digit in the image's place, by default not at all.
        """
        if len(digits) == 0:
            raise ValueError("a batch needs at least one example")
        if images is not None and named is not None:
            raise ValueError("give images or named, not both")
        rows, labels = [], []
        for i, (digit, q) in enumerate(zip(digits.tolist(), questions.tolist(), strict=True)):
            if images is not None:
                subject = "<image>" * IMAGE_TOKENS
            else:
                subject = "" if named is None else " ".join([str(digit)] * int(named[i]))
            asked = self._ids(prompt(QUESTIONS[q], subject))
            answered = self._ids(QUESTIONS[q].answer(digit) + "</s>")
            rows.append(asked + answered)
            labels.append([IGNORE] * len(asked) + answered)
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        return Batch(
            input_ids=torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
            labels=torch.tensor([row + [IGNORE] * (length - len(row)) for row in labels]),
            pixel_values=images,
        )

    def questions(self, size: int, seed: int, augmented: bool) -> Iterator[Batch]:
        """Endless batches over all pairs of a training image and a question, shuffled anew in every epoch."""
        for index, question, generator in self._dealt(len(QUESTIONS), size, seed):
            pixels = self.train.images[index]
            if augmented:
                pixels = augment(pixels, generator)
            yield self.collate(self.train.digits[index], question, pixels)

    def texts(self, size: int, seed: int) -> Iterator[Batch]:
        """The same pairs without images, with labels on every token, as pretraining has them.

        Half of the texts name no digit, so that the LLM learns what is answered most; a quarter name it once and a
        quarter as often as an image has tokens, so that it learns what follows from a digit and where to look for it.
        """
        lengths = torch.tensor([0, 0, 1, IMAGE_TOKENS])
        for index, question, generator in self._dealt(len(QUESTIONS), size, seed):
            named = lengths[torch.randint(len(lengths), index.shape, generator=generator)]
            batch = self.collate(self.train.digits[index], question, named=named)
            yield replace(batch, labels=batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE))

    def labelled_images(self, size: int, seed: int, augmented: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (images (B, 1, 8, 8), digits (B,)) for the classifier."""
        for index, _, generator in self._dealt(1, size, seed):
            pixels = self.train.images[index]
            yield augment(pixels, generator) if augmented else pixels, self.train.digits[index]

    def _dealt(self, kinds: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train) * kinds, generator=generator)
            for chunk in order.split(size):
                yield chunk // kinds, chunk % kinds, generator
