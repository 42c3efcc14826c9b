"""A Llama in static W8A8, written out in numpy and fp64, a window at a time: what the simulation is held against."""

import numpy as np

# Of a range. Numbers made of few codes, as weights of one half, lie between two steps more often than by chance, and
# the last bit turns them one way or the other.
OFF_TIES = 1e-9


def rounded(x, low, high):
    low, high = min(low, 0.0), max(high, 1e-8)
    scale = (high - low) / 255
    zero = np.clip(np.rint(-low / scale), 0, 255)
    codes = np.clip(np.rint(x / scale + OFF_TIES * 255) + zero, 0, 255)
    return (codes - zero) * scale


def rounded_weight(w):
    scale = np.abs(w).max() / 127
    return np.rint(w / scale) * scale


def norm(x, weight, epsilon):
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


class Llama:
    def __init__(self, model):
        self.config = model.config
        self.weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
        self.ranges = {}
        self.calibrating = True

    def activation(self, name, x, seen=None):
        if self.calibrating:
            known = x if seen is None else x[seen]
            low, high = known.min(), known.max()
            if name in self.ranges:
                before = self.ranges[name]
                low, high = 0.9 * before[0] + 0.1 * low, 0.9 * before[1] + 0.1 * high
            self.ranges[name] = (low, high)
        return rounded(x, *self.ranges[name])

    def linear(self, name, x):
        return self.activation(name, x) @ rounded_weight(self.weights[f"{name}.weight"]).T

    def rotated(self, x_HTD):
        tokens, width = x_HTD.shape[1:]
        frequency = self.config.rope_parameters["rope_theta"] ** (-np.arange(0, width, 2) / width)
        angle = np.arange(tokens)[:, None] * np.concatenate([frequency, frequency])
        first, second = x_HTD[..., : width // 2], x_HTD[..., width // 2 :]
        return x_HTD * np.cos(angle) + np.concatenate([-second, first], -1) * np.sin(angle)

    def attention(self, prefix, x):
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        query, key, value = (
            self.linear(f"{prefix}.{n}_proj", x).reshape(len(x), count, -1).transpose(1, 0, 2)
            for n, count in (("q", heads), ("k", groups), ("v", groups))
        )
        query, key = self.rotated(query), self.rotated(key)
        query, key, value = (
            self.activation(f"{prefix}.{n}", t) for n, t in (("query", query), ("key", key), ("value", value))
        )
        key, value = (np.repeat(t, heads // groups, 0) for t in (key, value))
        seen = np.broadcast_to(np.tri(len(x), dtype=bool), (heads, len(x), len(x)))
        score = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
        score = np.where(seen, self.activation(f"{prefix}.scores", score, seen), -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight = rounded(weight / weight.sum(-1, keepdims=True), 0.0, 1.0)
        mixed = (weight @ value).transpose(1, 0, 2).reshape(len(x), -1)
        return self.linear(f"{prefix}.o_proj", mixed)

    def logits(self, ids):
        epsilon, weights = self.config.rms_norm_eps, self.weights
        x = weights["model.embed_tokens.weight"][ids]
        for layer in (f"model.layers.{i}" for i in range(self.config.num_hidden_layers)):
            x = x + self.attention(f"{layer}.self_attn", norm(x, weights[f"{layer}.input_layernorm.weight"], epsilon))
            inner = norm(x, weights[f"{layer}.post_attention_layernorm.weight"], epsilon)
            gate, up = (self.linear(f"{layer}.mlp.{n}_proj", inner) for n in ("gate", "up"))
            x = x + self.linear(f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        return norm(x, weights["model.norm.weight"], epsilon) @ weights["lm_head.weight"].T

    def loss(self, ids):
        logits = self.logits(ids)[:-1]
        logits = logits - logits.max(-1, keepdims=True)
        return np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]])
