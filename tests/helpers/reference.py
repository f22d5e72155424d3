"""system.md 3 to 5 once more, for clarity alone: float64, explicit loops, no code of the package.

A decoder layer is written out too, so that its seven projections can be modulated; the prelude, the coda and the last
norm are the base's own. `base` is a transformers model with all its layers.
"""

import math

import torch

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def silu(x):
    return x / (1 + torch.exp(-x))


def rms(x, weight, eps):
    return torch.stack([torch.stack([v / torch.sqrt((v * v).mean() + eps) for v in row]) for row in x]) * weight


def linear_of(layer, name):
    return getattr(layer.self_attn if name in PROJECTIONS[:4] else layer.mlp, name)


def bases(base, prelude, recurrent, coda, rank):
    """Section 3: name -> A (r, in), B (out, r)."""
    n = len(base.model.layers)
    removed = [i for i in range(prelude, n - coda) if i != recurrent]
    result = {}
    for name in PROJECTIONS:
        residual = 0
        for i in removed:
            residual = residual + linear_of(base.model.layers[i], name).weight.detach().double()
        residual = residual / len(removed) - linear_of(base.model.layers[recurrent], name).weight.detach().double()
        u, s, vt = torch.linalg.svd(residual, full_matrices=False)
        for j in range(rank):  # a singular vector's sign is free
            if vt[j, vt[j].abs().argmax()] < 0:
                u[:, j], vt[j] = -u[:, j], -vt[j]
        result[name] = vt[:rank], u[:, :rank] * s[:rank]
    return result


def controller(p, h, t, pooling, rank):
    """Section 4, one sequence: (T, d) -> T times {name: m}; `p` holds the trained tensors by name."""
    vectors = []
    for i in range(len(h)):
        seen = h[: i + 1] if pooling == "causal" else h
        s = seen.mean(0)
        z = silu(p["modulation.state.weight"] @ s + p["modulation.state.bias"])
        x = torch.cat([z, p["modulation.step.weight"][t]])
        x = silu(p["modulation.hidden.weight"] @ x + p["modulation.hidden.bias"])
        x = silu(p["modulation.output.weight"] @ x + p["modulation.output.bias"])
        heads = p["modulation.heads.weight"]
        vectors.append({name: heads[k * rank:(k + 1) * rank] @ x for k, name in enumerate(PROJECTIONS)})
    return vectors


def project(layer, name, x, m, frozen, scale):
    """Section 3: (W + scale * B diag(m) A) x + b at each position."""
    linear = linear_of(layer, name)
    out = []
    for i in range(len(x)):
        weight = linear.weight
        if m is not None:
            a, b = frozen[name]
            weight = weight + scale * b @ torch.diag(m[i][name]) @ a
        y = weight @ x[i]
        out.append(y if linear.bias is None else y + linear.bias)
    return torch.stack(out)


def rotate(x, position, theta):
    """Rotary position embedding of one head's vector."""
    half = len(x) // 2
    angles = torch.tensor([position * theta ** (-2 * j / len(x)) for j in range(half)], dtype=x.dtype)
    first, second = x[:half], x[half:]
    return torch.cat([first * torch.cos(angles) - second * torch.sin(angles),
                      second * torch.cos(angles) + first * torch.sin(angles)])


def layer_of(layer, config, h, m, frozen, scale):
    """A Qwen2 decoder layer on one sequence (T, d), its projections modulated by `m`."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size, theta = config.hidden_size // heads, config.rope_parameters["rope_theta"]
    x = rms(h[None], layer.input_layernorm.weight, config.rms_norm_eps)[0]
    q, k, v = (project(layer, name, x, m, frozen, scale) for name in PROJECTIONS[:3])
    rows = []
    for i in range(len(h)):
        parts = []
        for head in range(heads):
            group = head // (heads // groups)
            query = rotate(q[i, head * size:(head + 1) * size], i, theta)
            scores = torch.stack([query @ rotate(k[j, group * size:(group + 1) * size], j, theta) / math.sqrt(size)
                                  for j in range(i + 1)])
            weights = torch.softmax(scores, 0)
            parts.append(sum(weights[j] * v[j, group * size:(group + 1) * size] for j in range(i + 1)))
        rows.append(torch.cat(parts))
    h = h + project(layer, "o_proj", torch.stack(rows), m, frozen, scale)
    x = rms(h[None], layer.post_attention_layernorm.weight, config.rms_norm_eps)[0]
    inner = silu(project(layer, "gate_proj", x, m, frozen, scale)) * project(layer, "up_proj", x, m, frozen, scale)
    return h + project(layer, "down_proj", inner, m, frozen, scale)


def forward(base, trained, tokens, split, depth, rank, alpha, modulation, pooling, gate, step_norm, max_steps):
    """Section 5: (B, T) tokens -> (B, T, V) logits; `trained` are the tensors of section 6 by name."""
    prelude, recurrent, coda = split
    layers, config = base.model.layers, base.config
    frozen = bases(base, prelude, recurrent, coda, rank)
    rows = []
    for row in tokens:
        h = base.model.embed_tokens.weight[row]
        for layer in layers[:prelude]:
            h = layer_of(layer, config, h, None, frozen, 0)
        for step in range(depth):
            t = min(step, max_steps - 1)
            m = None
            if modulation == "controller":
                m = controller(trained, h, t, pooling, rank)
            if modulation == "static":
                table = trained["modulation.table"]
                m = [{name: table[t, k] for k, name in enumerate(PROJECTIONS)}] * len(h)
            new = layer_of(layers[recurrent], config, h, m, frozen, alpha / rank)
            if step_norm:
                new = rms(new[None], trained["step_norm.weight"][t], 1e-6)[0]
            if gate:
                g = torch.stack([torch.sigmoid(trained["gate.linear.weight"] @ torch.cat([new[i], h[i]])
                                               + trained["gate.linear.bias"]) for i in range(len(h))])
                h = g * new + (1 - g) * h
            else:
                h = new
        for layer in layers[len(layers) - coda:]:
            h = layer_of(layer, config, h, None, frozen, 0)
        h = rms(h[None], base.model.norm.weight, config.rms_norm_eps)[0]
        rows.append(h @ base.lm_head.weight.T)
    return torch.stack(rows)


def loss(logits, labels):
    """Mean nats per token of the next token; -100 ignored."""
    values = [torch.logsumexp(logits[b, t], 0) - logits[b, t, labels[b, t + 1]]
              for b in range(len(labels)) for t in range(labels.shape[1] - 1) if labels[b, t + 1] != -100]
    return sum(values) / len(values)
