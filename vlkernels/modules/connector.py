"""Connectors around a Q-Former: vision features -> a few tokens of the language model's width.

Dims: B batch, T frames, N visual tokens, C vision width, M queries, D the Q-Former's width, W the language model's.
Errors are ValueErrors that name the argument, what it got and what is accepted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .projector import check_channels
from .qformer import QFormer, QFormerOutput


class QFormerConnector(nn.Module):
    """y = projection(QFormer(query_tokens, ln_vision(x))): x (B, N, C) -> (B, M, W).

    BLIP-2, InstructBLIP (with `input_ids`), MiniGPT-4, and X-LLM's image and video: frames x (B, T, N, C)
    -> (B, T M, W), each frame by itself, the tokens of all frames one after the other.

    Parameters `query_tokens` (1, M, D), `qformer.*`, `projection.weight` (W, D), `projection.bias` (without a
    text_hidden_size the states are returned as they are) and `ln_vision` (C; eps 1e-5), which runs inside the product
    that makes the image's keys and values. Initialised as LAVIS: query_tokens normal with deviation 0.02.

    Args:
        qformer: a QFormer; X-LLM shares one, and the ln_vision, between connectors.
        text_hidden_size: W, or None. n_query: M.
        ln_vision: whether there is one (LAVIS: yes; transformers: it is the vision model's), or the module itself.

    Source: salesforce/LAVIS, Vision-CAIR/MiniGPT-4, phellonchen/X-LLM; arXiv 2301.12597, 2304.10592, 2305.04160.
    """

    def __init__(
        self,
        qformer: QFormer,
        text_hidden_size: int | None,
        n_query: int = 32,
        *,
        ln_vision: bool | nn.Module = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        if isinstance(ln_vision, bool):
            ln_vision = nn.LayerNorm(qformer.encoder_hidden_size, **made) if ln_vision else None
        self.ln_vision = ln_vision
        self.query_tokens = nn.Parameter(torch.empty(1, n_query, qformer.hidden_size, **made))
        nn.init.normal_(self.query_tokens, std=0.02)
        self.qformer = qformer
        self.projection = None
        if text_hidden_size is not None:
            self.projection = nn.Linear(qformer.hidden_size, text_hidden_size, **made)

    def states(
        self,
        x: Tensor,
        image_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options,
    ) -> QFormerOutput:
        """QFormer.forward of the queries over x (B, N, C), before the projection; options as its own."""
        image = self.qformer.image_kv(x, image_mask, self.ln_vision)
        return self.qformer(self.query_tokens, image, input_ids, attention_mask, **options)

    def forward(
        self,
        x: Tensor,
        image_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if x.dim() not in (3, 4):
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, N, C), or frames (B, T, N, C)")
        if x.dim() == 4 and (image_mask is not None or input_ids is not None):
            raise ValueError("image_mask and input_ids are accepted with x (B, N, C), not with frames")
        frames = x.shape[:-2]
        x = x.flatten(0, 1) if x.dim() == 4 else x
        y = self.states(x, image_mask, input_ids, attention_mask).queries
        y = y if self.projection is None else self.projection(y)
        return y if len(frames) == 1 else y.reshape(frames[0], frames[1] * y.shape[1], y.shape[2])


class ConcatProjector(nn.Module):
    """MiniGPT-v2's path without a Q-Former: y = projection(concat of 4 neighbours of ln_vision(x) without CLS).

    x (B, 1 + N, C) -> (B, N / 4, W): `tokens` consecutive tokens become one. Parameters `ln_vision` (C; eps 1e-5) and
    `projection.weight` (W, 4 C), `projection.bias`; initialised as nn.LayerNorm, nn.Linear.

    Source: Vision-CAIR/MiniGPT-4 minigpt4/models/minigpt4.py (has_qformer=False); arXiv 2310.09478.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        *,
        tokens: int = 4,
        cls: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}; accepted: 1 or more")
        made = {"device": device, "dtype": dtype}
        self.tokens, self.cls = tokens, cls
        self.vision_hidden_size = vision_hidden_size
        self.ln_vision = nn.LayerNorm(vision_hidden_size, **made)
        self.projection = nn.Linear(tokens * vision_hidden_size, text_hidden_size, **made)

    def forward(self, x: Tensor) -> Tensor:
        check_channels("x", x, self.vision_hidden_size)
        if x.dim() != 3 or x.shape[1] < self.cls or (x.shape[1] - self.cls) % self.tokens:
            first = "CLS and " if self.cls else ""
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, N, C), N {first}a multiple of {self.tokens}")
        x = self.ln_vision(x[:, 1:] if self.cls else x)
        return self.projection(x.reshape(x.shape[0], -1, self.tokens * x.shape[2]))

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, cls={self.cls}"


class FrameQFormerConnector(nn.Module):
    """y = projection(QFormer(query_tokens, x + position[t])): x (B, T, n, C), n tokens a frame -> (B, M, W).

    The second half of Video-LLaMA's visual branch, and its audio branch: x (B, T, C), one feature a clip. Parameters
    `position.weight` (max_frames, C), `query_tokens` (1, M, D), `qformer.*`, `projection.*`. C is the Q-Former's
    encoder_hidden_size; upstream's Q-Former has two layers that both cross-attend. Initialised as BERT.

    Source: DAMO-NLP-SG/Video-LLaMA video_llama/models/video_llama.py; arXiv 2306.02858.
    """

    def __init__(
        self,
        qformer: QFormer,
        text_hidden_size: int,
        n_query: int = 32,
        max_frames: int = 32,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.max_frames = max_frames
        self.position = nn.Embedding(max_frames, qformer.encoder_hidden_size, **made)
        self.query_tokens = nn.Parameter(torch.empty(1, n_query, qformer.hidden_size, **made))
        nn.init.normal_(self.query_tokens, std=0.02)
        self.qformer = qformer
        self.projection = nn.Linear(qformer.hidden_size, text_hidden_size, **made)

    def forward(self, x: Tensor) -> Tensor:
        check_channels("x", x, self.qformer.encoder_hidden_size)
        if x.dim() not in (3, 4):
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, T, n, C) or (B, T, C)")
        x = x if x.dim() == 4 else x[:, :, None]
        if x.shape[1] > self.max_frames:
            raise ValueError(f"x has {x.shape[1]} frames; accepted: up to {self.max_frames}, one position each")
        place = self.position(torch.arange(x.shape[1], device=x.device))
        x = (x + place[:, None]).flatten(1, 2)
        return self.projection(self.qformer(self.query_tokens, x).queries)


class VideoLlamaConnector(nn.Module):
    """Video-LLaMA's visual branch: each frame through an image Q-Former, all frames' states through a second one.

        h_t = QFormer(query_tokens, ln_vision(x_t)),   y = video([h_t])           video: FrameQFormerConnector

    x (B, T, N, C) -> (B, M, W), M the video's queries; an image is a video of one frame. Parameters `ln_vision`,
    `query_tokens`, `qformer.*` (upstream freezes these) and `video.*`.

    Source: DAMO-NLP-SG/Video-LLaMA video_llama/models/video_llama.py; arXiv 2306.02858.
    """

    def __init__(
        self,
        qformer: QFormer,
        video_qformer: QFormer,
        text_hidden_size: int,
        n_query: int = 32,
        n_video_query: int = 32,
        max_frames: int = 32,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if video_qformer.encoder_hidden_size != qformer.hidden_size:
            raise ValueError(
                f"video_qformer reads {video_qformer.encoder_hidden_size} channels; accepted: {qformer.hidden_size}, "
                "the width of qformer's states"
            )
        made = {"device": device, "dtype": dtype}
        self.ln_vision = nn.LayerNorm(qformer.encoder_hidden_size, **made)
        self.query_tokens = nn.Parameter(torch.empty(1, n_query, qformer.hidden_size, **made))
        nn.init.normal_(self.query_tokens, std=0.02)
        self.qformer = qformer
        self.video = FrameQFormerConnector(video_qformer, text_hidden_size, n_video_query, max_frames, **made)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, T, N, C)")
        if x.shape[1] > self.video.max_frames:
            raise ValueError(f"x has {x.shape[1]} frames; accepted: up to {self.video.max_frames}, one position each")
        image = self.qformer.image_kv(x.flatten(0, 1), norm=self.ln_vision)
        states = self.qformer(self.query_tokens, image).queries
        return self.video(states.unflatten(0, x.shape[:2]))


class SpeechProjector(nn.Module):
    """y = ReLU(projection(x)): x (..., C) -> (..., W), X-LLM's speech projection and those around its BERT adaptor.

    Parameters `projection.weight` (W, C), `projection.bias`. Source: phellonchen/X-LLM; arXiv 2305.04160.
    """

    def __init__(self, speech_hidden_size: int, out_features: int, *, device=None, dtype=None):
        super().__init__()
        self.projection = nn.Linear(speech_hidden_size, out_features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_channels("x", x, self.projection.in_features)
        return F.relu(self.projection(x))
