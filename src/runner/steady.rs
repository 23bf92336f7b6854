//! Is a series of equal pieces of work flat in time? Decides when a warm-up may end and of which class a window is.
//! Pure functions over durations: knows no clock, no engine and no sensor. The runner gives it the time of each pass of
//! a static cell, or from one finished request to the next in a closed loop.

use crate::record::Steady;

/// Pieces of work without which nothing can be said.
pub(super) const LEAST_PIECES: usize = 8;
/// More pieces are averaged into so many blocks.
const MOST_BLOCKS: usize = 60;
/// Change over a stretch of warm-up that still counts as flat, relative.
const FLAT: f64 = 0.003;
/// Distance of a segment's mean from the window's that changes no conclusion, relative.
const SAME: f64 = 0.005;
/// A last segment of this share of the window may stand for it.
const LONG_SHARE: f64 = 0.6;
/// Standard deviations beyond which a change is no chance: 5 % on two sides.
const SURE: f64 = 1.96;
/// Cost of a change point in squared deviations, times the logarithm of the length (Barrett et al., OOPSLA 2017).
const PENALTY: f64 = 15.0;
/// Noise below this share of the median is taken as this much: a scripted engine has none at all.
const LEAST_NOISE: f64 = 0.0005;
/// Shortest segment, so that a single odd block is none.
const LEAST_SEGMENT: usize = 2;
/// Blocks farther from the median than this many times the distance of the 10th and the 90th percentile are left out
/// of the judgement (not of the measurement).
const OUTLIER: f64 = 3.0;

/// Whether neither slope nor halves show a change that is larger than [`FLAT`] and more than chance.
/// `false` for fewer than [`LEAST_PIECES`].
pub(super) fn is_flat(times_ns: &[u64]) -> bool {
    Series::of(times_ns).is_some_and(|series| !series.drifts() && !series.halves_differ())
}

/// The class of a window whose pieces of work took these times.
pub(super) fn class_of(times_ns: &[u64]) -> Steady {
    Series::of(times_ns).map_or(Steady::NotAssessed, |series| series.class())
}

/// Mean times of blocks of equally many pieces, over their median, without outliers.
struct Series {
    blocks: Vec<f64>,
    /// Standard deviation of one block.
    noise: f64,
}

impl Series {
    fn of(times_ns: &[u64]) -> Option<Self> {
        if times_ns.len() < LEAST_PIECES {
            return None;
        }
        let blocks = blocks(times_ns);
        let middle = median(&blocks);
        if middle <= 0.0 {
            return None;
        }
        let blocks = without_outliers(blocks.iter().map(|block| block / middle).collect());
        let noise = noise(&blocks);
        Some(Series { blocks, noise })
    }

    /// Theil and Sen's slope over the whole length, significant by Mann and Kendall's test.
    fn drifts(&self) -> bool {
        let count = self.blocks.len();
        let mut slopes = Vec::with_capacity(count * (count - 1) / 2);
        for (first, early) in self.blocks.iter().enumerate() {
            for (distance, late) in self.blocks[first..].iter().enumerate().skip(1) {
                slopes.push((late - early) / distance as f64);
            }
        }
        let change = median(&slopes) * (count - 1) as f64;
        let rises = slopes.iter().filter(|slope| **slope > 0.0).count() as f64;
        let falls = slopes.iter().filter(|slope| **slope < 0.0).count() as f64;
        let n = count as f64;
        let deviation = (n * (n - 1.0) * (2.0 * n + 5.0) / 18.0).sqrt();
        change.abs() > FLAT && (rises - falls).abs() - 1.0 > SURE * deviation
    }

    /// The medians of the two halves differ by more than [`FLAT`] and [`SURE`] standard errors.
    fn halves_differ(&self) -> bool {
        let (first, second) = self.blocks.split_at(self.blocks.len() / 2);
        let difference = (median(first) - median(second)).abs();
        // The variance of a normal sample's median is π/2 times that of its mean.
        let variance = std::f64::consts::FRAC_PI_2 * self.noise.powi(2);
        let error = (variance / first.len() as f64 + variance / second.len() as f64).sqrt();
        difference > FLAT && difference > SURE * error
    }

    fn class(&self) -> Steady {
        let segments = self.segments();
        let whole = mean(&self.blocks);
        let is_same = |segment: &&[f64]| (mean(segment) / whole - 1.0).abs() <= SAME;
        let stands_for_all = |segment: &&[f64]| {
            segment.len() as f64 >= LONG_SHARE * self.blocks.len() as f64 && is_same(segment)
        };
        if segments.iter().all(is_same) || segments.last().is_some_and(stands_for_all) {
            Steady::Steady
        } else if segments.windows(2).all(|pair| mean(pair[1]) < mean(pair[0])) {
            Steady::Warmup
        } else if segments.windows(2).all(|pair| mean(pair[1]) > mean(pair[0])) {
            Steady::Slowdown
        } else {
            Steady::NoSteadyState
        }
    }

    /// The stretches of constant mean that explain the series best at [`PENALTY`] for each change. All ends are tried,
    /// which finds what PELT finds; so short a series needs no pruning.
    fn segments(&self) -> Vec<&[f64]> {
        let count = self.blocks.len();
        let penalty = PENALTY * (count as f64).ln();
        // Least cost of the first `end` blocks, and where their last segment begins.
        let mut best = vec![(f64::INFINITY, 0); count + 1];
        best[0] = (0.0, 0);
        for end in LEAST_SEGMENT..=count {
            for begin in 0..=end - LEAST_SEGMENT {
                let cost = best[begin].0 + self.cost(begin, end) + penalty;
                if cost < best[end].0 {
                    best[end] = (cost, begin);
                }
            }
        }
        let (mut segments, mut end) = (Vec::new(), count);
        while end > 0 {
            let begin = best[end].1;
            segments.push(&self.blocks[begin..end]);
            end = begin;
        }
        segments.reverse();
        segments
    }

    /// Squared deviations from the segment's mean, in units of the noise.
    fn cost(&self, begin: usize, end: usize) -> f64 {
        let segment = &self.blocks[begin..end];
        let middle = mean(segment);
        segment.iter().map(|block| ((block - middle) / self.noise).powi(2)).sum()
    }
}

fn blocks(times_ns: &[u64]) -> Vec<f64> {
    let (pieces, count) = (times_ns.len(), times_ns.len().min(MOST_BLOCKS));
    (0..count)
        .map(|block| {
            let part = &times_ns[block * pieces / count..(block + 1) * pieces / count];
            part.iter().map(|time_ns| *time_ns as f64).sum::<f64>() / part.len() as f64
        })
        .collect()
}

fn without_outliers(blocks: Vec<f64>) -> Vec<f64> {
    let sorted = sorted(&blocks);
    let at = |share: f64| sorted[(share * (sorted.len() - 1) as f64).round() as usize];
    let reach = OUTLIER * (at(0.9) - at(0.1)).max(LEAST_NOISE);
    let middle = median(&blocks);
    blocks.into_iter().filter(|block| (block - middle).abs() <= reach).collect()
}

/// From the differences of neighbours, which a slow change barely touches. The largest is left out: it may be a step.
fn noise(blocks: &[f64]) -> f64 {
    let mut squares: Vec<f64> = blocks.windows(2).map(|pair| (pair[1] - pair[0]).powi(2)).collect();
    squares.sort_by(f64::total_cmp);
    squares.pop();
    if squares.is_empty() { LEAST_NOISE } else { (mean(&squares) / 2.0).sqrt().max(LEAST_NOISE) }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// 0 of an empty list.
fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::random;

    const SERIES: u64 = 400;
    const PIECE_NS: f64 = 1e8;

    /// `count` pieces of 100 ms times `shape(i / count)`, with normal noise of this relative deviation.
    fn series(seed: u64, count: usize, noise: f64, shape: impl Fn(f64) -> f64) -> Vec<u64> {
        (0..count as u64)
            .map(|index| {
                let uniform = |draw| random(seed, index * 12 + draw) as f64 / u64::MAX as f64;
                let normal = (0..12).map(uniform).sum::<f64>() - 6.0;
                (PIECE_NS * shape(index as f64 / count as f64) * (1.0 + noise * normal)) as u64
            })
            .collect()
    }

    /// Share of seeded series for which `holds`.
    fn share(
        count: usize,
        noise: f64,
        shape: impl Fn(f64) -> f64 + Copy,
        holds: impl Fn(&[u64]) -> bool,
    ) -> f64 {
        let times = (0..SERIES).filter(|seed| holds(&series(*seed, count, noise, shape))).count();
        times as f64 / SERIES as f64
    }

    fn flat(_: f64) -> f64 {
        1.0
    }

    #[test]
    fn a_flat_series_is_steady_and_false_alarms_are_rare() {
        for (count, noise) in [(8, 0.01), (20, 0.01), (60, 0.02), (1000, 0.05)] {
            let alarms = share(count, noise, flat, |times| class_of(times) != Steady::Steady);
            assert!(alarms <= 0.03, "{count} pieces, noise {noise}: {alarms} of the windows flagged");
            let restless = share(count, noise, flat, |times| !is_flat(times));
            assert!(restless <= 0.15, "{count} pieces, noise {noise}: {restless} not flat");
        }
    }

    #[test]
    fn a_ramp_is_told_from_noise_and_named_by_its_direction() {
        let (rise, fall) = (|at: f64| 1.0 + 0.05 * at, |at: f64| 1.05 - 0.05 * at);
        assert!(share(60, 0.01, rise, |times| class_of(times) == Steady::Slowdown) >= 0.95);
        assert!(share(60, 0.01, fall, |times| class_of(times) == Steady::Warmup) >= 0.95);
        assert!(share(60, 0.01, fall, |times| !is_flat(times)) >= 0.99);
    }

    #[test]
    fn a_step_is_found_where_it_changes_the_result() {
        let slower = |at: f64| if at < 0.5 { 1.0 } else { 1.03 };
        let faster = |at: f64| if at < 0.3 { 1.05 } else { 1.0 };
        assert!(share(60, 0.01, slower, |times| class_of(times) == Steady::Slowdown) >= 0.95);
        assert!(share(60, 0.01, faster, |times| class_of(times) == Steady::Warmup) >= 0.95);
        assert!(share(60, 0.01, slower, |times| !is_flat(times)) >= 0.99);
        let brief = |at: f64| if at < 0.1 { 1.02 } else { 1.0 };
        assert!(
            share(60, 0.002, brief, |times| class_of(times) == Steady::Steady) >= 0.95,
            "0.2 % of the mean"
        );
    }

    #[test]
    fn what_comes_and_goes_has_no_steady_state_unless_it_is_shorter_than_a_block() {
        let slow = |at: f64| if ((at * 4.0) as u64).is_multiple_of(2) { 1.0 } else { 1.05 };
        assert!(share(60, 0.01, slow, |times| class_of(times) == Steady::NoSteadyState) >= 0.95);
        let quick = |at: f64| if ((at * 600.0).round() as u64).is_multiple_of(2) { 1.0 } else { 1.05 };
        assert!(share(600, 0.01, quick, |times| class_of(times) == Steady::Steady) >= 0.97);
    }

    #[test]
    fn one_odd_piece_changes_no_class() {
        for at in [0, 11, 23] {
            let mut times = series(3, 24, 0.01, flat);
            times[at] *= 3;
            assert_eq!(class_of(&times), Steady::Steady, "at {at}");
            assert!(is_flat(&times), "at {at}");
        }
    }

    #[test]
    fn without_noise_only_a_change_beyond_the_tolerance_counts() {
        for count in [8, 30, 500] {
            let of = |shape: fn(f64) -> f64| series(0, count, 0.0, shape);
            assert_eq!(class_of(&of(flat)), Steady::Steady);
            assert!(is_flat(&of(flat)));
            assert_eq!(class_of(&of(|at| 1.0 + 0.004 * at)), Steady::Steady);
            assert_eq!(class_of(&of(|at| if at < 0.5 { 1.0 } else { 1.02 })), Steady::Slowdown);
            assert!(!is_flat(&of(|at| if at < 0.5 { 1.0 } else { 1.02 })));
        }
    }

    #[test]
    fn too_few_pieces_or_none_that_last_are_not_judged() {
        assert_eq!(class_of(&series(0, LEAST_PIECES - 1, 0.0, flat)), Steady::NotAssessed);
        assert!(!is_flat(&series(0, LEAST_PIECES - 1, 0.0, flat)));
        assert_eq!(class_of(&[0; 20]), Steady::NotAssessed);
    }
}
