#!/usr/bin/env python3
"""What PyTorch makes of the same work on the same card: the peer that a speed of ours is a ratio of.

    scripts/torch_baseline.py --against record.json --out torch.json       # a record's static cells, and the ratios
    scripts/torch_baseline.py models/llama-3.1-8b.toml --batch 1,8,32,64 --depth 1024 --isl 2048 --out torch.json
    scripts/torch_baseline.py --self-test                                  # on the CPU: the numbers are a decoder's

A decoder with a static cache of keys and values, random weights and random contexts. Cells bear the record's keys, so
that a ratio is of the same work: `decode/b8/d1024/o64` makes 64 tokens for 8 sequences from a context of 1024. Runs of
both belong into one session on one card, in turns.

Whatever is a matter of choice is decided in PyTorch's favour:

- Every decode step of a pass is a CUDA graph of its own, captured at the exact length of its context, so that attention
  reads what ours reads, no more, and needs no mask. A mask would take it off the fast paths, and so would heads that
  share keys: they become the query rows of one head, [batch, kv_heads, group, head_dim] against [batch, kv_heads,
  length, head_dim]. A prompt is one graph too, whole, where ours is cut into chunks.
- Attention is timed at the cell's longest context on each backend that accepts the shapes (flash, cuDNN,
  memory-efficient; the plain one only where none of those does), and the fastest one runs. The output names it, and
  says why the others do not.
- Residual sums are part of the matrix products (beta = 1), norms are one kernel, and the next token stays on the
  device: the host reads nothing until a window ends, where ours reads every token.
- --compile has Inductor fuse what is left between products and attention, by layer. It takes minutes of a short
  session, so it is not the default; report both where there is time.

With --budget, no cell is begun once so many seconds are over. Needs Python 3.11 and torch 2.5 or later.
"""

import argparse
import json
import statistics
import sys
import time
import tomllib
import warnings

STARTED = time.monotonic()  # the budget counts the import, which takes some seconds

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
# A backend that plans for every length of context (cuDNN) may take so long for all of a cell's.
MOST_PLANNING_S = 10.0


class Config:
    """The [config] table of a models/*.toml, or `model.config` of a record."""

    def __init__(self, table, name, layers=None):
        if table["architecture"] not in ("llama", "mistral"):
            sys.exit(f"error: {name}: the baseline has no {table['architecture']}, expected llama or mistral")
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


def rotate(x, cos, sin):
    """x: [batch, tokens, heads, head_dim]; pairs are (i, i + head_dim / 2); cos and sin: f32 [tokens, 1, head_dim], the
    first half of sin negative."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, swapped, sin, out=torch.empty_like(x))


def add_product(x, a, weight):
    """x + a · weightᵀ. Eager, the sum is part of the product; Inductor rather fuses it with what follows."""
    if torch.compiler.is_compiling():
        return x + F.linear(a, weight)
    x.flatten(0, 1).addmm_(a.flatten(0, 1), weight.t())
    return x


def attend(q, keys, values):
    """q: [batch, tokens, heads, head_dim]; keys and values: [batch, kv_heads, length, head_dim]. One new token sees all
    keys, those of a whole prompt see each its own past. Returns [batch, tokens, heads · head_dim]."""
    tokens, heads, kv_heads = q.shape[1], q.shape[2], keys.shape[1]
    if tokens == 1:
        rows = q[:, 0].unflatten(1, (kv_heads, heads // kv_heads))
        return F.scaled_dot_product_attention(rows, keys, values).flatten(1)[:, None]
    q = q.transpose(1, 2)
    seen = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=heads != kv_heads)
    return seen.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self, config, weight):
        super().__init__()
        c = self.c = config
        self.attn_norm, self.mlp_norm = weight(c.hidden), weight(c.hidden)
        self.qkv = weight((c.heads + 2 * c.kv_heads) * c.head_dim, c.hidden)
        self.o_proj = weight(c.hidden, c.heads * c.head_dim)
        self.gate_up = weight(2 * c.intermediate, c.hidden)
        self.down = weight(c.hidden, c.intermediate)

    def project(self, x, cos, sin):
        c = self.c
        x = F.rms_norm(x, (c.hidden,), self.attn_norm, c.eps)
        heads = F.linear(x, self.qkv).unflatten(-1, (-1, c.head_dim))
        qk, v = heads.split([c.heads + c.kv_heads, c.kv_heads], dim=2)
        q, k = rotate(qk, cos, sin).split([c.heads, c.kv_heads], dim=2)
        return q, k, v

    def finish(self, x, attended):
        c = self.c
        x = add_product(x, attended, self.o_proj)
        gate, up = F.linear(F.rms_norm(x, (c.hidden,), self.mlp_norm, c.eps), self.gate_up).chunk(2, dim=-1)
        return add_product(x, F.silu(gate).mul_(up), self.down)

    def forward(self, x, cos, sin, cache, start):
        q, k, v = self.project(x, cos, sin)
        end = start + x.shape[1]
        for held, new in zip(cache, (k, v)):
            held[:, :, start:end].copy_(new.transpose(1, 2))
        return self.finish(x, attend(q, *(held[:, :, :end] for held in cache)))


class Decoder(nn.Module):
    """Random weights of the scale of trained ones. Never zeros: they draw less power, and a card then runs faster than
    it would in use."""

    def __init__(self, config, device, dtype, seed):
        super().__init__()
        c = self.c = config
        self.device, self.dtype = device, dtype
        torch.manual_seed(seed)

        def weight(*size):
            values = torch.empty(size, device=device, dtype=dtype)
            values = values.normal_(0.0, 0.02) if len(size) > 1 else values.fill_(1.0)
            return nn.Parameter(values, requires_grad=False)

        self.embedding = weight(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Layer(c, weight) for _ in range(c.layers))
        self.norm = weight(c.hidden)
        self.head = self.embedding if c.tied else weight(c.vocab, c.hidden)

    def new_caches(self, batch, context):
        """Keys and values of every layer, [2, batch, kv_heads, context, head_dim], filled with random numbers."""
        c = self.c
        size = (2, batch, c.kv_heads, context, c.head_dim)
        return [torch.randn(size, device=self.device, dtype=self.dtype) for _ in self.layers]

    def new_rotation(self, context):
        """cos and sin of every place, as `rotate` takes them."""
        c = self.c
        frequency = c.theta ** (-torch.arange(0, c.head_dim, 2, device=self.device).float() / c.head_dim)
        angle = torch.outer(torch.arange(context, device=self.device).float(), frequency)[:, None]
        return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)

    def forward(self, tokens, caches, rotation, start):
        """tokens: [batch, n] at places `start` and on, n = 1 or start = 0. Returns the last logits, [batch, vocab]."""
        assert tokens.shape[1] == 1 or start == 0
        x = F.embedding(tokens, self.embedding)
        cos, sin = (table[start : start + tokens.shape[1]] for table in rotation)
        for layer, cache in zip(self.layers, caches):
            x = layer(x, cos, sin, cache, start)
        return F.linear(F.rms_norm(x[:, -1], (self.c.hidden,), self.norm, self.c.eps), self.head)


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


def windows(work, device, seconds, repeat):
    """Seconds per piece of `work` in each of `repeat` windows of at least `seconds`."""
    timer = Timer(device)
    work()
    begin = timer.mark()
    work()
    once = max(timer.seconds(begin, timer.mark()), 1e-6)
    pieces = max(1, round(seconds / once))
    times = []
    for _ in range(repeat):
        begin = timer.mark()
        for _ in range(pieces):
            work()
        times.append(timer.seconds(begin, timer.mark()) / pieces)
    return times


def graphed(steps, device):
    """One piece of work that runs `steps` one after another, on a GPU each as a CUDA graph. Their memory is shared: they
    never run at once. Every step runs once before, so that nothing is planned or compiled within a capture."""
    if device.type == "cuda":
        stream, pool = torch.cuda.Stream(device), None
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for step in steps:
                step()
        torch.cuda.synchronize(device)
        replays = []
        for step in steps:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                step()
            pool = graph.pool()
            replays.append(graph.replay)
        steps = replays

    def run():
        for step in steps:
            step()

    return run


def host_s(work, device):
    """Seconds of the host until `work` has ended."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def choose_backend(model, caches, new_tokens, lengths):
    """(name, what was found of each) of the backend whose attention over all layers takes least at the last of
    `lengths`, unless it would plan for too long for all of them."""
    c, device = model.c, model.device
    q = torch.randn((caches[0].shape[1], new_tokens, c.heads, c.head_dim), device=device, dtype=model.dtype)
    found, times = {}, {}

    def attention(length):
        for cache in caches:
            attend(q, *(held[:, :, :length] for held in cache))

    for name, backend in BACKENDS.items():
        if name == "math" and times:
            found[name] = "not tried: another one accepts"
            continue
        with sdpa_kernel(backend), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                attention(lengths[-1])
                fresh_s, again_s = (host_s(lambda: attention(lengths[0]), device) for _ in range(2))
                planning_s = (fresh_s - again_s) * (len(lengths) - 1)
                if planning_s > MOST_PLANNING_S:
                    found[name] = f"not used: to plan for {len(lengths)} lengths would take {planning_s:.0f} s"
                    continue
                work = graphed([lambda: attention(lengths[-1])], device)
                times[name] = statistics.median(windows(work, device, 0.05, 3))
                found[name] = f"{times[name] / len(caches) * 1e6:.1f} us a layer"
            except RuntimeError as error:
                reasons = [str(warning.message) for warning in said] or [str(error)]
                found[name] = "refused: " + " ".join(" ".join(reasons).split())[:400]
    if not times:
        raise RuntimeError(f"no backend of attention runs: {found}")
    return min(times, key=times.get), found


def decode(model, batch, depth, osl, args):
    """A pass: `osl` tokens for each sequence from a context of `depth`; tokens stay on the device."""
    context, device = depth + osl, model.device
    caches, rotation = model.new_caches(batch, context), model.new_rotation(context)
    name, found = choose_backend(model, caches, 1, range(depth + 1, context + 1))
    token = torch.randint(model.c.vocab, (batch, 1), device=device)

    def step_at(place):
        return lambda: token.copy_(model(token, caches, rotation, place).argmax(dim=-1, keepdim=True))

    with sdpa_kernel(BACKENDS[name]):
        one_pass = graphed([step_at(place) for place in range(depth, context)], device)
        times = windows(one_pass, device, args.seconds, args.repeat)
    rate = batch * osl / statistics.median(times)
    return {"output_tokens_per_s": rate, "attention": name, "backends": found, "windows_s": times}


def prefill(model, batch, isl, args):
    """A prompt of `isl` tokens each to the first token."""
    device = model.device
    caches, rotation = model.new_caches(batch, isl), model.new_rotation(isl)
    name, found = choose_backend(model, caches, isl, [isl])
    prompt = torch.randint(model.c.vocab, (batch, isl), device=device)
    with sdpa_kernel(BACKENDS[name]):
        whole = graphed([lambda: model(prompt, caches, rotation, 0).argmax(dim=-1)], device)
        times = windows(whole, device, args.seconds, args.repeat)
    rate = batch * isl / statistics.median(times)
    return {"input_tokens_per_s": rate, "attention": name, "backends": found, "windows_s": times}


def cells_of(args, record):
    """(key, kind, batch, length, output tokens) of what is asked, or of a record's static cells."""
    if record:
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


def measure(cell, model, args):
    key, kind, batch, length, osl = cell
    if time.monotonic() - STARTED > args.budget:
        return {"key": key, "skipped": f"the budget of {args.budget:g} s was used up"}
    try:
        with torch.inference_mode():
            if kind == "decode":
                return {"key": key, **decode(model, batch, length, osl, args)}
            return {"key": key, **prefill(model, batch, length, args)}
    except RuntimeError as error:  # out of memory among them; the other cells may well run
        return {"key": key, "failed": str(error).splitlines()[0]}
    finally:
        if args.compile:
            torch.compiler.reset()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def ours(record, key):
    """Tokens per second of a cell: all tokens over all time of its windows."""
    cell = next(cell for cell in record["cells"] if cell["key"] == key)
    side = "tokens_in" if cell["workload"]["kind"] == "prefill" else "tokens_out"
    spans = [window for run in cell["runs"] for window in run["windows"]]
    seconds = sum(window["t1_ns"] - window["t0_ns"] for window in spans) / 1e9
    return sum(window[side] for window in spans) / seconds if seconds else None


def print_table(result, record):
    print(f"{'cell':<28} {'tokmeter':>12} {'torch':>12} {'ratio':>7}   tok/s; torch's attention")
    for cell in result["cells"]:
        own = ours(record, cell["key"]) if record else None
        peer = cell.get("output_tokens_per_s") or cell.get("input_tokens_per_s")
        number = lambda value, digits: f"{value:.{digits}f}" if value else "-"
        ratio = own / peer if own and peer else None
        words = cell.get("attention") or f"{'failed' if 'failed' in cell else 'skipped'}: " + cell.get(
            "failed", cell.get("skipped", "")
        )
        print(f"{cell['key']:<28} {number(own, 1):>12} {number(peer, 1):>12} {number(ratio, 2):>7}   {words}")


def self_test():
    """Tokens one by one after a part of the prompt, on each backend that this CPU has, against the whole prompt at once
    and against a decoder written out by the book."""
    table = {"architecture": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    table |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 101}
    table |= {"rms_norm_eps": 1e-5, "rope": {"theta": 10000.0}, "tie_word_embeddings": False}
    config = Config(table, "self-test")
    model = Decoder(config, torch.device("cpu"), torch.float32, 1)
    for name, weight in model.named_parameters():  # large enough for attention to matter, gains that are no ones
        random = torch.randn_like(weight)
        weight.copy_(1.0 + random / 4 if "norm" in name else random / weight.shape[-1] ** 0.5)
    prompt, part, length = torch.randint(config.vocab, (3, 21)), 5, 21
    by_the_book = written_out(model, prompt, shares=torch.Tensor.repeat_interleave)
    rotation, ran = model.new_rotation(length), []
    for name in BACKENDS:
        try:
            with torch.inference_mode(), sdpa_kernel(BACKENDS[name]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                whole = model(prompt, model.new_caches(3, length), rotation, 0)
                caches = model.new_caches(3, length)
                model(prompt[:, :part], caches, rotation, 0)
                for place in range(part, length):
                    stepwise = model(prompt[:, place : place + 1], caches, rotation, place)
        except RuntimeError:
            continue
        ran.append(name)
        for found, way in ((whole, "the whole prompt"), (stepwise, "token by token")):
            error = ((found - by_the_book).norm() / by_the_book.norm()).item()
            assert error < 1e-5, f"{way} on {name}: off by {error}"
    assert ran, "no backend runs"
    # What the test would not see is not tested: heads that share the wrong keys are far off.
    wrong = written_out(model, prompt, shares=lambda x, group, dim: x.repeat(1, group, 1, 1))
    assert (wrong - by_the_book).norm() > 0.01 * by_the_book.norm()
    # The path of a measurement, budget included.
    args = argparse.Namespace(seconds=0.001, repeat=2, budget=1e9, compile=False)
    cells = [("decode/b2/d9/o4", "decode", 2, 9, 4), ("prefill/b1/i12", "prefill", 1, 12, 1)]
    for cell in cells:
        figures = measure(cell, model, args)
        rate = figures.get("output_tokens_per_s") or figures.get("input_tokens_per_s")
        assert figures["attention"] in ran and rate > 0, figures
    args.budget = -1.0
    assert "budget" in measure(cells[0], model, args)["skipped"]
    print(f"ok: whole prompts and single tokens agree with the book on {', '.join(ran)}")


def written_out(model, tokens, shares):
    """Logits of the last place: no cache, no fused function, masks and all in f64."""
    c = model.c
    wide = {name: weight.double() for name, weight in model.state_dict().items()}
    norm = lambda x, gain: x / (x.pow(2).mean(-1, keepdim=True) + c.eps).sqrt() * gain
    batch, length = tokens.shape
    turn = c.theta ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)
    angle = torch.outer(torch.arange(length).double(), turn)
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(x):
        pairs = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    unseen = torch.ones(length, length).triu(1).bool()
    x = wide["embedding"][tokens]
    for index in range(c.layers):
        w = lambda name: wide[f"layers.{index}.{name}"]
        heads = (norm(x, w("attn_norm")) @ w("qkv").T).view(batch, length, -1, c.head_dim).transpose(1, 2)
        q, k, v = heads.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
        q, (k, v) = turned(q), (shares(part, c.heads // c.kv_heads, dim=1) for part in (turned(k), v))
        scores = (q @ k.transpose(2, 3) / c.head_dim**0.5).masked_fill(unseen, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1) @ w("o_proj").T
        gate, up = (norm(x, w("mlp_norm")) @ w("gate_up").T).chunk(2, dim=-1)
        x = x + (gate / (1 + (-gate).exp()) * up) @ w("down").T
    return norm(x[:, -1], wide["norm"]) @ wide["head"].T


def numbers(text):
    return [int(part) for part in text.split(",") if part]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="models/NAME.toml, for the shapes")
    parser.add_argument("--against", metavar="RECORD", help="shapes, type and static cells of this record; print ratios")
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--depth", type=numbers, default=[1024])
    parser.add_argument("--isl", type=numbers, default=[])
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES.values(), help="default: the record's, or bfloat16")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=1.0, help="shortest window")
    parser.add_argument("--repeat", type=int, default=3, help="windows")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no cell is begun")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a test")
    parser.add_argument("--compile", action="store_true", help="compile each layer but its attention")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the figures here (JSON)")
    parser.add_argument("--self-test", action="store_true", help="hold the decoder against one written out, on the CPU")
    args = parser.parse_args()
    if not args.self_test and bool(args.model) == bool(args.against):
        parser.error("expected the shapes of either a model or a record (--against)")
    return args


def shapes_and_dtype(args, record):
    if record:
        dtype = record["engine"]["compute_dtype"]
        if dtype not in DTYPES:
            sys.exit(f"error: {args.against}: its products are in {dtype}, expected one of {', '.join(DTYPES)}")
        return Config(record["model"]["config"], args.against, args.layers), args.dtype or DTYPES[dtype]
    with open(args.model, "rb") as file:
        return Config(tomllib.load(file)["config"], args.model, args.layers), args.dtype or "bfloat16"


def main():
    args = arguments()
    if args.compile:
        Layer.project, Layer.finish = (torch.compile(part, dynamic=False) for part in (Layer.project, Layer.finish))
    if args.self_test:
        return self_test()
    record = None
    if args.against:
        with open(args.against, encoding="utf-8") as file:
            record = json.load(file)
    config, dtype = shapes_and_dtype(args, record)
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = Decoder(config, device, getattr(torch, dtype), args.seed)
    result = {
        "what": "torch baseline of the same shapes: static cache, a CUDA graph for each step, random weights",
        "model": args.model or record["model"]["name"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": dtype,
        "layers": config.layers,
        "compiled": "by layer, without attention" if args.compile else False,
        "command": sys.argv,
        "cells": [],
    }
    for cell in cells_of(args, record):
        result["cells"].append(measure(cell, model, args))
        shown = {name: value for name, value in result["cells"][-1].items() if name != "windows_s"}
        print(json.dumps(shown), flush=True)
        if args.out:
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
    print_table(result, record)


if __name__ == "__main__":
    main()
