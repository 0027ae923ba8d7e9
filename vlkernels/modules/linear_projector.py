"""Projectors of one linear (survey eq. 18) with what stands around it.

LinearProjector runs norm, position and the write into the text sequence as one op; the others are upstream's, and plain
PyTorch, for there is nothing to fuse.

All take `device` and `dtype`; x has the parameters' dtype, or any under autocast. Errors are ValueErrors that name the
argument, what it got and what is accepted. Parameter names are upstream's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._shuffle import shuffled
from ..ops.linear_projector import linear_projector
from ._children import child_problem
from .projector import check_channels


class LinearProjector(nn.Module):
    """y = [norm](shuffle(x)) Wᵀ + b [+ position], and its rows written into a text sequence: one op.

    x (..., C), with a shuffle s (B, h, w, C) -> y (..., N), or (B, h w / s², N). Given `into` (..., N) and `index`,
    int64 with one row number for each row of y, the result is `into` with those rows replaced, as transformers'
    masked_scatter makes it; `into` is not written to. `placeholder_rows` finds the index without waiting for a GPU.

    C = vision_hidden_size, N = text_hidden_size. Parameters `linear.weight` (N, C s²), `linear.bias`, with a norm
    ("layer" or "rms", over the C s² channels) `norm.weight` and, of "layer", `norm.bias`, with n_positions
    `position.weight` (n_positions, N): row t of each image gets row t, or row `position_index` (one for each row of y).
    Initialised as nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding.

    Errors: index and position_index are looked at on a CPU only; on a GPU a row outside of `into` is a device-side
    assertion, and of rows named twice one stays.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        *,
        bias: bool = True,
        norm: str = "none",
        eps: float = 1e-5,
        shuffle: int = 1,
        n_positions: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if norm not in ("none", "layer", "rms"):
            raise ValueError(f"norm is {norm!r}; accepted: none, layer, rms")
        if shuffle < 1 or n_positions < 0:
            raise ValueError(f"shuffle is {shuffle}, n_positions {n_positions}; accepted: 1 or more, 0 or more")
        made = {"device": device, "dtype": dtype}
        self.vision_hidden_size, self.shuffle = vision_hidden_size, shuffle
        channels = vision_hidden_size * shuffle**2
        kinds = {"none": None, "layer": nn.LayerNorm, "rms": nn.RMSNorm}
        self.norm = None if norm == "none" else kinds[norm](channels, eps=eps, **made)
        self.linear = nn.Linear(channels, text_hidden_size, bias=bias, **made)
        self.position = nn.Embedding(n_positions, text_hidden_size, **made) if n_positions else None

    def forward(
        self,
        x: Tensor,
        into: Tensor | None = None,
        index: Tensor | None = None,
        position_index: Tensor | None = None,
    ) -> Tensor:
        check_channels("x", x, self.vision_hidden_size)
        if (into is None) != (index is None):
            raise ValueError("into and index belong together; accepted: both or neither")
        if position_index is not None:
            if self.position is None:
                raise ValueError("position_index is given; accepted with n_positions only")
            _check_values("position_index", position_index, self.position.num_embeddings)
        if isinstance(into, Tensor):
            _check_values("index", index, into.shape[:-1].numel(), distinct=True)
        norm, linear, position = self.norm, self.linear, self.position
        kinds = ((norm, (nn.LayerNorm, nn.RMSNorm)), (linear, (nn.Linear,)), (position, (nn.Embedding,)))
        if any(child is not None and child_problem("child", child, kind) for child, kind in kinds) or (
            # such a table gives other rows or gradients than it holds
            position is not None and (position.padding_idx, position.max_norm) != (None, None)
        ):
            return self._plain(x, into, index, position_index)
        options = {}
        if norm is not None:
            options = {"norm_weight": norm.weight, "norm_bias": getattr(norm, "bias", None), "eps": norm.eps}
            options["norm"] = "layer" if type(norm) is nn.LayerNorm else "rms"
        return linear_projector(
            x, linear.weight, linear.bias, position=None if position is None else position.weight,
            position_index=position_index, into=into, index=index, shuffle=self.shuffle, **options,
        )  # fmt: skip

    def _plain(self, x: Tensor, into: Tensor | None, index: Tensor | None, position_index: Tensor | None) -> Tensor:
        """The same through the children, which do more than their weights say."""
        x = shuffled(x, self.shuffle)
        y = self.linear(x if self.norm is None else self.norm(x))
        if self.position is not None:
            if position_index is None:
                position_index = torch.arange(y.shape[-2], device=y.device).expand(y.shape[:-1])
            y = y + self.position(position_index.reshape(y.shape[:-1])).to(y.dtype)
        if into is None:
            return y
        rows = y.flatten(0, -2).to(into.dtype)
        return into.flatten(0, -2).index_copy(0, index.flatten(), rows).view(into.shape)

    def extra_repr(self) -> str:
        return f"shuffle={self.shuffle}"


def placeholder_rows(mask: Tensor, count: int) -> Tensor:
    """Where the image tokens go: the row numbers of the first `count` True entries of mask (any shape), int64 (count,).

    `count` is the features' number of rows, which the host knows, so that nothing waits for a GPU (nonzero would). With
    fewer True entries the rest is -1, which writing into a sequence refuses; True entries past `count` are ignored.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; accepted: bool, such as input_ids == image_token_id")
    mask = mask.flatten()
    order = mask.cumsum(0) - 1
    # all that is not wanted goes to one place more, cut off at the end
    order = torch.where(mask & (order < count), order, count)
    rows = torch.full((count + 1,), -1, dtype=torch.int64, device=mask.device)
    return rows.scatter(0, order, torch.arange(mask.numel(), device=mask.device))[:count]


def _check_values(name: str, index: Tensor, below: int, distinct: bool = False) -> None:
    """On a CPU, where looking at values waits for nothing; not inside a graph that is being traced."""
    if not isinstance(index, Tensor) or index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if type(index) is not Tensor or index.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(index))
    if low < 0 or high >= below:
        raise ValueError(f"{name} reaches from {low} to {high}; accepted: 0 to {below - 1}")
    if distinct and index.unique().numel() != index.numel():
        raise ValueError(f"{name} names a row twice; accepted: distinct rows")


class ImagePrefix(nn.Module):
    """y = [LN](dropout(proj(x))): the image prefix of Frozen and MAGMA, without its encoder.

    With `image_seq_len` S (Frozen): x (B, C), a pooled feature -> y (B, S, N), `proj.weight` (S N, C). Without (MAGMA):
    x (B, S, C), tokens -> y (B, S, N), `proj.weight` (N, C). C = encoder_out_dim, N = out_dim. `ln` (N; eps 1e-5)
    exists with `layernorm`. dropout acts in training. Initialised as nn.Linear and nn.LayerNorm.

    Source: Aleph-Alpha/magma magma/image_prefix.py (arXiv 2112.05253); Frozen, arXiv 2106.13884.
    """

    def __init__(
        self,
        encoder_out_dim: int,
        out_dim: int,
        *,
        image_seq_len: int | None = None,
        layernorm: bool = False,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is {dropout}; accepted: a probability")
        self.encoder_out_dim, self.image_seq_len, self.dropout = encoder_out_dim, image_seq_len, float(dropout)
        self.proj = nn.Linear(encoder_out_dim, out_dim * (image_seq_len or 1), device=device, dtype=dtype)
        self.ln = nn.LayerNorm(out_dim, device=device, dtype=dtype) if layernorm else None

    def forward(self, x: Tensor) -> Tensor:
        check_channels("x", x, self.encoder_out_dim)
        accepted = "(B, S, C)" if self.image_seq_len is None else "(B, C)"
        if x.dim() != (3 if self.image_seq_len is None else 2):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; accepted with image_seq_len={self.image_seq_len}: {accepted}"
            )
        y = self.proj(x)
        if self.image_seq_len is not None:
            y = y.unflatten(-1, (self.image_seq_len, -1))
        y = F.dropout(y, self.dropout, self.training)
        return y if self.ln is None else self.ln(y)

    def extra_repr(self) -> str:
        return f"image_seq_len={self.image_seq_len}, dropout={self.dropout:g}"


class FromageEmbeddings(nn.Module):
    """FROMAGe's two heads on the vision encoder's pooled output x (B, C), C = vision_hidden_size.

    mode "captioning": visual_embeddings(x) as (B, n, N), N = embedding_dim, n = n_visual_tokens.
    mode "retrieval": visual_fc(x) as (B, 1, S), S = shared_emb_dim. dropout acts on either in training.
    Initialised as nn.Linear. Source: kohjingyu/fromage fromage/models.py; arXiv 2301.13823.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        embedding_dim: int,
        shared_emb_dim: int = 256,
        n_visual_tokens: int = 1,
        *,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is {dropout}; accepted: a probability")
        self.vision_hidden_size, self.n_visual_tokens, self.dropout = (
            vision_hidden_size,
            n_visual_tokens,
            float(dropout),
        )
        made = {"device": device, "dtype": dtype}
        self.visual_embeddings = nn.Linear(vision_hidden_size, embedding_dim * n_visual_tokens, **made)
        self.visual_fc = nn.Linear(vision_hidden_size, shared_emb_dim, **made)

    def forward(self, x: Tensor, mode: str = "captioning") -> Tensor:
        if mode not in ("captioning", "retrieval"):
            raise ValueError(f"mode is {mode!r}; accepted: captioning, retrieval")
        check_channels("x", x, self.vision_hidden_size)
        if x.dim() != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, C), pooled features")
        if mode == "captioning":
            y = self.visual_embeddings(x).unflatten(-1, (self.n_visual_tokens, -1))
        else:
            y = self.visual_fc(x).unsqueeze(1)
        return F.dropout(y, self.dropout, self.training)


class EpalmConnector(nn.Module):
    """eP-ALM: the CLS tokens of the last L vision layers, each through its own linear, or one for all with `shared`.

    y[k] = connector[-(k + 1)](feats[-(k + 1)][:, :1]), k < L = injected_hidden_states: a list of L tensors (B, 1, N),
    the last layer's first. feats: a sequence of at least L hidden states (B, T, C) whose token 0 is CLS, or a tensor
    (layers, B, T, C). C = vis_dim, N = text_dim. Initialised as nn.Linear.
    Source: mshukor/eP-ALM models/connector.py; arXiv 2303.11403.
    """

    def __init__(
        self,
        vis_dim: int,
        text_dim: int,
        injected_hidden_states: int = 1,
        *,
        shared: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if injected_hidden_states < 1:
            raise ValueError(f"injected_hidden_states is {injected_hidden_states}; accepted: 1 or more")
        self.vis_dim, self.injected_hidden_states = vis_dim, injected_hidden_states
        count = 1 if shared else injected_hidden_states
        self.connector = nn.ModuleList(nn.Linear(vis_dim, text_dim, device=device, dtype=dtype) for _ in range(count))

    def forward(self, feats: Sequence[Tensor] | Tensor) -> list[Tensor]:
        L = self.injected_hidden_states
        if len(feats) < L:
            raise ValueError(f"feats holds {len(feats)} hidden states; accepted: at least {L}")
        outputs = []
        for i in range(1, L + 1):
            x = feats[-i]
            check_channels(f"feats[-{i}]", x, self.vis_dim)
            if x.dim() != 3 or x.shape[1] < 1:
                raise ValueError(f"feats[-{i}] has shape {tuple(x.shape)}; accepted: (B, T, C) with CLS as token 0")
            outputs.append(self.connector[0 if len(self.connector) == 1 else -i](x[:, :1]))
        return outputs


class VisualEmbedding(nn.Module):
    """The visual input of VL-T5, VL-Adapter, VL-PET and LST: features, boxes and order, (B, T, C) -> (B, T, N).

        y = RMS(feats W_fᵀ + b_f) + RMS([pos, area] W_pᵀ + b_p) + image[0] + word[V - 1 - t]      individual norms
        y = RMS(feats W_fᵀ + b_f + [pos, area] W_pᵀ + b_p + image[0] + word[V - 1 - t])           otherwise

    pos (B, T, 4) holds (x1, x2, y1, y2), area = (y2 - y1) (x2 - x1). The order of object t is the language model's own
    word table read from its last row: pass that nn.Embedding (V, N) as obj_order_embedding and it is shared. Additional
    layers follow the features' linear: [Linear, ReLU, RMS] with individual norms, else [Linear, ReLU].

    Args:
        feat_dim, d_model: C and N.
        obj_order_embedding: the shared word table; None with use_vis_order_embedding=False.
        n_images: rows of img_order_embedding.
        eps: of the RMSNorms; use_vis_layer_norm=False leaves them out.

    forward's img_order_ids (B or 1, T) default to 0, obj_order_ids to t. Initialised as nn.Linear and nn.Embedding.
    Source: ylsung/VL_adapter VL-T5/src/modeling_t5.py; arXiv 2112.06825.
    """

    def __init__(
        self,
        feat_dim: int,
        d_model: int,
        obj_order_embedding: nn.Embedding | None = None,
        *,
        n_images: int = 2,
        individual_vis_layer_norm: bool = True,
        use_vis_layer_norm: bool = True,
        additional_visual_embedding_layers: int = 0,
        use_vis_order_embedding: bool = True,
        eps: float = 1e-6,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        if use_vis_order_embedding:
            if obj_order_embedding is None or obj_order_embedding.embedding_dim != d_model:
                got = None if obj_order_embedding is None else tuple(obj_order_embedding.weight.shape)
                raise ValueError(
                    f"obj_order_embedding is {got}; accepted: the word table, an nn.Embedding (V, {d_model})"
                )
        elif obj_order_embedding is not None:
            raise ValueError("obj_order_embedding is given with use_vis_order_embedding=False; accepted: None")
        self.feat_dim = feat_dim
        inner_norm = use_vis_layer_norm and individual_vis_layer_norm

        def norm() -> list[nn.Module]:
            return [nn.RMSNorm(d_model, eps=eps, **made)] if inner_norm else []

        feat = [nn.Linear(feat_dim, d_model, **made), *norm()]
        for _ in range(additional_visual_embedding_layers):
            feat += [nn.Linear(d_model, d_model, **made), nn.ReLU(), *norm()]
        self.feat_embedding = nn.Sequential(*feat)
        self.absolute_vis_pos_embedding = nn.Sequential(nn.Linear(5, d_model, **made), *norm())
        self.obj_order_embedding = obj_order_embedding
        self.img_order_embedding = nn.Embedding(n_images, d_model, **made) if use_vis_order_embedding else None
        outer_norm = use_vis_layer_norm and not individual_vis_layer_norm
        self.layer_norm = nn.RMSNorm(d_model, eps=eps, **made) if outer_norm else None

    def forward(
        self,
        feats: Tensor,
        pos: Tensor,
        img_order_ids: Tensor | None = None,
        obj_order_ids: Tensor | None = None,
    ) -> Tensor:
        check_channels("feats", feats, self.feat_dim)
        if feats.dim() != 3:
            raise ValueError(f"feats has shape {tuple(feats.shape)}; accepted: (B, T, C)")
        if tuple(pos.shape) != (*feats.shape[:2], 4):
            raise ValueError(f"pos has shape {tuple(pos.shape)}; accepted: (B, T, 4) = {(*feats.shape[:2], 4)}")
        x1, x2, y1, y2 = pos.unbind(-1)
        boxes = torch.cat((pos, ((y2 - y1) * (x2 - x1)).unsqueeze(-1)), -1)
        y = self.feat_embedding(feats) + self.absolute_vis_pos_embedding(boxes)
        if self.obj_order_embedding is not None:
            y = y + self._order(feats, img_order_ids, obj_order_ids)
        return y if self.layer_norm is None else self.layer_norm(y)

    def _order(self, feats: Tensor, img_order_ids: Tensor | None, obj_order_ids: Tensor | None) -> Tensor:
        rows, T = self.obj_order_embedding.num_embeddings, feats.shape[1]
        if obj_order_ids is None:
            if rows < T:
                raise ValueError(f"feats has {T} tokens; accepted: at most the {rows} rows of obj_order_embedding")
            obj_order_ids = torch.arange(T, device=feats.device).unsqueeze(0)
        if img_order_ids is None:
            img_order_ids = torch.zeros(1, 1, dtype=torch.long, device=feats.device)
        return self.img_order_embedding(img_order_ids) + self.obj_order_embedding(rows - 1 - obj_order_ids)
