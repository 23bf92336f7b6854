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
        "not_reached" => "the cell ended before it came to this",
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
        "unfinished" => {
            "The slowest requests are not in the latencies, which therefore look better than they are."
        }
        "check_failed" => {
            "An identity that every measurement must satisfy did not hold. Do not use the cell."
        }
        "above_ceiling" => {
            "Faster than the device can be: bytes, flops, time or ceiling is wrong. Do not use the cell's shares."
        }
        _ => "METHODOLOGY.md says what it means.",
    }
}
