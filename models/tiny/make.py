#!/usr/bin/env python3
"""Tiny random models and their goldens, from an independent numpy implementation of the dense decoder.

    python3 models/tiny/make.py            # rewrites llama/, qwen2/ and qwen3/ beside this file

Needs numpy only and never calls tokmeter. `Decoder` is the definition of right that the goldens rest on: plain
float64 arithmetic over the weights *as stored* (after rounding to bf16 or f16), in Hugging Face's conventions.
The values of every tensor are representable in the narrowest type used (bf16 for llama and qwen2, f16 for qwen3), so
that `llama/model.safetensors` and `llama/model.gguf` hold the same numbers and a bf16 engine starts from them exactly.

golden.json, per prompt: `token_ids`; `last_logits`, all logits after the last token; `top`, for every position the
five most likely next tokens as [id, log-probability]; `greedy.token_ids`, the sixteen tokens greedy decoding adds;
`greedy.min_gap`, the smallest distance between the best and the second logit along that path. Re-running rewrites
every file byte for byte.
"""
import json
import math
import pathlib
import struct

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
PROMPT_LENGTHS = (1, 2, 7, 33, 64)
GREEDY_TOKENS = 16
TOP = 5
MIN_GAP = 1e-3  # a greedy path nearer than this to a tie would make a useless golden: change the seed


# --- the decoder ------------------------------------------------------------------------------------------------------

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


# --- the models -------------------------------------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
MERGES = """Ġ t|Ġ a|h e|i n|r e|o n|Ġt he|e r|Ġ s|a t|Ġ w|Ġ o|e n|Ġ c|i t|i s|a n|o r|e s|Ġ b|e d|Ġ f|in g|Ġ p|o u|Ġa n|
Ġan d|a l|Ġt o|a r|Ġ m|Ġo f|Ġ in|Ġ d|Ġ h|l e|i c|a s|Ġ l|o m|Ġ Ġ|ĠĠ ĠĠ|en t|i on|Ġ n|v e|s t|r o|l l|ou r|k en|t er|Ġto ken|
Ġm e|Ġme ter|Ġ is|Ġb e|ĠĠĠĠ ĠĠĠĠ|Ċ Ċ|Ġw or""".replace("\n", "").split("|")


def byte_alphabet():
    """GPT-2's printable stand-in for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [table[b] for b in range(256)]


def vocabulary():
    tokens = SPECIAL + byte_alphabet()
    for merge in MERGES:
        left, right = merge.split(" ")
        assert left in tokens and right in tokens and left + right not in tokens, merge
        tokens.append(left + right)
    return tokens


TOKENS = vocabulary()
COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": len(TOKENS), "hidden_act": "silu", "rms_norm_eps": 1e-5,
          "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02}
MODELS = {
    "llama": dict(seed=1, stored="F32", shards=1, config=COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "head_dim": 16,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32}}),
    "qwen2": dict(seed=2, stored="BF16", shards=2, config=COMMON | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
        "tie_word_embeddings": True, "use_sliding_window": False, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}),
    "qwen3": dict(seed=3, stored="F16", shards=1, config=COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "float16", "head_dim": 32,
        "attention_bias": False, "tie_word_embeddings": True, "use_sliding_window": False, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "rope_scaling": None}),
}


def shapes(config):
    """Every tensor's name and shape, in the order in which the random numbers are drawn."""
    d, ffn, dh = config["hidden_size"], config["intermediate_size"], head_dim(config)
    q, kv = config["num_attention_heads"] * dh, config["num_key_value_heads"] * dh
    yield "model.embed_tokens.weight", (config["vocab_size"], d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (d,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield layer + f"self_attn.{name}_proj.weight", (rows, d)
            if config["model_type"] == "qwen2":
                yield layer + f"self_attn.{name}_proj.bias", (rows,)
        if config["model_type"] == "qwen3":
            yield layer + "self_attn.q_norm.weight", (dh,)
            yield layer + "self_attn.k_norm.weight", (dh,)
        yield layer + "self_attn.o_proj.weight", (d, q)
        yield layer + "post_attention_layernorm.weight", (d,)
        yield layer + "mlp.gate_proj.weight", (ffn, d)
        yield layer + "mlp.up_proj.weight", (ffn, d)
        yield layer + "mlp.down_proj.weight", (d, ffn)
    yield "model.norm.weight", (d,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], d)


def random_weights(config, seed, stored):
    """Scaled so that attention is peaked, layers outweigh the embedding, and logits spread over a few units."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes(config):
        value = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            value = 1.0 + 0.2 * value
        elif name.endswith(".bias"):
            value = 0.3 * value
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            value = 0.3 * value
        else:
            value = 1.5 / math.sqrt(shape[-1]) * value
        weights[name] = value.astype(np.float16).astype(np.float32) if stored == "F16" else round_bf16(value)
    return weights


def round_bf16(x):
    """To the nearest bf16, ties to even, held as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


# --- files ------------------------------------------------------------------------------------------------------------

def to_bytes(value, stored):
    value = np.ascontiguousarray(value, np.float32)
    if stored == "BF16":
        return (value.view(np.uint32) >> 16).astype("<u2").tobytes()
    return value.astype({"F32": "<f4", "F16": "<f2"}[stored]).tobytes()


def safetensors(weights, stored):
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name in sorted(weights):
        data = to_bytes(weights[name], stored)
        header[name] = {"dtype": stored, "shape": list(weights[name].shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + body


def sharded(weights, stored, count):
    """{file name: bytes}: one file, or `count` shards of alternating tensors and their index."""
    if count == 1:
        return {"model.safetensors": safetensors(weights, stored)}
    files, where, names = {}, {}, list(weights)
    for i in range(count):
        file, part = f"model-{i + 1:05}-of-{count:05}.safetensors", names[i::count]
        files[file] = safetensors({n: weights[n] for n in part}, stored)
        where |= {n: file for n in part}
    size = sum(w.size * len(to_bytes(w[:1], stored)) // w[:1].size for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": {n: where[n] for n in sorted(where)}}
    files["model.safetensors.index.json"] = pretty(index)
    return files


GGUF_NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
              "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
GGUF_TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight"}


def gguf_name(name):
    if name in GGUF_TOP:
        return GGUF_TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def interleave(value, heads):
    """llama.cpp's order of Q and K rows for arch llama: the two halves of a rotated pair become neighbours."""
    return value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)


def gguf_tensors(config, weights):
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    out = {}
    for name, value in weights.items():
        kind = name.removesuffix("_proj.weight")[-1]
        out[gguf_name(name)] = interleave(value, heads[kind]) if name.endswith((".q_proj.weight", ".k_proj.weight")) else value
    if config.get("rope_scaling"):
        plain = rope_frequencies(config | {"rope_scaling": None})
        out["rope_freqs.weight"] = rope_factors(config, plain).astype(np.float32)
    return out


class GgufType:
    """Value types of the format, as (code, packer)."""
    U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

    @staticmethod
    def pack(kind, value):
        if kind == GgufType.STRING:
            return struct.pack("<Q", len(value.encode())) + value.encode()
        return struct.pack({4: "<I", 5: "<i", 6: "<f", 7: "<?"}[kind], value)


def gguf(metadata, tensors, alignment=32):
    """GGUF v3 with F32 tensors. metadata: {key: (type, value)}, a list being an array of that type."""
    out = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        out += GgufType.pack(GgufType.STRING, key)
        if isinstance(value, list):
            out += struct.pack("<IIQ", GgufType.ARRAY, kind, len(value)) + b"".join(GgufType.pack(kind, v) for v in value)
        else:
            out += struct.pack("<I", kind) + GgufType.pack(kind, value)
    offset = 0
    for name, value in tensors.items():
        out += GgufType.pack(GgufType.STRING, name) + struct.pack("<I", value.ndim)
        out += struct.pack(f"<{value.ndim}QIQ", *reversed(value.shape), 0, offset)
        offset += 4 * value.size + -(4 * value.size) % alignment
    parts = [out, bytes(-len(out) % alignment)]
    for value in tensors.values():
        parts += [to_bytes(value, "F32"), bytes(-(4 * value.size) % alignment)]
    return b"".join(parts)


def gguf_config(config, name):
    """The llama-architecture keys for an HF config."""
    u32, f32, string = GgufType.U32, GgufType.F32, GgufType.STRING
    return {
        "general.architecture": (string, "llama"), "general.name": (string, name), "general.alignment": (u32, 32),
        "general.file_type": (u32, 0), "llama.block_count": (u32, config["num_hidden_layers"]),
        "llama.context_length": (u32, config["max_position_embeddings"]),
        "llama.embedding_length": (u32, config["hidden_size"]),
        "llama.feed_forward_length": (u32, config["intermediate_size"]),
        "llama.attention.head_count": (u32, config["num_attention_heads"]),
        "llama.attention.head_count_kv": (u32, config["num_key_value_heads"]),
        "llama.attention.layer_norm_rms_epsilon": (f32, config["rms_norm_eps"]),
        "llama.rope.freq_base": (f32, config["rope_theta"]), "llama.rope.dimension_count": (u32, head_dim(config)),
        "llama.vocab_size": (u32, config["vocab_size"])}


def gguf_tokenizer():
    u32, string = GgufType.U32, GgufType.STRING
    kinds = [3 if t in SPECIAL else 1 for t in TOKENS]  # 3: control, 1: normal
    return {
        "tokenizer.ggml.model": (string, "gpt2"), "tokenizer.ggml.pre": (string, "smollm"),
        "tokenizer.ggml.tokens": (string, TOKENS), "tokenizer.ggml.token_type": (GgufType.I32, kinds),
        "tokenizer.ggml.merges": (string, MERGES), "tokenizer.ggml.bos_token_id": (u32, 1),
        "tokenizer.ggml.eos_token_id": (u32, 2), "tokenizer.ggml.padding_token_id": (u32, 3),
        "tokenizer.ggml.unknown_token_id": (u32, 0),
        "tokenizer.ggml.add_bos_token": (GgufType.BOOL, False), "tokenizer.ggml.add_space_prefix": (GgufType.BOOL, False)}


def hf_tokenizer():
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": t} | flags for i, t in enumerate(SPECIAL)], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None, "decoder": byte_level | {"add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: i for i, t in enumerate(TOKENS)}, "merges": MERGES}}


def pretty(value):
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# --- goldens ----------------------------------------------------------------------------------------------------------

def rounded(x):
    return float(f"{x:.9g}")


def top_tokens(logprobs, count):
    """[[id, log-probability] x count], best first; the lower id wins a tie."""
    order = np.argsort(-logprobs, kind="stable")[:count]
    return [[int(i), rounded(logprobs[i])] for i in order]


def golden_prompt(model, token_ids):
    logits = model.logits(token_ids)
    ids, gaps = list(token_ids), []
    for _ in range(GREEDY_TOKENS):
        last = model.logits(ids)[-1]
        second, best = np.sort(last)[-2:]
        gaps.append(best - second)
        ids.append(int(last.argmax()))
    greedy = ids[len(token_ids):]
    assert min(gaps) > MIN_GAP and len(set(greedy)) > GREEDY_TOKENS // 2, (min(gaps), greedy)
    return {"token_ids": token_ids, "last_logits": [rounded(x) for x in logits[-1]],
            "top": [top_tokens(row, TOP) for row in log_softmax(logits)],
            "greedy": {"token_ids": greedy, "min_gap": rounded(min(gaps))}}


def golden(name, spec, weights):
    rng = np.random.default_rng([spec["seed"], 1])
    model = Decoder(spec["config"], weights)
    prompts = [[int(t) for t in rng.integers(0, len(TOKENS), n)] for n in PROMPT_LENGTHS]
    head = {"generator": "models/tiny/make.py", "model": name, "seed": spec["seed"], "stored_dtype": spec["stored"],
            "arithmetic": "float64", "vocab_size": len(TOKENS)}
    lines = ",\n".join("    " + json.dumps(golden_prompt(model, p)) for p in prompts)
    return (json.dumps(head, indent=2)[:-2] + ',\n  "prompts": [\n' + lines + "\n  ]\n}\n").encode()


def main():
    for name, spec in MODELS.items():
        config, folder = spec["config"], HERE / name
        weights = random_weights(config, spec["seed"], spec["stored"])
        files = {"config.json": pretty(config), "golden.json": golden(name, spec, weights)}
        files |= sharded(weights, spec["stored"], spec["shards"])
        if name == "llama":
            files["model.gguf"] = gguf(gguf_config(config, "tiny llama") | gguf_tokenizer(), gguf_tensors(config, weights))
            files["tokenizer.json"] = pretty(hf_tokenizer())
        folder.mkdir(exist_ok=True)
        for file, data in files.items():
            (folder / file).write_bytes(data)
            print(f"{name}/{file}: {len(data)} bytes")


if __name__ == "__main__":
    main()
