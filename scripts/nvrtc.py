"""NVRTC for the scripts beside this file: where the library lies, one compilation of a kernel file to a CUBIN, and the
name under which the binary looks for that image. Headers, options and the key are those of src/backend/cuda/prebuilt.rs;
a test beside compile.rs compares the names. Needs no GPU and no driver."""

import argparse
import ctypes
import glob
import hashlib
import os
import site
import struct
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


def architectures(text):
    """`sm_80,sm_90a` of a command line as a list."""
    names = text.split(",")
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {','.join(ARCHITECTURES)}")
    return [name for name in ARCHITECTURES if name in names]


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


def is_whole(image):
    """Whether an image is as long as its ELF header says."""
    if len(image) < 64 or image[:4] != b"\x7fELF":
        return False
    segments, sections = struct.unpack_from("<QQ", image, 32)
    segment_bytes, segment_count, section_bytes, section_count = struct.unpack_from("<4H", image, 54)
    return len(image) >= max(segments + segment_bytes * segment_count, sections + section_bytes * section_count)


def kept(folder, names, version):
    """The images among `names` that `folder` holds whole, made by this version of the compiler."""
    images = {name: read(folder, name) for name in names if os.path.exists(os.path.join(folder, name))}
    compiler = f"Cuda compilation tools, release {version},".encode()
    return {name: image for name, image in images.items() if is_whole(image) and compiler in image}


def keep(folder, images):
    """Makes `folder` hold exactly `images`, by their names; each file is written whole or not at all."""
    os.makedirs(folder, exist_ok=True)
    held = glob.glob(os.path.join(folder, "*.cubin")) + glob.glob(os.path.join(folder, "*.cubin.tmp"))
    for old in set(map(os.path.basename, held)) - set(images):
        os.remove(os.path.join(folder, old))
    for name, image in images.items():
        path = os.path.join(folder, name)
        if os.path.exists(path) and read(folder, name) == image:
            continue
        with open(path + ".tmp", "wb") as file:
            file.write(image)
        os.replace(path + ".tmp", path)
