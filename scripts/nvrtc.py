"""NVRTC for the scripts beside this file: where the library lies, one compilation of a kernel file to a CUBIN, and the
name under which the binary looks for that image. Headers, options and the key are those of src/backend/cuda/compile.rs,
where a test compares them. Needs no GPU and no driver."""

import ctypes
import glob
import hashlib
import os
import site
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KERNELS = os.path.join(ROOT, "kernels")
PREBUILT = os.path.join(KERNELS, "prebuilt")
HEADERS = ["common.cuh", "ptx.cuh"]
# Beside the architecture.
OPTIONS = ["--std=c++17", "-default-device"]
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a"]


class CompileError(Exception):
    """NVRTC refused a source; the text is its log."""


def sources(folder=KERNELS):
    """Names of the kernel files, without `.cu`."""
    return sorted(name[: -len(".cu")] for name in os.listdir(folder) if name.endswith(".cu"))


def read(folder, name):
    with open(os.path.join(folder, name), "rb") as file:
        return file.read()


def in_packages(*parts):
    """Files that Python packages of NVIDIA brought, by their path below `nvidia/<package>`; the newest last."""
    places = site.getsitepackages() + [site.getusersitepackages()]
    return sorted(found for place in places for found in glob.glob(os.path.join(place, "nvidia", "*", *parts)))


def find(given=None):
    """The library: `given` (a file or its folder), else this interpreter's package."""
    if given and os.path.isfile(given):
        return given
    found = sorted(glob.glob(os.path.join(given, "libnvrtc.so*"))) if given else in_packages("lib", "libnvrtc.so.*")
    if not found:
        sys.exit(f"libnvrtc was not found{f' in {given}' if given else ''}\nhint: pip install -r scripts/requirements.txt")
    return found[-1]


def source_key(name, folder=KERNELS):
    """sha256 over what the text of a kernel depends on, each part preceded by its length."""
    parts = ["\n".join(OPTIONS).encode(), read(folder, f"{name}.cu")]
    for header in HEADERS:
        parts += [header.encode(), read(folder, header)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def prebuilt_name(name, architecture):
    return f"{name}.{architecture}.{source_key(name)}.cubin"


def strings(values):
    return (ctypes.c_char_p * len(values))(*values)


class Nvrtc:
    def __init__(self, path):
        # Some releases look for this one without knowing where they lie themselves.
        for builtins in sorted(glob.glob(os.path.join(os.path.dirname(path), "libnvrtc-builtins.so.*"))):
            ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(path)

    def version(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def call(self, function, *arguments):
        result = getattr(self.library, function)(*arguments)
        if result != 0:
            raise CompileError(f"{function} failed with {result}")

    def taken(self, program, what):
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, name, architecture, folder=KERNELS, more_options=()):
        """(CUBIN, log) of `name`.cu for one architecture."""
        program = ctypes.c_void_p()
        texts, names = strings([read(folder, h) for h in HEADERS]), strings([h.encode() for h in HEADERS])
        source = read(folder, f"{name}.cu")
        self.call("nvrtcCreateProgram", ctypes.byref(program), source, f"{name}.cu".encode(), len(HEADERS), texts, names)
        options = [f"--gpu-architecture={architecture}", *OPTIONS, *more_options]
        result = self.library.nvrtcCompileProgram(program, len(options), strings([o.encode() for o in options]))
        log = self.taken(program, "ProgramLog").decode().rstrip("\0\n")
        if result != 0:
            raise CompileError(f"{name}.cu for {architecture}: NVRTC error {result}\n{log}")
        image = self.taken(program, "CUBIN")
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return image, log


def keep(folder, images):
    """Makes `folder` hold exactly `images`, by their names."""
    os.makedirs(folder, exist_ok=True)
    for old in glob.glob(os.path.join(folder, "*.cubin")):
        os.remove(old)
    for name, image in images.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(image)
