#!/usr/bin/env python3
"""Pre-tokenisation goldens: how each `tokenizer.ggml.pre` type cuts a text before byte-pair merging.

    python3 tests/goldens/pretokenize.py        # rewrites pretokenize.json; needs the `regex` package

The rules are those documented in llama.cpp's src/llama-vocab.cpp, run here by an unrelated regular-expression
engine. A type may name several expressions: each is applied to the pieces that the one before it left, seeing
nothing beyond the piece. Text between two matches is a piece of its own. Special tokens are plain text here.
"""
import json
import pathlib

import regex

from probes import PROBES

# GPT-2's expression. llama.cpp writes it without the last alternative and matches lone spaces all the same.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3's, of which Qwen2's differs in cutting digits one by one.
LLAMA3 = (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
EXPRESSIONS = {
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
    "gpt-2": [GPT2],
}


def cut(piece, expression):
    end = 0
    for match in regex.finditer(expression, piece):
        if match.start() > end:
            yield piece[end:match.start()]
        yield match.group()
        end = match.end()
    if end < len(piece):
        yield piece[end:]


def pieces(text, expressions):
    parts = [text] if text else []
    for expression in expressions:
        parts = [p for part in parts for p in cut(part, expression)]
    assert "".join(parts) == text
    return parts


def main():
    out = {pre: [{"text": t, "pieces": pieces(t, e)} for t in PROBES] for pre, e in EXPRESSIONS.items()}
    blocks = []
    for pre, rows in out.items():
        lines = ",\n".join("    " + json.dumps(row) for row in rows)
        blocks.append(f'  "{pre}": [\n{lines}\n  ]')
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    print(f"{path.name}: {len(PROBES)} texts x {len(EXPRESSIONS)} types, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
