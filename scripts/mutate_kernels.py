#!/usr/bin/env python3
"""Plants known bugs one at a time and requires that a test notices each.

Without --host those of tests/emulated_gpu/mutations.toml in a copy of the kernels, for the self-tests beside that
file; with --host those of host_mutations.toml in a copy of the whole source, for `cargo test --test emulated`. First
the sources as they are must pass. A bug that no test notices, that does not compile, or whose text is no longer in its
file, is an error.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KERNELS = os.path.join(ROOT, "kernels")
TESTS = os.path.join(ROOT, "tests", "emulated_gpu")
COMPILE = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-DCUDA_EMU"]
ORDERS = ["forward", "reverse", "7", "12"]
SECONDS = 300


class Broken(Exception):
    """A mutation that cannot be tried."""


def change(root, mutation):
    """Applies a mutation below `root`; gives back the file's path and text."""
    path = os.path.join(root, mutation["file"])
    with open(path) as file:
        text = file.read()
    if text.count(mutation["find"]) != 1:
        raise Broken(f"its text is {text.count(mutation['find'])} times in the file, expected once")
    with open(path, "w") as file:
        file.write(text.replace(mutation["find"], mutation["replace"]))
    return path, text


def outcome(command, **options):
    """(whether it passed, what it said)"""
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, **options)
    except subprocess.TimeoutExpired:
        return False, [f"ran longer than {SECONDS} s"]
    return run.returncode == 0, (run.stdout + run.stderr).strip().splitlines() or [f"exit status {run.returncode}"]


class Kernels:
    """Each bug in a folder of its own, several at a time."""

    LIST = "mutations.toml"

    def passes(self, test, kernels=KERNELS):
        with tempfile.TemporaryDirectory() as folder:
            program, source = os.path.join(folder, test), os.path.join(TESTS, test + ".cpp")
            built, said = outcome(COMPILE + ["-I", TESTS, "-I", kernels, source, "-o", program])
            if not built:
                raise Broken(f"{test} does not compile: {' '.join(said)[:2000]}")
            passed, said = outcome([program] + ORDERS)
            return passed, said[-1]

    def passes_with(self, mutation):
        with tempfile.TemporaryDirectory() as folder:
            kernels = os.path.join(folder, "kernels")
            shutil.copytree(KERNELS, kernels, ignore=shutil.ignore_patterns("prebuilt"))
            change(kernels, mutation)
            return self.passes(mutation["test"], kernels)


class Host:
    """One copy of the tracked files, built anew for each bug beside what the repository has built."""

    LIST = "host_mutations.toml"
    TREE = os.path.join(ROOT, "target", "mutants")

    def __init__(self):
        shutil.rmtree(self.TREE, ignore_errors=True)
        # Cargo adds the settings of the folders above to those of a folder: .cargo counts without a copy.
        tracked = ["git", "ls-files", "-z", "--", ".", ":(exclude).cargo"]
        for name in subprocess.check_output(tracked, cwd=ROOT, text=True).split("\0")[:-1]:
            copy = os.path.join(self.TREE, name)
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copy2(os.path.join(ROOT, name), copy)

    def cargo(self, *arguments):
        # Quick to build, and nothing that would have the crates of others built again.
        quick = {"CARGO_PROFILE_DEV_OPT_LEVEL": "0", "CARGO_INCREMENTAL": "1"}
        # The program with a bug in it does not take the place of the right one.
        folders = {"CARGO_BUILD_BUILD_DIR": os.path.join(ROOT, "target"), "CARGO_TARGET_DIR": self.TREE + "-out"}
        environment = {**os.environ, **quick, **folders}
        command = ["cargo", "test", "--quiet", "--locked", "--test", "emulated", *arguments]
        return outcome(command, cwd=self.TREE, env=environment)

    def passes(self, test):
        built, said = self.cargo("--no-run")
        if not built:
            raise Broken(f"it does not compile: {' '.join(said)[:2000]}")
        passed, said = self.cargo("--", "--exact", test)
        if not any("1 passed" in line or "1 failed" in line for line in said):
            raise Broken(f"the test did not run: {' '.join(said)[:2000]}")
        panics = [line for number, line in enumerate(said) if number and "panicked at" in said[number - 1]]
        return passed, panics[-1] if panics else said[-1]

    def passes_with(self, mutation):
        path, text = change(self.TREE, mutation)
        try:
            return self.passes(mutation["test"])
        finally:
            with open(path, "w") as file:
                file.write(text)


def planted(subject, mutation):
    """(the complaint, unless the bug was caught; what the test said)"""
    try:
        passed, said = subject.passes_with(mutation)
    except Broken as error:
        return str(error), ""
    return ("no test noticed" if passed else None), said


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="store_true", help="bugs of the host side instead of those of the kernels")
    parser.add_argument("--jobs", type=int, default=2, help="kernel bugs tried at a time")
    parser.add_argument("--only", default="", help="bugs whose description or file contains this")
    choice = parser.parse_args()
    subject = Host() if choice.host else Kernels()
    with open(os.path.join(TESTS, subject.LIST), "rb") as file:
        mutations = tomllib.load(file)["mutation"]
    mutations = [m for m in mutations if choice.only in m["models"] + m["file"]]
    for test in sorted({m["test"] for m in mutations}):
        passed, said = subject.passes(test)
        if not passed:
            sys.exit(f"{test} fails without any planted bug: {said}")
    missed, begin = 0, time.monotonic()
    with ThreadPoolExecutor(1 if choice.host else choice.jobs) as pool:
        for mutation, (complaint, said) in zip(mutations, pool.map(lambda m: planted(subject, m), mutations)):
            missed += complaint is not None
            verdict = "MISSED" if complaint else "caught"
            print(f"{verdict}  {mutation['file']}: {mutation['models']}: {complaint or said}", flush=True)
    print(f"{len(mutations) - missed} of {len(mutations)} planted bugs caught in {time.monotonic() - begin:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
