#!/usr/bin/env python3
"""Compiles every kernel file for every architecture into kernels/prebuilt/, from where the next build embeds them, so
that the binary runs on a host with nothing but the driver. Needs NVRTC:

    pip install nvidia-cuda-nvrtc==13.0.88
    scripts/prebuild_kernels.py [--nvrtc FOLDER] [ARCH ...]
"""

import argparse
import ctypes
import hashlib
import pathlib
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The same lists as in src/backend/cuda/compile.rs.
SOURCES = ["embed", "norm", "gemm", "rope", "attention", "sample", "silu"]
HEADERS = ["common.cuh", "ptx.cuh"]
OPTIONS = ["--std=c++17", "-default-device"]
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a"]


def read(name):
    return (ROOT / "kernels" / name).read_bytes()


def source_key(source):
    """As `source_key` in compile.rs: sha256 over parts, each preceded by its length."""
    parts = ["\n".join(OPTIONS).encode(), source]
    for header in HEADERS:
        parts += [header.encode(), read(header)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


class Compiler:
    def __init__(self, folder):
        for builtins in sorted(folder.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))
        libraries = sorted(folder.glob("libnvrtc.so*"))
        if not libraries:
            raise SystemExit(f"{folder} has no libnvrtc.so")
        self.nvrtc = ctypes.CDLL(str(libraries[0]))

    def check(self, call, result, log=""):
        if result != 0:
            raise SystemExit(f"{call} failed with {result}\n{log}")

    def text(self, program, size, get):
        length = ctypes.c_size_t()
        self.check(size, getattr(self.nvrtc, size)(program, ctypes.byref(length)))
        buffer = ctypes.create_string_buffer(length.value)
        self.check(get, getattr(self.nvrtc, get)(program, buffer))
        return buffer.raw

    def cubin(self, name, source, architecture):
        strings = lambda values: (ctypes.c_char_p * len(values))(*values)
        program = ctypes.c_void_p()
        texts, names = strings([read(header) for header in HEADERS]), strings([h.encode() for h in HEADERS])
        created = self.nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source, name.encode(), len(HEADERS), texts, names
        )
        self.check("nvrtcCreateProgram", created)
        options = [f"--gpu-architecture={architecture}".encode()] + [option.encode() for option in OPTIONS]
        result = self.nvrtc.nvrtcCompileProgram(program, len(options), strings(options))
        log = self.text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode().rstrip("\0\n")
        self.check(f"compiling {name} for {architecture}", result, log)
        image = self.text(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        self.nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        return image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/lib"
    parser.add_argument("--nvrtc", type=pathlib.Path, default=default, metavar="FOLDER")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "kernels/prebuilt", metavar="FOLDER")
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, metavar="ARCH")
    arguments = parser.parse_args()
    compiler = Compiler(arguments.nvrtc)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for old in arguments.out.glob("*.cubin"):
        old.unlink()
    for name in SOURCES:
        source = read(f"{name}.cu")
        for architecture in arguments.architectures:
            image = compiler.cubin(f"{name}.cu", source, architecture)
            (arguments.out / f"{name}.{architecture}.{source_key(source)}.cubin").write_bytes(image)
            print(f"{name} {architecture}: {len(image)} bytes", flush=True)


if __name__ == "__main__":
    main()
