"""The dense decoder in plain numpy, in Hugging Face's conventions: the definition of right behind the goldens.

It shares no code with tokmeter. Written to be read: every position is computed at once, nothing is cached.
"""
import math

import numpy as np


def rope_frequencies(config):
    """Angle per position of each rotated pair, with llama3's stretching of the long wavelengths where configured."""
    dim = head_dim(config)
    freq = config["rope_theta"] ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    return freq / rope_factors(config, freq)


def rope_factors(config, freq):
    """What each frequency is divided by: 1 without scaling. GGUF stores these numbers as `rope_freqs.weight`."""
    scaling = config.get("rope_scaling")
    if scaling is None:
        return np.ones_like(freq)
    assert scaling["rope_type"] == "llama3", scaling
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # in the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: short wavelength, untouched; 0: stretched in full
    return 1.0 / (keep + (1.0 - keep) / factor)


def head_dim(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


class Decoder:
    """Llama, Qwen2 and Qwen3 in one: a bias or a QK-norm is applied where the weights hold one."""

    def __init__(self, config, weights, dtype=np.float64):
        self.config = config
        self.w = {name: np.asarray(value, dtype=dtype) for name, value in weights.items()}
        self.inv_freq = rope_frequencies(config)
        self.dtype = dtype

    def norm(self, x, name):
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config["rms_norm_eps"]) * self.w[name + ".weight"]

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def rope(self, x):
        """x is [positions, heads, head_dim]; pair i is (x[i], x[i + head_dim / 2])."""
        angle = np.arange(len(x))[:, None] * self.inv_freq
        cos, sin = (f(angle)[:, None, :].astype(self.dtype) for f in (np.cos, np.sin))
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def heads(self, x, name, count, rotated):
        x = self.linear(x, name + "_proj").reshape(len(x), count, head_dim(self.config))
        if name + "_norm.weight" in self.w:
            x = self.norm(x, name + "_norm")
        return self.rope(x) if rotated else x

    def attention(self, x, prefix):
        n, n_heads, n_kv = len(x), self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q = self.heads(x, prefix + "q", n_heads, rotated=True)
        k = self.heads(x, prefix + "k", n_kv, rotated=True)
        v = self.heads(x, prefix + "v", n_kv, rotated=False)
        k, v = (np.repeat(t, n_heads // n_kv, axis=1) for t in (k, v))
        score = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim(self.config))
        score = np.where(np.tri(n, dtype=bool), score, -np.inf)
        weight = np.exp(score - score.max(axis=-1, keepdims=True))
        weight /= weight.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weight, v).reshape(n, -1)
        return self.linear(mixed, prefix + "o_proj")

    def mlp(self, x, prefix):
        gate, up = self.linear(x, prefix + "gate_proj"), self.linear(x, prefix + "up_proj")
        return self.linear(gate / (1.0 + np.exp(-gate)) * up, prefix + "down_proj")

    def logits(self, token_ids):
        """[positions, vocabulary]: row i scores the token after token_ids[i]."""
        x = self.w["model.embed_tokens.weight"][np.asarray(token_ids)]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            x = x + self.attention(self.norm(x, layer + "input_layernorm"), layer + "self_attn.")
            x = x + self.mlp(self.norm(x, layer + "post_attention_layernorm"), layer + "mlp.")
        head = "model.embed_tokens" if self.config.get("tie_word_embeddings") else "lm_head"
        return self.linear(self.norm(x, "model.norm"), head)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
