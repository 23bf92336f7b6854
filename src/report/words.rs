//! Codes of the record in words: why a value is missing, and what a flag means for the reader.

use super::explain;

/// A reason code in words. Where the tables have words of their own, theirs; an unknown code as it is, without underscores.
pub fn reason_in_words(code: &str) -> String {
    if let Some(observations) =
        code.strip_prefix("needs_").and_then(|rest| rest.strip_suffix("_observations"))
    {
        return format!("needs {observations} observations");
    }
    let words = match code {
        "not_found" => "there is no such file, directory or entry on this machine",
        "permission" => "it exists and may not be read",
        "unreadable" => "reading it failed",
        "empty" => "there is nothing in it",
        "malformed" => "it is not what it should be",
        "unlimited" => "no limit is set",
        "no_frequency_policy" => "the kernel governs no clock here, as in most virtual machines",
        "no_cuda_driver" => "no CUDA driver library",
        "not_a_git_checkout" => "the build was not made in a git checkout",
        "git_failed" => "git did not answer the build",
        "no_commit" => "the checkout had no commit",
        "no_rustc" => "the build could not ask the compiler for its version",
        "no_lock_file" => "the build found no lock file",
        "scripted_clock" => "the time was scripted, so the machine means nothing",
        "window_too_short" => "no tick of the counter between two readings",
        "counter_went_back" => "the counter was smaller at the end than at the start",
        "running" => "the invocation had not ended, or was killed",
        "not_given" => "the option was not used",
        "cells_on_command_line" => "the cells were given on the command line",
        "no_gpu_in_use" => "no GPU was in use",
        "not_a_gpu" => "a CPU has none",
        "no_time" => "no repetition before the deadline",
        "not_reached" => "the cell or the run ended before it came to this",
        "skipped" => "the cell was skipped",
        "static_workload" => "prefill, decode and generate cells have no ramp and no drain",
        "no_token" => "no token was made",
        "no_request" => "no request belongs to the window",
        "no_complete_request" => "no request was finished",
        "no_step" => "no step became visible",
        "order_depends_on_time" => {
            "serving cells batch requests as they come, so their tokens have no fixed hash"
        }
        "not_cuda" => "the backend is not CUDA",
        "own_kernels" => "our own kernels were asked for (--gemm own)",
        "deterministic" => "only our own kernels are deterministic (--deterministic)",
        "cublaslt_not_found" => "cuBLASLt was not found",
        "cublaslt_unusable" => "cuBLASLt could not be started",
        "no_memory_for_tuning" => "the device was too full to time an algorithm",
        "redacted" => "taken out of this public copy",
        "model_was_named" => "a model was named, so none was fetched as a witness",
        "model_not_available" => "the model of the witness could not be had",
        "no_gpu" => "no GPU",
        "not_needed" => "there was no need",
        "graphs_switched_off" => "graphs were switched off (TOKMETER_CUDA_GRAPHS=0)",
        "no_ceilings" => "the record has no ceilings",
        "no_ceiling_of_this_type" => "no matmul peak was measured in this type",
        "not_one_device" => "the cell ran on several devices",
        "shapes_not_supported" => "the model's shapes are not supported",
        "cache_size_unknown" => "the size of the last-level cache is unknown",
        "kv_dtype_unknown" => "the size of keys and values is unknown",
        "prompts_took_several_steps" => {
            "a prompt took several steps, which does not say what each of them read"
        }
        "embedding_bytes_unknown" => "the size of the quantised embedding is unknown",
        "hot" => "no pause for cooling was asked for (--thermal)",
        "not_asked" => "it was not asked for (--power, --idle-seconds)",
        "driver_not_loaded" => "NVML is there, but the driver's module is not loaded",
        "driver_library_mismatch" => "NVML and the driver's module are of different versions",
        "function_not_found" => "this NVML has no such function",
        "deprecated" => "this NVML gives it no more",
        "not_supported" => "this device does not give it",
        "no_permission" => "the driver gives it to the administrator only",
        "gpu_is_lost" => "the GPU fell off the bus",
        "answer_to_another_question" | "answer_of_another_type" => {
            "NVML answered something else than was asked"
        }
        "driver_version_unknown" => "without the driver's version NVML's numbering of fields is unknown",
        "no_hwmon_power" => "the host has no power sensor of its own",
        "trace_begins_late" => "the external meter's file begins after the window",
        "trace_ends_early" => "the external meter's file ends before the window",
        "trace_has_hole" => "the external meter's file has a hole in the window",
        "trace_unreadable" => "the external meter's file cannot be read",
        "counter_reset" => "the energy counter began anew within the window",
        "counter_stuck" => "the energy counter stood still",
        "too_few_updates" => "the energy counter was updated too rarely within the window",
        "update_period_changed" => "the energy counter's period changed within the window",
        "power_is_zero" => "the sensor read no power at all",
        "no_power_reading" => "the sensor gave no power within the window",
        "power_above_limit" => "the power is above the device's limit, which cannot be",
        "power_below_idle" => "the power is below that of the idle device, which cannot be",
        "power_is_not_energy_per_token_times_rate" => {
            "joules per token times tokens per second are not the power"
        }
        "power_integrated_only" => {
            "the device has no energy counter, and its power may be read in step with the load"
        }
        "idle_watched_too_shortly" => "idle power was watched for less than a minute (--idle-seconds 60)",
        "no_counter" => "the sensor has no such counter",
        "not_seen" => "it did not occur while it was watched",
        "not_known" | "not_measured" | "not_counted" => "the sensor does not say",
        "counter_and_power_disagree" => "counter and integrated power differ by more than 5 %",
        "device_shared" => "somebody else's work is in the reading",
        "clock_stepped" => "the clock was set while it was measured",
        "needs_2_runs" => "needs two runs",
        "histogram_unreadable" => "the histogram in the file cannot be read",
        "idle_power_not_measured" => "idle power was not measured",
        "no_energy_price" => "the cost model has no price of energy",
        "power_unreadable" => "the power is no number",
        "price_too_large" | "too_large" => "the price is too large to compute with",
        "no_output_tokens" => "it makes no output tokens",
        "no_input_tokens" => "it computes no prompt tokens",
        "no_tokens" => "there are no tokens",
        "costs_nothing" => "the price is nothing",
        _ => return explain(code),
    };
    words.to_owned()
}

/// What follows for a reader from a flag, by its name in the JSON summary.
pub fn consequence(flag: &str) -> &'static str {
    match flag {
        "failed" => "The cell stopped with an error. Runs before it are kept and shown.",
        "interrupted" => "A signal stopped the cell. Runs before it are kept and shown.",
        "skipped" => "Nothing was tried: the model or the device has no room for the cell.",
        "not_quiet" => {
            "Somebody else used the machine during a window. Numbers are kept and not corrected; measure again on a quiet \
             machine before deciding anything."
        }
        "unsustainable" => {
            "The backlog grew while it was measured, so latencies belong to the length of the window, not to the engine."
        }
        "not_steady" => {
            "Rates, clocks or temperatures were still moving while it was measured; a longer warm-up would give another number."
        }
        "throttled" => {
            "The device held its clocks down while it was measured. Numbers are kept: they are of a throttled device."
        }
        "unfinished" => {
            "The slowest requests are not in the latencies, which therefore look better than they are."
        }
        "check_failed" => {
            "An identity that every measurement must satisfy did not hold. Do not use the cell."
        }
        "above_ceiling" => {
            "Faster than the device can be: bytes, flops, time or ceiling is wrong. Do not use the cell's shares."
        }
        "energy_in_doubt" => "The energy is shown, and must not decide a comparison.",
        _ => "METHODOLOGY.md says what it means.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_code_of_the_format_has_words() {
        let format = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/FORMAT.md")).unwrap();
        let table =
            format.split("## Reason codes").nth(1).and_then(|rest| rest.split("\n## ").next()).unwrap();
        let heads = table.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
        let codes: Vec<&str> = heads
            .flat_map(|head| head.split('`'))
            .filter(|code| code.starts_with(|c: char| c.is_ascii_lowercase()))
            .collect();
        assert!(codes.len() > 30, "{codes:?}");
        // A code with an ellipsis stands for many, which are shown as they are.
        let bare = codes
            .iter()
            .filter(|code| !code.ends_with('…') && reason_in_words(code) == code.replace('_', " "));
        assert_eq!(bare.collect::<Vec<_>>(), [&""; 0], "codes without words in src/report/words.rs");
    }

    #[test]
    fn numbers_of_observations_and_unknown_codes_are_told_too() {
        assert_eq!(reason_in_words("needs_29_observations"), "needs 29 observations");
        assert_eq!(reason_in_words("a_code_of_tomorrow"), "a code of tomorrow");
    }
}
