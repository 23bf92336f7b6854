//! What a report draws, as points: where a cell stands on the axes, percentiles of a latency, speed per user, bytes and
//! flops against the device's ceilings, power over time. Computes; draws nothing.

use super::CellSummary;
use crate::record::{Energy, LatencyHistogram, Maybe, Record, Workload, merge_histograms};

/// Kinds of cells in the order of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CellKind {
    Prefill,
    Decode,
    Generate,
    ServeClosed,
    ServeOpen,
}

impl CellKind {
    pub const ALL: [CellKind; 5] =
        [CellKind::Prefill, CellKind::Decode, CellKind::Generate, CellKind::ServeClosed, CellKind::ServeOpen];

    pub fn name(self) -> &'static str {
        match self {
            CellKind::Prefill => "prefill",
            CellKind::Decode => "decode",
            CellKind::Generate => "generate",
            CellKind::ServeClosed => "serve-closed",
            CellKind::ServeOpen => "serve-open",
        }
    }
}

/// Where a workload stands on the axes of its kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    pub kind: CellKind,
    /// Batch, concurrency, or requests per second.
    pub load: f64,
    /// Tokens that are there before the first timed one: prompt or depth.
    pub context: u32,
    /// Tokens made per request; 0 for prefill.
    pub osl: u32,
}

impl Place {
    pub fn of(workload: &Workload) -> Place {
        let (kind, load, context, osl) = match *workload {
            Workload::Prefill { batch, isl } => (CellKind::Prefill, f64::from(batch), isl, 0),
            Workload::Decode { batch, depth, osl } => (CellKind::Decode, f64::from(batch), depth, osl),
            Workload::Generate { batch, isl, osl } => (CellKind::Generate, f64::from(batch), isl, osl),
            Workload::ServeClosed { concurrency, isl, osl, .. } => {
                (CellKind::ServeClosed, f64::from(concurrency), isl, osl)
            }
            Workload::ServeOpen { request_rate_per_s, isl, osl, .. } => {
                (CellKind::ServeOpen, request_rate_per_s, isl, osl)
            }
        };
        Place { kind, load, context, osl }
    }
}

/// Output tokens per second that one user sees: the inverse of the mean TPOT of the cell's requests.
pub fn tokens_per_s_per_user(cell: &CellSummary) -> Maybe<f64> {
    match &cell.tpot {
        Maybe::Value(tpot) if tpot.mean_ns > 0.0 => Maybe::Value(1e9 / tpot.mean_ns),
        Maybe::Value(_) => Maybe::missing("no_step"),
        Maybe::Missing(missing) => Maybe::Missing(missing.clone()),
    }
}

/// Indices of the points that no other point exceeds in both coordinates, by rising x.
pub fn frontier(points: &[(f64, f64)]) -> Vec<usize> {
    let mut by_x: Vec<usize> = (0..points.len()).collect();
    by_x.sort_by(|a, b| points[*b].0.total_cmp(&points[*a].0).then(points[*b].1.total_cmp(&points[*a].1)));
    let mut highest = f64::NEG_INFINITY;
    by_x.retain(|index| {
        let is_on = points[*index].1 > highest;
        highest = highest.max(points[*index].1);
        is_on
    });
    by_x.reverse();
    by_x
}

/// Work of a cell against its device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RooflinePoint {
    pub bytes_per_s: f64,
    pub flops_per_s: f64,
}

impl RooflinePoint {
    /// Arithmetic intensity.
    pub fn flops_per_byte(&self) -> f64 {
        self.flops_per_s / self.bytes_per_s
    }
}

/// The two ceilings that make a device's roof.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roof {
    pub bytes_per_s: f64,
    pub flops_per_s: f64,
}

/// The roof over the record's devices, from its first: several are of one kind.
pub fn roof(record: &Record) -> Maybe<Roof> {
    let ceilings = match &record.ceilings {
        Maybe::Value(ceilings) => ceilings,
        Maybe::Missing(missing) => return Maybe::Missing(missing.clone()),
    };
    let Some(first) = ceilings.first() else { return Maybe::missing("no_ceilings") };
    let both = first.bandwidth_bytes_per_s().zip(first.matmul_of(&record.engine.compute_dtype));
    both.map(|(bytes_per_s, flops_per_s)| Roof { bytes_per_s, flops_per_s })
}

/// Bytes and flops per second of a cell of the record: its MBU and MFU times the ceilings that they are shares of.
pub fn roofline_point(record: &Record, cell: &CellSummary) -> Maybe<RooflinePoint> {
    let shares = cell.mbu_share.as_ref().zip(cell.mfu_share.as_ref());
    roof(record).zip(shares).map(|(roof, (mbu, mfu))| RooflinePoint {
        bytes_per_s: mbu * roof.bytes_per_s,
        flops_per_s: mfu * roof.flops_per_s,
    })
}

/// One percentile: the share of observations that are at most so long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PercentilePoint {
    pub share: f64,
    pub ns: f64,
}

/// Points of a percentile plot for each tenth of a decade of `1 − share`.
const POINTS_PER_DECADE: u32 = 20;
/// Fewer observations show no distribution.
const FEWEST_OBSERVATIONS: u64 = 5;

/// The distribution over all runs, up to the last percentile that so many observations bound from above with 95 %
/// confidence: `share^n = 0.05`.
pub fn percentiles<'a>(
    runs: impl Iterator<Item = &'a Maybe<LatencyHistogram>>,
) -> Maybe<Vec<PercentilePoint>> {
    let mut reason = "no_run".to_owned();
    let mut parts = Vec::new();
    for run in runs {
        match run {
            Maybe::Value(histogram) => parts.push(histogram),
            Maybe::Missing(missing) => reason.clone_from(&missing.missing),
        }
    }
    let extremes = (parts.iter().map(|part| part.min_ns).min(), parts.iter().map(|part| part.max_ns).max());
    let (Some(min_ns), Some(max_ns)) = extremes else { return Maybe::missing(reason) };
    let Ok(Some(merged)) = merge_histograms(parts) else { return Maybe::missing("histogram_unreadable") };
    if merged.len() < FEWEST_OBSERVATIONS {
        return Maybe::missing("needs_5_observations");
    }
    let last_share = 0.05_f64.powf(1.0 / merged.len() as f64);
    let mut shares = shares_up_to(last_share).into_iter().peekable();
    let (mut points, mut below) = (Vec::new(), 0);
    for bucket in merged.iter_recorded() {
        below += bucket.count_since_last_iteration();
        let ns = bucket.value_iterated_to().clamp(min_ns, max_ns) as f64;
        while let Some(share) = shares.next_if(|share| (share * merged.len() as f64).ceil() as u64 <= below) {
            points.push(PercentilePoint { share, ns });
        }
    }
    // A histogram answers with the upper end of a bucket; the least value is known exactly.
    points.first_mut().into_iter().for_each(|first| first.ns = min_ns as f64);
    Maybe::Value(points)
}

/// From 0 upward, evenly in the logarithm of what is above.
fn shares_up_to(last: f64) -> Vec<f64> {
    let share = |step: u32| 1.0 - 10f64.powf(-f64::from(step) / f64::from(POINTS_PER_DECADE));
    let mut shares: Vec<f64> = (0..).map(share).take_while(|share| *share < last).collect();
    shares.push(last);
    shares
}

/// A window on the invocation's clock, and what the sensor said over it.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowReading {
    pub key: String,
    pub run: u32,
    pub t0_s: f64,
    pub t1_s: f64,
    pub power: Maybe<PowerReading>,
    pub sm_mhz: Maybe<f64>,
    /// At the start and at the end.
    pub temperature_c: Maybe<(f64, f64)>,
}

/// Mean power of all devices over the metered part of a window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PowerReading {
    pub t_a_s: f64,
    pub t_b_s: f64,
    pub mean_w: f64,
}

impl PowerReading {
    fn of(energy: &Energy) -> Self {
        let (t_a_s, t_b_s) = (energy.t_a_ns as f64 / 1e9, energy.t_b_ns as f64 / 1e9);
        PowerReading { t_a_s, t_b_s, mean_w: energy.energy_j / (t_b_s - t_a_s) }
    }
}

/// All windows of a record, in the order they were measured.
pub fn window_readings(record: &Record) -> Vec<WindowReading> {
    let mut readings = Vec::new();
    for cell in &record.cells {
        for run in &cell.runs {
            readings.extend(run.windows.iter().map(|window| WindowReading {
                key: cell.key.clone(),
                run: run.index,
                t0_s: window.t0_ns as f64 / 1e9,
                t1_s: window.t1_ns as f64 / 1e9,
                power: window.energy.as_ref().map(PowerReading::of),
                sm_mhz: window.clocks.as_ref().map(|clocks| clocks.sm_mean_mhz),
                temperature_c: window.temperature.as_ref().map(|reading| (reading.start_c, reading.end_c)),
            }));
        }
    }
    readings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frontier_keeps_what_nothing_exceeds_in_both() {
        let points = [(1.0, 10.0), (2.0, 9.0), (2.0, 8.0), (1.5, 4.0), (3.0, 1.0), (0.5, 10.0)];
        assert_eq!(frontier(&points), [0, 1, 4]);
        assert_eq!(frontier(&[]), [0usize; 0]);
    }

    fn histogram(values: impl Iterator<Item = u64>) -> Maybe<LatencyHistogram> {
        LatencyHistogram::of(values).map_or(Maybe::missing("no_request"), Maybe::Value)
    }

    #[test]
    fn percentiles_end_where_observations_do() {
        // 1 ms to 100 ms over two runs; 0.05^(1/100) = 97.05 %.
        let runs =
            [histogram((1..=50).map(|ms| ms * 1_000_000)), histogram((51..=100).map(|ms| ms * 1_000_000))];
        let points = percentiles(runs.iter()).into_value().unwrap();
        assert_eq!((points[0].share, points[0].ns), (0.0, 1e6));
        let last = points.last().unwrap();
        assert!((last.share - 0.970_49).abs() < 1e-4 && (last.ns / 98e6 - 1.0).abs() < 2e-3, "{last:?}");
        for point in &points[1..] {
            let exact = (point.share * 100.0).ceil() * 1e6;
            assert!((point.ns / exact - 1.0).abs() < 2e-3, "{point:?}, expected {exact}");
        }
        assert_eq!(percentiles([histogram(1_000..1_004)].iter()), Maybe::missing("needs_5_observations"));
        assert_eq!(percentiles([histogram(0..0)].iter()), Maybe::missing("no_request"));
    }
}
