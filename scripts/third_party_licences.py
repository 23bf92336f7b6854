#!/usr/bin/env python3
"""Writes what a binary's distributor owes the authors of what is in it: every crate of the graph of normal dependencies
for one target, its version, licence expression and source, and each licence text once. Reads what cargo says of them and
the packages that it has fetched; needs Python alone.

    scripts/third_party_licences.py --target x86_64-unknown-linux-gnu --out THIRD-PARTY-LICENCES.txt

Fails when a crate has neither an expression nor a text, when its expression asks for a licence that is not in ALLOWED,
and when it comes without a text and is under none of those whose text lies in this repository.
"""

import argparse
import json
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CDLA-Permissive-2.0", "ISC", "MIT", "MIT-0", "MPL-2.0", "Unicode-3.0", "Unicode-DFS-2016", "Unlicense", "Zlib",
}
TEXT = re.compile(r"(licen[cs]e|copying|copyright|notice|unlicense|patents)([-._].*)?", re.IGNORECASE)
# What is not a text although it is named like one.
NO_TEXT = (".rs", ".py", ".toml", ".json", ".sh", ".html", ".tera", ".hbs")
RULE = "=" * 100


class Refused(Exception):
    """The binary may not be given away like this."""


class Crate:
    def __init__(self, package):
        self.name, self.version = package["name"], package["version"]
        self.folder = os.path.dirname(package["manifest_path"])
        # Crates from before SPDX separate alternatives by a slash.
        self.expression = (package["license"] or "").replace("/", " OR ")
        self.expression = re.sub(r"\s+", " ", self.expression).strip()
        self.authors, self.source = package["authors"], package["repository"] or package["homepage"] or ""
        self.named = package["license_file"]

    def __str__(self):
        return f"{self.name} {self.version}"

    def texts(self):
        """Licence texts in the package, at any depth: code taken from elsewhere brings its own."""
        paths = [os.path.join(self.folder, self.named)] if self.named else []
        for folder, _, names in sorted(os.walk(self.folder)):
            texts = (name for name in sorted(names) if TEXT.fullmatch(name) and not name.endswith(NO_TEXT))
            paths += [os.path.join(folder, name) for name in texts]
        for path in dict.fromkeys(map(os.path.normpath, paths)):
            with open(path, encoding="utf-8", errors="replace") as file:
                text = "\n".join(line.rstrip() for line in file.read().splitlines()).strip("\n")
            if text:
                yield text


def allowed(expression, permitted):
    """Whether what the SPDX expression asks for can be met with licences in `permitted` alone."""
    tokens = re.findall(r"[()]|[^\s()]+", expression)

    def alternatives():
        met = together()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            met = together() or met
        return met

    def together():
        met = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            met = one() and met
        return met

    def one():
        token = tokens.pop(0) if tokens else ")"
        if token == "(":
            met = alternatives()
            if not tokens or tokens.pop(0) != ")":
                raise ValueError
            return met
        if token in (")", "AND", "OR", "WITH"):
            raise ValueError
        if tokens and tokens[0] == "WITH":
            tokens.pop(0)
            token += f" WITH {tokens.pop(0) if tokens else ''}"
        return token in permitted

    met = alternatives()
    if tokens:
        raise ValueError
    return met


def check(crate, has_text):
    if not crate.expression:
        if not has_text:
            raise Refused(f"{crate} has neither a licence expression nor a licence text")
        raise Refused(f"{crate} has a licence text but no expression: read it, and see to it that the package says which")
    try:
        is_allowed = allowed(crate.expression, ALLOWED)
    except ValueError:
        raise Refused(f"{crate} has the licence {crate.expression!r}, which is no SPDX expression")
    if not is_allowed:
        raise Refused(f"{crate} is under {crate.expression}, expected what {', '.join(sorted(ALLOWED))} permit")


def standard_text(crate):
    """For a package without a text: that of a licence that it is under and that lies here."""
    def ours(name):
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            return file.read().strip("\n")

    if allowed(crate.expression, {"Apache-2.0"}):
        return ours("LICENSE-APACHE")
    if allowed(crate.expression, {"MIT"}):
        holders = ", ".join(crate.authors) or f"the authors of {crate.name}"
        return re.sub(r"^Copyright .*$", f"Copyright (c) {holders}", ours("LICENSE-MIT"), flags=re.MULTILINE)
    raise Refused(f"{crate} is under {crate.expression} and comes without its text")


def linked(target, more):
    """Crates that reach the binary: the root's normal dependencies, theirs, and so on, with the features that this build
    has, which `cargo metadata` does not tell apart. Procedural macros are among them: what they write is compiled in."""
    tree = cargo(["tree", "--edges", "normal", "--target", target, "--prefix", "none", "--format", "{p}", *more])
    # `name v1.2.3 (proc-macro)`, the root first.
    lines = [line.split() for line in tree.splitlines()]
    names = [(name, version.removeprefix("v")) for name, version, *_ in lines]
    reached = set(names) - {names[0]}
    packages = json.loads(cargo(["metadata", "--format-version", "1", "--filter-platform", target, *more]))["packages"]
    crates = [Crate(package) for package in packages if (package["name"], package["version"]) in reached]
    return sorted(crates, key=lambda crate: (crate.name, crate.version))


def cargo(arguments):
    command = [os.environ.get("CARGO", "cargo"), *arguments, "--locked"]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"error: cargo {arguments[0]} failed")
    return run.stdout


def document(crates, target):
    numbers, users, rows = {}, {}, []
    for crate in crates:
        texts = list(crate.texts())
        check(crate, bool(texts))
        texts = texts or [standard_text(crate)]
        for text in texts:
            numbers.setdefault(text, len(numbers) + 1)
            users.setdefault(text, []).append(str(crate))
        texts = ", ".join(str(numbers[text]) for text in dict.fromkeys(texts))
        rows.append(f"{crate}\n    {crate.expression}; text {texts}\n    {crate.source}".rstrip())
    head = (
        f"Software by others in tokmeter for {target}: {len(rows)} crates, each with its licence expression, the numbers\n"
        "of its licence texts below, and its source. Alternatives (OR) are for the receiver to choose from. Beside them the\n"
        "Rust standard library (MIT OR Apache-2.0, https://github.com/rust-lang/rust)."
    )
    parts = [head, *rows]
    for text, number in numbers.items():
        parts.append(f"{RULE}\nText {number}: {', '.join(dict.fromkeys(users[text]))}\n{RULE}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, metavar="TRIPLE")
    parser.add_argument("--out", metavar="FILE", help="instead of standard output")
    parser.add_argument("--offline", action="store_true", help="what cargo has fetched must be enough")
    choice = parser.parse_args()
    crates = linked(choice.target, ["--offline"] if choice.offline else [])
    try:
        text = document(crates, choice.target)
    except Refused as error:
        sys.exit(f"error: {error}")
    if choice.out:
        with open(choice.out, "w", encoding="utf-8") as file:
            file.write(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
