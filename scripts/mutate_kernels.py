#!/usr/bin/env python3
"""Plants each bug of tests/emulated_gpu/mutations.toml in a copy of the kernels and requires the self-test to fail.

First the kernels as they are must pass. A bug that no test notices, or whose text is no longer in its file, is an error.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KERNELS = os.path.join(ROOT, "kernels")
TESTS = os.path.join(ROOT, "tests", "emulated_gpu")
COMPILE = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-DCUDA_EMU"]
ORDERS = ["forward", "reverse", "7", "12"]
SECONDS = 300


def outcome(test, kernels, folder):
    """(whether the test passed, what it said last)"""
    program = os.path.join(folder, test)
    source = os.path.join(TESTS, test + ".cpp")
    build = subprocess.run(COMPILE + ["-I", TESTS, "-I", kernels, source, "-o", program], capture_output=True, text=True)
    if build.returncode != 0:
        raise RuntimeError(f"{test} does not compile:\n{build.stderr[:2000]}")
    try:
        run = subprocess.run([program] + ORDERS, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"ran longer than {SECONDS} s"
    said = (run.stdout + run.stderr).strip().splitlines()
    return run.returncode == 0, said[-1] if said else f"exit status {run.returncode}"


def planted(mutation):
    """(None when the bug was caught, else the complaint; what the test said)"""
    with tempfile.TemporaryDirectory() as folder:
        kernels = os.path.join(folder, "kernels")
        shutil.copytree(KERNELS, kernels)
        path = os.path.join(kernels, mutation["file"])
        with open(path) as file:
            text = file.read()
        if text.count(mutation["find"]) != 1:
            return f"its text is {text.count(mutation['find'])} times in the file, expected once", ""
        with open(path, "w") as file:
            file.write(text.replace(mutation["find"], mutation["replace"]))
        try:
            passed, said = outcome(mutation["test"], kernels, folder)
        except RuntimeError as error:
            return str(error), ""
        return ("no test noticed" if passed else None), said


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="bugs whose description or file contains this")
    choice = parser.parse_args()
    with open(os.path.join(TESTS, "mutations.toml"), "rb") as file:
        mutations = tomllib.load(file)["mutation"]
    mutations = [m for m in mutations if choice.only in m["models"] + m["file"]]
    for test in sorted({m["test"] for m in mutations}):
        with tempfile.TemporaryDirectory() as folder:
            passed, said = outcome(test, KERNELS, folder)
        if not passed:
            sys.exit(f"{test} fails without any planted bug: {said}")
    missed = 0
    with ThreadPoolExecutor(choice.jobs) as pool:
        for mutation, (complaint, said) in zip(mutations, pool.map(planted, mutations)):
            missed += complaint is not None
            verdict = "MISSED" if complaint else "caught"
            print(f"{verdict}  {mutation['file']}: {mutation['models']}: {complaint or said}", flush=True)
    print(f"{len(mutations) - missed} of {len(mutations)} planted bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
