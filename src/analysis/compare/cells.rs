//! Cells matched by key, as series of session means, and judged as one family.

use std::collections::BTreeSet;

use super::arms::Arms;
use super::effect::{ASSUMED_SIGMA, Effect, Noise, RunSpread, Series};
use super::result::{Comparand, HeldBack, Metric, Numbers, SessionCounts, Settings};
use super::sample::CellSample;
use super::session::Group;
use super::verdict::{Judged, Rules, Verdict, judge};
use crate::analysis::stats::{TQuantiles, far_from_median, mean, sum_of_squares};
use crate::record::Maybe;

/// Values of one metric in one cell, by session.
#[derive(Default)]
struct Values {
    sessions: Vec<f64>,
    spread: RunSpread,
}

fn values(groups: &[Group<'_>], key: &str, metric: Metric) -> Values {
    let mut found = Values::default();
    for group in groups {
        let cells = group.samples.iter().filter_map(|sample| sample.cells.get(key));
        let runs: Vec<f64> = cells.flat_map(|cell| own_values(cell, metric)).collect();
        if runs.is_empty() {
            continue;
        }
        found.sessions.push(mean(&runs));
        found.spread.sum_of_squares += sum_of_squares(&runs);
        found.spread.degrees += runs.len() as f64 - 1.0;
    }
    found
}

fn own_values(cell: &CellSample, metric: Metric) -> Vec<f64> {
    match metric {
        Metric::Throughput => cell.ln_rates.clone(),
        Metric::TokensPerJoule if !cell.energy_doubts.is_empty() => Vec::new(),
        Metric::TokensPerJoule => cell.ln_tokens_per_joule.value().copied().into_iter().collect(),
    }
}

fn series(arms: &Arms<'_>, key: &str, metric: Metric) -> Series {
    let (baseline, candidate) = (values(&arms.baseline, key, metric), values(&arms.candidate, key, metric));
    let noise = arms.noise.iter().map(|batch| values(batch, key, metric).sessions);
    Series {
        noise: noise.filter(|batch| !batch.is_empty()).collect(),
        runs: [baseline.spread, candidate.spread],
        baseline: baseline.sessions,
        candidate: candidate.sessions,
    }
}

/// A cell and metric before it is judged.
struct Matched {
    cell: String,
    metric: Metric,
    series: Series,
}

/// What is known of the sides beside their values.
pub(super) struct Circumstances<'a> {
    pub(super) meter_changed: bool,
    /// Cells that a library computes by another algorithm than before, without anybody having declared it.
    pub(super) with_other_algorithm: BTreeSet<&'a str>,
}

/// Every metric of every cell of the baseline, and the geometric mean of the throughputs.
pub(super) fn judge_cells(
    arms: &Arms<'_>,
    circumstances: &Circumstances<'_>,
    settings: &Settings,
    quantiles: &TQuantiles,
    remarks: &mut Vec<String>,
) -> (Vec<Comparand>, Maybe<Comparand>) {
    let mut matched = Vec::new();
    let mut judged = Vec::new();
    for (key, metric) in keys(arms).iter().flat_map(|key| Metric::ALL.map(|metric| (key, metric))) {
        let series = series(arms, key, metric);
        let is_energy = metric == Metric::TokensPerJoule;
        let meter_moved = if is_energy { meter_moved(arms, key) } else { None };
        let meter_changed = (circumstances.meter_changed || meter_moved.is_some()) && is_energy;
        match (series.baseline.is_empty(), series.candidate.is_empty()) {
            (true, true) if is_energy => {
                if let Some(doubts) = doubts(&arms.baseline, key).or_else(|| doubts(&arms.candidate, key)) {
                    remarks.push(format!("{key}: energy does not decide: {doubts}"));
                }
            }
            (true, true) => remarks.push(format!("{key}: measured on neither side")),
            (true, false) => remarks.push(format!("{key}: {} only in the candidate", metric.unit())),
            (false, true) if !meter_changed && is_energy && doubts(&arms.candidate, key).is_some() => {
                let doubts = doubts(&arms.candidate, key).unwrap_or_default();
                let note = format!("energy in doubt in the candidate: {doubts}");
                judged.push(unjudged(key, metric, Verdict::Inconclusive, note, &series));
            }
            (false, true) if !meter_changed => judged.push(vanished(arms, key, metric, &series)),
            (false, _) if meter_changed => {
                let note = meter_moved
                    .unwrap_or_else(|| "another power sensor: the energies do not compare".to_owned());
                judged.push(unjudged(key, metric, Verdict::MeterChanged, note, &series));
            }
            (false, _) => matched.push(Matched { cell: key.clone(), metric, series }),
        }
    }
    let own: Vec<&Matched> = matched
        .iter()
        .filter(|one| !circumstances.with_other_algorithm.contains(one.cell.as_str()))
        .collect();
    let aggregate = aggregate(&own, settings, quantiles);
    judged.extend(judge_matched(matched, settings, quantiles));
    judged.iter_mut().for_each(|cell| hold_back(cell, arms, circumstances));
    judged.sort_by(|a, b| (&a.cell, a.metric).cmp(&(&b.cell, b.metric)));
    (judged, aggregate)
}

/// Share of a side's runs beyond which they are not of one lasting state.
const UNSETTLED_SHARE: f64 = 1.0 / 3.0;

/// Takes a verdict back that the numbers alone give: a pass on runs of a state that does not last, and a loss that came
/// with another algorithm of a library.
fn hold_back(cell: &mut Comparand, arms: &Arms<'_>, circumstances: &Circumstances<'_>) {
    let sides = [("baseline", &arms.baseline), ("candidate", &arms.candidate)];
    let unsettled: Vec<String> =
        sides.into_iter().filter_map(|(side, groups)| unsettled(side, groups, &cell.cell)).collect();
    let held_back = if cell.verdict.passes() && !unsettled.is_empty() {
        HeldBack::UnsettledRuns
    } else if cell.verdict == Verdict::Regressed
        && circumstances.with_other_algorithm.contains(cell.cell.as_str())
    {
        cell.notes.push("regressed with another algorithm of the library: see Why".to_owned());
        HeldBack::LibraryAlgorithm
    } else {
        cell.notes.extend(unsettled);
        return;
    };
    cell.notes.extend(unsettled);
    cell.verdict = Verdict::Inconclusive;
    cell.held_back = Some(held_back);
}

/// What is to be said of one side's runs of a cell, if more than a third are flagged.
fn unsettled(side: &str, groups: &[Group<'_>], key: &str) -> Option<String> {
    let cells = || groups.iter().flat_map(|group| &group.samples).filter_map(|sample| sample.cells.get(key));
    let all: usize = cells().map(|cell| cell.ln_rates.len()).sum();
    let flagged: usize = cells().map(|cell| cell.unsettled_runs).sum();
    (flagged as f64 > all as f64 * UNSETTLED_SHARE).then(|| {
        format!("{flagged} of {all} runs of the {side} were not steady, or had their clocks held down by heat or the power supply")
    })
}

/// Change of the ratio of counter and integrated power, in logarithms, beyond which the meter is another one.
const METER_DRIFT: f64 = 0.01;

/// Why the energies of a cell do not compare although the sensor has the same name.
fn meter_moved(arms: &Arms<'_>, key: &str) -> Option<String> {
    let ratio = |groups: &[Group<'_>]| -> Option<f64> {
        let cells = groups.iter().flat_map(|group| &group.samples).filter_map(|sample| sample.cells.get(key));
        let known: Vec<f64> = cells.filter_map(|cell| cell.ln_meter_ratio.value().copied()).collect();
        (!known.is_empty()).then(|| mean(&known))
    };
    let moved = ratio(&arms.candidate)? - ratio(&arms.baseline)?;
    (moved.abs() > METER_DRIFT).then(|| {
        format!(
            "the counter moved by {:+.1} % against integrated power: the meter changed, not only the machine",
            moved.exp_m1() * 100.0
        )
    })
}

/// Why the energy of a cell must not decide on one side.
fn doubts(groups: &[Group<'_>], key: &str) -> Option<String> {
    let samples = groups.iter().flat_map(|group| &group.samples);
    let mut doubts = samples.filter_map(|sample| sample.cells.get(key)).map(|cell| &cell.energy_doubts);
    doubts.find(|doubts| !doubts.is_empty()).cloned()
}

fn keys(arms: &Arms<'_>) -> BTreeSet<String> {
    let groups = arms.baseline.iter().chain(&arms.candidate);
    groups.flat_map(|group| &group.samples).flat_map(|sample| sample.cells.keys().cloned()).collect()
}

fn counts(series: &Series) -> SessionCounts {
    SessionCounts {
        baseline: series.baseline.len() as u32,
        candidate: series.candidate.len() as u32,
        noise: series.noise.iter().map(Vec::len).sum::<usize>() as u32,
    }
}

fn unjudged(key: &str, metric: Metric, verdict: Verdict, note: String, series: &Series) -> Comparand {
    Comparand {
        cell: key.to_owned(),
        metric,
        verdict,
        held_back: None,
        notes: vec![note],
        sessions: counts(series),
        numbers: Maybe::missing("not_comparable"),
    }
}

/// What the baseline has and the candidate lacks: never a pass.
fn vanished(arms: &Arms<'_>, key: &str, metric: Metric, series: &Series) -> Comparand {
    let samples = || arms.candidate.iter().flat_map(|group| &group.samples);
    let cells = || samples().filter_map(|sample| sample.cells.get(key));
    let reason = match metric {
        Metric::Throughput => cells().find_map(|cell| cell.absent.clone()),
        Metric::TokensPerJoule => {
            cells().find_map(|cell| cell.ln_tokens_per_joule.reason().map(|reason| reason.replace('_', " ")))
        }
    };
    let note = match reason {
        Some(reason) => format!("gone in the candidate: {reason}"),
        None => "gone in the candidate: no record has this cell".to_owned(),
    };
    unjudged(key, metric, Verdict::NotComparable, note, series)
}

fn judge_matched(matched: Vec<Matched>, settings: &Settings, quantiles: &TQuantiles) -> Vec<Comparand> {
    let scope = Scope { tests: matched.len(), rules: settings.rules, quantiles };
    let family: Vec<(Series, f64)> = matched
        .iter()
        .map(|one| (one.series.clone(), settings.thresholds.of(one.metric, &one.cell)))
        .collect();
    let judged = judge(&family, settings.rules, quantiles);
    matched
        .into_iter()
        .zip(family)
        .zip(judged)
        .map(|((one, (series, threshold_ratio)), judged)| {
            scope.comparand((one.cell, one.metric), &series, threshold_ratio, &judged)
        })
        .collect()
}

/// The geometric mean over cells, taken in each session first, since the cells of a session share its luck. One more
/// test at the full level, on throughput alone, and without cells whose library computes otherwise than before.
fn aggregate(matched: &[&Matched], settings: &Settings, quantiles: &TQuantiles) -> Maybe<Comparand> {
    let throughputs: Vec<&Series> =
        matched.iter().filter(|one| one.metric == Metric::Throughput).map(|one| &one.series).collect();
    if throughputs.len() < 2 {
        return Maybe::missing("needs_2_cells");
    }
    let over = |pick: &dyn Fn(&Series) -> Option<&Vec<f64>>| -> Option<Vec<f64>> {
        let columns: Vec<&Vec<f64>> = throughputs.iter().map(|series| pick(series)).collect::<Option<_>>()?;
        let sessions = columns.first()?.len();
        // A session that lacks a cell has another mean.
        columns.iter().all(|column| column.len() == sessions).then(|| {
            (0..sessions)
                .map(|session| mean(&columns.iter().map(|column| column[session]).collect::<Vec<f64>>()))
                .collect()
        })
    };
    let (Some(baseline), Some(candidate)) =
        (over(&|series| Some(&series.baseline)), over(&|series| Some(&series.candidate)))
    else {
        return Maybe::missing("cells_differ_between_sessions");
    };
    let batches = throughputs.iter().map(|series| series.noise.len()).max().unwrap_or(0);
    let series = Series {
        baseline,
        candidate,
        noise: (0..batches).filter_map(|batch| over(&|series| series.noise.get(batch))).collect(),
        runs: Default::default(),
    };
    let threshold = settings.thresholds.throughput_ratio;
    let judged = judge(&[(series.clone(), threshold)], settings.rules, quantiles).remove(0);
    let scope = Scope { tests: 1, rules: settings.rules, quantiles };
    Maybe::Value(scope.comparand(("all cells".to_owned(), Metric::Throughput), &series, threshold, &judged))
}

/// What the numbers of a family share.
struct Scope<'a> {
    /// Tests in the family.
    tests: usize,
    rules: Rules,
    quantiles: &'a TQuantiles,
}

impl Scope<'_> {
    fn comparand(
        &self,
        (cell, metric): (String, Metric),
        series: &Series,
        threshold_ratio: f64,
        judged: &Judged,
    ) -> Comparand {
        Comparand {
            cell,
            metric,
            verdict: judged.verdict,
            held_back: None,
            notes: notes(series, judged, self.rules, self.quantiles),
            sessions: counts(series),
            numbers: Maybe::Value(self.numbers(series, threshold_ratio, judged)),
        }
    }

    fn numbers(&self, series: &Series, threshold_ratio: f64, judged: &Judged) -> Numbers {
        let (effect, alpha) = (&judged.effect, self.rules.alpha);
        let is_known = effect.noise != Noise::Unknown;
        let known = |value: f64| if is_known { Maybe::Value(value) } else { Maybe::missing(TOO_FEW) };
        let detectable = |alpha: f64| {
            let size = effect.detectable(alpha, self.quantiles);
            size.map_or(Maybe::missing(TOO_FEW), |size| Maybe::Value(size.exp_m1()))
        };
        let needed = effect.sessions_needed(judged.threshold_ln, alpha, self.quantiles);
        Numbers {
            baseline: mean(&series.baseline).exp(),
            candidate: mean(&series.candidate).exp(),
            effect_ratio: effect.difference.exp_m1(),
            interval_95_ratio: interval_ratio(effect, self.quantiles),
            p_worse: known(effect.p_worse),
            p_worse_holm: known(judged.p_worse),
            p_better_holm: known(judged.p_better),
            threshold_ratio,
            sigma: known(effect.sigma),
            sigma_source: effect.noise,
            degrees_of_freedom: effect.nu,
            detectable_ratio: detectable(alpha),
            detectable_holm_ratio: detectable(alpha / self.tests.max(1) as f64),
            sessions_needed: needed.map_or(Maybe::missing(TOO_FEW), |needed| Maybe::Value(needed as u32)),
        }
    }
}

/// Sessions below which a median of deviations says nothing.
const FEWEST_FOR_A_MEDIAN: usize = 5;
/// Reason code where the sessions allow no statement.
const TOO_FEW: &str = "too_few_sessions";

/// The 95 % interval of a change, as ratios.
pub(super) fn interval_ratio(effect: &Effect, quantiles: &TQuantiles) -> Maybe<[f64; 2]> {
    if effect.noise == Noise::Unknown {
        return Maybe::missing(TOO_FEW);
    }
    let half = effect.half_width(0.95, quantiles);
    Maybe::Value([(effect.difference - half).exp_m1(), (effect.difference + half).exp_m1()])
}

fn notes(series: &Series, judged: &Judged, rules: Rules, quantiles: &TQuantiles) -> Vec<String> {
    let effect = &judged.effect;
    let mut notes = Vec::new();
    match effect.noise {
        Noise::Assumed => notes.push(format!(
            "assumed noise of {} % between sessions: one session on each side and no noise records",
            ASSUMED_SIGMA * 100.0
        )),
        Noise::Unknown => notes.push(format!(
            "degrees of freedom are {}, expected at least 3: more sessions, or noise records",
            effect.nu
        )),
        Noise::Welch => notes.push("each side's own variance: their runs scatter differently".to_owned()),
        Noise::Pooled if effect.variance_changed => {
            notes.push("variance changed: the runs of the two sides scatter differently".to_owned());
        }
        Noise::Pooled => {}
    }
    if effect.rests_on_one_session && judged.p_worse <= rules.alpha {
        notes.push("rests on one session: without it the loss might be chance".to_owned());
    }
    let real_loss = effect.difference + effect.half_width(0.95, quantiles) < 0.0;
    if real_loss && matches!(judged.verdict, Verdict::Pass | Verdict::Same) {
        notes.push(format!(
            "worse by {:.1} %, which is real and below the threshold",
            -effect.difference.exp_m1() * 100.0
        ));
    }
    for (side, arm) in [("baseline", &series.baseline), ("candidate", &series.candidate)] {
        for index in far_from_median(arm).into_iter().filter(|_| arm.len() >= FEWEST_FOR_A_MEDIAN) {
            notes.push(format!("session {} of the {side} lies far from the others", index + 1));
        }
    }
    notes
}
