#!/usr/bin/env python3
"""Predicts how long every operation of Llama-3.1-8B takes on GPUs that have not run it, from compiled kernels alone.

    scripts/predict_kernels.py --out results/DATE-predictions/llama-3.1-8b-bf16.json
    scripts/predict_kernels.py --check FILE       # made of today's kernels? says so, 1 where not
    scripts/predict_kernels.py --self-test        # planted changes move the counts as they should

Counted: registers and shared memory (ptxas); instructions, bytes of shared memory and mma of a trip of the hot loop, which
is the shortest way round it with all copies and mma, of the end of a tile and of the rest, which are the longest ways
(nvdisasm); trips (the launch arithmetic of src/backend/cuda, what a warp has to do over what one trip does of it); bytes
and flops (kernels/README.md).

    kernel = max(memory, l2, shared, issue, tensor, pace) + chain + gap - hidden      (max of both without a hot loop)
    memory = DRAM bytes / min(read bandwidth, bytes in flight / DRAM latency)         l2 = bytes / L2 bandwidth
    shared, issue, tensor = of the busiest multiprocessor: bytes / 128, warp instructions / (4 issue efficiency),
             flops of its mma / (rate of mma.sync, tensor efficiency), in cycles
    pace   = instructions of one warp in its hot loop at the pace of a warp that waits for itself, once for each wave
    chain  = round trips to L2 and DRAM that wait for each other before the first byte and after the last, and the
             instructions of one warp outside of its hot loop at that pace
    gap    = from the end of a kernel to the start of the next; it is hidden as far as the weights that a block asks for
             before it waits take time, if it fits beside the blocks of the kernel before
    operation = its kernels, each behind the one before, the first behind the last (`peaks --ops` repeats it)
    step      = all kernels of a step in their order, and the host once

What no source was found for is a guess and marked as one (`basis`). The model knows no throttling, no contention for
pages of DRAM, no halves of an L2, and takes all instructions for alike, f64 too: a miss above 15 % means that it is wrong
at that operation.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import kernel_matrix
import nvrtc
import sass

SCHEMA = "tokmeter-prediction/1"
MODEL = "llama-3.1-8b"
DTYPE = "bf16"
DECODE_BATCHES = [1, 8, 32, 64]
DEPTH = 1024
PREFILL_TOKENS = 2048
FILES = ["attention", "embed", "gemm", "norm", "rope", "sample", "silu"]


# ---- Assumptions --------------------------------------------------------------------------------------------------
def figure(value, unit, basis, source):
    """`basis`: `source` (somebody published or measured it), `computed` (from such), `recalled` (not looked up again) or `guess`."""
    return {"value": value, "unit": unit, "basis": basis, "source": source}


def missing(reason):
    return {"missing": reason}


ASSUMPTIONS = {
    "issue_efficiency": figure(0.7, "share of 4 warp instructions a cycle", "guess", "barriers and waits of a block take the rest"),
    "tensor_efficiency": figure(0.85, "share of the rate of mma.sync", "guess", "copies, fragments and barriers between the products"),
    "dependent_cpi": figure(3.0, "cycles an instruction", "guess", "between an issue slot and the latency of an ALU instruction, with two to four warps on a scheduler"),
    "graph_gap_ns": figure(800.0, "ns", "guess", "about 1300 ns without dependent launch on an H100 (Hazy Research, Look Ma, No Bubbles, 2025)"),
    "queued_gap_ns": figure(1000.0, "ns", "guess", "prefill is not captured: the host runs ahead of kernels of this length"),
    "host_step_ns": figure(15000.0, "ns", "guess", "once a step: the graph's launch and the wait for the sampled ids"),
    "shared_bytes_per_cycle": figure(128.0, "bytes a cycle and multiprocessor", "source", "CUDA programming guide: 32 banks of 4 bytes"),
    "activations_in_l2": figure(1.0, "share", "guess", "what a kernel of a decode step writes, the next finds in L2; weights, keys and values come from DRAM"),
    "library_share": figure(0.9, "share of the large square product", "guess", "cuBLASLt at a model's shapes, 2048 rows"),
}

CHIPS = "https://chipsandcheese.com/p/nvidias-b200-keeping-the-cuda-juggernaut"
HOPPER_RATE = "NVIDIA/cudnn-frontend pull request 650: 989.5 TFLOP/s = 132 SMs x 1.83 GHz x 4096"
HOPPER_MMA = "arXiv 2402.13499: mma reaches 62.9 % of the peak that wgmma has, 0.629 x 4096"
B200_FACTS = "pytorch/ao pull request 4002, properties read from a B200"
PRO_FACTS = "NVIDIA/cudnn-frontend pull request 1164, quoting NVIDIA's RTX Blackwell PRO paper"
RATES = "zzc0721/torch-performance-test-data issue 161"


def hopper(toml_name, names, bandwidth, matmul):
    return {
        "names": names,
        "architecture": "sm_90a",
        "memory": toml_name,
        "multiprocessors": figure(132, "multiprocessors", "source", HOPPER_RATE),
        "clock_hz": figure(1.83e9, "Hz", "source", HOPPER_RATE),
        "shared_bytes": figure(228 << 10, "bytes a multiprocessor", "source", "CUDA programming guide, compute capability 9.0"),
        "threads": figure(2048, "threads a multiprocessor", "source", "CUDA programming guide, compute capability 9.0"),
        "mma_flops_per_cycle": figure(2576, "flops a cycle and multiprocessor", "recalled", HOPPER_MMA),
        "read_bandwidth_bytes_per_s": bandwidth,
        "matmul_flops_per_s": matmul,
        "l2_bandwidth_bytes_per_s": figure(6.5e12, "bytes/s", "guess", "27 bytes a cycle and multiprocessor"),
        "l2_latency_ns": figure(160.0, "ns", "guess", f"as a B200's within a partition ({CHIPS}: about 150 ns)"),
        "dram_latency_ns": figure(650.0, "ns", "guess", "under load"),
    }


DEVICES = {
    "h100-sxm": hopper(
        "h100", ["NVIDIA H100 80GB HBM3"],
        figure(3.05e12, "bytes/s", "guess", "91 % of the data sheet; 88 to 90 % are commonly measured by copies"),
        figure(7.5e14, "flops/s", "guess", "76 % of the data sheet's 989 TFLOP/s, random data at the power limit, as an H200 does"),
    ),
    "h200": hopper(
        "h200", ["NVIDIA H200"],
        figure(4.3e12, "bytes/s", "source", "copy measured on an H200 with driver 580.159; reading is taken for as fast"),
        figure(7.8e14, "flops/s", "source", "square product of 8192 in bf16 on random data, 769 to 798 TFLOP/s measured on that H200"),
    ),
    "b200": {
        "names": ["NVIDIA B200"],
        "architecture": "sm_100a",
        "memory": "b200",
        "multiprocessors": figure(148, "multiprocessors", "source", B200_FACTS),
        "clock_hz": figure(1.85e9, "Hz", "computed", "2250 TFLOP/s of the data sheet / (148 SMs x 8192)"),
        "shared_bytes": figure(228 << 10, "bytes a multiprocessor", "source", B200_FACTS),
        "threads": figure(2048, "threads a multiprocessor", "source", "CUDA programming guide, compute capability 10.0"),
        "mma_flops_per_cycle": figure(2048, "flops a cycle and multiprocessor", "guess", "an A100's rate; FlashAttention-2, which uses mma.sync, reaches 361 of the 561 TFLOP/s that this gives (meta-pytorch/tritonbench pull request 171)"),
        "read_bandwidth_bytes_per_s": figure(7.0e12, "bytes/s", "guess", "91 % of the 7.67 TB/s that the driver's bus width and clock give (pytorch/ao pull request 4002)"),
        "matmul_flops_per_s": figure(1.61e15, "flops/s", "source", "cuBLAS at 8192 (https://pyptx.dev/performance/)"),
        "l2_bandwidth_bytes_per_s": figure(8.2e12, "bytes/s", "guess", "30 bytes a cycle and multiprocessor, of which some cross the dies"),
        "l2_latency_ns": figure(150.0, "ns", "source", f"{CHIPS}, within a partition"),
        "dram_latency_ns": figure(750.0, "ns", "guess", "under load, half of it across the dies"),
    },
    "rtx-pro-6000-blackwell": {
        "names": ["NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"],
        "architecture": "sm_120a",
        "memory": None,
        "memory_bytes_per_s": figure(1.792e12, "bytes/s", "source", "NVIDIA's data sheet: GDDR7 at 28 Gbit/s, 512 bits"),
        "multiprocessors": figure(188, "multiprocessors", "source", PRO_FACTS),
        "clock_hz": figure(2.6e9, "Hz", "computed", "125 TFLOP/s in f32 of the data sheet / (24,064 lanes x 2)"),
        "shared_bytes": figure(100 << 10, "bytes a multiprocessor", "source", "CUDA programming guide, compute capability 12.0"),
        "threads": figure(1536, "threads a multiprocessor", "source", "CUDA programming guide, compute capability 12.0"),
        "mma_flops_per_cycle": figure(1024, "flops a cycle and multiprocessor", "computed", "an eighth of the data sheet's 4000 TOPS (sparse FP4) / (188 SMs x 2.6 GHz)"),
        "read_bandwidth_bytes_per_s": figure(1.65e12, "bytes/s", "guess", "92 % of the data sheet"),
        "matmul_flops_per_s": figure(4.17e14, "flops/s", "source", f"square product of 8192 in bf16, Server Edition ({RATES}); a Workstation Edition had 350 (issue 160)"),
        "l2_bandwidth_bytes_per_s": figure(7.0e12, "bytes/s", "guess", "14 bytes a cycle and multiprocessor"),
        "l2_latency_ns": figure(180.0, "ns", "guess", "as a B200's at another clock and topology"),
        "dram_latency_ns": figure(600.0, "ns", "guess", "under load"),
    },
}
REGISTERS = 65536
REGISTER_STEP = 256  # a warp's registers are given in so many
RESERVED_SHARED = 1024  # of each block, from compute capability 8.0 on
MOST_BLOCKS = 32


# ---- Machine code -------------------------------------------------------------------------------------------------
class Block:
    """Instructions without a branch in between."""

    def __init__(self):
        self.ops, self.next = [], []


class Code:
    """One kernel's machine code as a graph. Slow paths are left out: what is called, and what divergent warps take."""

    def __init__(self, entry, text):
        kernel = sass.Kernel(entry, text)
        ops = [kernel.opcode(at) for at in range(len(kernel.instructions))]
        # A block begins where control may come from elsewhere, and behind what sends it elsewhere.
        jumps = {at: after for at, after in enumerate(kernel.next) if after != [at + 1]}
        begins = {0} | {at + 1 for at in jumps} | {to for after in jumps.values() for to in after}
        starts = sorted(at for at in begins if at < len(ops))
        number = {at: index for index, at in enumerate(starts)}
        self.blocks = []
        for start, end in zip(starts, [*starts[1:], len(ops)]):
            block = Block()
            block.ops = [op for op in ops[start:end] if op != "NOP"]
            block.next = [number[to] for to in kernel.next[end - 1]]
            self.blocks.append(block)
        self.loops = self.find_loops()

    def reachable(self):
        seen, waiting = set(), [0]
        while waiting:
            at = waiting.pop()
            if at not in seen:
                seen.add(at)
                waiting += self.blocks[at].next
        return seen

    def find_loops(self):
        """Natural loops: header -> the blocks in it, by back edges to a dominator."""
        alive = self.reachable()
        before = {at: [] for at in alive}
        for at in alive:
            for to in self.blocks[at].next:
                before[to].append(at)
        dominators = {at: set(alive) for at in alive}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for at in sorted(alive - {0}):
                common = set.intersection(*(dominators[b] for b in before[at])) | {at}
                if common != dominators[at]:
                    dominators[at], changed = common, True
        loops = {}
        for at in alive:
            for to in self.blocks[at].next:
                if to in dominators[at]:
                    body, waiting = {to}, [at]
                    while waiting:
                        block = waiting.pop()
                        if block not in body:
                            body.add(block)
                            waiting += before[block]
                    loops[to] = loops.get(to, set()) | body
        return loops

    def ops_of(self, blocks):
        return [op for at in blocks for op in self.blocks[at].ops]

    def inner(self, region, but=None):
        """Headers of the outermost loops strictly inside of `region`."""
        inside = [h for h, body in self.loops.items() if body <= region and h != but]
        return [h for h in inside if not any(h in self.loops[o] and o != h and o in inside for o in inside)]

    def way(self, region, entry, trips, avoid, best_of, header=None):
        """Counts along the way from `entry` through `region` that is largest by `best_of`, loops taken `trips(header)` times,
        blocks with instructions to `avoid` left out."""
        inner = self.inner(region, header)
        home = {at: h for h in inner for at in self.loops[h]}
        best = {}

        def out_of(node):
            blocks = self.loops[node] if node in inner else [node]
            for at in blocks:
                for to in self.blocks[at].next:
                    to = home.get(to, to)
                    if to in region and to != node and to != header:
                        yield to

        def own(node):
            if node in inner:
                times = trips(node)
                return scaled(self.way(self.loops[node], node, trips, avoid, best_of, node), times) if times else Counter()
            return counts(self.blocks[node].ops)

        def walk(node):
            if node not in best:
                best[node] = None  # a way that comes back here is none
                ways = [walk(to) for to in sorted(set(out_of(node))) if not self.shunned(to, inner, avoid)]
                best[node] = own(node) + max((way for way in ways if way is not None), key=best_of, default=Counter())
            return best[node]

        return walk(home.get(entry, entry) if entry != header else entry)

    def shunned(self, node, inner, avoid):
        blocks = self.loops[node] if node in inner else [node]
        return any(op.split(".")[0] in avoid for at in blocks for op in self.blocks[at].ops)


def most_instructions(way):
    return way["instructions"]


def steady(way):
    """All tensor-core instructions and copies, and nothing that can be left out."""
    return way["mma"] + way["copies"], -way["instructions"]


def width(op):
    return 16 if ".128" in op or op.startswith("LDSM") and ".4" in op else 8 if ".64" in op else 4


def counts(ops):
    """What matters of instructions, of one warp."""
    found = Counter(instructions=len(ops))
    for op in ops:
        name = op.split(".")[0]
        if name == "HMMA":
            found["mma"] += 1
        if name in ("LDS", "STS", "LDSM", "LDGSTS"):
            found["shared_bytes"] += 32 * width(op)
        if name == "LDGSTS":
            found["copies"] += 1
        if name == "LDG":
            found["loads"] += 1
            found["l2_loads"] += "STRONG" in op
        if name in ("STG", "RED", "ATOMG", "MEMBAR", "CALL"):
            found[name.lower()] += 1
        if name == "MUFU":
            found["exp2"] += ".EX2" in op
    return found


def scaled(found, factor):
    return Counter({what: count * factor for what, count in found.items()})


class Trips:
    """How often each loop of a kernel runs: what a warp has to do of something, over what one trip does of it. A loop that
    was given no such work is one that this shape does not enter."""

    def __init__(self, code, entry):
        self.code, self.entry, self.of, self.roles = code, entry, {}, {}

    def features(self, header):
        return counts(self.code.ops_of(self.code.loops[header]))

    def candidates(self, marker, also=None, lacks=None):
        """Innermost loops with `marker`, those that do most of it first and of these the shortest."""
        found = []
        for header, body in self.code.loops.items():
            features = self.features(header)
            nested = any(self.features(inner)[marker] for inner in self.code.inner(body, header))
            if features[marker] and not nested and not (also and not features[also]) and not (lacks and features[lacks]):
                found.append((-features[marker], features["instructions"], header))
        return [header for *_, header in sorted(found)]

    def give(self, role, needed, marker, also=None, lacks=None, unit=None):
        """`unit`: one trip does this much of `marker`, or a small multiple where the compiler unrolled."""
        free = [h for h in self.candidates(marker, also, lacks) if h not in self.of]
        if unit:
            free = sorted((h for h in free if self.features(h)[marker] % unit == 0), key=lambda h: self.features(h)[marker])
        if not free:
            sys.exit(f"{self.entry}: no loop for {role}, expected one with {marker}; it is not the kernel that this model is of")
        self.of[free[0]] = needed / self.features(free[0])[marker]
        self.roles[role] = free[0]

    def give_around(self, role, inside, times):
        """The loop around that of the role `inside`."""
        inner = self.roles[inside]
        outer = [h for h, body in self.code.loops.items() if inner in body and h != inner]
        header = min(outer, key=lambda h: len(self.code.loops[h]))
        self.of[header], self.roles[role] = times, header

    def __call__(self, header):
        return self.of.get(header, 0)

    def uncounted(self):
        """Loops with tensor-core instructions that nothing was said of: the model would be silently wrong."""
        return [header for header in self.candidates("mma") if header not in self.of]


# ---- Kernels ------------------------------------------------------------------------------------------------------
@dataclass
class Kernel:
    """One launch: what the host asks for, and what a warp of it has to do."""

    entry: str
    grid: list
    threads: int
    give: object  # (Trips): the work of a warp
    shared_bytes: int = 0
    dram_bytes: float = 0
    l2_bytes: float = 0
    waits: dict = field(default_factory=dict)  # {"l2" or "dram": round trips that wait for each other}, outside of loops
    loop_waits: list = field(default_factory=list)  # (roles, "l2" or "dram"): each trip waits once; nested roles multiply
    hot: str = None  # role of the loop that does the work
    mma: int = 0  # tensor-core instructions of a trip of it, if the compiler does not unroll
    copies: int = 0  # copies to shared memory of such a trip
    in_flight: int = 0  # bytes that a block keeps on their way from DRAM
    prefetched: int = 0  # of them asked for before it waits for the kernel before it
    working_blocks: int = 0  # where not all of the grid work
    ends: float = 0  # ends of tiles within the hot loop
    adds_wait: int = 0  # values that a thread adds one after another, where it does so by loading
    never: tuple = ()  # instructions that a launch of this shape does not meet
    flops: float = 0  # of a library's kernel

    def blocks(self):
        return self.working_blocks or math.prod(self.grid)


class Shape:
    """Sizes of the model and of one step, in the letters of kernels/README.md."""

    def __init__(self, config, kind, batch, length):
        self.h, self.f, self.v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        self.hd, self.heads, self.kv_heads = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
        self.q, self.k, self.layers = self.heads * self.hd, self.kv_heads * self.hd, config["num_hidden_layers"]
        self.kind, self.batch, self.length = kind, batch, length
        self.is_decode = kind == "decode"
        self.tokens = batch if self.is_decode else batch * length
        self.context = length + 1 if self.is_decode else length
        self.attended = batch * self.context if self.is_decode else batch * length * (length + 1) // 2

    def name(self):
        return f"{self.kind}/b{self.batch}/{'d' if self.is_decode else 'i'}{self.length}"

    def moved(self, activations, others=0):
        """Activations of a decode step stay in L2, those of a long prompt do not."""
        dram, l2 = (others, activations) if self.is_decode else (others + activations, 0)
        return {"dram_bytes": dram, "l2_bytes": l2}

    def kv_bytes(self):
        return 4 * self.batch * self.context * self.k


def work(shape, op):
    """Bytes and flops of one operation: kernels/README.md, and `Op::work` in src/arch/cost.rs with `peaks --ops`."""
    s, t = shape, shape.tokens
    weights, others, multiplied = {
        "embed": (t * s.h, t * s.h, 0),
        "attn_in": ((s.q + 2 * s.k) * s.h, t * (s.h + s.q + 2 * s.k), t * s.h * (s.q + 2 * s.k)),
        "attention": (0, 2 * t * s.q + 2 * s.k * s.batch * s.context, 2 * s.q * s.attended),
        "attn_out": (s.h * s.q, t * (s.q + 2 * s.h), t * s.q * s.h),
        "mlp_in": (2 * s.f * s.h, t * (s.h + s.f), 2 * t * s.h * s.f),
        "mlp_out": (s.h * s.f, t * (s.f + 2 * s.h), t * s.f * s.h),
        "logits": (s.v * s.h, s.batch * s.h, s.batch * s.h * s.v),
    }[op]
    # The gain of a norm is kept in f32 on the device.
    gains = 4 * s.h if op in ("attn_in", "mlp_in", "logits") else 0
    return 2 * (weights + others) + gains + (4 * s.batch if op == "logits" else 0), 2.0 * multiplied


def stream(epilogue, rows, columns, depth, machine):
    """gemm_stream: src/backend/cuda/products.rs, and `Deal` in kernels/gemm.cu."""
    p, silu = min(64, max(8, 1 << (rows - 1).bit_length())), epilogue == "silu"
    tiles, steps = -(-columns // (64 if silu else 128)), -(-depth // 64)
    grid = machine["multiprocessors"] * (1 if machine["architecture"].startswith("sm_12") else 2)
    blocks = min(grid, tiles * steps)
    units = -(-tiles * steps // blocks)
    is_shared = tiles * steps % blocks != 0 or units % steps != 0
    parts = 0 if not is_shared else -(-steps // units) + 1 if units < steps else 2
    sums = p // 2  # of a thread: 128 p / 256

    def give(of):
        of.give("units", units * sums, "mma", unit=sums)
        of.give("first weights", 3 * 4, "copies", lacks="mma")
        of.give("parts", parts * sums, "l2_loads", unit=sums)

    weights = (2 if silu else 1) * columns * depth * 2
    return Kernel(
        f"gemm_stream_{DTYPE}_{epilogue}_{p}", [grid, 1, 1], 256, give, 4 * (16384 + 128 * p), dram_bytes=weights,
        # Activations are read again for every tile; parts are written and read.
        l2_bytes=weights + tiles * rows * depth * 2 + 2 * tiles * parts * p * 128 * 4,
        # The first tokens; then a part is stored and fenced, and its ticket drawn.
        waits={"l2": 3 if is_shared else 1}, loop_waits=[(["parts"], "l2")], hot="units", mma=sums, copies=4 + -(-p // 32), in_flight=3 * 16384,
        prefetched=3 * 16384, working_blocks=blocks, ends=max(1, units / steps + (1 if is_shared else 0)),
        adds_wait=sums if epilogue == "residual" else 0,
    )


def tiled(epilogue, rows, columns, depth):
    silu = epilogue == "silu"
    across, down = -(-columns // (64 if silu else 128)), -(-rows // 128)
    weights = (2 if silu else 1) * columns * depth * 2

    def give(of):
        of.give("units", -(-depth // 32) * 32, "mma", unit=32)

    # A group of eight rows of tiles reads the weights once from DRAM, its other reads are L2's.
    return Kernel(
        f"gemm_tiled_{DTYPE}_{epilogue}", [across, down, 1], 256, give, dram_bytes=weights * -(-down // 8) + rows * depth * 2,
        l2_bytes=across * down * 256 * depth * 2, waits={"dram": 1}, hot="units", mma=32, copies=4, in_flight=2 * 16384,
    )


def library(rows, columns, depth):
    """cuBLASLt: no machine code to count."""
    moved = 2 * (columns * depth + rows * depth + rows * columns)
    return Kernel("cublaslt", [], 0, None, dram_bytes=moved, flops=2.0 * rows * columns * depth)


def norm(shape, rows, gathers=False):
    def give(of):
        of.give("squares", shape.h / 1024, "loads", lacks="stg")
        of.give("normed", shape.h / 2048 * 4, "loads", also="stg")

    return Kernel(
        f"rms_norm_{DTYPE}", [rows, 1, 1], 256, give, **shape.moved(rows * shape.h * 6, 4 * shape.h), waits={"l2": int(gathers)},
        loop_waits=[(["squares"], "l2"), (["normed"], "dram")],
    )


def rope(shape):
    heads = shape.heads + 2 * shape.kv_heads
    threads = min(128, max(32, -(-shape.hd // 2 // 32) * 32))

    def give(of):
        of.give("pairs", shape.hd / 2 / threads * 2, "stg")

    return Kernel(f"rope_kv_{DTYPE}", [shape.tokens, heads, 1], threads, give, **shape.moved(shape.tokens * heads * shape.hd * 6),
                  waits={"l2": 2}, never=("BAR",))  # no norm over heads


def embed(shape):
    def give(of):
        of.give("values", shape.h / 2048, "loads")

    values = shape.tokens * shape.h
    return Kernel(
        f"embed_{DTYPE}", [shape.tokens, 1, 1], 256, give, **shape.moved(4 * values, 2 * values), waits={"l2": 2},
        loop_waits=[(["values"], "dram")],
    )


def sample(shape):
    chunks = -(-shape.v // 4096)

    def first(of):
        of.give("logits", 4096 / 256, "loads")
        of.give("best of warps", 7 * 256, "shared_bytes", lacks="loads")

    def second(of):
        of.give("chunks", chunks / 32 * 2, "loads")

    moved = 4 * shape.batch * shape.v
    return [
        Kernel("sample_stage1", [chunks, shape.batch, 1], 256, first, l2_bytes=moved, waits={"l2": 1}, loop_waits=[(["logits"], "l2")],
               never=("MUFU",)),  # greedy: no noise
        Kernel("sample_stage2", [shape.batch, 1, 1], 32, second, waits={"l2": 1}, loop_waits=[(["chunks"], "l2")]),
    ]


def host_constant(file, name):
    """From the host's source, so that a change there is a change here."""
    text = nvrtc.read(os.path.join(nvrtc.ROOT, "src", "backend", "cuda"), file).decode()
    return int(re.search(rf"const {name}: usize = (\d+);", text)[1])


def splits_of(shape, machine):
    """`splits` of src/backend/cuda/attend.rs: enough for two blocks on each multiprocessor."""
    groups, most = shape.batch * shape.kv_heads, host_constant("attend.rs", "MAX_SPLITS")
    usual = max(machine["multiprocessors"] // groups, host_constant("attend.rs", "USUAL_SPLITS"))
    return max(1, min(-(-2 * machine["multiprocessors"] // groups), usual, most))


def attention_decode(shape, machine):
    pages, group, splits = -(-shape.context // 16), shape.heads // shape.kv_heads, splits_of(shape, machine)
    of_warp = -(-pages // splits) / 4
    outputs = group * shape.hd // 128  # of each thread in the merges

    def give(of):
        of.give("pages", max(1, of_warp) * 32, "mma", unit=32)
        of.give("first page", 16, "copies", lacks="mma")
        # Warps are brought together by another loop where the result is the output: that one divides.
        is_output = {"also": "call"} if splits == 1 else {"lacks": "call"}
        of.give("merge of warps", outputs * 4, "exp2", **is_output)
        if splits > 1:
            of.give("weights of splits", splits, "exp2", also="l2_loads")
            of.give("largest of splits", splits, "l2_loads", lacks="exp2")
            of.give_around("merge of splits", "weights of splits", outputs)

    nested = [(["merge of splits", role], "l2") for role in ("weights of splits", "largest of splits")]
    return Kernel(
        f"attention_decode_{DTYPE}_{shape.hd}", [shape.batch, shape.kv_heads, splits], 128, give, 64 << 10, dram_bytes=shape.kv_bytes(),
        l2_bytes=shape.kv_bytes() + 4 * shape.tokens * shape.q, waits={"l2": 5 if splits > 1 else 3, "dram": 1},
        loop_waits=nested if splits > 1 else [], hot="pages", mma=32, copies=16, in_flight=min(4, 4 * of_warp) * 8192,
    )


def attention_prefill(shape):
    tiles = -(-shape.length // 64)
    mean = (tiles + 1) / 2  # of key tiles that a tile of rows sees: blocks are even only on average

    def give(of):
        of.give("keys", mean * 128, "mma", unit=128)
        of.give("first keys", 16, "copies", lacks="mma")

    read = tiles * shape.batch * shape.heads * mean * 64 * shape.hd * 4
    return Kernel(
        f"attention_prefill_{DTYPE}_{shape.hd}", [tiles * shape.batch, shape.heads, 1], 128, give, 64 << 10,
        dram_bytes=shape.kv_bytes() + 4 * shape.tokens * shape.q, l2_bytes=read, waits={"l2": 3}, hot="keys", mma=128, copies=16,
    )


def product(epilogue, rows, columns, depth, products, machine):
    if rows <= 64:
        return [stream(epilogue, rows, columns, depth, machine)]
    if products == "own":
        return [tiled(epilogue, rows, columns, depth)]
    if epilogue != "silu":
        return [library(rows, columns, depth)]
    grid, moved = [rows, -(-columns // 2048), 1], 6 * rows * columns
    return [library(rows, 2 * columns, depth), Kernel(f"silu_mul_{DTYPE}", grid, 256, lambda of: None, dram_bytes=moved, waits={"dram": 1})]


def kernels_of(op, s, products, machine):
    """The launches of one operation in their order: src/backend/cuda/ops.rs."""
    by = (products, machine)
    return {
        "embed": lambda: [embed(s)],
        "attn_in": lambda: [norm(s, s.tokens), *product("store_f32", s.tokens, s.q + 2 * s.k, s.h, *by), rope(s)],
        "attention": lambda: [attention_decode(s, machine) if s.is_decode else attention_prefill(s)],
        "attn_out": lambda: product("residual", s.tokens, s.h, s.q, *by),
        "mlp_in": lambda: [norm(s, s.tokens), *product("silu", s.tokens, s.f, s.h, *by)],
        "mlp_out": lambda: product("residual", s.tokens, s.h, s.f, *by),
        "logits": lambda: [norm(s, s.batch, gathers=True), *product("store_f32", s.batch, s.v, s.h, *by), *sample(s)],
    }[op]()


OPS = ["embed", "attn_in", "attention", "attn_out", "mlp_in", "mlp_out", "logits"]
LAYER = OPS[1:-1]


# ---- Counting -----------------------------------------------------------------------------------------------------
class Compiled:
    """All kernels for one architecture: machine code, and what ptxas says of it."""

    def __init__(self, architecture, folder=nvrtc.KERNELS, files=FILES):
        self.architecture, self.texts, self.resources, self.codes = architecture, {}, {}, {}
        library, nvdisasm = nvrtc.find(), kernel_matrix.find_nvdisasm() or sys.exit("nvdisasm was not found\nhint: pip install -r scripts/requirements.txt")
        self.version = nvrtc.Nvrtc(library).version()
        with ThreadPoolExecutor(2) as pool:
            for texts, rows in pool.map(lambda name: one_file(name, architecture, folder, library, nvdisasm), files):
                self.texts.update(texts)
                self.resources.update({row[0]: row for row in rows})

    def code(self, entry):
        if entry not in self.codes:
            self.codes[entry] = Code(entry, self.texts[entry])
        return self.codes[entry]


def one_file(name, architecture, folder, library, nvdisasm):
    image, log = nvrtc.Nvrtc(library).compile(name, architecture, folder, ["--ptxas-options=-v"])
    return sass.texts(nvdisasm, image), kernel_matrix.resources(log, architecture)


@dataclass
class Counted:
    """What machine code and shape say of one launch, each of one warp."""

    of: Trips
    trips: float
    per_trip: Counter
    end: Counter  # more than a trip at the end of a tile
    outside: Counter

    def all(self, ends):
        return scaled(self.per_trip, self.trips) + scaled(self.end, ends) + self.outside


def count(kernel, code):
    of = Trips(code, kernel.entry)
    kernel.give(of)
    hot = of.roles.get(kernel.hot)
    avoid = ("CALL", *kernel.never)
    outside = code.way(code.reachable(), 0, lambda h: 0 if h == hot else of(h), avoid, most_instructions)
    if hot is None:
        return Counted(of, 0, Counter(), Counter(), outside)
    if of.uncounted():
        sys.exit(f"{kernel.entry}: a loop with tensor-core instructions has no trip count")
    body = code.loops[hot]
    round_trip = lambda inner, best_of: code.way(body, hot, inner, avoid, best_of, hot)
    per_trip = round_trip(lambda h: 0, steady)
    copying = [h for h in code.inner(body, hot) if of.features(h)["copies"]]
    if copying:
        # What the loop does not copy itself, the loop within it does.
        times = max(0, kernel.copies - per_trip["copies"]) / of.features(copying[0])["copies"]
        per_trip = round_trip(lambda h: times if h == copying[0] else 0, steady)
    unrolled = per_trip["mma"] / kernel.mma
    if not unrolled or unrolled % 1 or abs(per_trip["copies"] - unrolled * kernel.copies) > 0.01 * kernel.copies:
        found = f"{per_trip['mma']} tensor-core instructions and {per_trip['copies']:.1f} copies"
        sys.exit(f"{kernel.entry}: {found} in a trip, expected {kernel.mma} and {kernel.copies} or a multiple; the model is not of this kernel")
    end = round_trip(of, most_instructions) - per_trip if kernel.ends else Counter()
    return Counted(of, of(hot), per_trip, end, outside)


# ---- Timing -------------------------------------------------------------------------------------------------------
def assumed(name):
    return ASSUMPTIONS[name]["value"]


def machine_of(device):
    """A device's figures as numbers."""
    return {name: fact["value"] if isinstance(fact, dict) and "value" in fact else fact for name, fact in device.items()}


def taken(kernel, row):
    """Registers, shared memory and threads of a block."""
    registers = -(-row[2] * 32 // REGISTER_STEP) * REGISTER_STEP * -(-kernel.threads // 32)
    return registers, row[3] + kernel.shared_bytes + RESERVED_SHARED, kernel.threads


def fitting(kernel, row, machine, beside=(0, 0, 0)):
    """Blocks of a kernel that a multiprocessor holds beside what others take."""
    room = (REGISTERS, machine["shared_bytes"], machine["threads"])
    return max(0, min(MOST_BLOCKS, *((all_ - used) // own for all_, used, own in zip(room, beside, taken(kernel, row)))))


class Timer:
    """Times launches on one device."""

    def __init__(self, compiled, device):
        self.compiled, self.machine, self.counted = compiled, machine_of(device), {}

    def count(self, kernel):
        key = (kernel.entry, tuple(kernel.grid), kernel.l2_bytes, kernel.dram_bytes)
        if key not in self.counted:
            self.counted[key] = count(kernel, self.compiled.code(kernel.entry))
        return self.counted[key]

    def terms(self, kernel, resident):
        machine, ns = self.machine, 1e9 / self.machine["clock_hz"]
        rate = machine["read_bandwidth_bytes_per_s"]
        if kernel.flops:
            tensor = kernel.flops / (machine["matmul_flops_per_s"] * assumed("library_share")) * 1e9
            return {"memory": kernel.dram_bytes / rate * 1e9, "tensor": tensor}
        if kernel.in_flight:
            on_their_way = min(kernel.blocks(), resident * machine["multiprocessors"]) * kernel.in_flight
            rate = min(rate, on_their_way / machine["dram_latency_ns"] * 1e9)
        counted = self.count(kernel)
        all_, in_loop = counted.all(kernel.ends), math.ceil(counted.trips) * counted.per_trip["instructions"]
        waves = -(-kernel.blocks() // (resident * machine["multiprocessors"]))
        warps = -(-kernel.blocks() // machine["multiprocessors"]) * -(-kernel.threads // 32)
        return {
            "memory": kernel.dram_bytes / rate * 1e9,
            "l2": kernel.l2_bytes / machine["l2_bandwidth_bytes_per_s"] * 1e9,
            "shared": warps * all_["shared_bytes"] / assumed("shared_bytes_per_cycle") * ns,
            "issue": warps * all_["instructions"] / (4 * assumed("issue_efficiency")) * ns,
            "tensor": warps * all_["mma"] * 4096 / (machine["mma_flops_per_cycle"] * assumed("tensor_efficiency")) * ns,
            "pace": waves * in_loop * assumed("dependent_cpi") * ns,
        }

    def round_trips(self, kernel):
        counted, trips = self.count(kernel), Counter(kernel.waits)
        for roles, where in kernel.loop_waits:
            trips[where] += math.prod(math.ceil(counted.of(counted.of.roles[role])) for role in roles)
        reduces = any(op.startswith("RED") for op in self.compiled.code(kernel.entry).ops_of(self.compiled.code(kernel.entry).reachable()))
        trips["l2"] += 0 if reduces else kernel.adds_wait
        return trips

    def hidden(self, kernel, before, row, gap_ns):
        """Of the gap, what the weights take that a block asks for before it waits."""
        if not kernel.prefetched or before is None or before.entry == "cublaslt":
            return 0.0
        old = self.compiled.resources[before.entry]
        held = min(fitting(before, old, self.machine), -(-before.blocks() // self.machine["multiprocessors"]))
        beside = tuple(held * part for part in taken(before, old))
        blocks = min(fitting(kernel, row, self.machine, beside), -(-kernel.blocks() // self.machine["multiprocessors"]))
        early = blocks * self.machine["multiprocessors"] * kernel.prefetched
        return min(gap_ns, early / self.machine["read_bandwidth_bytes_per_s"] * 1e9)

    def launch(self, kernel, before, gap_ns):
        """One launch behind `before`."""
        if kernel.flops:
            terms, found, chain_ns, hidden_ns = self.terms(kernel, 0), {"machine_code": missing("a library's kernel")}, 0.0, 0.0
        else:
            row = self.compiled.resources[kernel.entry]
            resident = fitting(kernel, row, self.machine) or sys.exit(f"{kernel.entry} does not fit on a multiprocessor")
            terms, waits, counted = self.terms(kernel, resident), self.round_trips(kernel), self.count(kernel)
            alone = (counted.outside + counted.end)["instructions"]
            chain_ns = waits["l2"] * self.machine["l2_latency_ns"] + waits["dram"] * self.machine["dram_latency_ns"]
            chain_ns += alone * assumed("dependent_cpi") * 1e9 / self.machine["clock_hz"]
            hidden_ns = self.hidden(kernel, before, row, gap_ns)
            found = {"machine_code": {
                "registers": row[2], "static_shared_bytes": row[3], "spill_bytes": row[4], "grid": kernel.grid, "threads": kernel.threads,
                "dynamic_shared_bytes": kernel.shared_bytes, "resident_blocks": resident, "trips": round(counted.trips, 3),
                "instructions_per_trip": round(counted.per_trip["instructions"], 1), "mma_per_trip": round(counted.per_trip["mma"], 1),
                "instructions_at_a_tiles_end": round(counted.end["instructions"], 1), "tile_ends": round(kernel.ends, 2),
                "instructions_outside": round(counted.outside["instructions"], 1),
                "instructions_per_warp": round(counted.all(kernel.ends)["instructions"]),
                "l2_round_trips": waits["l2"], "dram_round_trips": waits["dram"],
            }}
        limit = max(terms, key=terms.get)
        # Without a loop that does the work, what the warps issue together is the chain itself.
        busy_ns = terms[limit] + chain_ns if kernel.hot or kernel.flops else max(terms[limit], chain_ns)
        return {
            "entry": kernel.entry, "dram_bytes": round(kernel.dram_bytes), "l2_bytes": round(kernel.l2_bytes),
            "terms_ns": {name: round(value, 1) for name, value in terms.items()}, "limited_by": limit,
            "chain_ns": round(chain_ns, 1), "gap_ns": gap_ns, "hidden_ns": round(hidden_ns, 1),
            "time_ns": round(busy_ns + gap_ns - hidden_ns, 1), **found,
        }


def bound(machine, moved, flops):
    memory, matmul = moved / machine["read_bandwidth_bytes_per_s"] * 1e9, flops / machine["matmul_flops_per_s"] * 1e9
    return max(memory, matmul), "memory" if memory >= matmul else "matmul"


def one_op(op, shape, products, timer):
    kernels = kernels_of(op, shape, products, timer.machine)
    gap_ns = assumed("graph_gap_ns" if shape.is_decode else "queued_gap_ns")
    launches = [timer.launch(kernel, kernels[at - 1], gap_ns) for at, kernel in enumerate(kernels)]
    moved, flops = work(shape, op)
    time_ns, (bound_ns, by) = sum(launch["time_ns"] for launch in launches), bound(timer.machine, moved, flops)
    return {
        "op": op, "times_in_a_step": shape.layers if op in LAYER else 1, "time_ns": round(time_ns, 1), "bytes": moved, "flops": flops,
        "bound_ns": round(bound_ns, 1), "bound_by": by, "bound_share": round(bound_ns / time_ns, 4), "kernels": launches,
    }


def whole_step(shape, products, timer):
    """All launches of a step behind each other; every layer is like the second, whose first kernel follows a layer's last."""
    gap_ns = assumed("graph_gap_ns" if shape.is_decode else "queued_gap_ns")
    of = lambda op: kernels_of(op, shape, products, timer.machine)
    layer = [kernel for op in LAYER for kernel in of(op)]
    sequence = [(kernel, 1) for kernel in of("embed")] + [(kernel, shape.layers) for kernel in layer] + [(kernel, 1) for kernel in of("logits")]
    time_ns, before = 0.0, None
    for kernel, times in sequence:
        time_ns += times * timer.launch(kernel, before, gap_ns)["time_ns"]
        before = kernel
    return time_ns + assumed("host_step_ns"), sum(times for _, times in sequence)


def one_step(shape, products, timer):
    ops = [one_op(op, shape, products, timer) for op in OPS]
    time_ns, launches = whole_step(shape, products, timer)
    bound_ns = sum(op["bound_ns"] * op["times_in_a_step"] for op in ops)
    return {
        "step": shape.name(), "products": products, "launches": launches, "time_ns": round(time_ns, 1), "bound_ns": round(bound_ns, 1),
        "bound_share": round(bound_ns / time_ns, 4), "ops": ops,
    }


def steps(config):
    decode = [(Shape(config, "decode", batch, DEPTH), "own") for batch in DECODE_BATCHES]
    return decode + [(Shape(config, "prefill", 1, PREFILL_TOKENS), products) for products in ("own", "cublaslt")]


# ---- The file -----------------------------------------------------------------------------------------------------
def read_toml(*parts):
    with open(os.path.join(nvrtc.ROOT, *parts), "rb") as file:
        return tomllib.load(file)


def described(name, device, gpus, compiled, config):
    facts = {key: value for key, value in device.items() if isinstance(value, dict)}
    if device["memory"]:
        listed = gpus[device["memory"]]
        facts["memory_bytes_per_s"] = figure(listed["memory_bytes_per_s"], "bytes/s", "source", f"devices/gpus.toml: {listed['source']}")
    facts["graph_node_ns"] = ASSUMPTIONS["graph_gap_ns"]
    mma = device["mma_flops_per_cycle"]
    rate = mma["value"] * device["multiprocessors"]["value"] * device["clock_hz"]["value"]
    facts["mma_flops_per_s"] = figure(rate, "flops/s", mma["basis"], f"every multiprocessor at its clock; {mma['source']}")
    timer = Timer(compiled, device)
    return {"name": name, "device_names": device["names"], "architecture": device["architecture"], "facts": facts,
            "steps": [one_step(shape, products, timer) for shape, products in steps(config)]}


def keys(folder=nvrtc.KERNELS):
    return {name: nvrtc.source_key(name, folder) for name in FILES}


def git(*arguments):
    done = subprocess.run(["git", "-C", nvrtc.ROOT, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def commit():
    head = git("rev-parse", "HEAD")
    if head is None:
        return missing("not_a_git_checkout")
    return head + ("-changed" if git("status", "--porcelain", "--", "kernels", "src/backend/cuda", "scripts/predict_kernels.py") else "")


def prediction(folder, devices):
    model, gpus = read_toml("models", f"{MODEL}.toml"), read_toml("devices", "gpus.toml")
    compiled = {arch: Compiled(arch, folder) for arch in sorted({device["architecture"] for device in devices.values()})}
    return {
        "schema": SCHEMA, "model": model["name"], "compute_dtype": DTYPE, "commit": commit(),
        "compiler": f"NVRTC {next(iter(compiled.values())).version}", "kernels": keys(folder), "assumptions": ASSUMPTIONS,
        "devices": [described(name, device, gpus, compiled[device["architecture"]], model["config"]) for name, device in devices.items()],
    }


def one_line_each(value, depth=0):
    """JSON with a line for whatever holds no list of objects: a kernel is a line, and a change of one is a line of a diff."""
    is_deep = lambda part: isinstance(part, dict) and any(isinstance(v, (dict, list)) for v in part.values())
    pad = "  " * (depth + 1)
    if isinstance(value, dict) and is_deep(value) and "entry" not in value:
        lines = [f"{pad}{json.dumps(key)}: {one_line_each(part, depth + 1)}" for key, part in value.items()]
        return "{\n" + ",\n".join(lines) + "\n" + "  " * depth + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(pad + one_line_each(part, depth + 1) for part in value) + "\n" + "  " * depth + "]"
    return json.dumps(value, ensure_ascii=False)


def table(made):
    """The prediction in short."""
    for device in made["devices"]:
        print(f"\n{device['name']} ({device['architecture']}): µs, and share of the bound")
        print("".join(f"{title:>16}" for title in ["step", "products", *OPS, "step"]))
        for step in device["steps"]:
            cells = [f"{op['time_ns'] / 1e3:.1f} {op['bound_share'] * 100:3.0f} %" for op in [*step["ops"], step]]
            print("".join(f"{cell:>16}" for cell in [step["step"], step["products"], *cells]))


def check(path):
    with open(path) as file:
        committed = json.load(file)
    if committed.get("schema") != SCHEMA:
        sys.exit(f"{path}: schema {committed.get('schema')}, expected {SCHEMA}")
    now = keys()
    others = sorted(name for name in now.keys() | committed["kernels"].keys() if now.get(name) != committed["kernels"].get(name))
    if others:
        print(f"{path}: predicted for other kernels, of {committed['commit']}: {', '.join(others)} changed since")
        return 1
    print(f"{path}: predicted for these kernels")
    return 0


# ---- Planted changes ----------------------------------------------------------------------------------------------
def readme_work():
    """(operation, batch) -> MB and Gflop as the table of kernels/README.md has them, context 1024 with the new token."""
    rows = {}
    for line in nvrtc.read(nvrtc.KERNELS, "README.md").decode().splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if cells[0] in OPS and len(cells) == 7:
            numbers = [float(cell.replace(",", "")) for cell in cells[1:]]
            rows[cells[0], 1], rows[cells[0], 64] = (numbers[0], numbers[2]), (numbers[3], numbers[5])
    return rows


def work_differs(config, of=work):
    """Operations whose bytes or flops are not those of kernels/README.md, to the digits that it prints."""
    near = lambda found, told: abs(found - told) <= 0.05 * max(told, 0.1)
    for (op, batch), (megabytes, gigaflops) in readme_work().items():
        moved, flops = of(Shape(config, "decode", batch, DEPTH - 1), op)
        if not near(moved / 1e6, megabytes) or not near(flops / 1e9, gigaflops):
            yield f"{op} at batch {batch}: {moved / 1e6:.1f} MB and {flops / 1e9:.3f} Gflop, kernels/README.md has {megabytes} and {gigaflops}"


def with_text(compiled, entry, change):
    """The same kernels, the machine code of one changed line by line."""
    changed = Compiled.__new__(Compiled)
    changed.__dict__.update(compiled.__dict__)
    text = "\n".join(line for old in compiled.texts[entry].splitlines() for line in change(old))
    changed.texts, changed.codes = {**compiled.texts, entry: text}, {}
    return changed


def refused(call):
    """Why the program would end, or None."""
    try:
        call()
    except SystemExit as why:
        return str(why)
    return None


def self_test():
    config, device = read_toml("models", f"{MODEL}.toml")["config"], DEVICES["h100-sxm"]
    shape = Shape(config, "decode", 1, DEPTH)
    compiled = Compiled("sm_90a", files=["gemm", "norm"])
    product = stream("residual", 1, shape.h, shape.q, machine_of(device))
    launch = lambda of, facts=device, kernel=product: Timer(of, facts).launch(kernel, kernel, 800.0)
    before = launch(compiled)
    instructions = lambda found: found["machine_code"]["instructions_per_trip"]
    is_op = lambda line, op: re.search(rf"\b{op}\b", line.split(";")[0])
    twice = lambda line: [line, line] if is_op(line, "(LDS|IMAD|IADD3|LOP3|VIADD)") else [line]
    faults = []

    def expect(what, holds):
        print(f"{'found ' if holds else 'missed'} {what}")
        faults.extend([] if holds else [what])

    slower = launch(with_text(compiled, product.entry, twice))
    expect("instructions of the hot loop doubled: more a trip, and more time to issue them",
           instructions(slower) > 1.3 * instructions(before) and slower["terms_ns"]["issue"] > before["terms_ns"]["issue"])
    waiting = launch(with_text(compiled, product.entry, lambda line: [re.sub(r"\bREDG?\.", "STG.", line)]))
    expect("the epilogue loads and stores instead of adding in L2: more round trips",
           waiting["machine_code"]["l2_round_trips"] == before["machine_code"]["l2_round_trips"] + 4)
    more_mma = with_text(compiled, product.entry, lambda line: [line] * (2 if is_op(line, "HMMA") else 1))
    expect("twice the tensor-core instructions for the same copies: refused", "expected" in (refused(lambda: launch(more_mma)) or ""))
    no_mma = with_text(compiled, product.entry, lambda line: [] if is_op(line, "HMMA") else [line])
    expect("no tensor-core instructions: refused", "no loop for units" in (refused(lambda: launch(no_mma)) or ""))
    narrow = {**device, "read_bandwidth_bytes_per_s": figure(1e12, "bytes/s", "guess", "planted")}
    expect("a third of the bandwidth: three times as long in memory", launch(compiled, narrow)["terms_ns"]["memory"] > 3 * before["terms_ns"]["memory"])
    taken_up = {**device, "shared_bytes": figure(80 << 10, "bytes", "guess", "planted")}
    expect("less shared memory: one block fits, and no gap is hidden",
           launch(compiled, taken_up)["machine_code"]["resident_blocks"] == 1 and launch(compiled, taken_up)["hidden_ns"] == 0 < before["hidden_ns"])
    wide = stream("residual", 1, 2 * shape.h, shape.q, machine_of(device))
    expect("twice the rows of the weight: twice the bytes and the units",
           wide.dram_bytes == 2 * product.dram_bytes and launch(compiled, kernel=wide)["machine_code"]["trips"] >= 1.9 * before["machine_code"]["trips"])
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.join(folder, "kernels")
        shutil.copytree(nvrtc.KERNELS, folder, ignore=shutil.ignore_patterns("prebuilt"))
        text = nvrtc.read(folder, "norm.cu").decode()
        planted = text.replace("block_sum(sum, scratch) / d", "(block_sum(sum, scratch) + block_sum(sum * 2.0f, scratch)) / d")
        with open(os.path.join(folder, "norm.cu"), "w") as file:
            file.write(planted)
        changed = Compiled("sm_90a", folder, ["norm"])
        both = [launch(of, kernel=norm(shape, 1))["machine_code"]["instructions_outside"] for of in (compiled, changed)]
        expect("a second sum over the block in norm.cu: more instructions", planted != text and both[1] > both[0] + 20)
        expect("another norm.cu: another key", keys(folder)["norm"] != keys()["norm"] and keys(folder)["gemm"] == keys()["gemm"])
    wrong = list(work_differs(config))
    for fault in wrong:
        print(fault)
    expect("bytes and flops are those of kernels/README.md", not wrong and len(readme_work()) == 2 * len(OPS))
    without_kv = lambda shape, op: work(shape, op) if op != "attention" else (4 * shape.tokens * shape.q, work(shape, op)[1])
    expect("attention without its keys and values: not those of kernels/README.md", any("attention" in fault for fault in work_differs(config, without_kv)))
    print(f"{len(faults)} planted changes missed")
    return 1 if faults else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", help="write the prediction here, as JSON")
    parser.add_argument("--device", action="append", choices=sorted(DEVICES), help="only this one")
    parser.add_argument("--kernels", metavar="FOLDER", default=nvrtc.KERNELS, help="kernel sources [default: kernels/]")
    parser.add_argument("--check", metavar="FILE", help="say whether FILE was made of the kernels as they are")
    parser.add_argument("--self-test", action="store_true", help="plant changes and see the counts move")
    choice = parser.parse_args()
    if choice.check:
        return check(choice.check)
    if choice.self_test:
        return self_test()
    made = prediction(choice.kernels, {name: DEVICES[name] for name in choice.device or DEVICES})
    table(made)
    if choice.out:
        os.makedirs(os.path.dirname(choice.out) or ".", exist_ok=True)
        with open(choice.out, "w") as file:
            file.write(one_line_each(made) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
