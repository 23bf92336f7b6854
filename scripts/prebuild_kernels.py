#!/usr/bin/env python3
"""Compiles every kernel file for every architecture into kernels/prebuilt/, from where the next build embeds them, so
that the binary runs on a host with nothing but the driver. What lies there already, is of the present source and was
made by this release of the compiler, stays; what is of another source goes. Needs NVRTC, but no GPU:

    pip install -r scripts/requirements.txt
    scripts/prebuild_kernels.py                       # all eight architectures
    scripts/prebuild_kernels.py --arch sm_90a         # a build for one kind of device
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import nvrtc


def compiled(job):
    """The image of one file for one architecture, or what the compiler says against it."""
    library, name, architecture = job
    try:
        return nvrtc.Nvrtc(library).compile(name, architecture)[0]
    except nvrtc.CompileError as error:
        return error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvrtc", metavar="PATH", help="the library or its folder")
    parser.add_argument("--out", default=nvrtc.PREBUILT, metavar="FOLDER")
    parser.add_argument("--names", action="store_true", help="only print the names that the binary looks for")
    parser.add_argument("--arch", type=nvrtc.architectures, default=nvrtc.ARCHITECTURES, metavar="LIST",
                        help="only these architectures, comma-separated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="compilations at a time")
    choice = parser.parse_args()
    jobs = {nvrtc.prebuilt_name(name, architecture): (name, architecture)
            for name in nvrtc.sources() for architecture in choice.arch}
    if choice.names:
        print("\n".join(jobs))
        return 0
    library = nvrtc.find(choice.nvrtc)
    images = nvrtc.kept(choice.out, jobs, nvrtc.Nvrtc(library).version())
    missing = [name for name in jobs if name not in images]
    with ProcessPoolExecutor(choice.jobs) as pool:
        for name, image in zip(missing, pool.map(compiled, [(library, *jobs[name]) for name in missing])):
            if isinstance(image, nvrtc.CompileError):
                pool.shutdown(cancel_futures=True)
                sys.exit(str(image))
            images[name] = image
            print(f"{' '.join(jobs[name])}: {len(image)} bytes", flush=True)
    nvrtc.keep(choice.out, images)
    print(f"{len(images)} images in {choice.out}, {len(missing)} of them compiled now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
