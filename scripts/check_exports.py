#!/usr/bin/env python3
"""Reads exports with the programs that they are made for, and holds what these read against hand arithmetic.

The files are those of tests/goldens/export, which `cargo test --test export` holds against the program: made-up records
whose numbers are round. Where a consumer cannot be installed (InferenceX, fleet-sim, DPS) its field names, taken from its
source or manual, are checked instead; EXPORT.md says which. --self-test damages each file and requires that it is noticed.
Needs the packages of scripts/requirements-exports.txt (pip install --no-deps); no GPU.
"""

import argparse
import csv
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import math
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "export"

# The made-up machine of tests/export.rs: seconds of a decode step and of a batch of prompts.
DECODE_S = lambda batch, kv_tokens: 40e-3 + 5e-3 * batch + 4e-6 * kv_tokens
PREFILL_S = lambda tokens: 30e-3 + 4e-3 * tokens


def expect(found, expected, what, share=1e-9):
    if not math.isclose(found, expected, rel_tol=share):
        raise ValueError(f"{what} is {found}, expected {expected}")


def expect_keys(found, needed, allowed, what):
    if missing := sorted(set(needed) - set(found)):
        raise ValueError(f"{what} lacks {missing}")
    if unknown := sorted(set(found) - set(needed) - set(allowed)):
        raise ValueError(f"{what} has {unknown}, which its consumer does not know")


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for the parts of Dynamo that serve and never read: its native runtime and its cluster client."""

    NAMES = ("dynamo.runtime", "dynamo._core", "aisimulate_core", "kubernetes")

    def find_spec(self, name, path, target=None):
        if any(name == stem or name.startswith(stem + ".") for stem in self.NAMES):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock()
        module.__spec__, module.__name__, module.__path__ = spec, spec.name, []
        return module

    def exec_module(self, module):
        pass


def prometheus(text):
    from prometheus_client.parser import text_string_to_metric_families

    families = list(text_string_to_metric_families(text))
    samples = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = {name: value for name, value in sample.labels.items() if name in ("quantile", "state", "tokens")}
        key = (sample.name, tuple(sorted(sample.labels.items())))
        if key in samples:
            raise ValueError(f"{key} stands there twice")
        samples[key] = samples[sample.name, tuple(labels.values())] = sample.value
    kinds = {family.name: family.type for family in families}
    expect_keys(["summary"], [kinds["tokmeter_time_to_first_token_seconds"]], [], "the kind of TTFT")
    expect(samples["tokmeter_output_tokens_per_second", ()], 160, "output tokens per second")
    expect(samples["tokmeter_power_watts", ()], 600, "power")
    expect(samples["tokmeter_joules_per_token", ("output",)], 3.75, "joules per output token")
    expect(samples["tokmeter_time_to_first_token_seconds", ("0.5",)], 0.25, "median TTFT")
    expect(samples["tokmeter_time_to_first_token_seconds_sum", ()], 7.5, "sum of TTFT")
    expect(samples["tokmeter_idle_power_watts", ("no_context",)], 75, "idle power")


def table(text):
    rows = list(csv.DictReader(io.StringIO(text), strict=True))
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"a line has another number of fields than the header: {row}")
    row = rows[0]
    for name, expected in [("ttft_p50_ms", 250), ("step_p50_us", 25000), ("power_w", 600), ("power_tdp_share", 0.6)]:
        expect(float(row[name]), expected, name)


def dynamo_fpm(text):
    import msgspec
    from aiconfigurator_core._aiconfigurator_core import RustForwardPassPerfModel
    from dynamo.common.forward_pass_metrics import FPM_VERSION, ForwardPassMetrics
    from dynamo.planner.core.perf_model.decode import DecodeRegressionModel
    from dynamo.planner.core.perf_model.prefill import PrefillRegressionModel

    passes = []
    for line in text.splitlines():
        decoded = msgspec.json.decode(line, type=ForwardPassMetrics)
        if decoded.version != FPM_VERSION:
            raise ValueError(f"version {decoded.version}, expected {FPM_VERSION}")
        # Neither a field more nor a field less than Dynamo's own.
        if msgspec.to_builtins(decoded) != json.loads(line):
            raise ValueError(f"Dynamo reads {decoded} from {line}")
        passes.append(decoded)
    decoding = [found for found in passes if found.scheduled_requests.num_decode_requests]
    filling = [found for found in passes if found.scheduled_requests.num_prefill_requests]
    for found in decoding:
        scheduled = found.scheduled_requests
        # Half a token of rounding is 2 microseconds.
        step_s = DECODE_S(scheduled.num_decode_requests, scheduled.sum_decode_kv_tokens)
        expect(found.wall_time, step_s, "a decode step", 1e-4)

    planner = DecodeRegressionModel(max_num_fpm_samples=1000)
    planner.load_benchmark_fpms(decoding)
    if not planner._ensure_fitted():
        raise ValueError("Dynamo's planner fits no decode model")
    expect(planner._predict_2d(8, 4164), DECODE_S(8, 4164), "the planner's decode step", 0.01)
    planner = PrefillRegressionModel(max_num_fpm_samples=1000)
    planner.load_benchmark_fpms(filling)
    if not planner._ensure_fitted():
        raise ValueError("Dynamo's planner fits no prefill model")
    expect(planner._predict_wall_time(1024), PREFILL_S(1024), "the planner's prefill", 0.2)

    model = RustForwardPassPerfModel.from_regression()
    model.tune_with_fpms(json.dumps([[json.loads(line)] for line in text.splitlines()]))
    query = {"version": FPM_VERSION, "scheduled_requests": {"num_decode_requests": 8, "sum_decode_kv_tokens": 4164}}
    found_ms = model.estimate_forward_pass_time_ms(json.dumps([query]))
    if found_ms is None:
        raise ValueError("AIConfigurator's model is not ready after these passes")
    expect(found_ms, 1e3 * DECODE_S(8, 4164), "AIConfigurator's decode step", 0.05)


def dynamo_profile(text):
    import yaml
    from dynamo.planner.core.perf_model.decode import DecodeRegressionModel
    from dynamo.planner.monitoring.perf_metrics import _convert_decode_profiling, _convert_prefill_profiling

    manifest = yaml.safe_load(text)
    expect_keys(manifest, ["apiVersion", "kind", "metadata", "data"], [], "the manifest")
    if (manifest["apiVersion"], manifest["kind"]) != ("v1", "ConfigMap"):
        raise ValueError("it is no ConfigMap")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in manifest["data"].items():
            Path(folder, name).write_text(content)
        filling, decoding = _convert_prefill_profiling(folder), _convert_decode_profiling(folder)
    found = {one.scheduled_requests.sum_prefill_tokens: one.wall_time for one in filling}
    expect(found[128], 0.550256, "prefill of 128 tokens, s")
    for one in decoding:
        scheduled = one.scheduled_requests
        step_s = DECODE_S(scheduled.num_decode_requests, scheduled.sum_decode_kv_tokens)
        expect(one.wall_time, step_s, f"a decode step of {scheduled}", 1e-4)
    model = DecodeRegressionModel(max_num_fpm_samples=1000)
    model.load_benchmark_fpms(decoding)
    if not model._ensure_fitted():
        raise ValueError("Dynamo's planner fits no decode model")
    expect(model._predict_2d(8, 4164), DECODE_S(8, 4164), "the planner's decode step", 0.01)


def inferencex(text):
    """Names by InferenceX's process_result.py and aggregate_power.py, and InferenceX-app's metric-keys.ts."""
    routing = """hw conc model framework precision spec_decoding disagg is_multinode isl osl tp pp dcp_size pcp_size ep
        dp_attention""".split()
    rates = ["tput_per_gpu", "input_tput_per_gpu", "output_tput_per_gpu"]
    latencies = [f"{a}_{b}" for a in ("mean", "median", "p90", "p99") for b in ("ttft", "tpot", "itl", "e2el", "intvty")]
    power = """power_metric_schema_version power_valid power_invalid_reasons avg_power_w avg_total_gpu_power_w
        total_gpu_energy_j joules_per_successful_query joules_per_input_token joules_per_output_token
        joules_per_total_token""".split()
    for row in json.loads(text):
        expect_keys(row, routing + rates, latencies + power, "a row")
        expect(row["tput_per_gpu"], row["input_tput_per_gpu"] + row["output_tput_per_gpu"], "all tokens")
        expect(row["median_intvty"] * row["median_tpot"], 1, "interactivity times TPOT")
        expect(row["median_ttft"], 0.25, "median TTFT, s")
        # Both count the same tokens, so power over rate is energy over tokens.
        expect(row["joules_per_total_token"], row["avg_power_w"] / row["tput_per_gpu"], "joules per token")
        expect(row["power_metric_schema_version"], 2, "the version of power fields")


def mlperf_power(text):
    from submission_checker.models.file.system_power import SystemPower

    power = SystemPower.model_validate(json.loads(text)).compute({0: 2})
    if power.problems:
        raise ValueError(f"the checker finds {power.problems}")
    # Appendix D: 350 W for a small x86 CPU, 1000 W for a B200, and half as much again for air cooling.
    expect(power.total_system_power_w, (350 + 1000) * 1.5, "provisioned power, W")
    point = json.loads(text)["measured"]["points"][0]
    expect(point["system_tps_per_gpu_kw"], 160 / 0.6, "tokens per second and kW")


def aic_system(text):
    import aiconfigurator_core
    import yaml

    patch = yaml.safe_load(text)
    own = yaml.safe_load(Path(aiconfigurator_core.__path__[0], "systems", "b200_sxm.yaml").read_text())
    expect_keys(patch, ["gpu"], [], "the patch")
    expect_keys(patch["gpu"], ["mem_bw_empirical_scaling_factor"], own["gpu"], "gpu")
    for name, value in patch["gpu"].items():
        if not isinstance(value, (int, float)):
            raise ValueError(f"gpu.{name} is read as {value!r}, expected a number")
    found = own["gpu"]["mem_bw"] * patch["gpu"]["mem_bw_empirical_scaling_factor"]
    expect(found, 7.2e12, "AIConfigurator's effective bandwidth, bytes/s")
    expect(patch["gpu"]["mem_empirical_constant_latency"], 1.8e-6, "latency, s")


def fleet_sim(text):
    """Arguments and formulas by fleet_sim/gpu_profiles/manual.py."""
    needed = "name W H chunk blk_size total_kv_blks max_slots cost_per_hr".split()
    optional = "calibration_ctx power_idle_w power_nominal_w power_logistic_k power_logistic_x0".split()
    profile = json.loads(text)
    expect_keys(profile, needed, optional, "the profile")
    for name in ("chunk", "blk_size", "total_kv_blks", "max_slots", "calibration_ctx"):
        if type(profile[name]) is not int:
            raise ValueError(f"{name} is {profile[name]!r}, expected a whole number")
    context = profile["calibration_ctx"]
    for sequences in (1, 8, profile["max_slots"]):
        expect(profile["W"] + profile["H"] * sequences, DECODE_S(sequences, sequences * context), "an iteration, s", 1e-6)
        x = math.log2(sequences) - profile["power_logistic_x0"]
        range_w = profile["power_nominal_w"] - profile["power_idle_w"]
        watts = profile["power_idle_w"] + range_w / (1 + math.exp(-profile["power_logistic_k"] * x))
        joules = 8 + 3 * sequences + 1e-3 * sequences * context
        expect(watts, joules / DECODE_S(sequences, sequences * context), f"power at {sequences}, W", 0.03)


def dps_device(text):
    """Keys by the shipped specifications in DPS' manual."""
    import yaml

    for device in yaml.safe_load(text):
        expect_keys(device, ["type", "model", "spec"], ["description"], "a device")
        expect_keys(device["spec"], ["minLoadWatts", "maxLoadWatts"], ["wppsSupport"], "spec")
        expect(device["spec"]["minLoadWatts"], 200, "lowest limit, W")
        expect(device["spec"]["maxLoadWatts"], 1000, "highest limit, W")


def simready_rack(text):
    import simready.foundation.tier_aif as tier
    from pxr import Sdf

    # By its file: the package itself wants the validator around it.
    place = Path(tier.__path__[0], "capabilities", "aif", "equipment_classes.py")
    spec = importlib.util.spec_from_file_location("equipment_classes", place)
    classes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(classes)
    layer = Sdf.Layer.CreateAnonymous("rack_properties.usda")
    if not layer.ImportFromString(text) or not layer.defaultPrim:
        raise ValueError("USD reads no layer with a default prim")
    attributes = layer.GetPrimAtPath("/" + layer.defaultPrim).attributes
    values = {name: attribute.default for name, attribute in attributes.items()}
    equipment = classes.normalize(values["aif:core:assetClass"])
    specified = [name for name in values if name.startswith("aif:spec:")]
    expect_keys(specified, ["aif:spec:numGPUs"], classes.ATTRIBUTES[equipment], "the rack")
    expect(values["aif:spec:numGPUs"], 72, "GPUs")
    expect(values["tokmeter:gpuBoards:maxPower"], 43.2, "power of all boards, kW")


# File, its check, and a damage that the check must notice.
CHECKS = [
    ("prometheus.prom", prometheus, ("_seconds{", "_seconds{{")),
    ("csv.csv", table, ("step_mean_us,", "")),
    ("dynamo-fpm.jsonl", dynamo_fpm, ('"dp_rank":0', '"dp_rank":0,"energy_j":1')),
    ("dynamo-profile.json", dynamo_profile, ("prefill_ttft", "prefill_ttft_ms")),
    ("inferencex.json", inferencex, ('"tput_per_gpu": 480.0', '"tput_per_gpu": 160.0')),
    ("mlperf-power.json", mlperf_power, ('"cooling": "air"', '"cooling": "liquid"')),
    ("aic-system.yaml", aic_system, ("0.0000018", "18e-07")),
    ("fleet-sim.json", fleet_sim, ('"W"', '"w"')),
    ("dps-device.yaml", dps_device, ("minLoadWatts", "minLoadKilowatts")),
    ("simready-rack.usda", simready_rack, ("aif:spec:numGPUs", "aif:spec:gpus")),
]


def fault(check, text):
    try:
        check(text)
    except ImportError as error:
        sys.exit(f"{error}\nhint: pip install --no-deps -r scripts/requirements-exports.txt")
    except Exception as error:  # whatever a consumer raises is a finding
        return f"{type(error).__name__}: {error}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", nargs="?", type=Path, default=GOLDENS, help="where the exports are")
    parser.add_argument("--self-test", action="store_true", help="require that a damaged file is noticed")
    arguments = parser.parse_args()
    sys.meta_path.insert(0, StandIn())
    failed = False
    for name, check, (before, after) in CHECKS:
        text = (arguments.folder / name).read_text()
        if arguments.self_test:
            if before not in text:
                sys.exit(f"{name}: the damage finds no {before!r}")
            found = fault(check, text.replace(before, after))
            failed |= found is None
            print(f"{name}: {'the damage was not noticed' if found is None else 'noticed: ' + found[:160]}")
        else:
            found = fault(check, text)
            failed |= found is not None
            print(f"{name}: {found or 'read'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
