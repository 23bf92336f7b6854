#!/usr/bin/env python3
"""Compiles every kernel for every architecture with NVRTC and writes kernels/resources.tsv.

Fails when a kernel does not compile, when a hot kernel (gemm_*, attention_*) spills or has a stack, or when a kernel's
registers differ from the committed table by more than a tenth (write the new table with --update, and say why); when a
kernel is not listed for the emulated device; and, with nvdisasm at hand, when the machine code lacks what was meant:
tensor-core instructions and 128-bit copies in the hot kernels, 128-bit loads in those bound by bandwidth.
Needs the library of the Python package nvidia-cuda-nvrtc, and nvidia-cuda-nvdisasm: found in this interpreter's
site-packages, or --nvrtc FILE and --nvdisasm FILE.
"""

import argparse
import ctypes
import glob
import os
import re
import site
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KERNELS = os.path.join(ROOT, "kernels")
TABLE = os.path.join(KERNELS, "resources.tsv")
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a"]
HEADERS = ["common.cuh", "ptx.cuh"]
COLUMNS = ["kernel", "arch", "registers", "shared_bytes", "spill_bytes", "stack_bytes"]
HOT = ("gemm_", "attention_")
# What the machine code of kernels with these beginnings must contain, and must not.
MEANT = [
    (HOT, {"tensor-core instructions": r"\bHMMA\.", "128-bit copies to shared memory": r"\bLDGSTS\.\S*\.128"}),
    (("mma_peak_",), {"tensor-core instructions": r"\bHMMA\."}),
    (("embed_", "rms_norm_", "silu_mul_", "read_bandwidth", "copy_bandwidth"), {"128-bit loads": r"\bLDG\.\S*\.128"}),
]
LOCAL_MEMORY = r"\b(LDL|STL)\b"


def in_packages(*parts):
    places = site.getsitepackages() + [site.getusersitepackages()]
    return sorted(f for p in places for f in glob.glob(os.path.join(p, "nvidia", "*", *parts)))


def find_nvrtc():
    found = in_packages("lib", "libnvrtc.so.*")
    if not found:
        sys.exit("libnvrtc was not found: pip install nvidia-cuda-nvrtc==13.0.88, or --nvrtc FILE")
    return found[-1]


def find_nvdisasm():
    found = in_packages("bin", "nvdisasm")
    if not found and os.environ.get("TOKMETER_REQUIRE_ALL") == "1":
        sys.exit("nvdisasm was not found: pip install nvidia-cuda-nvdisasm, or --nvdisasm FILE")
    return found[-1] if found else None


def open_nvrtc(path):
    for builtins in glob.glob(os.path.join(os.path.dirname(path), "libnvrtc-builtins.so.*")):
        ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(path)


def read(name):
    with open(os.path.join(KERNELS, name), "rb") as file:
        return file.read()


def strings(values):
    return (ctypes.c_char_p * len(values))(*values)


def compile_file(nvrtc, source, arch):
    """NVRTC's log for one file, with ptxas's resources, and the machine code; raises on an error."""
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
    text = log.value.decode()
    if result != 0:
        raise RuntimeError(f"{source} for {arch}: NVRTC error {result}\n{text}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return text, cubin.raw


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


def compile_one(job):
    """(rows of the table, whether it compiled, complaints)"""
    nvrtc, nvdisasm, source, arch = job
    try:
        log, cubin = compile_file(open_nvrtc(nvrtc), source, arch)
    except RuntimeError as error:
        return [], False, [str(error)]
    complaints = list(machine_code_faults(nvdisasm, cubin, arch)) if nvdisasm else []
    return resources(log, arch), True, complaints


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
    parser.add_argument("--nvdisasm", help="path of nvdisasm")
    parser.add_argument("--update", action="store_true", help="write the table whatever the registers were")
    parser.add_argument("--arch", action="append", help="only this architecture; writes no table")
    parser.add_argument("--file", action="append", help="only this file; writes no table")
    parser.add_argument("--jobs", type=int, default=2)
    choice = parser.parse_args()
    nvrtc, nvdisasm = choice.nvrtc or find_nvrtc(), choice.nvdisasm or find_nvdisasm()
    if not nvdisasm:
        print("waived: machine code is not looked at, nvdisasm was not found")
    sources = choice.file or sorted(f for f in os.listdir(KERNELS) if f.endswith(".cu"))
    jobs = [(nvrtc, nvdisasm, source, arch) for source in sources for arch in choice.arch or ARCHITECTURES]
    with ProcessPoolExecutor(choice.jobs) as pool:
        results = list(pool.map(compile_one, jobs))
    rows = sorted(row for found, _, _ in results for row in found)
    errors = [complaint for _, _, complaints in results for complaint in complaints]
    part = bool(choice.arch or choice.file)
    errors += faults(rows, {} if part else committed(), choice.update)
    if not part:
        errors += unregistered(rows)
    if part:
        for row in rows:
            print("\t".join(map(str, row)))
    elif all(compiled for _, compiled, _ in results) and (choice.update or not os.path.exists(TABLE)):
        with open(TABLE, "w") as file:
            for row in [COLUMNS] + rows:
                file.write("\t".join(map(str, row)) + "\n")
    print(f"{len(rows)} kernels in {len(jobs)} compilations, {len(errors)} faults")
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
