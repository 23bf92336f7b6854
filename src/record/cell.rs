//! What was measured of one workload: warm-up, windows, requests, and the checks on them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::environment::CellGpu;
use super::machine::CpuShare;
use super::{Latency, Maybe};

/// One kind of load at one set of sizes. All lengths are tokens per request.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Workload {
    /// `batch` prompts of `isl` tokens at once; one output token each.
    Prefill { batch: u32, isl: u32 },
    /// `batch` sequences that already hold `depth` tokens make `osl` tokens each, one per step.
    Decode { batch: u32, depth: u32, osl: u32 },
    /// `batch` requests at once, prompt to last token, repeated.
    Generate { batch: u32, isl: u32, osl: u32 },
    /// `concurrency` requests always in the engine; at least `requests` are measured.
    ServeClosed { concurrency: u32, isl: u32, osl: u32, requests: u32 },
    /// Poisson arrivals at `request_rate_per_s`, whatever the engine does; at least `requests` are measured.
    ServeOpen { request_rate_per_s: f64, isl: u32, osl: u32, requests: u32 },
}

impl Workload {
    /// Stable name of the cell: `decode/b8/d512/o64`.
    pub fn key(&self) -> String {
        match self {
            Workload::Prefill { batch, isl } => format!("prefill/b{batch}/i{isl}"),
            Workload::Decode { batch, depth, osl } => format!("decode/b{batch}/d{depth}/o{osl}"),
            Workload::Generate { batch, isl, osl } => format!("generate/b{batch}/i{isl}/o{osl}"),
            Workload::ServeClosed { concurrency, isl, osl, requests } => {
                format!("serve-closed/c{concurrency}/i{isl}/o{osl}/n{requests}")
            }
            Workload::ServeOpen { request_rate_per_s, isl, osl, requests } => {
                format!("serve-open/r{request_rate_per_s}/i{isl}/o{osl}/n{requests}")
            }
        }
    }

    /// Prompt and output tokens of each request. A decode cell's prompt is its depth, and its first output token
    /// belongs to the untimed prefill.
    pub fn lengths(&self) -> (u32, u32) {
        match *self {
            Workload::Prefill { isl, .. } => (isl, 1),
            Workload::Decode { depth, osl, .. } => (depth, osl.saturating_add(1)),
            Workload::Generate { isl, osl, .. }
            | Workload::ServeClosed { isl, osl, .. }
            | Workload::ServeOpen { isl, osl, .. } => (isl, osl),
        }
    }

    /// Input and output tokens that one request contributes to a window of a static cell.
    pub fn counted_tokens(&self) -> (u32, u32) {
        match *self {
            Workload::Decode { osl, .. } => (0, osl),
            _ => self.lengths(),
        }
    }

    /// Sequences of a static cell, which repeats the same requests in every pass; `None` for serving.
    pub fn static_batch(&self) -> Option<u32> {
        match *self {
            Workload::Prefill { batch, .. }
            | Workload::Decode { batch, .. }
            | Workload::Generate { batch, .. } => Some(batch),
            Workload::ServeClosed { .. } | Workload::ServeOpen { .. } => None,
        }
    }
}

/// All that was measured of one workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// Name of the workload, such as `decode/b8/d512/o64`.
    pub key: String,
    pub workload: Workload,
    pub devices: Vec<String>,
    pub outcome: Outcome,
    pub warmup: Maybe<Warmup>,
    /// The GPUs before, after the warm-up, and after the cell.
    #[serde(default = "Maybe::<Vec<CellGpu>>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub gpus: Maybe<Vec<CellGpu>>,
    pub runs: Vec<Run>,
}

impl Cell {
    /// One in which nothing was tried.
    pub fn skipped(workload: Workload, device: String, why: String) -> Self {
        Cell {
            key: workload.key(),
            workload,
            devices: vec![device],
            outcome: Outcome::Skipped { why },
            warmup: Maybe::missing("skipped"),
            gpus: Maybe::missing("skipped"),
            runs: Vec::new(),
        }
    }
}

/// Whether the cell was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome {
    Measured,
    /// The runs before the failure are kept.
    Failed {
        error: String,
    },
    /// Stopped by a signal; the runs before it are kept.
    Interrupted,
    /// A suite's cell that this model or this device has no room for; nothing was tried.
    Skipped {
        why: String,
    },
}

/// Work of the same shapes before the first window; none of it is counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Warmup {
    pub duration_ns: u64,
    pub steps: u64,
    pub requests: u64,
    /// Why it ended.
    #[serde(default = "Maybe::<WarmupEnd>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub ended: Maybe<WarmupEnd>,
}

/// What ended a warm-up or a ramp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WarmupEnd {
    /// The asked time and amount of work were done; flatness was not asked for.
    Fixed,
    /// Times, clocks and temperature were flat.
    Flat,
    /// The longest time was over before that.
    Bound,
}

/// One repetition. Times are nanoseconds of the run's own monotonic clock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Run {
    pub index: u32,
    /// Start of the run, RFC 3339, UTC.
    pub started_at: String,
    pub windows: Vec<Window>,
    /// Load of the same kind before the window opened; missing for static cells, whose passes all start alike.
    pub ramp: Maybe<Warmup>,
    pub latency: Latency,
    /// Requests that arrived in a window. A decode cell has a row per sequence and pass.
    pub requests: Vec<RequestRow>,
    pub drain: Maybe<Drain>,
    /// How the device cooled before the run.
    #[serde(default = "Maybe::<Cooldown>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub cooldown: Maybe<Cooldown>,
    pub steady: Steady,
    pub checks: Vec<Check>,
    /// SHA-256 over the output token ids (little-endian u32, request by request) of the first measured pass.
    pub output_token_sha256: Maybe<String>,
}

/// The timed part. Tokens count when they become visible to the host in (`t0_ns`, `t1_ns`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Window {
    pub t0_ns: u64,
    pub t1_ns: u64,
    /// Prompt tokens computed.
    pub tokens_in: u64,
    /// Output tokens that became visible.
    pub tokens_out: u64,
    /// Forward passes that became visible.
    pub steps: u64,
    /// Requests whose last token became visible.
    pub requests_completed: u64,
    /// Whole repetitions of a static workload; 0 for serving.
    pub passes: u64,
    /// Requests that had arrived and were not finished, at both ends.
    pub backlog: WindowEnd,
    pub cpu: Maybe<CpuShare>,
    pub energy: Maybe<Energy>,
    pub clocks: Maybe<Clocks>,
    pub temperature: Maybe<Temperature>,
    pub clock_events: Maybe<ClockEvents>,
}

/// A count at the start and at the end of a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WindowEnd {
    pub at_t0: u64,
    pub at_t1: u64,
}

/// Energy over the metered part of the window, [`t_a_ns`, `t_b_ns`]: between two updates of an energy counter, or the
/// whole window where power was integrated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Energy {
    pub t_a_ns: u64,
    pub t_b_ns: u64,
    /// All devices together, gross: idle power is part of it.
    pub energy_j: f64,
    /// Half-width of what the times of the readings leave open. The sensor's own error comes on top
    /// ([`super::Meter::systematic_share`]).
    pub uncertainty_j: f64,
    /// Prompt tokens whose work lies in the metered part.
    pub tokens_in: f64,
    /// Output tokens whose work lies in the metered part.
    pub tokens_out: f64,
    /// Why this energy must not decide a comparison: `short_window`, `counter_and_power_disagree`, `device_shared`,
    /// `power_integrated_only`, `clock_stepped`.
    pub doubts: Vec<String>,
    pub devices: Vec<DeviceEnergy>,
    /// CPU time of the thread that read the sensor during the window.
    pub sampler_cpu_ns: Maybe<u64>,
}

/// Energy of one metered device between its own two readings, which enclose the window's metered part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeviceEnergy {
    pub device: String,
    pub t_a_ns: u64,
    pub t_b_ns: u64,
    /// How far the first reading may be from `t_a_ns`.
    pub half_width_a_ns: u64,
    /// How far the second reading may be from `t_b_ns`.
    pub half_width_b_ns: u64,
    pub energy_j: f64,
    /// Updates of the counter that were seen, or readings of power.
    pub readings: u64,
    /// The counter's update period in this window.
    pub update_period_ns: Maybe<u64>,
    /// The same energy from power readings alone.
    pub integral_j: Maybe<f64>,
    /// Least and largest power that was read.
    pub power_min_w: Maybe<f64>,
    pub power_max_w: Maybe<f64>,
}

/// Device clocks over the window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Clocks {
    pub sm_mean_mhz: f64,
    pub sm_min_mhz: f64,
    pub memory_mhz: Maybe<f64>,
}

/// Device temperature over the window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Temperature {
    pub start_c: f64,
    pub end_c: f64,
    pub max_c: f64,
}

/// Time that clocks were held down during the window, by cause.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClockEvents {
    pub software_power_cap_ns: Maybe<u64>,
    pub software_thermal_ns: Maybe<u64>,
    pub hardware_thermal_ns: Maybe<u64>,
    pub hardware_power_brake_ns: Maybe<u64>,
    /// All causes that were seen, as the driver's bits in hexadecimal, those without a name included.
    pub reasons_mask: Maybe<String>,
}

/// One request of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RequestRow {
    pub id: u64,
    pub isl_tokens: u32,
    /// Tokens produced so far; less than asked only when the drain ended first.
    pub osl_tokens: u32,
    /// When the request was meant to arrive.
    pub arrival_ns: u64,
    /// When it was handed to the engine.
    pub submitted_ns: u64,
    pub first_token_ns: Maybe<u64>,
    pub last_token_ns: Maybe<u64>,
    pub complete: bool,
}

/// What happened after the last window, while its requests were finished under unchanged load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    pub duration_ns: u64,
    /// Requests of the window that the drain's bound cut off.
    pub unfinished: u64,
}

/// A pause in which the device cooled, and the warm-up that followed it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cooldown {
    pub duration_ns: u64,
    /// Temperature at its end.
    pub end_c: f64,
    /// The device came to the temperature it was to cool to before the longest time was over.
    pub reached: bool,
    pub warmup: Warmup,
}

/// What lies between two runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Thermal {
    /// Nothing: the device stays hot.
    Hot,
    /// A pause until the device is nearly as cool as before the first cell, and a warm-up.
    Cooldown,
}

/// Whether the windows showed a steady state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Steady {
    /// Not asked for, an open loop, or too few pieces of work.
    NotAssessed,
    /// No change that matters was found.
    Steady,
    /// The work became faster within the window.
    Warmup,
    /// The work became slower within the window.
    Slowdown,
    /// The speed came and went.
    NoSteadyState,
    /// Open loop only: the backlog grew, so the latencies belong to the length of the window, not to the engine.
    Unsustainable,
}

/// An identity that the measurement must satisfy, and whether it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Check {
    pub name: String,
    pub ok: bool,
    pub detail: String,
}
