"""Prompts and MemVP: peft's logits with and without the projection, places of rows, and errors at the door."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlkernels.modules import (
    EpalmInjection,
    EpalmPrompt,
    MemVPAdapter,
    MemVPFeedForward,
    MemVPMemory,
    PrefixEncoder,
    PromptFuse,
    SoftPrompt,
    VPTPrompts,
    memory_ffn,
)
from vlkernels.testing import compare

IDS = torch.tensor([[3, 5, 1, 7, 2], [4, 4, 9, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=17,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
        )  # fmt: skip
    )


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_is_pefts(projection):
    """As past_key_values of transformers' cache: peft's own logits, also after the projection is dropped."""
    peft = pytest.importorskip("peft")
    from transformers import DynamicCache

    base = llama()
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projection, encoder_hidden_size=6
    )
    theirs = peft.get_peft_model(base, config)
    encoder = theirs.prompt_encoder["default"]
    want = theirs(input_ids=IDS, attention_mask=MASK).logits
    ours = PrefixEncoder(3, 2, 4, 4, hidden=6 if projection else None)
    ours.load_state_dict(encoder.state_dict(), strict=True)
    kept = theirs.get_prompt_embedding_to_save("default")
    dropped = ours.without_projection()
    assert list(dropped.state_dict()) == ["embedding.weight"] and torch.equal(dropped(), kept)
    for prefix in (ours, dropped):
        past = DynamicCache(prefix.past_key_values(2))
        got = base(input_ids=IDS, attention_mask=prefix.mask(MASK), past_key_values=past).logits
        assert torch.equal(got, want)


def test_soft_prompt_is_pefts():
    peft = pytest.importorskip("peft")
    base = llama()
    theirs = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    want = theirs(input_ids=IDS, attention_mask=MASK).logits
    ours = SoftPrompt(3, 16)
    ours.load_state_dict(theirs.prompt_encoder["default"].state_dict(), strict=True)
    x = base.get_input_embeddings()(IDS)
    assert torch.equal(base(inputs_embeds=ours(x), attention_mask=ours.mask(MASK)).logits, want)
    assert torch.equal(SoftPrompt(2, 16, init=x[0, :2].detach())(None), x[0, :2])


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("project", [-1, 5])
def test_vpt_places(deep, project):
    prompts = VPTPrompts(2, 8, 3, deep=deep, project=project)
    names = (
        ["prompt_embeddings"]
        + ["deep_prompt_embeddings"] * deep
        + ["prompt_proj.weight", "prompt_proj.bias"] * (project > 0)
    )
    assert sorted(prompts.state_dict()) == sorted(names)
    assert prompts.prompt_embeddings.abs().max() <= (6 / (3 * 256 + (project if project > 0 else 8))) ** 0.5
    x = torch.randn(3, 5, 8)
    y = prompts(x)
    rows = prompts.prompt_proj(prompts.prompt_embeddings).expand(3, -1, -1)
    assert torch.equal(y, torch.cat((x[:, :1], rows, x[:, 1:]), 1))
    z = prompts(y, 2)
    if deep:
        rows = prompts.prompt_proj(prompts.deep_prompt_embeddings[1]).expand(3, -1, -1)
        assert torch.equal(z, torch.cat((x[:, :1], rows, x[:, 1:]), 1))
    else:
        assert z is y


def test_prompt_fuse():
    module = PromptFuse(2, 8)
    v, t = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    assert torch.equal(module(v, t), torch.cat((module.prompt.expand(3, -1, -1), v, t), 1))
    assert module(None, t).shape == (3, 7, 8)
    assert sum(p.numel() for p in PromptFuse(20, 768).parameters()) == 15_360
    mask = module.blind_mask(4, 5)
    assert mask[:2].all() and mask[:, :2].all() and mask[2:6, 2:6].all() and mask[6:, 6:].all()
    assert not mask[2:6, 6:].any() and not mask[6:, 2:6].any()


def test_epalm_prompt():
    assert [n for n, _ in EpalmPrompt(3, 8).named_parameters()] == [
        "prefix_embedding.0.weight", "prefix_embedding.1.weight", "prefix_embedding.1.bias",
        "prefix_embedding.3.weight", "prefix_embedding.3.bias",
    ]  # fmt: skip
    deep = EpalmPrompt(3, 8, mlp=False, deep=True, nb_prompts=2)
    prompts = deep(4)
    assert len(prompts) == 2 and torch.equal(prompts[1], deep.prefix_embedding[0].weight[3:].expand(4, -1, -1))


def test_epalm_injection():
    place = EpalmInjection(1, 7)
    assert [place.index(i, 3) for i in range(8)] == [None, 0, 0, 1, 1, 2, 2, None]
    assert [EpalmInjection(0, 2).index(i, 5) for i in range(2)] == [0, 1]
    assert [EpalmInjection(0, 5).index(i, 2) for i in range(5)] == [0, 0, 1, 1, 1]
    tokens = [torch.full((2, 1, 4), float(j)) for j in range(3)]
    x, mask = torch.randn(2, 5, 4), torch.full((2, 1, 5, 5), -7.0)
    y, grown = place(x, 1, tokens, mask)
    assert torch.equal(y, torch.cat((tokens[0], x), 1)) and grown.shape == (2, 1, 6, 6)
    assert not grown[:, :, 0].any() and not grown[..., 0].any() and torch.equal(grown[..., 1:, 1:], mask)
    z, same = place(y, 5, tokens, grown)
    assert torch.equal(z, torch.cat((tokens[2], x), 1)) and same is grown
    assert place(x, 0, tokens, mask)[0] is x


def test_memvp():
    memory = MemVPMemory(6, 3, 8, 5)
    k, v = memory()
    assert k is memory.adapter_emb1 and not v.any()
    ffn = nn.Linear(8, 8)
    layer, z = MemVPFeedForward(ffn).eval(), torch.randn(2, 4, 8)
    assert torch.equal(layer(z, k, v), ffn(z))  # E2 is zero: nothing is added at first
    nn.init.normal_(memory.adapter_emb2)
    clip, has = torch.randn(2, 3, 6), torch.tensor([1, 0])
    k, v = memory(clip, has)
    assert torch.equal(k[1:], memory.adapter_emb1) and torch.equal(v[1:], memory.adapter_emb2)
    want = ffn(z) + 0.1 * (F.silu(z @ k.transpose(1, 2)) @ v)
    assert torch.equal(layer(z, k, v), want)
    assert not torch.equal(layer.train()(z, k, v), want)  # dropout
    adapter = MemVPAdapter(8, 3)
    assert not adapter(z).any()
    nn.init.normal_(adapter.fc2.weight)
    difference = adapter(z) - F.gelu(z @ adapter.fc1.weight.t()) @ adapter.fc2.weight.t()
    assert float(difference.detach().abs().max()) <= 4 * compare.ulp(8.0, torch.float32)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: PrefixEncoder(3, 2, 4, 4).past_key_values(2, cache_len=2), "3 rows; accepted: at most the cache's 2"),
        (lambda: PrefixEncoder(0, 2, 4, 4), "n=0"),
        (lambda: PrefixEncoder(3, 2, 4, 4).mask(torch.ones(5)), r"accepted: \(B, T\)"),
        (lambda: SoftPrompt(0, 8), "n is 0"),
        (lambda: SoftPrompt(2, 8, init=torch.zeros(3, 8)), "init has shape"),
        (lambda: SoftPrompt(2, 8)(torch.zeros(2, 3, 7)), "with D = 8"),
        (lambda: PromptFuse(2, 8)(torch.zeros(2, 3, 7), torch.zeros(2, 3, 8)), "with D = 8"),
        (lambda: VPTPrompts(2, 8, 2)(torch.zeros(2, 3, 8), 2), "layer is 2; accepted: 0 to 1"),
        (lambda: VPTPrompts(4, 8, 2, deep=True)(torch.zeros(2, 3, 8), 1), "x has 3 rows"),
        (lambda: EpalmInjection(3, 3), "start=3, end=3"),
        (lambda: EpalmInjection(0, 3)(torch.zeros(2, 3, 4), 0, []), "tokens is empty"),
        (lambda: EpalmInjection(0, 3)(torch.zeros(2, 3, 4), 0, [torch.zeros(2, 4)]), r"accepted: \(B, 1, D\)"),
        (lambda: EpalmPrompt(0, 8), "n=0"),
        (lambda: MemVPMemory(6, 3, 8, 0), "rows is 0"),
        (lambda: MemVPMemory(6, 3, 8, 2)(torch.zeros(2, 3, 6)), "at most that many"),
        (lambda: MemVPFeedForward(nn.Identity(), dropout=1.0), "dropout is 1.0"),
        (lambda: memory_ffn(torch.zeros(2, 3, 8), torch.zeros(3, 5, 8), torch.zeros(3, 5, 8), 0.1), "accepted: "),
        (lambda: memory_ffn(torch.zeros(2, 3, 8), torch.zeros(2, 5, 8), torch.zeros(2, 4, 8), 0.1), "values has shape"),
        (lambda: MemVPAdapter(8, 0), "r is 0"),
    ],
)
def test_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()
