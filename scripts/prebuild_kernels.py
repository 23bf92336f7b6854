#!/usr/bin/env python3
"""Compiles every kernel file for every architecture into kernels/prebuilt/, from where the next build embeds them, so
that the binary runs on a host with nothing but the driver. Needs NVRTC, but no GPU:

    pip install -r scripts/requirements.txt
    scripts/prebuild_kernels.py [--nvrtc PATH] [ARCH ...]
"""

import argparse
import sys

import nvrtc


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvrtc", metavar="PATH", help="the library or its folder")
    parser.add_argument("--out", default=nvrtc.PREBUILT, metavar="FOLDER")
    parser.add_argument("--names", action="store_true", help="only print the names that the binary looks for")
    parser.add_argument("architectures", nargs="*", default=nvrtc.ARCHITECTURES, metavar="ARCH")
    choice = parser.parse_args()
    jobs = [(name, architecture) for name in nvrtc.sources() for architecture in choice.architectures]
    if choice.names:
        print("\n".join(nvrtc.prebuilt_name(*job) for job in jobs))
        return 0
    compiler = nvrtc.Nvrtc(nvrtc.find(choice.nvrtc))
    images = {}
    for name, architecture in jobs:
        try:
            image, _ = compiler.compile(name, architecture)
        except nvrtc.CompileError as error:
            sys.exit(str(error))
        images[nvrtc.prebuilt_name(name, architecture)] = image
        print(f"{name} {architecture}: {len(image)} bytes", flush=True)
    nvrtc.keep(choice.out, images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
