"""Accuracy of answers on the held-out digits, and the figures that they are held against."""

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data.digits import IGNORE, IMAGE_TOKENS, QUESTIONS, DigitsQA, prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = dict[str, float]  # question name to share of right answers; "all" is their mean


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether greedy decoding gives the whole answer: (B, L, V) and (B, L) to (B,) booleans.

    With the right answer fed in, token t is the greedy choice wherever t-1 was right, so all tokens being right here
    and greedy decoding giving this answer are one and the same.
    """
    guesses, expected = logits[:, :-1].argmax(-1), labels[:, 1:]
    return ((guesses == expected) | (expected == IGNORE)).all(-1)


@torch.no_grad()
def accuracy(model: nn.Module, qa: DigitsQA, images: Tensor | None) -> Scores:
    """Share of held-out questions answered right; `images` (n, 1, 8, 8) for the held-out digits, None: text only."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    digits = qa.held_out.digits
    scores = {}
    for q, question in enumerate(QUESTIONS):
        batch = qa.collate(digits, torch.full_like(digits, q), images).inputs(device)
        labels = batch.pop("labels")
        scores[question.name] = right(model(**batch).logits, labels).float().mean().item()
    model.train(was_training)
    return _with_mean(scores)


@torch.no_grad()
def classifier_accuracy(classifier: nn.Module, qa: DigitsQA) -> float:
    """Share of held-out digits that the pretrained tower's own head names right."""
    device = next(classifier.parameters()).device
    guesses = classifier(qa.held_out.images.to(device)).argmax(-1).cpu()
    return (guesses == qa.held_out.digits).float().mean().item()


def chance() -> Scores:
    """Guessing evenly among the answers of each question."""
    return _with_mean({question.name: 1 / len(question.answers) for question in QUESTIONS})


def majority(qa: DigitsQA) -> Scores:
    """Always giving the answer that is most frequent in training: the best one can do without looking."""
    scores = {}
    for question in QUESTIONS:
        [(answer, _)] = Counter(question.answer(d) for d in qa.train.digits.tolist()).most_common(1)
        hits = [question.answer(d) == answer for d in qa.held_out.digits.tolist()]
        scores[question.name] = sum(hits) / len(hits)
    return _with_mean(scores)


@torch.no_grad()
def generate(model: "PreTrainedModel", qa: DigitsQA, image: Tensor) -> list[str]:
    """The model's own words for each question about one image (1, 8, 8)."""
    device = next(model.parameters()).device
    said = []
    for question in QUESTIONS:
        text = prompt(question, "<image>" * IMAGE_TOKENS)
        inputs = qa.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(device)
        out = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            pixel_values=image[None].to(device),
            max_new_tokens=3,
            do_sample=False,
        )
        said.append(qa.tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
    return said


def _with_mean(scores: Scores) -> Scores:
    return {**scores, "all": sum(scores.values()) / len(scores)}
