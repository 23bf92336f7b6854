//! The operating characteristics of a comparison, by seeded simulation of sessions, processes and windows: how often it
//! errs, what it finds, and that another unit than the session would be wrong.

#![allow(clippy::unwrap_used)]

use tokmeter::analysis::compare::{Rules, RunSpread, Series, Verdict, estimate, judge, overall};
use tokmeter::analysis::stats::{TQuantiles, mann_whitney, mean};

/// Repetitions of a full simulation; an unoptimised build takes fewer, and its tolerances grow accordingly.
const REPETITIONS: usize = if cfg!(debug_assertions) { 1000 } else { 4000 };
/// Repetitions behind the published table.
const PUBLISHED_REPETITIONS: usize = 4000;
const CELLS: usize = 12;
/// The published table's threshold of 2 % is in logarithms; so is everything here.
const THRESHOLD_LN: f64 = 0.02;
/// Sessions share one part of their luck over all cells; the other part is each cell's own. Together 0.5 %.
const SHARED_SIGMA: f64 = 0.0035;
const OWN_SIGMA: f64 = 0.0035;
const NOISE_SESSIONS: usize = 6;

/// xoshiro256** (Blackman and Vigna), seeded by SplitMix64.
struct Random([u64; 4]);

impl Random {
    fn new(seed: u64) -> Self {
        let mut state = seed;
        Random(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }))
    }

    fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller).
    fn normal(&mut self) -> f64 {
        let (radius, angle) = ((-2.0 * self.uniform().ln()).sqrt(), std::f64::consts::TAU * self.uniform());
        radius * angle.cos()
    }
}

/// What is planted in the candidate.
#[derive(Clone, Copy, Debug)]
struct Planted {
    effect: f64,
    in_one_cell: bool,
}

/// Sessions × cells of one arm, in logarithms.
fn sessions(random: &mut Random, count: usize, planted: Planted, sigma: f64) -> Vec<[f64; CELLS]> {
    (0..count)
        .map(|_| {
            let shared = SHARED_SIGMA * sigma * random.normal();
            std::array::from_fn(|cell| {
                let effect = if planted.in_one_cell && cell > 0 { 0.0 } else { planted.effect };
                shared + OWN_SIGMA * sigma * random.normal() + effect
            })
        })
        .collect()
}

struct Trial {
    cells: Vec<Verdict>,
    overall: Verdict,
}

fn trial(
    random: &mut Random,
    per_arm: usize,
    noise: usize,
    planted: Planted,
    sigma: f64,
    quantiles: &TQuantiles,
) -> Trial {
    let none = Planted { effect: 0.0, in_one_cell: false };
    let noise = sessions(random, noise, none, sigma);
    let baseline = sessions(random, per_arm, none, sigma);
    let candidate = sessions(random, per_arm, planted, sigma);
    let column =
        |arm: &[[f64; CELLS]], cell: usize| arm.iter().map(|session| session[cell]).collect::<Vec<f64>>();
    let means = |arm: &[[f64; CELLS]]| arm.iter().map(|session| mean(session)).collect::<Vec<f64>>();
    let threshold = -(-THRESHOLD_LN).exp_m1();
    let series = |baseline, candidate, noise: Vec<f64>| Series {
        baseline,
        candidate,
        noise: if noise.is_empty() { Vec::new() } else { vec![noise] },
        runs: [RunSpread::default(); 2],
    };
    let family: Vec<(Series, f64)> = (0..CELLS)
        .map(|cell| {
            (series(column(&baseline, cell), column(&candidate, cell), column(&noise, cell)), threshold)
        })
        .collect();
    let cells: Vec<Verdict> =
        judge(&family, Rules::default(), quantiles).iter().map(|judged| judged.verdict).collect();
    let all = [(series(means(&baseline), means(&candidate), means(&noise)), threshold)];
    let aggregate = judge(&all, Rules::default(), quantiles)[0].verdict;
    Trial { overall: overall(&cells, Some(aggregate)), cells }
}

/// Shares of REGRESSED, PASS (or better), INCONCLUSIVE and IMPROVED, and of any regression in a cell without a loss.
fn shares(seed: u64, per_arm: usize, planted: Planted) -> [f64; 5] {
    let mut random = Random::new(seed);
    let quantiles = TQuantiles::default();
    let mut counts = [0usize; 5];
    for _ in 0..REPETITIONS {
        let trial = trial(&mut random, per_arm, NOISE_SESSIONS, planted, 1.0, &quantiles);
        match trial.overall {
            Verdict::Regressed => counts[0] += 1,
            Verdict::Inconclusive => counts[2] += 1,
            Verdict::Improved => (counts[1], counts[3]) = (counts[1] + 1, counts[3] + 1),
            _ => counts[1] += 1,
        }
        let unharmed = if planted.in_one_cell { 1.. } else { CELLS.. };
        if trial.cells[unharmed].contains(&Verdict::Regressed) {
            counts[4] += 1;
        }
    }
    counts.map(|count| count as f64 / REPETITIONS as f64)
}

/// Four standard errors of the difference of two simulated shares, and the rounding of the table.
fn tolerance(share: f64) -> f64 {
    let p = share.clamp(0.002, 0.998);
    let both = 1.0 / REPETITIONS as f64 + 1.0 / PUBLISHED_REPETITIONS as f64;
    4.0 * (p * (1.0 - p) * both).sqrt() + 0.0006
}

#[test]
fn the_published_operating_characteristics_are_reproduced() {
    let all = |effect| Planted { effect, in_one_cell: false };
    let one = |effect| Planted { effect, in_one_cell: true };
    // Sessions per arm, what is planted; REGRESSED, PASS, INCONCLUSIVE, IMPROVED of an independent program.
    for (per_arm, planted, expected) in [
        (1, all(0.0), [0.005, 0.296, 0.699, 0.005]),
        (1, all(-0.01), [0.181, 0.019, 0.800, 0.0]),
        (1, all(-0.03), [0.993, 0.0, 0.007, 0.0]),
        (1, one(-0.03), [0.576, 0.001, 0.423, 0.0]),
        (1, one(-0.05), [0.967, 0.0, 0.033, 0.0]),
        (1, all(0.03), [0.0, 1.0, 0.0, 0.978]),
        (2, all(0.0), [0.001, 0.826, 0.173, 0.0]),
        (2, all(-0.01), [0.134, 0.095, 0.771, 0.0]),
        (2, one(-0.03), [0.952, 0.0, 0.048, 0.0]),
        (2, all(0.03), [0.0, 1.0, 0.0, 1.0]),
        (3, all(0.0), [0.0, 0.978, 0.022, 0.0]),
        (3, all(-0.01), [0.050, 0.252, 0.698, 0.0]),
        (3, all(-0.02), [0.925, 0.001, 0.074, 0.0]),
        (3, all(-0.03), [1.0, 0.0, 0.0, 0.0]),
        (3, one(-0.03), [0.994, 0.0, 0.006, 0.0]),
        (5, all(0.0), [0.0, 1.0, 0.0, 0.0]),
        (5, all(-0.01), [0.007, 0.609, 0.384, 0.0]),
        (5, all(-0.02), [0.927, 0.0, 0.073, 0.0]),
        (5, one(-0.03), [1.0, 0.0, 0.001, 0.0]),
    ] {
        let found = shares(
            (per_arm as u64 * 1000).wrapping_add_signed((planted.effect * -1e4) as i64),
            per_arm,
            planted,
        );
        for (found, expected) in found.iter().zip(expected) {
            let most = tolerance(expected);
            assert!(
                (found - expected).abs() <= most,
                "{per_arm} {planted:?}: {found} against {expected} ± {most}"
            );
        }
    }
}

#[test]
fn errors_and_power_keep_their_promises() {
    let least = |p: f64| p + 3.0 * (p * (1.0 - p) / REPETITIONS as f64).sqrt();
    for per_arm in [1, 2, 3] {
        let none = shares(71 + per_arm as u64, per_arm, Planted { effect: 0.0, in_one_cell: false });
        assert!(none[0] <= least(0.01), "REGRESSED without a change: {}", none[0]);
        let one = shares(81 + per_arm as u64, per_arm, Planted { effect: -THRESHOLD_LN, in_one_cell: true });
        assert!(one[1] <= least(0.05), "PASS with one cell worse by the threshold: {}", one[1]);
        assert!(one[4] <= least(0.01), "REGRESSED in an unharmed cell: {}", one[4]);
    }
    let found = shares(91, 3, Planted { effect: -0.03, in_one_cell: true })[0];
    assert!(
        found >= 0.95 - 3.0 * (0.05 * 0.95 / REPETITIONS as f64).sqrt(),
        "−3 % in one of twelve: {found}"
    );
}

#[test]
fn ninety_five_percent_intervals_cover_ninety_five_percent() {
    let quantiles = TQuantiles::default();
    for (per_arm, noise) in [(3, 0), (3, 6), (5, 0), (10, 6)] {
        let mut random = Random::new(700 + per_arm as u64 * 10 + noise as u64);
        // The interval of each cell by itself: one cell per repetition is independent of the next.
        let repetitions = 4 * REPETITIONS;
        let mut covered = 0;
        for _ in 0..repetitions {
            let mut draw = |count: usize| (0..count).map(|_| 0.005 * random.normal()).collect::<Vec<f64>>();
            let (baseline, candidate) = (draw(per_arm), draw(per_arm));
            let noise = if noise > 0 { vec![draw(noise)] } else { Vec::new() };
            let effect = estimate(&Series { baseline, candidate, noise, runs: Default::default() });
            covered += usize::from(effect.difference.abs() <= effect.half_width(0.95, &quantiles));
        }
        let share = covered as f64 / repetitions as f64;
        assert!((0.93..=0.97).contains(&share), "{per_arm} sessions, {noise} noise: {share}");
    }
}

#[test]
fn sessions_that_do_not_differ_at_all_are_compared_exactly() {
    let quantiles = TQuantiles::default();
    for (effect, expected) in [(0.0, Verdict::Same), (-0.03, Verdict::Regressed), (0.03, Verdict::Improved)] {
        let planted = Planted { effect, in_one_cell: false };
        let trial = trial(&mut Random::new(5), 3, 6, planted, 0.0, &quantiles);
        assert_eq!(trial.overall, expected);
    }
}

/// ln(tok/s) of windows and processes under boots that differ by 0.5 %, processes by 0.3 %, windows by 0.6 %.
struct Hierarchy {
    windows: Vec<f64>,
    processes: Vec<f64>,
    boots: Vec<f64>,
}

fn hierarchy(random: &mut Random, boots: usize, processes: usize) -> Hierarchy {
    let mut all = Hierarchy { windows: Vec::new(), processes: Vec::new(), boots: Vec::new() };
    for _ in 0..boots {
        let boot = 0.5 * random.normal();
        let first = all.processes.len();
        for _ in 0..processes {
            let process = boot + 0.3 * random.normal();
            let windows: Vec<f64> = (0..10).map(|_| process + 0.6 * random.normal()).collect();
            all.processes.push(mean(&windows));
            all.windows.extend(windows);
        }
        all.boots.push(mean(&all.processes[first..]));
    }
    all
}

/// Two-sided p value of Welch's test, which unequal scatter of the runs asks for.
fn welch(baseline: &[f64], candidate: &[f64]) -> f64 {
    let spread = |variance: f64| RunSpread { sum_of_squares: variance * 50.0, degrees: 50.0 };
    let effect = estimate(&Series {
        baseline: baseline.to_vec(),
        candidate: candidate.to_vec(),
        noise: Vec::new(),
        runs: [spread(1.0), spread(100.0)],
    });
    2.0 * effect.p_worse.min(effect.p_better)
}

#[test]
fn windows_and_processes_are_the_wrong_unit_and_sessions_the_right_one() {
    let mut random = Random::new(7);
    let mut wrong = [0usize; 3];
    for _ in 0..REPETITIONS {
        let (one, other) = (hierarchy(&mut random, 1, 6), hierarchy(&mut random, 1, 6));
        let lower =
            mann_whitney(&one.windows, &other.windows).min(mann_whitney(&other.windows, &one.windows));
        wrong[0] += usize::from(2.0 * lower < 0.05);
        wrong[1] += usize::from(welch(&one.processes, &other.processes) < 0.05);
        let (one, other) = (hierarchy(&mut random, 3, 2), hierarchy(&mut random, 3, 2));
        wrong[2] += usize::from(welch(&one.boots, &other.boots) < 0.05);
    }
    // False differences of an independent program: 74 % by windows, 54 % by processes, 3.5 % by sessions.
    for (count, expected) in wrong.into_iter().zip([0.736, 0.538, 0.034]) {
        let found = count as f64 / REPETITIONS as f64;
        assert!((found - expected).abs() <= tolerance(expected), "{found} against {expected}");
    }
}

#[test]
fn ten_thousand_cells_of_fifty_records_take_less_than_a_second() {
    let mut random = Random::new(3);
    let family: Vec<(Series, f64)> = (0..10_000)
        .map(|_| {
            let mut draw = |count: usize| (0..count).map(|_| 0.005 * random.normal()).collect::<Vec<f64>>();
            let (baseline, candidate, noise) = (draw(20), draw(20), vec![draw(10)]);
            (Series { baseline, candidate, noise, runs: Default::default() }, 0.02)
        })
        .collect();
    let clock = tokmeter::clock::Clock::monotonic();
    let begin_ns = clock.now_ns();
    let quantiles = TQuantiles::default();
    let judged = judge(&family, Rules::default(), &quantiles);
    for judged in &judged {
        judged.effect.half_width(0.95, &quantiles);
        judged.effect.detectable(0.05, &quantiles).unwrap();
        judged.effect.sessions_needed(judged.threshold_ln, 0.05, &quantiles).unwrap();
    }
    let seconds = (clock.now_ns() - begin_ns) as f64 / 1e9;
    let most = if cfg!(debug_assertions) { 20.0 } else { 1.0 };
    assert!(seconds < most, "{seconds} s, expected less than {most} s");
}
