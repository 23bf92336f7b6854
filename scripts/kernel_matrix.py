#!/usr/bin/env python3
"""Compiles every kernel for every architecture with NVRTC and writes kernels/resources.tsv.

Fails when a kernel does not compile, when a hot kernel (gemm_*, attention_*) spills or has a stack, or when a kernel's
registers differ from the committed table by more than a tenth (write the new table with --update, and say why).
Needs the library of the Python package nvidia-cuda-nvrtc: found in this interpreter's site-packages, or --nvrtc FILE.
"""

import argparse
import ctypes
import glob
import os
import re
import site
import sys
from concurrent.futures import ProcessPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KERNELS = os.path.join(ROOT, "kernels")
TABLE = os.path.join(KERNELS, "resources.tsv")
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a"]
HEADERS = ["common.cuh", "ptx.cuh"]
COLUMNS = ["kernel", "arch", "registers", "shared_bytes", "spill_bytes", "stack_bytes"]
HOT = ("gemm_", "attention_")


def find_nvrtc():
    places = site.getsitepackages() + [site.getusersitepackages()]
    found = [f for p in places for f in glob.glob(os.path.join(p, "nvidia", "*", "lib", "libnvrtc.so.*"))]
    if not found:
        sys.exit("libnvrtc was not found: pip install nvidia-cuda-nvrtc==13.0.88, or --nvrtc FILE")
    return sorted(found)[-1]


def open_nvrtc(path):
    for builtins in glob.glob(os.path.join(os.path.dirname(path), "libnvrtc-builtins.so.*")):
        ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(path)


def read(name):
    with open(os.path.join(KERNELS, name), "rb") as file:
        return file.read()


def strings(values):
    return (ctypes.c_char_p * len(values))(*values)


def compile_log(nvrtc, source, arch):
    """NVRTC's log for one file, with ptxas's resources; raises on an error."""
    program = ctypes.c_void_p()
    headers = strings([read(h) for h in HEADERS])
    names = strings([h.encode() for h in HEADERS])
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), read(source), source.encode(), len(HEADERS), headers, names)
    options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", "--ptxas-options=-v", "-lineinfo"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), strings([o.encode() for o in options]))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode()
    if result != 0:
        raise RuntimeError(f"{source} for {arch}: NVRTC error {result}\n{text}")
    return text


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


def compile_one(job):
    path, source, arch = job
    try:
        return resources(compile_log(open_nvrtc(path), source, arch), arch), None
    except RuntimeError as error:
        return [], str(error)


def committed():
    if not os.path.exists(TABLE):
        return {}
    with open(TABLE) as file:
        lines = [line.rstrip("\n").split("\t") for line in file][1:]
    return {(line[0], line[1]): int(line[2]) for line in lines}


def unregistered(rows):
    """Differences between the kernels that compile and those the emulated device knows."""
    with open(os.path.join(ROOT, "tests", "emulated_gpu", "entries.inc")) as file:
        known = set(re.findall(r"^KERNEL\((\w+),", file.read(), re.MULTILINE))
    for name in sorted(known ^ {row[0] for row in rows}):
        yield f"{name} is only {'in entries.inc' if name in known else 'in kernels/'}"


def faults(rows, before, update):
    for name, arch, registers, _, spills, stack in rows:
        if name.startswith(HOT) and (spills or stack):
            yield f"{name} for {arch}: {spills} bytes of spills, {stack} of stack, expected none"
        old = before.get((name, arch))
        if old is not None and not update and abs(registers - old) > 0.1 * old:
            yield f"{name} for {arch}: {registers} registers, {old} in kernels/resources.tsv"
    if before and not update and set(before) != {(r[0], r[1]) for r in rows}:
        yield "the kernels are not those of kernels/resources.tsv: run with --update"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvrtc", help="path of libnvrtc")
    parser.add_argument("--update", action="store_true", help="write the table whatever the registers were")
    parser.add_argument("--arch", action="append", help="only this architecture; writes no table")
    parser.add_argument("--file", action="append", help="only this file; writes no table")
    parser.add_argument("--jobs", type=int, default=2)
    choice = parser.parse_args()
    path = choice.nvrtc or find_nvrtc()
    sources = choice.file or sorted(f for f in os.listdir(KERNELS) if f.endswith(".cu"))
    jobs = [(path, source, arch) for source in sources for arch in choice.arch or ARCHITECTURES]
    with ProcessPoolExecutor(choice.jobs) as pool:
        results = list(pool.map(compile_one, jobs))
    rows = sorted(row for found, _ in results for row in found)
    errors = [error for _, error in results if error]
    part = bool(choice.arch or choice.file)
    errors += faults(rows, {} if part else committed(), choice.update)
    if not part:
        errors += unregistered(rows)
    if part:
        for row in rows:
            print("\t".join(map(str, row)))
    elif not any(error for _, error in results) and (choice.update or not os.path.exists(TABLE)):
        with open(TABLE, "w") as file:
            for row in [COLUMNS] + rows:
                file.write("\t".join(map(str, row)) + "\n")
    print(f"{len(rows)} kernels in {len(jobs)} compilations, {len(errors)} faults")
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
