"""What modules are compared with, as upstream writes it: OpenFlamingo's resampler and LAVIS' BLIP-2 stage 1.

Plain PyTorch; parameters come from a state dict under upstream's names.
"""

import torch
import torch.nn.functional as F


def layer_norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def lin(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def attention(q, k, v, K, mask=None, head_norms=None):
    """Of (.., M, H K) and (.., N, G K), keys and values repeated for the heads that share them."""
    q, k, v = (t.unflatten(-1, (-1, K)).transpose(-2, -3) for t in (q, k, v))
    if head_norms is not None:
        q, k = head_norms[0](q), head_norms[1](k)
    k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    s = torch.einsum("...id,...jd->...ij", q * K**-0.5, k)
    if mask is not None:
        s = s.masked_fill(~mask, torch.finfo(s.dtype).min)
    s = s - s.amax(-1, keepdim=True).detach()
    return torch.einsum("...ij,...jd->...id", s.softmax(-1), v).transpose(-2, -3).flatten(-2)


def seen(mask, latents):
    """The mask (.., N) with the latents' columns, which are always visible."""
    if mask is None:
        return None
    return F.pad(mask, (0, latents.shape[-2]), value=True)[..., None, None, :]


def flamingo(p, x, mask=None, K=6, media="media_time_embs"):
    """x (b, T, F, v, d), mask (b, T, F v)."""
    b, T, frames = x.shape[:3]
    if "frame_embs" in p:
        x = x + p["frame_embs"][:frames, None]
    x = x.flatten(2, 3)
    if media in p:
        x = x + p[media][:T]
    l = p["latents"].expand(b, T, -1, -1)
    i = 0
    while f"layers.{i}.0.to_q.weight" in p:
        a = f"layers.{i}.0."
        xm, lm = layer_norm(p, a + "norm_media", x), layer_norm(p, a + "norm_latents", l)
        k, v = lin(p, a + "to_kv", torch.cat((xm, lm), -2)).chunk(2, -1)
        l = lin(p, a + "to_out", attention(lin(p, a + "to_q", lm), k, v, K, seen(mask, l))) + l
        f = f"layers.{i}.1."
        ffn = l
        if f + "1.weight" in p:
            ffn = lin(p, f + "3", F.gelu(lin(p, f + "1", layer_norm(p, f + "0", l))))
        l = ffn + l
        i += 1
    return layer_norm(p, "norm", l)


def lavis_stage1(module, x, ids, keep, negatives, seen=None, image_ids=None):
    """LAVIS' forward of a modules.Blip2Stage1, step by step, for drawn negatives (images, texts): images gathered, and
    projected once more in each pass."""
    q, queries = module.qformer, module.query_tokens
    norm, B, M = module.ln_vision, len(x), queries.shape[1]
    image = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    first = q(queries.expand(B, -1, -1), image, image_mask=seen, use_cache=True)
    image_feats = F.normalize(module.vision_proj(first.queries), dim=-1)
    text_feat = F.normalize(module.text_proj(q(input_ids=ids, attention_mask=keep).text[:, 0]), dim=-1)
    sim_q2t = torch.matmul(image_feats.unsqueeze(1), text_feat.unsqueeze(-1)).squeeze(-1)
    sim_i2t = sim_q2t.max(-1)[0] / module.temp
    sim_t2q = torch.matmul(text_feat.unsqueeze(1).unsqueeze(1), image_feats.permute(0, 2, 1)).squeeze(2)
    sim_t2i = sim_t2q.max(-1)[0] / module.temp
    if image_ids is None:
        targets = torch.arange(B, device=x.device)
        loss_itc = sum(F.cross_entropy(sim, targets, label_smoothing=0.1) for sim in (sim_i2t, sim_t2i)) / 2
    else:
        same = (image_ids[:, None] == image_ids[None]).double()
        targets = 0.9 * same / same.sum(1, keepdim=True) + 0.1 / B
        loss_itc = sum(-(F.log_softmax(sim, 1) * targets).sum(1).mean() for sim in (sim_i2t, sim_t2i)) / 2
    images, texts = negatives
    all_ids = torch.cat((ids, ids, torch.stack([ids[int(t)] for t in texts])))
    all_keep = torch.cat((keep, keep, torch.stack([keep[int(t)] for t in texts])))
    all_images = torch.cat((image, torch.stack([image[int(i)] for i in images]), image))
    all_seen = None if seen is None else torch.cat((seen, seen[images], seen))
    matched = q(queries.expand(3 * B, -1, -1), all_images, all_ids, all_keep, all_seen).hidden[:, :M]
    logits = module.itm_head(matched).mean(1)
    labels = torch.cat((ids.new_ones(B), ids.new_zeros(2 * B)))
    decoded = ids.clone()
    decoded[:, 0] = module.bos_token_id
    scores = q.lm_logits(q(input_ids=decoded, attention_mask=keep, cache=first.cache).text)
    targets = decoded.masked_fill(decoded == 0, -100)[:, 1:]
    loss_lm = F.cross_entropy(scores[:, :-1].flatten(0, 1), targets.reshape(-1), label_smoothing=0.1)
    loss_itm = F.cross_entropy(logits, labels)
    return {
        "loss": loss_itc + loss_itm + loss_lm, "loss_itc": loss_itc, "loss_itm": loss_itm, "loss_lm": loss_lm,
        "sim_i2t": sim_i2t, "sim_t2i": sim_t2i, "itm_logits": logits, "lm_logits": scores[:, :-1],
        "image_feats": image_feats, "text_feats": text_feat,
    }  # fmt: skip
