#!/usr/bin/env python3
"""llama.cpp's speed on this machine, as one JSON line: the peer that `cargo bench` prints beside tokmeter's numbers.

    python3 tests/goldens/llama_cpp_speed.py MODEL.gguf [--threads N] [--runs 5]

Decode: batch 1, 128 greedy tokens one by one after a 16-token prompt. Prefill: 512 tokens in one batch. Both are
medians over the runs, after one that is not counted; loading, and the prompt of the decode run, are outside the clock.
Each step ends when its arg-max is known on the host. The model runs as it is stored, and with llama.cpp's defaults
otherwise. Needs numpy and llama-cpp-python.
"""
import argparse
import json
import os
import pathlib
import statistics
import time

import llama_cpp
import numpy as np

PROMPT, DECODE, PREFILL = 16, 128, 512


class Peer:
    def __init__(self, path, threads):
        self.llm = llama_cpp.Llama(path, n_ctx=1024, n_batch=PREFILL, n_ubatch=PREFILL, n_threads=threads,
                                   n_threads_batch=threads, n_gpu_layers=0, verbose=False)
        self.tokens = np.random.default_rng(7).integers(0, self.llm.n_vocab(), PREFILL).tolist()

    def step(self, tokens):
        """Feeds the tokens and returns the most likely next one."""
        self.llm.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(self.llm.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.llm.n_vocab(),)).argmax())

    def decode_seconds(self):
        self.llm.reset()
        token = self.step(self.tokens[:PROMPT])
        start = time.perf_counter()
        for _ in range(DECODE):
            token = self.step([token])
        return time.perf_counter() - start

    def prefill_seconds(self):
        self.llm.reset()
        start = time.perf_counter()
        self.step(self.tokens)
        return time.perf_counter() - start


def rates(seconds, tokens, runs):
    """Tokens per second: the median over the runs, and all of them."""
    seconds()
    each = [tokens / seconds() for _ in range(runs)]
    return round(statistics.median(each), 2), [round(x, 2) for x in each]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    peer = Peer(args.model, args.threads)
    prefill, prefill_runs = rates(peer.prefill_seconds, PREFILL, args.runs)
    decode, decode_runs = rates(peer.decode_seconds, DECODE, args.runs)
    print(json.dumps({
        "engine": "llama.cpp", "llama_cpp_python": llama_cpp.__version__, "model": pathlib.Path(args.model).name,
        "threads": args.threads, "decode_output_tokens_per_second": decode,
        "prefill_input_tokens_per_second": prefill, "decode_runs": decode_runs, "prefill_runs": prefill_runs}))


if __name__ == "__main__":
    main()
