#!/usr/bin/env python3
"""Goldens of SmolLM2-135M-Instruct under teacher forcing: log-probabilities from llama.cpp over float32 weights.

    python3 tests/goldens/smollm2_logprobs.py SmolLM2-135M-Instruct.Q4_1.gguf

Rewrites smollm2_logprobs.jsonl, in the format of `tokmeter check --prompts`, and smollm2_logprobs.meta.json. Needs
numpy and llama-cpp-python. llama.cpp also quantises *activations* when weights are quantised, so the golden is not its
answer on the file as shipped: the weights are dequantised here to float32, written as an F32 GGUF to a temporary
folder, and evaluated with a float32 KV cache and without flash attention. Decoder, the numpy implementation behind
models/tiny, evaluates the same weights in float64; how far the two are apart is in the meta file, as is the
log-probability of each token that really came next.
"""
import hashlib
import json
import pathlib
import sys
import tempfile

import llama_cpp
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "models" / "tiny"))
from decoder import Decoder, log_softmax  # noqa: E402
from formats import gguf, pretty  # noqa: E402
from gguf_reader import read_gguf  # noqa: E402

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TOP = 8
GREEDY_TOKENS = 32
SETTINGS = dict(n_ctx=512, n_batch=512, n_ubatch=512, n_threads=2, n_threads_batch=2, n_gpu_layers=0, logits_all=True,
                type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False, seed=0)

PROMPTS = {
    "mill": """The old mill stood at the bend of the river, where the water ran slow and green under the willows. For
two hundred years it had ground the wheat of the valley, and then one autumn the wheel stopped and nobody came to
mend it. Swallows moved into the loft. Children dared each other to climb the ladder and look down at the great stones
lying still in the dark. When the new owner arrived from the city, she did not tear anything down. She oiled the
bearings, replaced eleven rotten paddles, and opened the sluice gate a hand's width. The whole building shivered, like
an animal waking up, and then, very slowly, the wheel began to turn.""",
    "heat": """A computer turns almost all of the electricity it uses into heat, and that heat has to go somewhere. In a
small office a fan is enough, because the air in the room is cooler than the chips and there is plenty of it. In a data
center with thousands of machines, the air itself becomes the problem. Engineers therefore bring water closer and closer
to the processors, first to the doors of the racks and finally to metal plates bolted onto the chips themselves. Warm
water leaving the building is not waste. In winter it can heat apartments, greenhouses, or a public swimming pool, and
the company that owns the computers can sell it.""",
    "code": """use std::collections::HashMap;

/// Counts how often each word occurs, ignoring case.
fn count_words(text: &str) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for word in text.split_whitespace() {
        let key = word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
        if !key.is_empty() {
            *counts.entry(key).or_insert(0) += 1;
        }
    }
    counts
}

fn main() {
    let counts = count_words("The cat and the hat.");
    assert_eq!(counts["the"], 2);
    println!("{} distinct words", counts.len());
}
""",
    "numbers": """Measured on 2026-03-14 at 09:26:53, three runs each:
batch  1: 113.4 tokens/s, 8.82 ms per token
batch  8: 702.9 tokens/s, 11.38 ms per token
batch 32: 1849.0 tokens/s, 17.31 ms per token
1 + 2 = 3, 2 + 3 = 5, 3 + 5 = 8, 5 + 8 = 13, 8 + 13 = 21, 13 + 21 = 34, 21 + 34 =""",
    "languages": """Le café était fermé, mais l'odeur du pain chaud flottait encore dans la rue. Über den Dächern
läutete eine Glocke. El niño preguntó: «¿Cuántas estrellas hay?» Η απάντηση ήταν σιωπή. Потом пошёл снег. 東京は今日も雨です。
안녕하세요! 🙂 The naïve résumé cost €5 – or £4½.""",
}


def canonical(metadata, weights):
    """HF config and names from a llama GGUF; Q and K rows go back from neighbouring to half-split pairs."""
    get = {k: v for k, (_, v) in metadata.items()}
    assert get["general.architecture"] == "llama"
    config = {"hidden_size": get["llama.embedding_length"], "num_hidden_layers": get["llama.block_count"],
              "num_attention_heads": get["llama.attention.head_count"],
              "num_key_value_heads": get["llama.attention.head_count_kv"],
              "rms_norm_eps": get["llama.attention.layer_norm_rms_epsilon"],
              "rope_theta": get["llama.rope.freq_base"], "tie_word_embeddings": "output.weight" not in weights}
    names = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    out = {"model.embed_tokens.weight": weights["token_embd.weight"],
           "model.norm.weight": weights["output_norm.weight"]}
    if "output.weight" in weights:
        out["lm_head.weight"] = weights["output.weight"]
    for i in range(config["num_hidden_layers"]):
        for short, name in names.items():
            value = weights[f"blk.{i}.{short}.weight"]
            if short in heads:
                rows, columns = value.shape
                pairs = value.reshape(heads[short], rows // heads[short] // 2, 2, columns)
                value = pairs.swapaxes(1, 2).reshape(rows, columns)
            out[f"model.layers.{i}.{name}.weight"] = value
    return config, out


class LlamaCpp:
    def __init__(self, path):
        self.llm = llama_cpp.Llama(str(path), verbose=False, **SETTINGS)

    def tokenize(self, text):
        return self.llm.tokenize(text.encode(), add_bos=False, special=False)

    def logits(self, ids):
        self.llm.reset()
        self.llm.eval(ids)
        return self.llm.scores[:len(ids)].astype(np.float64)

    def greedy(self, ids, count):
        """Token ids, and the logit gap between the best and the second at each step."""
        last, out, gaps = self.logits(ids)[-1], [], []
        while True:
            second, best = np.sort(last)[-2:]
            out.append(int(last.argmax()))
            gaps.append(best - second)
            if len(out) == count:
                return out, gaps
            self.llm.eval(out[-1:])
            last = self.llm.scores[self.llm.n_tokens - 1].astype(np.float64)

    def text(self, ids):
        return self.llm.detokenize(ids).decode(errors="replace")


def top_tokens(logprobs):
    order = np.argsort(-logprobs, kind="stable")[:TOP]
    return [[int(i), round(float(logprobs[i]), 6)] for i in order]


def next_logprobs(logprobs, ids):
    return logprobs[np.arange(len(ids) - 1), ids[1:]]


def distance(reference, other, ids):
    """How far apart two engines' log-probabilities are: for the tokens that came next, and for the reference's top."""
    best = np.argsort(-reference, axis=-1, kind="stable")[:, :TOP]
    top = np.abs(np.take_along_axis(reference - other, best, axis=-1))
    following = np.abs(next_logprobs(reference, ids) - next_logprobs(other, ids))
    agree = reference.argmax(-1) == other.argmax(-1)
    return {"next": following, "top": top.ravel(), "argmax_differs": ~agree}


def summary(distances):
    joined = {k: np.concatenate([d[k] for d in distances]) for k in distances[0]}
    out = {"positions": len(joined["argmax_differs"]), "argmax_differs": int(joined["argmax_differs"].sum())}
    for kind in ("next", "top"):
        for name, reduce in (("mean", np.mean), ("max", np.max)):
            out[f"{kind}_{name}_abs"] = float(f"{reduce(joined[kind]):.3g}")
    return out


def main(path):
    sha256 = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    assert sha256 == SHA256, f"{path} is not the published file: its sha256 is {sha256}"
    metadata, weights, stored = read_gguf(path)
    with tempfile.TemporaryDirectory() as folder:
        f32 = pathlib.Path(folder) / "f32.gguf"
        f32.write_bytes(gguf(metadata | {"general.file_type": (4, 0)}, weights))
        engine = LlamaCpp(f32)
        prompts = {name: engine.tokenize(text) for name, text in PROMPTS.items()}
        logprobs = {name: log_softmax(engine.logits(ids)) for name, ids in prompts.items()}
        greedy = {name: engine.greedy(ids, GREEDY_TOKENS) for name, ids in prompts.items()}
    quantised = LlamaCpp(path)
    model = Decoder(*canonical(metadata, weights))
    lines, per_prompt, to_numpy, to_quantised = [], {}, [], []
    for name, ids in prompts.items():
        continuation, gaps = greedy[name]
        own = log_softmax(model.logits(ids + continuation))
        to_numpy.append(distance(logprobs[name], own[:len(ids)], ids))
        to_quantised.append(distance(logprobs[name], log_softmax(quantised.logits(ids)), ids))
        follows = own[len(ids) - 1:-1].argmax(-1) == continuation
        lines.append({"id": name, "text": PROMPTS[name], "token_ids": ids,
                      "top": [top_tokens(row) for row in logprobs[name]],
                      "greedy": {"token_ids": continuation, "text": engine.text(continuation)}})
        per_prompt[name] = {
            "positions": len(ids), "numpy": summary(to_numpy[-1:]), "greedy_min_gap": round(min(gaps), 6),
            "greedy_confirmed_by_numpy": bool(follows.all()),
            "perplexity": round(float(np.exp(-next_logprobs(logprobs[name], ids).mean())), 6),
            "next_logprobs": [round(float(x), 6) for x in next_logprobs(logprobs[name], ids)]}
    meta = {"generator": "tests/goldens/smollm2_logprobs.py", "model": pathlib.Path(path).name, "sha256": sha256,
            "stored": stored, "engine": f"llama.cpp through llama-cpp-python {llama_cpp.__version__}",
            "weights": "dequantised to float32", "settings": SETTINGS, "distance_to_numpy_float64": summary(to_numpy),
            "distance_to_llama_cpp_on_the_quantised_file": summary(to_quantised), "prompts": per_prompt}
    body = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (HERE / "smollm2_logprobs.jsonl").write_text(body)
    (HERE / "smollm2_logprobs.meta.json").write_bytes(pretty(meta))
    print("numpy:", meta["distance_to_numpy_float64"])
    print("quantised file:", meta["distance_to_llama_cpp_on_the_quantised_file"])


if __name__ == "__main__":
    main(sys.argv[1])
