#!/usr/bin/env python3
"""What PyTorch makes of the same work on the same card: the peer that a speed of ours is a ratio of.

    scripts/torch_baseline.py models/llama-3.1-8b.toml --batch 1,8,32,64 --depth 1024 --isl 2048 --out torch.json
    scripts/torch_baseline.py models/llama-3.1-8b.toml --against record.json      # and print the ratios

A decoder with a static cache of keys and values, random weights and random contexts, each decode step one CUDA graph
(captured by torch.compile, or by hand with --no-compile), arg-max on the device, the token fed back without the host.
One token per sequence and step; a step's time is that of many steps between two events. Cells bear the record's keys, so
that a ratio is of the same work: `decode/b8/d1024/o64` decodes 64 tokens for 8 sequences from a context of 1024.

With --against, cells and seconds come from a record of tokmeter, and each line shows ours, theirs and the ratio. Runs of
both belong into one session on one card, in turns. Needs Python 3.11 and torch 2.5 or later; on a CPU it runs for its
own test (--device cpu).
"""

import argparse
import json
import statistics
import sys
import time
import tomllib

import torch
from torch import nn
from torch.nn import functional as F


class Config:
    """The [config] table of a models/*.toml."""

    def __init__(self, path, layers=None):
        with open(path, "rb") as file:
            table = tomllib.load(file)["config"]
        if table["architecture"] not in ("llama", "mistral"):
            sys.exit(f"error: {path}: the baseline has no {table['architecture']}, expected llama or mistral")
        self.hidden = table["hidden_size"]
        self.intermediate = table["intermediate_size"]
        self.layers = layers or table["num_hidden_layers"]
        self.heads = table["num_attention_heads"]
        self.kv_heads = table["num_key_value_heads"]
        self.head_dim = table.get("head_dim", self.hidden // self.heads)
        self.vocab = table["vocab_size"]
        self.eps = table["rms_norm_eps"]
        self.theta = table["rope"]["theta"]
        self.tied = table["tie_word_embeddings"]


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rotate(x, cos, sin):
    """x: [batch, heads, tokens, head_dim]; cos and sin: [tokens, head_dim / 2]; pairs are (i, i + head_dim / 2)."""
    one, other = x.float().chunk(2, dim=-1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1).type_as(x)


class Layer(nn.Module):
    def __init__(self, config, batch, context):
        super().__init__()
        c = self.c = config
        self.attn_norm = RMSNorm(c.hidden, c.eps)
        self.qkv = nn.Linear(c.hidden, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.mlp_norm = RMSNorm(c.hidden, c.eps)
        self.gate_up = nn.Linear(c.hidden, 2 * c.intermediate, bias=False)
        self.down = nn.Linear(c.intermediate, c.hidden, bias=False)
        # [batch, kv_heads, context, head_dim]
        cache = (batch, c.kv_heads, context, c.head_dim)
        self.register_buffer("k", torch.zeros(cache), persistent=False)
        self.register_buffer("v", torch.zeros(cache), persistent=False)

    def forward(self, x, positions, cos, sin, mask):
        c, (batch, tokens, _) = self.c, x.shape
        sizes = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        q, k, v = self.qkv(self.attn_norm(x)).split(sizes, dim=-1)
        q, k, v = (part.view(batch, tokens, -1, c.head_dim).transpose(1, 2) for part in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if mask is None:  # a whole prompt: only its own keys are seen
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        self.k.index_copy_(2, positions, k)
        self.v.index_copy_(2, positions, v)
        if mask is not None:
            attended = F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask, enable_gqa=True)
        x = x + self.o_proj(attended.transpose(1, 2).reshape(batch, tokens, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, config, batch, context):
        super().__init__()
        c = self.c = config
        self.embedding = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Layer(c, batch, context) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.head = nn.Linear(c.hidden, c.vocab, bias=False)
        if c.tied:
            self.head.weight = self.embedding.weight
        for table in ("cos", "sin"):  # f32 [context, head_dim / 2]
            self.register_buffer(table, torch.empty(context, c.head_dim // 2), persistent=False)
        self.register_buffer("places", torch.empty(context, dtype=torch.int64), persistent=False)

    def forward(self, tokens, positions, whole_prompt):
        """tokens: [batch, n] ids; positions: [n]; returns the next id of each sequence, [batch, 1]."""
        x = self.embedding(tokens)
        cos, sin = self.cos[positions], self.sin[positions]
        mask = None if whole_prompt else (self.places <= positions[:, None])[None, None]
        for layer in self.layers:
            x = layer(x, positions, cos, sin, mask)
        return self.head(self.norm(x[:, -1:])).argmax(dim=-1)


def build(config, batch, context, device, dtype, seed):
    """Random weights of the scale of trained ones; a context of random keys and values. Never zeros: they draw less
    power, and a card then runs faster than it would in use."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Decoder(config, batch, context)
    model = model.to(dtype).to_empty(device=device)
    frequency = config.theta ** (-torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    model.places = torch.arange(context, device=device)
    angle = torch.outer(model.places.float(), frequency)
    model.cos, model.sin = angle.cos(), angle.sin()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.normal_(0.0, 0.02)
        for layer in model.layers:
            layer.k.normal_()
            layer.v.normal_()
    return model.eval()


class Timer:
    """Seconds on the device between two points of its queue."""

    def __init__(self, device):
        self.is_cuda = device.type == "cuda"

    def mark(self):
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin, end):
        if not self.is_cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def windows(work, timer, args):
    """Seconds per piece of `work`: the median over `--repeat` windows of at least `--seconds` each."""
    work()
    begin = timer.mark()
    work()
    once = max(timer.seconds(begin, timer.mark()), 1e-6)
    pieces = max(1, round(args.seconds / once))
    times = []
    for _ in range(args.repeat):
        begin = timer.mark()
        for _ in range(pieces):
            work()
        times.append(timer.seconds(begin, timer.mark()) / pieces)
    return statistics.median(times), times


def graphed(step, device):
    """`step` as one CUDA graph, captured by hand after three steps on a stream of its own."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def decode(model, batch, depth, osl, device, args):
    """A pass of `osl` steps from a context of `depth` tokens and one more; tokens stay on the device."""
    token = torch.randint(model.c.vocab, (batch, 1), device=device)
    position = torch.tensor([depth], device=device)
    forward = model if args.no_compile else torch.compile(model, fullgraph=True)

    def step():
        token.copy_(forward(token, position, False))
        position.add_(1)

    with torch.inference_mode():
        step()
        run = graphed(step, device) if device.type == "cuda" else step

        def one_pass():
            position.fill_(depth)
            for _ in range(osl):
                run()

        seconds, times = windows(one_pass, Timer(device), args)
    return {"output_tokens_per_s": batch * osl / seconds, "windows_s": times}


def prefill(model, batch, isl, device, args):
    """A prompt of `isl` tokens each to the first token."""
    prompt = torch.randint(model.c.vocab, (batch, isl), device=device)
    positions = torch.arange(isl, device=device)
    forward = model if args.no_compile else torch.compile(model, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        seconds, times = windows(lambda: forward(prompt, positions, True), Timer(device), args)
    return {"input_tokens_per_s": batch * isl / seconds, "windows_s": times}


def cells_of(args):
    """(key, kind, batch, length, output tokens) of what is asked, or of a record's static cells."""
    if args.against:
        with open(args.against, encoding="utf-8") as file:
            record = json.load(file)
        for cell in record["cells"]:
            work = cell["workload"]
            if work["kind"] == "decode":
                yield cell["key"], "decode", work["batch"], work["depth"], work["osl"]
            elif work["kind"] == "prefill":
                yield cell["key"], "prefill", work["batch"], work["isl"], 1
        return
    for batch in args.batch:
        for depth in args.depth:
            yield f"decode/b{batch}/d{depth}/o{args.osl}", "decode", batch, depth, args.osl
    for isl in args.isl:
        yield f"prefill/b1/i{isl}", "prefill", 1, isl, 1


def measure(cell, config, device, dtype, args):
    key, kind, batch, length, osl = cell
    model = build(config, batch, length + osl + 1, device, dtype, args.seed)
    run = {"decode": lambda: decode(model, batch, length, osl, device, args)}
    run["prefill"] = lambda: prefill(model, batch, length, device, args)
    try:
        return {"key": key, **run[kind]()}
    except torch.cuda.OutOfMemoryError as error:
        return {"key": key, "failed": str(error).splitlines()[0]}
    finally:
        del model
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def ours(record, key):
    """Tokens per second of a cell: all tokens over all time of its windows."""
    cell = next(cell for cell in record["cells"] if cell["key"] == key)
    side = "tokens_in" if cell["workload"]["kind"] == "prefill" else "tokens_out"
    spans = [window for run in cell["runs"] for window in run["windows"]]
    seconds = sum(window["t1_ns"] - window["t0_ns"] for window in spans) / 1e9
    return sum(window[side] for window in spans) / seconds if seconds else None


def print_ratios(result, path):
    with open(path, encoding="utf-8") as file:
        record = json.load(file)
    print(f"{'cell':<28} {'tokmeter':>12} {'torch':>12} {'ratio':>7}   tok/s")
    for cell in result["cells"]:
        own = ours(record, cell["key"])
        peer = cell.get("output_tokens_per_s") or cell.get("input_tokens_per_s")
        if own and peer:
            print(f"{cell['key']:<28} {own:>12.1f} {peer:>12.1f} {own / peer:>7.2f}")
        else:
            print(f"{cell['key']:<28} {'-' if not own else f'{own:.1f}':>12} {cell.get('failed', '-')}")


def numbers(text):
    return [int(part) for part in text.split(",") if part]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="models/NAME.toml, for the shapes")
    parser.add_argument("--against", metavar="RECORD", help="measure the static cells of this record and print ratios")
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--depth", type=numbers, default=[1024])
    parser.add_argument("--isl", type=numbers, default=[])
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=2.0, help="shortest window")
    parser.add_argument("--repeat", type=int, default=3, help="windows")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a test")
    parser.add_argument("--no-compile", action="store_true", help="plain PyTorch in a CUDA graph captured by hand")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the figures here (JSON)")
    return parser.parse_args()


def main():
    args = arguments()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = Config(args.model, args.layers)
    torch.set_float32_matmul_precision("high")
    result = {
        "what": "torch baseline of the same shapes: static cache, CUDA graphs, random weights",
        "model": args.model,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": args.dtype,
        "compiled": not args.no_compile,
        "command": sys.argv,
        "cells": [],
    }
    for cell in cells_of(args):
        result["cells"].append(measure(cell, config, device, dtype, args))
        print(json.dumps({name: value for name, value in result["cells"][-1].items() if name != "windows_s"}))
        if args.out:
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
    if args.against:
        print_ratios(result, args.against)


if __name__ == "__main__":
    main()
