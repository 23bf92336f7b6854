#!/usr/bin/env python3
"""Tiny random models and their goldens, from an independent numpy implementation of the dense decoder.

    python3 models/tiny/make.py            # rewrites llama/, qwen2/ and qwen3/ beside this file

Needs numpy only and never calls tokmeter. The goldens are decoder.py's in float64, over the weights *as stored*. The
values of every tensor are representable in the narrowest type used (bf16 for llama and qwen2, f16 for qwen3), so that
`llama/model.safetensors` and `llama/model.gguf` hold the same numbers and a bf16 engine starts from them exactly.

golden.json, per prompt: `token_ids`; `last_logits`, all logits after the last token; `top`, for every position the
five most likely next tokens as [id, log-probability]; `greedy.token_ids`, the sixteen tokens greedy decoding adds;
`greedy.min_gap`, the smallest distance between the best and the second logit along that path. Re-running rewrites
every file byte for byte.
"""
import json
import math
import pathlib

import numpy as np

from decoder import Decoder, head_dim, log_softmax, rope_factors, rope_frequencies
from formats import BOOL, F32, I32, STRING, U32, gguf, pretty, round_bf16, sharded

HERE = pathlib.Path(__file__).resolve().parent
PROMPT_LENGTHS = (1, 2, 7, 33, 64)
GREEDY_TOKENS = 16
TOP = 5
MIN_GAP = 0.02  # a greedy path nearer than this to a tie would make a fragile golden: choose another seed


# --- the models -------------------------------------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
MERGES = """Ġ t|Ġ a|h e|i n|r e|o n|Ġt he|e r|Ġ s|a t|Ġ w|Ġ o|e n|Ġ c|i t|i s|a n|o r|e s|Ġ b|e d|Ġ f|in g|Ġ p|o u|Ġa n|
Ġan d|a l|Ġt o|a r|Ġ m|Ġo f|Ġ in|Ġ d|Ġ h|l e|i c|a s|Ġ l|o m|Ġ Ġ|ĠĠ ĠĠ|en t|i on|Ġ n|v e|s t|r o|l l|ou r|k en|
t er|Ġto ken|Ġm e|Ġme ter|Ġ is|Ġb e|ĠĠĠĠ ĠĠĠĠ|Ċ Ċ|Ġw or""".replace("\n", "").split("|")


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
    "llama": dict(seed=193, stored="F32", shards=1, config=COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "head_dim": 16,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32}}),
    "qwen2": dict(seed=113, stored="BF16", shards=2, config=COMMON | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
        "tie_word_embeddings": True, "use_sliding_window": False, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}),
    "qwen3": dict(seed=97, stored="F16", shards=1, config=COMMON | {
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


# --- the vocabulary and the names of GGUF and tokenizer.json ----------------------------------------------------------

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
        out[gguf_name(name)] = interleave(value, heads[kind]) if kind in heads else value
    if config.get("rope_scaling"):
        plain = rope_frequencies(config | {"rope_scaling": None})
        out["rope_freqs.weight"] = rope_factors(config, plain).astype(np.float32)
    return out


def gguf_config(config, name):
    """The llama-architecture keys for an HF config."""
    return {
        "general.architecture": (STRING, "llama"), "general.name": (STRING, name), "general.alignment": (U32, 32),
        "general.file_type": (U32, 0), "llama.block_count": (U32, config["num_hidden_layers"]),
        "llama.context_length": (U32, config["max_position_embeddings"]),
        "llama.embedding_length": (U32, config["hidden_size"]),
        "llama.feed_forward_length": (U32, config["intermediate_size"]),
        "llama.attention.head_count": (U32, config["num_attention_heads"]),
        "llama.attention.head_count_kv": (U32, config["num_key_value_heads"]),
        "llama.attention.layer_norm_rms_epsilon": (F32, config["rms_norm_eps"]),
        "llama.rope.freq_base": (F32, config["rope_theta"]), "llama.rope.dimension_count": (U32, head_dim(config)),
        "llama.vocab_size": (U32, config["vocab_size"])}


def gguf_tokenizer():
    kinds = [3 if t in SPECIAL else 1 for t in TOKENS]  # 3: control, 1: normal
    return {
        "tokenizer.ggml.model": (STRING, "gpt2"), "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.tokens": (STRING, TOKENS), "tokenizer.ggml.token_type": (I32, kinds),
        "tokenizer.ggml.merges": (STRING, MERGES), "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2), "tokenizer.ggml.padding_token_id": (U32, 3),
        "tokenizer.ggml.unknown_token_id": (U32, 0), "tokenizer.ggml.add_bos_token": (BOOL, False),
        "tokenizer.ggml.add_space_prefix": (BOOL, False)}


def hf_tokenizer():
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": t} | flags for i, t in enumerate(SPECIAL)], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None, "decoder": byte_level | {"add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: i for i, t in enumerate(TOKENS)}, "merges": MERGES}}


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
            metadata = gguf_config(config, "tiny llama") | gguf_tokenizer()
            files["model.gguf"] = gguf(metadata, gguf_tensors(config, weights))
            files["tokenizer.json"] = pretty(hf_tokenizer())
        folder.mkdir(exist_ok=True)
        for file, data in files.items():
            (folder / file).write_bytes(data)
            print(f"{name}/{file}: {len(data)} bytes")


if __name__ == "__main__":
    main()
