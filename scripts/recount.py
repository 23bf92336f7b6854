#!/usr/bin/env python3
"""Counts a record again, by rules written down in FORMAT.md and none of tokmeter's code; the standard library is enough.

    scripts/recount.py RECORD.json                                  # prints what follows from the record, as JSON
    tokmeter report RECORD.json --format json | scripts/recount.py RECORD.json --against -

Rates are tokens over the time of all windows; joules per token lie between the meter's own readings; times of requests
come from the rows, and only what rows do not hold (gaps between tokens, steps) from the histograms. With `--against` each
number must agree with tokmeter's to 0.1 %, else the differences are printed and the exit code is 1.
"""
import argparse
import json
import sys

import hdr_histogram

TOLERANCE = 1e-3
# Fewer observations do not bound the percentile: ln 0.05 / ln q.
FEWEST = {"p50_ns": (0.50, 5), "p90_ns": (0.90, 29), "p99_ns": (0.99, 299)}
METRICS = ("ttft", "itl", "tpot", "e2e", "step")


def is_missing(value):
    return isinstance(value, dict) and set(value) == {"missing"}


def recount(record):
    return {"record": record["started_at"], "cells": [cell_of(cell) for cell in record["cells"]]}


def cell_of(cell):
    runs = cell["runs"]
    windows = [window for run in runs for window in run["windows"]]
    seconds = sum(window["t1_ns"] - window["t0_ns"] for window in windows) / 1e9
    tokens_in = sum(window["tokens_in"] for window in windows)
    tokens_out = sum(window["tokens_out"] for window in windows)
    counted = "tokens_in" if cell["workload"]["kind"] == "prefill" else "tokens_out"
    found = {"key": cell["key"], "tokens_in": tokens_in, "tokens_out": tokens_out}
    if seconds > 0:
        found["output_tokens_per_s"] = tokens_out / seconds
        found["headline_tokens_per_s"] = (tokens_in if counted == "tokens_in" else tokens_out) / seconds
        found["total_tokens_per_s"] = (tokens_in + tokens_out) / seconds
    for metric in METRICS:
        found[metric] = percentiles(metric, runs)
    found.update(energy_of(windows, counted))
    return {name: value for name, value in found.items() if value is not None}


def percentiles(metric, runs):
    """From the rows where they have it, else from the histograms; None where the record has neither."""
    if all(is_missing(run["latency"][metric]) for run in runs):
        return None
    exact = sorted(value for run in runs for row in run["requests"] for value in of_row(metric, row))
    if metric in ("ttft", "tpot", "e2e"):
        return summed_up(len(exact), sum(exact), lambda q: exact[hdr_histogram.rank(q, len(exact)) - 1])
    stored = [run["latency"][metric] for run in runs if not is_missing(run["latency"][metric])]
    merged = hdr_histogram.Histogram({})
    for histogram in stored:
        part = hdr_histogram.decode_base64(histogram["data"])
        if part.count != histogram["count"]:
            raise SystemExit(f"{metric}: the histogram holds {part.count} values, expected {histogram['count']}")
        merged = merged.merged(part)
    # The extremes beside the histogram are exact, its buckets are not.
    low, high = min(part["min_ns"] for part in stored), max(part["max_ns"] for part in stored)
    total = sum(part["sum_ns"] for part in stored)
    return summed_up(merged.count, total, lambda q: max(low, min(high, merged.value_at(q))))


def of_row(metric, row):
    first, last = row["first_token_ns"], row["last_token_ns"]
    if is_missing(first):
        return
    if metric == "ttft":
        yield first - row["arrival_ns"]
    if metric == "e2e" and row["complete"]:
        yield last - row["arrival_ns"]
    if metric == "tpot" and row["complete"] and row["osl_tokens"] >= 2:
        yield (last - first) / (row["osl_tokens"] - 1)


def summed_up(count, total, value_at):
    if count == 0:
        return None
    found = {"count": count, "mean_ns": total / count}
    found.update({name: value_at(q) for name, (q, fewest) in FEWEST.items() if count >= fewest})
    return found


def energy_of(windows, counted):
    """Joules, tokens and seconds between the meter's readings; nothing where a window has no energy."""
    parts = [window["energy"] for window in windows]
    if not parts or any(is_missing(part) for part in parts):
        return {}
    joules = sum(part["energy_j"] for part in parts)
    tokens = sum(part[counted] for part in parts)
    seconds = sum(part["t_b_ns"] - part["t_a_ns"] for part in parts) / 1e9
    if min(joules, tokens, seconds) <= 0:
        return {}
    return {"joules_per_token": joules / tokens, "tokens_per_joule": tokens / joules, "power_w": joules / seconds}


def comparisons(ours, theirs):
    """Names with our number and tokmeter's; one of them None where only the other side has it."""
    def number(value):
        return None if value is None or is_missing(value) else value

    throughput = number(theirs["throughput"]) or {}
    headline = throughput.get("tokens_per_s")
    yield "tokens_per_s", ours.get("headline_tokens_per_s"), headline
    yield "total_tokens_per_s", ours.get("total_tokens_per_s"), throughput.get("total_tokens_per_s")
    for name in ("joules_per_token", "tokens_per_joule", "power_w"):
        yield name, ours.get(name), number(theirs[name])
    for metric in METRICS:
        mine, its = ours.get(metric) or {}, number(theirs[metric]) or {}
        for name in ("count", "mean_ns", *FEWEST):
            yield f"{metric} {name}", mine.get(name), number(its.get(name))


def differences(ours, summary):
    """Sentences, and how many numbers were compared."""
    theirs = summary["cells"]
    faults, compared = [], 0
    # In the record's order: an anchor is measured several times under one key.
    for cell, its_cell in zip(ours["cells"], theirs):
        if cell["key"] != its_cell["key"]:
            faults.append(f"{cell['key']}: {its_cell['key']} stands in its place in the summary")
            continue
        for name, mine, its in comparisons(cell, its_cell):
            if mine is None and its is None:
                continue
            compared += 1
            if mine is None or its is None or abs(mine - its) > TOLERANCE * abs(its):
                faults.append(f"{cell['key']}: {name} is {mine} counted again, {its} in the summary")
    if len(theirs) != len(ours["cells"]):
        faults.append(f"{len(ours['cells'])} cells in the record, {len(theirs)} in the summary")
    return faults, compared


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record")
    parser.add_argument("--against", metavar="SUMMARY", help="what tokmeter report --format json printed; - is stdin")
    args = parser.parse_args()
    with open(args.record, encoding="utf-8") as file:
        ours = recount(json.load(file))
    if args.against is None:
        json.dump(ours, sys.stdout, indent=2)
        print()
        return 0
    with sys.stdin if args.against == "-" else open(args.against, encoding="utf-8") as file:
        summaries = json.load(file)
    same = [summary for summary in summaries if summary["started_at"] == ours["record"]]
    if len(same) != 1:
        print(f"{args.record}: {len(same)} summaries belong to it, expected 1", file=sys.stderr)
        return 1
    faults, compared = differences(ours, same[0])
    for fault in faults:
        print(fault)
    print(f"{compared} numbers of {len(ours['cells'])} cells counted again, {len(faults)} differ by more than 0.1 %")
    return 1 if faults or compared == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
