#!/usr/bin/env python3
"""Compiles every kernel for every architecture with NVRTC and holds the result against kernels/resources.tsv.

Fails when a kernel does not compile, when a hot kernel (gemm_*, attention_*) spills or has a stack, or when a kernel's
registers differ from the committed table by more than a tenth (write the new table with --update, and say why); when a
kernel is not listed for the emulated device; when a streaming product and the attention before it no longer fit one
multiprocessor; and, with nvdisasm at hand, when the machine code lacks what was meant: tensor-core instructions and
128-bit copies in the hot kernels, 128-bit loads in those bound by bandwidth, few instructions around the copies of a
streaming product's stage, additions to the residual that nobody waits for, an early trigger of the next kernel. --self-test plants each of these faults in a copy of the kernels and requires that it is found.
Needs the packages of scripts/requirements.txt: found in this interpreter's site-packages, or --nvrtc PATH and
--nvdisasm FILE. Needs no GPU.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import nvrtc
import sass

TABLE = os.path.join(nvrtc.KERNELS, "resources.tsv")
COLUMNS = ["kernel", "arch", "registers", "shared_bytes", "spill_bytes", "stack_bytes"]
HOT = ("gemm_", "attention_")
RESIDUAL = tuple(f"gemm_{kind}_{t}_residual" for kind in ("stream", "tiled") for t in ("bf16", "f16"))
# Kernels of a decode step let the next one begin as soon as they may read themselves. The compiler moves index arithmetic
# between the two: at most so many instructions from the wait to the trigger.
EARLY = ("embed_", "rms_norm_", "silu_mul_", "rope_kv_", "attention_", "gemm_stream_", "sample_")
MOST_BEFORE_THE_TRIGGER = 40
# What the machine code of kernels with these beginnings must contain, and must not.
MEANT = [
    (HOT, {"tensor-core instructions": r"HMMA\.", "128-bit copies to shared memory": r"LDGSTS\.\S*\.128"}),
    (("mma_peak_",), {"tensor-core instructions": r"HMMA\."}),
    (("embed_", "rms_norm_", "silu_mul_", "read_bandwidth", "copy_bandwidth"), {"128-bit loads": r"LDG\.\S*\.128"}),
    (RESIDUAL, {"additions that nobody waits for": r"REDG?\."}),
]
LOCAL_MEMORY = r"LDL|STL"
# Instructions of one turn of a streaming product's loop that are neither tensor-core products nor loads of fragments.
MOST_AROUND_A_STAGE = 130
# Eight loads of a bandwidth probe are on their way before the first is used.
PROBE_LOADS = 8

# Shared memory of a multiprocessor, bytes, where a streaming product shall fetch weights while attention runs (CUDA
# programming guide, technical specifications); registers, and what each block and warp takes of them.
SHARED_OF_SM = {"sm_90a": 233472, "sm_100a": 233472, "sm_103a": 233472}
REGISTERS_OF_SM, REGISTERS_STEP, SHARED_OF_SYSTEM = 65536, 256, 1024
ATTENTION_BLOCKS, ATTENTION_SHARED = 2, 65536  # blocks beside it, and dynamic shared memory of each, bytes

def find_nvdisasm():
    found = nvrtc.in_packages("bin", "nvdisasm")
    if not found and os.environ.get("TOKMETER_REQUIRE_ALL") == "1":
        sys.exit("nvdisasm was not found\nhint: pip install -r scripts/requirements.txt, or --nvdisasm FILE")
    return found[-1] if found else None


def machine_code_faults(kernel, arch):
    """What the machine code of one kernel lacks, or has too much of."""
    for beginnings, patterns in MEANT:
        for what, pattern in patterns.items():
            if kernel.name.startswith(beginnings) and not kernel.matching(pattern):
                yield f"{kernel.name} for {arch}: no {what} in its machine code"
    if kernel.name.startswith(HOT) and kernel.matching(LOCAL_MEMORY):
        yield f"{kernel.name} for {arch}: local memory in its machine code"
    waits, triggers = kernel.matching("ACQBULK"), kernel.matching("PREEXIT")
    if kernel.name.startswith(EARLY) and waits and not 0 < min(triggers, default=0) - waits[-1] <= MOST_BEFORE_THE_TRIGGER:
        yield f"{kernel.name} for {arch}: the next kernel may not begin right after its wait"
    if kernel.name.startswith("gemm_stream_"):
        around = around_a_stage(kernel)
        if around > MOST_AROUND_A_STAGE:
            yield f"{kernel.name} for {arch}: {around} instructions around a stage's copies, at most {MOST_AROUND_A_STAGE}"
    if kernel.name.endswith("_bandwidth") and loads_in_flight(kernel) < PROBE_LOADS:
        yield f"{kernel.name} for {arch}: {loads_in_flight(kernel)} loads in flight, expected {PROBE_LOADS}"


def around_a_stage(kernel):
    """Instructions of a turn of the loop that copies and multiplies, without the products and their operands."""
    loop = kernel.shortest_loop(r"LDGSTS", r"HMMA") or range(len(kernel.instructions))
    return sum(not re.match(r"HMMA|LDS\b|LDS\.|LDSM", kernel.opcode(index)) for index in loop)


def loads_in_flight(kernel):
    """Most 128-bit loads in a row without one of their uses between them."""
    most = count = 0
    for index in range(len(kernel.instructions)):
        opcode = kernel.opcode(index)
        count = count + 1 if re.match(r"LDG\.\S*128", opcode) else 0 if re.match(r"LOP3|STG|BRA", opcode) else count
        most = max(most, count)
    return most


def crowded(rows):
    """Streaming products of up to 32 tokens that do not fit one multiprocessor beside the attention before them."""
    table = {(name, arch): (registers, shared) for name, arch, registers, shared, *_ in rows}

    def taken(name, arch, threads, dynamic):
        """Registers and bytes of shared memory of a block."""
        registers, static = table[name, arch]
        return threads // 32 * -(-registers * 32 // REGISTERS_STEP) * REGISTERS_STEP, static + dynamic + SHARED_OF_SYSTEM

    for name, arch in table:
        product = re.fullmatch(r"gemm_stream_(\w+?)_\w+_(8|16|32)", name)
        attention = product and f"attention_decode_{product[1]}_128"
        if arch not in SHARED_OF_SM or (attention, arch) not in table:
            continue
        own = taken(name, arch, 256, 4 * (16384 + 128 * int(product[2])))
        beside = taken(attention, arch, 128, ATTENTION_SHARED)
        registers, shared = (mine + ATTENTION_BLOCKS * theirs for mine, theirs in zip(own, beside))
        if registers > REGISTERS_OF_SM or shared > SHARED_OF_SM[arch]:
            most = f"{REGISTERS_OF_SM} and {SHARED_OF_SM[arch]}"
            yield f"{name} for {arch}: {registers} registers and {shared} B with two blocks of attention, at most {most}"


def resources(log, arch):
    """Rows of the table from ptxas's text."""
    rows = []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part[: part.index("'")]
        number = lambda pattern: int((re.search(pattern, part) or [0, "0"])[1])
        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        shared = number(r"(\d+) bytes smem")
        rows.append([name, arch, number(r"Used (\d+) registers"), shared, spills, number(r"(\d+) bytes stack frame")])
    return rows


class Compiled:
    """What one file for one architecture came to."""

    def __init__(self, job):
        library, nvdisasm, folder, source, arch = job
        self.source, self.arch, self.image, self.rows = source, arch, None, []
        try:
            self.image, log = nvrtc.Nvrtc(library).compile(source, arch, folder, ["--ptxas-options=-v"])
        except nvrtc.CompileError as error:
            self.faults = [str(error)]
            return
        self.rows = resources(log, arch)
        kernels = sass.kernels(nvdisasm, self.image).values() if nvdisasm else []
        self.faults = [fault for kernel in kernels for fault in machine_code_faults(kernel, arch)]


def committed():
    if not os.path.exists(TABLE):
        return {}
    with open(TABLE) as file:
        lines = [line.rstrip("\n").split("\t") for line in file][1:]
    return {(line[0], line[1]): int(line[2]) for line in lines}


def unregistered(names):
    """Differences between the kernels that compile and those the emulated device knows."""
    with open(os.path.join(nvrtc.ROOT, "tests", "emulated_gpu", "entries.inc")) as file:
        known = set(re.findall(r"^KERNEL\((\w+),", file.read(), re.MULTILINE))
    for name in sorted(known ^ set(names)):
        yield f"{name} is only {'in entries.inc' if name in known else 'in kernels/'}"


def faults(rows, before):
    """Spills and stacks of hot kernels, and registers unlike those of the table `before`."""
    for name, arch, registers, _, spills, stack in rows:
        if name.startswith(HOT) and (spills or stack):
            yield f"{name} for {arch}: {spills} bytes of spills, {stack} of stack, expected none"
        old = before.get((name, arch))
        if old is not None and abs(registers - old) > 0.1 * old:
            yield f"{name} for {arch}: {registers} registers, {old} in kernels/resources.tsv"


def write_table(rows):
    with open(TABLE, "w") as file:
        for row in [COLUMNS] + rows:
            file.write("\t".join(map(str, row)) + "\n")


# Faults that are planted: the file compiled, changes of text, and what must be said of which kernel.
PLANTED = [
    (
        "gemm",
        [("gemm.cu", "__launch_bounds__(256, blocks_an_sm)", "__launch_bounds__(256, 8)")],
        [r"gemm_\w+ for sm_90a: [1-9]\d* bytes of spills", r"gemm_\w+ for sm_90a: \d+ registers, \d+ in kernels",
         r"gemm_\w+ for sm_90a: local memory in its machine code"],
    ),
    (
        "gemm",
        [
            ("ptx.cuh", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};",
             "fma.rn.f32 %0, %4, %8, %1; // %2 %3 %5 %6 %7 %9"),
            ("ptx.cuh", "cp.async.cg.shared.global [%0], [%1], 16;", "cp.async.ca.shared.global [%0], [%1], 8;"),
            ("ptx.cuh", "cp.async.cg.shared.global [%0], [%1], 16, %2;", "cp.async.ca.shared.global [%0], [%1], 8, %2;"),
        ],
        [r"gemm_\w+_bf16_\w+ for sm_90a: no tensor-core instructions", r"gemm_\w+ for sm_90a: no 128-bit copies to shared memory"],
    ),
    (
        "gemm",
        [("gemm.cu", "        const T* from = weights + step * COLUMNS;",
          "        const T* from = weights + step * COLUMNS + (mix(mix(mix(mix(mix(u64(step)))))) & 8);")],
        [r"gemm_stream_\w+ for sm_90a: \d+ instructions around a stage's copies"],
    ),
    (
        "norm",
        [("norm.cu", "    pdl_wait();\n    pdl_launch();\n", "    pdl_wait();\n"), ("norm.cu", " + eps);\n", " + eps);\n    pdl_launch();\n")],
        [r"rms_norm_bf16 for sm_90a: the next kernel may not begin right after its wait"],
    ),
    (
        "gemm",
        [("ptx.cuh", 'asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");', "*p += x;")],
        [r"gemm_stream_bf16_residual_8 for sm_90a: no additions that nobody waits for", r"gemm_tiled_f16_residual for sm_90a: no additions"],
    ),
    (
        "peaks",
        [("peaks.cu", "__launch_bounds__(256, 4) read_bandwidth", "__launch_bounds__(256, 8) read_bandwidth")],
        [r"read_bandwidth for sm_90a: 4 loads in flight"],
    ),
    (
        "embed",
        [("embed.cu", "const Vec16 values = load128_once(row + i);",
          "Vec16 values; for (int w = 0; w < 4; w++) values.word[w] = reinterpret_cast<const volatile u32*>(row + i)[w];")],
        [r"embed_bf16 for sm_90a: no 128-bit loads"],
    ),
]


def missed_faults(library, nvdisasm):
    """Planted faults that were not found."""
    for source, changes, expected in PLANTED:
        with tempfile.TemporaryDirectory() as folder:
            folder = os.path.join(folder, "kernels")
            shutil.copytree(nvrtc.KERNELS, folder, ignore=shutil.ignore_patterns("prebuilt"))
            for name, old, new in changes:
                text = nvrtc.read(folder, name).decode()
                if text.count(old) != 1:
                    yield f"{old!r} is {text.count(old)} times in {name}, expected once"
                with open(os.path.join(folder, name), "w") as file:
                    file.write(text.replace(old, new))
            compiled = Compiled((library, nvdisasm, folder, source, "sm_90a"))
        found = compiled.faults + list(faults(compiled.rows, committed()))
        for pattern in expected:
            hit = next((fault for fault in found if re.search(pattern, fault)), None)
            if hit:
                print(f"found  {hit}")
            else:
                yield f"planted in {source}.cu and not found: {pattern}; found were {found}"
    hungry = [["attention_decode_bf16_128", "sm_90a", 168, 128, 0, 0], ["gemm_stream_bf16_silu_32", "sm_90a", 96, 16, 0, 0]]
    if len(list(crowded(hungry))) != 1:
        yield f"96 registers a thread beside two blocks of attention, and found were {list(crowded(hungry))}"
    names = {kernel for kernel, _ in committed()}
    for less, more in [(set(), {"new_kernel"}), ({"embed_bf16"}, set())]:
        if not list(unregistered(names - less | more)):
            yield "a kernel that the emulated device does not know, or one that is gone, was not found"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvrtc", metavar="PATH", help="libnvrtc or its folder")
    parser.add_argument("--nvdisasm", metavar="FILE")
    parser.add_argument("--update", action="store_true", help="write the table whatever the registers were")
    parser.add_argument("--self-test", action="store_true", help="find planted faults instead")
    parser.add_argument("--keep", metavar="FOLDER", help="write the checked images here, as prebuild_kernels.py does")
    parser.add_argument("--arch", action="append", help="only this architecture; writes no table")
    parser.add_argument("--file", action="append", help="only this file; writes no table")
    parser.add_argument("--jobs", type=int, default=2)
    choice = parser.parse_args()
    library, nvdisasm = nvrtc.find(choice.nvrtc), choice.nvdisasm or find_nvdisasm()
    if not nvdisasm:
        print("waived: machine code is not looked at, nvdisasm was not found")
    if choice.self_test:
        if not nvdisasm:
            return 0
        errors = list(missed_faults(library, nvdisasm))
        return report(errors, f"{len(errors)} planted faults missed")
    sources = [name.removesuffix(".cu") for name in choice.file or nvrtc.sources()]
    jobs = [(library, nvdisasm, nvrtc.KERNELS, name, arch) for name in sources for arch in choice.arch or nvrtc.ARCHITECTURES]
    with ProcessPoolExecutor(choice.jobs) as pool:
        results = list(pool.map(Compiled, jobs))
    rows = sorted(row for compiled in results for row in compiled.rows)
    errors = [fault for compiled in results for fault in compiled.faults]
    if choice.arch or choice.file:
        errors += [*faults(rows, {}), *crowded(rows)]
        print("\n".join("\t".join(map(str, row)) for row in rows))
    else:
        before = {} if choice.update else committed()
        errors += [*faults(rows, before), *crowded(rows), *unregistered(row[0] for row in rows)]
        if before and set(before) != {(row[0], row[1]) for row in rows}:
            errors.append("the kernels are not those of kernels/resources.tsv: run with --update")
        if not before and all(compiled.image for compiled in results):
            write_table(rows)
    if choice.keep and not errors:
        nvrtc.keep(choice.keep, {nvrtc.prebuilt_name(c.source, c.arch): c.image for c in results})
    return report(errors, f"{len(rows)} kernels in {len(jobs)} compilations, {len(errors)} faults")


def report(errors, summary):
    print(summary)
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
