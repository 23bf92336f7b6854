#!/usr/bin/env python3
"""Compiles every kernel for every architecture with NVRTC and holds the result against kernels/resources.tsv.

Fails when a kernel does not compile, when a hot kernel (gemm_*, attention_*) spills or has a stack, or when a kernel's
registers differ from the committed table by more than a tenth (write the new table with --update, and say why); when a
kernel is not listed for the emulated device; and, with nvdisasm at hand, when the machine code lacks what was meant:
tensor-core instructions and 128-bit copies in the hot kernels, 128-bit loads in those bound by bandwidth.
--self-test plants each of these faults in a copy of the kernels and requires that it is found.
Needs the packages of scripts/requirements.txt: found in this interpreter's site-packages, or --nvrtc PATH and
--nvdisasm FILE. Needs no GPU.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import nvrtc

TABLE = os.path.join(nvrtc.KERNELS, "resources.tsv")
COLUMNS = ["kernel", "arch", "registers", "shared_bytes", "spill_bytes", "stack_bytes"]
HOT = ("gemm_", "attention_")
# What the machine code of kernels with these beginnings must contain, and must not.
MEANT = [
    (HOT, {"tensor-core instructions": r"\bHMMA\.", "128-bit copies to shared memory": r"\bLDGSTS\.\S*\.128"}),
    (("mma_peak_",), {"tensor-core instructions": r"\bHMMA\."}),
    (("embed_", "rms_norm_", "silu_mul_", "read_bandwidth", "copy_bandwidth"), {"128-bit loads": r"\bLDG\.\S*\.128"}),
]
LOCAL_MEMORY = r"\b(LDL|STL)\b"


def find_nvdisasm():
    found = nvrtc.in_packages("bin", "nvdisasm")
    if not found and os.environ.get("TOKMETER_REQUIRE_ALL") == "1":
        sys.exit("nvdisasm was not found\nhint: pip install -r scripts/requirements.txt, or --nvdisasm FILE")
    return found[-1] if found else None


def machine_code_faults(nvdisasm, cubin, arch):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        name = re.match(r"\w+", part)[0]
        for beginnings, patterns in MEANT:
            for what, pattern in patterns.items():
                if name.startswith(beginnings) and not re.search(pattern, part):
                    yield f"{name} for {arch}: no {what} in its machine code"
        if name.startswith(HOT) and re.search(LOCAL_MEMORY, part):
            yield f"{name} for {arch}: local memory in its machine code"


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
        self.faults = list(machine_code_faults(nvdisasm, self.image, arch)) if nvdisasm else []


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
        errors += faults(rows, {})
        print("\n".join("\t".join(map(str, row)) for row in rows))
    else:
        before = {} if choice.update else committed()
        errors += [*faults(rows, before), *unregistered(row[0] for row in rows)]
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
