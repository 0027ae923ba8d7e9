"""What abstractors of maps are compared with, as upstream writes it: Honeybee's two, MobileVLM's LDP and LDPv2, VMamba.

Plain PyTorch; parameters come from a state dict under upstream's names. Convolutions are channels first, as upstream's.
"""

import math

import torch
import torch.nn.functional as F

from .providers.deformable_attention import equation as sampled
from .providers.selective_scan_2d import ordered, placed, scan_of_copies
from .upstream import attention, lin
from .upstream import layer_norm as normed


def image(x):
    side = int(x.shape[1] ** 0.5)
    return x.transpose(1, 2).unflatten(2, (side, side))


def rows(x):
    return x.flatten(2).transpose(1, 2)


def norm(p, name, x):
    n = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)
    return n.permute(0, 3, 1, 2)


def conv(p, name, x, stride=1):
    weight = p[f"{name}.weight"]
    padding, groups = weight.shape[-1] // 2, x.shape[1] if weight.shape[-1] > 1 else 1
    return F.conv2d(x, weight, p.get(f"{name}.bias"), stride=stride, padding=padding, groups=groups)


def excited(p, name, x, act, gate):
    return x * gate(conv(p, f"{name}.fc2", act(conv(p, f"{name}.fc1", x.mean((2, 3), keepdim=True)))))


def bottleneck(p, b, x):
    y = F.silu(norm(p, f"{b}.conv1.bn", conv(p, f"{b}.conv1.conv", x)))
    y = F.silu(norm(p, f"{b}.conv2.bn", conv(p, f"{b}.conv2.conv", y)))
    y = norm(p, f"{b}.conv3.bn", conv(p, f"{b}.conv3.conv", excited(p, f"{b}.se", y, F.silu, torch.sigmoid)))
    down = f"{b}.downsample.conv.weight" in p
    return F.silu(y + (norm(p, f"{b}.downsample.bn", conv(p, f"{b}.downsample.conv", x)) if down else x))


def c_abstractor(side):
    def equation(p, x):
        if "prenorm.weight" in p:
            x = F.layer_norm(x, x.shape[-1:], p["prenorm.weight"], p["prenorm.bias"], 1e-6)
        x = image(x + p["pos_emb"] if "pos_emb" in p else x)
        for stage in (0, 2):
            if stage:
                x = F.adaptive_avg_pool2d(x, (side, side))
            k = 1
            while f"net.{stage}.b{k}.conv1.conv.weight" in p:
                x = bottleneck(p, f"net.{stage}.b{k}", x)
                k += 1
        x, i = lin(p, "readout.0", rows(x)), 2
        while f"readout.{i}.weight" in p:
            x, i = lin(p, f"readout.{i}", F.silu(x)), i + 2
        return torch.cat((x, p["eos_tokens"].expand(len(x), -1, -1)), 1) if "eos_tokens" in p else x

    return equation


def ldp(p, x):
    x = image(lin(p, "model.mlp.3", F.gelu(lin(p, "model.mlp.1", x))))
    for k in (1, 2):
        b = f"model.mb_block.{k}.block"
        y = F.hardswish(norm(p, f"{b}.0.1", conv(p, f"{b}.0.0", x, k)))
        y = norm(p, f"{b}.2.1", conv(p, f"{b}.2.0", excited(p, f"{b}.1", y, F.relu, F.hardsigmoid)))
        x = x + y if k == 1 else y
    return rows(x)


def ldpv2(p, x):
    y = F.adaptive_avg_pool2d(image(lin(p, "mlp.mlp.2", F.gelu(lin(p, "mlp.mlp.0", x)))), (12, 12))
    return rows(conv(p, "peg.peg.0", y) + y)


def d_abstractor(heads, points, target):
    def equation(p, x):
        x = lin(p, "input_proj.0", x) if "input_proj.0.weight" in p else x
        x = x + p["v_pos_emb"] if "v_pos_emb" in p else x
        B, N, D = x.shape
        side = math.isqrt(N)
        rows = p["query_position_embeddings.weight"].expand(B, -1, -1)
        if target == "none":
            pos, t = rows.split(D, -1)
        else:
            grid = x.transpose(1, 2).reshape(B, D, side, side)
            pooled = F.adaptive_avg_pool2d(grid, math.isqrt(rows.shape[1])).flatten(2).transpose(1, 2)
            pos, t = (pooled, rows) if target == "query" else (rows, pooled)
        i = 0
        while f"layers.{i}.fc1.weight" in p:
            a, e = f"layers.{i}.self_attn.", f"layers.{i}.encoder_attn."
            z = t + pos
            q, k, v = (lin(p, f"{a}{name}_proj", of) for name, of in (("q", z), ("k", z), ("v", t)))
            o = attention(q, k, v, t.shape[-1] // heads)
            t = normed(p, f"layers.{i}.self_attn_layer_norm", t + lin(p, f"{a}out_proj", o))
            z = t + pos
            offsets = lin(p, f"{e}sampling_offsets", z).view(B, -1, heads, 1, points, 2)
            logits = lin(p, f"{e}attention_weights", z).view(B, -1, heads, 1, points)
            value = lin(p, f"{e}value_proj", x).view(B, N, heads, -1)
            centre = p["reference_points"].expand(B, -1, -1)[:, :, None]
            y = sampled(value, offsets, logits, [side, side], True, centre).flatten(2)
            t = normed(p, f"layers.{i}.encoder_attn_layer_norm", t + lin(p, f"{e}output_proj", y))
            y = lin(p, f"layers.{i}.fc2", lin(p, f"layers.{i}.fc1", t).relu())
            t = normed(p, f"layers.{i}.final_layer_norm", t + y)
            i += 1
        if "eos_tokens" in p:
            t = torch.cat((t, p["eos_tokens"].expand(B, -1, -1)), 1)
        return lin(p, "output_proj", t) if "output_proj.weight" in p else t

    return equation


def ss2d(m, x):
    """SS2D as upstream writes it in PyTorch: four copies of the map, einsums over them, and a sum of four maps."""
    (_, h, w, _), K, R, S = x.shape, 4, m.dt_rank, m.d_state
    x, z = m.in_proj(x).chunk(2, -1)
    x = F.silu(m.conv2d(x.permute(0, 3, 1, 2).contiguous())).flatten(2).transpose(1, 2)
    xs = torch.stack([ordered(x, letter, h, w) for letter in m.scan], 1)
    low, b, c = torch.einsum("bkdl,kcd->bkcl", xs, m.x_proj_weight).split((R, S, S), 2)
    delta = torch.einsum("bkrl,kdr->bkdl", low, m.dt_projs_weight)
    a, bias = -torch.exp(m.A_logs.float()), m.dt_projs_bias.flatten()
    y, _ = scan_of_copies(xs.flatten(1, 2), delta.flatten(1, 2), a, b, c, m.Ds, bias, None, True)
    y = y.unflatten(1, (K, -1))
    y = sum(placed(y[:, k], letter, h, w) for k, letter in enumerate(m.scan)).transpose(1, 2)
    return m.out_proj(m.out_norm(y.to(x.dtype)).unflatten(1, (h, w)) * F.silu(z))
