"""Connectors around a Q-Former, and BLIP-2's first stage, against upstream's steps by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.upstream import lavis_stage1
from vlkernels import use_backend
from vlkernels.integrations.checkpoints import to_ours, to_upstream
from vlkernels.modules import (
    Blip2Stage1,
    ConcatProjector,
    FrameQFormerConnector,
    LoRALinear,
    QFormer,
    QFormerConnector,
    SpeechProjector,
    VideoLlamaConnector,
)
from vlkernels.testing.compare import ulp

B, M, T, N, C, D, H, V = 3, 5, 6, 9, 20, 16, 2, 23


@pytest.fixture(autouse=True)
def _on_the_reference():
    """The kernels run in test_qformer.py and in the goldens."""
    with use_backend("reference"):
        yield


def qformer(width=C, frequency=2, text=False, layers=3, **options):
    words = {"vocab_size": V, "max_position_embeddings": 12, "lm_head": True} if text else {}
    options = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "masked": -10000.0} | options
    return QFormer(D, layers, H, 24, frequency, width, **words, **options)


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "temp":
                continue
            norm = ("norm" in name.lower() or "ln_" in name) and name.endswith("weight")
            parameter.normal_(float(norm), 0.5 if parameter.dim() == 1 else 1.2 * parameter.shape[-1] ** -0.5)
    return module.double()


def close64(a, b):
    """Both in float64: equal but for the order of sums."""
    a, b = a.detach(), b.detach()
    assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape
    assert (a - b).abs().max() <= 2048 * ulp(float(b.abs().max()), torch.float64)


def compare(a, b, *leaves):
    """Results and gradients."""
    close64(a, b)
    dy = torch.randn_like(a)
    ours, theirs = (torch.autograd.grad(t, leaves, dy, retain_graph=True) for t in (a, b))
    for one, other in zip(ours, theirs, strict=True):
        close64(one, other)


def layer_norm(module, x):
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-5)


@pytest.mark.parametrize("level", [0, 1])
def test_image_connector(level):
    """BLIP-2, MiniGPT-4: the vision norm runs inside the product of keys and values."""
    module, x = (
        randomised(QFormerConnector(qformer(level=level), 18, M)),
        torch.randn(B, N, C).double().requires_grad_(),
    )
    seen = torch.ones(B, N, dtype=torch.long)
    seen[1, 4:] = 0
    states = module.qformer(module.query_tokens, layer_norm(module.ln_vision, x), image_mask=seen).queries
    compare(module(x, seen), module.projection(states), x, module.ln_vision.weight, module.ln_vision.bias)


def test_instructblip_connector_takes_text():
    module = randomised(QFormerConnector(qformer(text=True), 18, M, ln_vision=False))
    x, ids = torch.randn(B, N, C).double(), torch.randint(1, V, (B, T))
    assert module.ln_vision is None and QFormerConnector(qformer(), None, M).projection is None
    states = module.qformer(module.query_tokens, x, ids).queries
    compare(module(x, input_ids=ids), module.projection(states), module.query_tokens)
    assert not torch.equal(module(x, input_ids=ids), module(x))


def test_frames_one_by_one():
    """X-LLM's video: the same Q-Former and vision norm with queries of its own, the frames' tokens in a row."""
    image = randomised(QFormerConnector(qformer(), 18, M))
    video = randomised(QFormerConnector(image.qformer, 18, 4, ln_vision=image.ln_vision))
    assert video.ln_vision is image.ln_vision and video.qformer is image.qformer
    x = torch.randn(2, 3, N, C).double().requires_grad_()
    compare(video(x), torch.cat([video(x[:, t]) for t in range(3)], 1), x, video.query_tokens)


def test_concat_projector():
    """MiniGPT-v2: each output token is the projection of four consecutive tokens after the CLS."""
    module, x = randomised(ConcatProjector(C, 18)), torch.randn(B, 13, C).double().requires_grad_()
    n = layer_norm(module.ln_vision, x)
    by_hand = [module.projection(torch.cat([n[:, 1 + 4 * i + j] for j in range(4)], -1)) for i in range(3)]
    compare(module(x), torch.stack(by_hand, 1), x, module.ln_vision.weight)
    with pytest.raises(ValueError, match="N CLS and a multiple of 4"):
        module(x[:, :12])
    assert ConcatProjector(C, 18, cls=False, tokens=3).double()(x[:, :12]).shape == (B, 4, 18)
    with pytest.raises(ValueError, match="N a multiple of 3"):
        ConcatProjector(C, 18, cls=False, tokens=3).double()(x)


def video_llama():
    return randomised(VideoLlamaConnector(qformer(), qformer(D, 1, layers=2), 18, M, 4, max_frames=6))


def test_video_llama():
    module, x = video_llama(), torch.randn(2, 3, N, C).double().requires_grad_()
    frames = [module.qformer(module.query_tokens, layer_norm(module.ln_vision, x[:, t])).queries for t in range(3)]
    states = torch.cat([h + module.video.position.weight[t] for t, h in enumerate(frames)], 1)
    expected = module.video.projection(module.video.qformer(module.video.query_tokens, states).queries)
    compare(module(x), expected, x, module.query_tokens, module.video.query_tokens, module.video.position.weight)
    with pytest.raises(ValueError, match="x has 7 frames; accepted: up to 6"):
        module(torch.randn(2, 7, N, C).double())
    with pytest.raises(ValueError, match=r"accepted: \(B, T, N, C\)"):
        module(x[0])
    with pytest.raises(ValueError, match="video_qformer reads 20 channels; accepted: 16"):
        VideoLlamaConnector(qformer(), qformer(), 18)


def test_video_llama_audio():
    """One feature a clip: as frames of one token."""
    module, x = randomised(FrameQFormerConnector(qformer(C, 1), 18, 3, max_frames=8)), torch.randn(2, 5, C).double()
    close64(module(x), module(x[:, :, None]))
    assert module(x).shape == (2, 3, 18) and not torch.equal(module(x), module(x.flip(1)))
    with pytest.raises(ValueError, match="x has 9 frames; accepted: up to 8"):
        module(torch.randn(2, 9, C).double())


def test_speech():
    module, x = SpeechProjector(7, 5), torch.randn(2, 3, 7)
    assert torch.equal(module(x), F.linear(x, module.projection.weight, module.projection.bias).clamp(min=0))


def test_published_sizes():
    image = QFormer(device="meta")
    video = QFormer(768, 2, 12, 3072, 1, 768, device="meta")
    module = VideoLlamaConnector(image, video, 4096, device="meta")
    assert sum(p.numel() for p in module.parameters()) == 127_269_120


MAPS = {
    "qformer.lavis_image": lambda: QFormerConnector(qformer(), 18, M),
    "qformer.lavis_t5": lambda: QFormerConnector(qformer(), 18, M),
    "qformer.lavis_text": lambda: QFormerConnector(qformer(vocab_size=V), 18, M),
    "qformer.lavis_itg": lambda: QFormerConnector(qformer(text=True), None, M),
    "qformer.lavis_stage1": lambda: Blip2Stage1(qformer(text=True), M, 7, bos_token_id=V - 1),
    "qformer.hf_blip2": lambda: QFormerConnector(qformer(), 18, M, ln_vision=False),
    "qformer.hf_instructblip": lambda: QFormerConnector(qformer(vocab_size=V), 18, M, ln_vision=False),
    "connector.minigpt4": lambda: QFormerConnector(qformer(), 18, M),
    "connector.minigpt_v2": lambda: ConcatProjector(C, 18),
    "connector.video_llama": video_llama,
    "connector.video_llama_audio": lambda: FrameQFormerConnector(qformer(C, 1), 18, 8, 8),
    "connector.x_llm_image": lambda: QFormerConnector(qformer(), 18, M),
    "connector.x_llm_video": lambda: QFormerConnector(qformer(), 18, M),
    "connector.x_llm_speech": lambda: SpeechProjector(7, 5),
}


@pytest.mark.parametrize("name", MAPS)
def test_state_dict_goes_to_upstream_and_back(name):
    module, twin = MAPS[name](), MAPS[name]()
    upstream = to_upstream(name, module.state_dict())
    # the head's bias and the word table have two and three names
    assert len(upstream) == len(module.state_dict()) + (2 if name.endswith(("itg", "stage1")) else 0)
    twin.load_state_dict(to_ours(name, upstream))
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in twin.state_dict().items())


def test_lora_hooks_and_deepcopy():
    module, x = randomised(QFormerConnector(qformer(), 18, M)).float(), torch.randn(B, N, C)
    plain = module(x)
    assert torch.equal(copy.deepcopy(module)(x), plain)
    called = []
    handle = module.ln_vision.register_forward_hook(lambda *_: called.append(1))
    hooked = module(x)
    handle.remove()
    limit = 256 * ulp(float(plain.detach().abs().max()), torch.float32)
    assert called and (hooked - plain).abs().max() <= limit
    attention = module.qformer.encoder.layer[0].crossattention.attention
    attention.key = LoRALinear.from_plain(attention.key, 2)
    module.projection = LoRALinear.from_plain(module.projection, 2)
    assert (module(x) - plain).abs().max() <= limit
    with torch.no_grad():
        attention.key.adapters["default"].b.normal_()
    assert not torch.equal(module(x), plain)


@pytest.mark.parametrize("call, says", [
    (lambda m, x: m(x[0]), "accepted: .B, N, C., or frames"),
    (lambda m, x: m(x[None], torch.ones(3, 9)), "image_mask and input_ids are accepted with x .B, N, C."),
    (lambda m, x: m(x[..., :3]), "image_embeds has shape"),
    (lambda m, x: Blip2Stage1(m.qformer), "qformer has no LM head"),
    (lambda m, x: Blip2Stage1(qformer(text=True), bos_token_id=V), "bos_token_id is 23; accepted: 0 to 22"),
])  # fmt: skip
def test_errors_name_the_argument(call, says):
    with pytest.raises(ValueError, match=says):
        call(QFormerConnector(qformer(), 18, M), torch.randn(B, N, C))


# -- BLIP-2's first stage ------------------------------------------------------------------------------------------


def pairs():
    x, ids, keep = torch.randn(B, N, C).double(), torch.randint(1, V - 1, (B, T)), torch.ones(B, T, dtype=torch.long)
    keep[1, 4:] = keep[2, 5:] = 0
    return x, ids.masked_fill(keep == 0, 0), keep


def stage1(**options):
    return randomised(Blip2Stage1(qformer(text=True, **options), M, 7, bos_token_id=V - 1))


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("masked, grouped", [(False, False), (True, True)])
def test_stage1_is_lavis(masked, grouped, level):
    module, (x, ids, keep) = stage1(level=level), pairs()
    x.requires_grad_()
    seen = torch.ones(B, N, dtype=torch.long)
    seen[0, 3:] = 0
    seen = seen if masked else None
    image_ids = torch.tensor([4, 9, 4]) if grouped else None
    got = module(x, ids, keep, seen, image_ids)
    expected = lavis_stage1(module, x, ids, keep, got.negatives, seen, image_ids)
    for name, value in expected.items():
        close64(getattr(got, name), value)
    leaves = dict(module.named_parameters()) | {"x": x}
    ours, theirs = (
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) for loss in (got.loss, expected["loss"])
    )
    top = max(float(g.abs().max()) for g in theirs if g is not None)
    for name, a, b in zip(leaves, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        # of all gradients, for some are zero but for rounding
        assert a is None or (a - b).abs().max() <= 2048 * ulp(top, torch.float64), name


def test_negatives_are_drawn_by_similarity_and_never_pairs():
    module, (x, ids, keep) = stage1(), pairs()
    with torch.no_grad():
        drawn = [module(x, ids, keep).negatives for _ in range(20)]
        images, texts = (torch.stack(t) for t in zip(*drawn, strict=True))
        own = torch.arange(B)
        assert not (images == own).any() and not (texts == own).any()
        assert len(images.unique(dim=0)) > 1
        # pairs of one image are no negatives: rows 0 and 2 can only take 1
        drawn = [module(x, ids, keep, image_ids=torch.tensor([4, 9, 4])).negatives for _ in range(10)]
        assert all((n[0::2] == 1).all() for pair in drawn for n in pair)
        torch.manual_seed(5)
        one = module(x, ids, keep).negatives
        torch.manual_seed(5)
        assert all(torch.equal(a, b) for a, b in zip(one, module(x, ids, keep).negatives, strict=True))


def test_stage1_does_not_wait_for_the_device():
    """Nothing asks for a value: on meta tensors that would be an error."""
    module = Blip2Stage1(qformer(text=True), M, 7, bos_token_id=V - 1).to("meta")
    ids = torch.zeros(B, T, dtype=torch.long, device="meta")
    found = module(torch.zeros(B, N, C, device="meta"), ids, torch.ones_like(ids))
    found.loss.backward()
    assert found.loss.device.type == "meta" and found.itm_logits.shape == (3 * B, 2)
