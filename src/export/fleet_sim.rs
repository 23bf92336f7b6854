//! A `ManualProfile` of fleet-sim, the fleet planner of vLLM's semantic router: the decode law as its two constants, and the
//! power of a GPU as a logistic curve of the sequences in flight. Times are seconds, powers W of the GPU board, the price US
//! dollars per GPU and hour. The keys are those of the dataclass and nothing else: `ManualProfile(**json.load(file))`.

use serde::Serialize;

use super::{About, Content, Exported, Given, Refusal, Setting, Settings, Source, as_json};
use crate::analysis::calibrate::{Calibration, Law, Load, Phase, Quantity, Range, Term};
use crate::record::{CostMode, Record};

/// Context at which fleet-sim's own profiles are calibrated.
const USUAL_CONTEXT_TOKENS: f64 = 8192.0;

pub(super) const ABOUT: About = About {
    name: "fleet-sim",
    made_from: "one calibration with a decode law, and a record that it was fitted to",
    consumer: "ManualProfile, JSON of its arguments: fleet-sim (vllm-sr-sim)",
    source: "github vllm-project/semantic-router at 0c5b1d02, src/fleet-sim/fleet_sim/gpu_profiles/manual.py",
    settings: &[
        Setting {
            key: "cost_per_hr",
            meaning: "US dollars per GPU and hour [default: the record's rental price, in USD]",
        },
        Setting {
            key: "calibration_ctx",
            meaning: "tokens [default: 8192, or the end of the law's domain nearest to it]",
        },
    ],
    fields: &[
        ("name", "device, model, precision, and that tokmeter's engine ran"),
        ("W", "s: the decode law's constant"),
        ("H", "s per sequence at calibration_ctx: (the law at max_slots less W) / max_slots"),
        ("calibration_ctx", "tokens: --set, or 8192 within the law's domain"),
        ("chunk", "prompt tokens of a step at most (subject.chunk_tokens)"),
        ("blk_size", "engine.page_size_tokens"),
        ("total_kv_blks", "subject.kv_tokens_held / blk_size: what the engine held, maybe not all that fits"),
        (
            "max_slots",
            "the largest batch of the law's domain, or the sequences of calibration_ctx tokens that were held",
        ),
        ("cost_per_hr", "USD: --set, or the record's rental price"),
        (
            "power_idle_w",
            "W at no load: the curve's lower end; no power fields without an energy law that rises",
        ),
        ("power_nominal_w", "W: the curve's upper end"),
        (
            "power_logistic_k, power_logistic_x0",
            "the curve's steepness and middle, over log2 of the sequences",
        ),
    ],
};

#[derive(Serialize)]
struct ManualProfile {
    name: String,
    #[serde(rename = "W")]
    base_s: f64,
    #[serde(rename = "H")]
    sequence_s: f64,
    chunk: u32,
    blk_size: u32,
    total_kv_blks: u64,
    max_slots: u64,
    cost_per_hr: f64,
    calibration_ctx: u64,
    #[serde(flatten)]
    power: Option<Curve>,
}

/// `P(b) = idle + (nominal − idle) / (1 + exp(−k (log2 b − x0)))`
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Curve {
    #[serde(rename = "power_idle_w")]
    idle_w: f64,
    #[serde(rename = "power_nominal_w")]
    nominal_w: f64,
    #[serde(rename = "power_logistic_k")]
    k: f64,
    #[serde(rename = "power_logistic_x0")]
    x0: f64,
}

pub(super) fn export(given: &[Given], settings: &Settings) -> Result<Exported, Refusal> {
    let (file, calibration, source) = parts(given)?;
    let refuse = |what: String| Refusal(format!("{file}: {what}"));
    let Some(law) = calibration.law(Phase::Decode, Quantity::Time) else {
        return Err(refuse(
            "has no decode law, which fleet-sim's W and H are\n\
             hint: tokmeter run --suite calibration, then tokmeter calibrate"
                .to_owned(),
        ));
    };
    let subject = &calibration.subject;
    if subject.gpus_per_replica != 1 {
        return Err(refuse(format!(
            "is of replicas of {} GPUs, and a ManualProfile is of one GPU\nhint: calibrate one GPU",
            subject.gpus_per_replica
        )));
    }
    let (Some(held), Some(chunk)) = (subject.kv_tokens_held.value(), subject.chunk_tokens.value()) else {
        return Err(refuse(
            "does not know its chunk or the tokens that it held\nhint: a calibration of records knows both"
                .to_owned(),
        ));
    };
    let domain = |name: &str| {
        law.domain.get(name).copied().ok_or_else(|| refuse(format!("its decode law has no domain of {name}")))
    };
    let context = context(settings, domain("context_tokens")?)?;
    let max_slots = domain("batch")?.max.min(*held as f64 / context).floor();
    if max_slots < 2.0 {
        return Err(refuse(format!(
            "has room for {max_slots} sequences of {context} tokens, expected at least 2\n\
             hint: --set calibration_ctx=512 takes a shorter context"
        )));
    }
    let mut notes = remarks(law, calibration);
    let power = power(law, calibration, (context, max_slots), &mut notes);
    let base_s = law.coefficient(Term::Constant);
    let profile = ManualProfile {
        name: format!("{} {} {} (tokmeter)", subject.device, subject.model, subject.precision),
        base_s,
        sequence_s: (law.at(&at(max_slots, context)) - base_s) / max_slots,
        chunk: *chunk,
        blk_size: source.record.engine.page_size_tokens,
        total_kv_blks: held / u64::from(source.record.engine.page_size_tokens.max(1)),
        max_slots: max_slots as u64,
        cost_per_hr: cost_per_hr(&source, settings)?,
        calibration_ctx: context as u64,
        power,
    };
    Ok(Exported { text: as_json(&profile)?, notes })
}

/// One calibration, and a record that it was fitted to.
fn parts(given: &[Given]) -> Result<(&str, &Calibration, Source<'_>), Refusal> {
    let (mut calibrations, mut sources) = (Vec::new(), Vec::new());
    for Given { file, content } in given {
        match content {
            Content::Calibration(calibration) => calibrations.push((file, calibration)),
            Content::Record(record) => sources.push(Source::of(file, record)?),
        }
    }
    let ([(file, calibration)], [source]) = (calibrations.as_slice(), sources.as_slice()) else {
        return Err(Refusal(format!(
            "fleet-sim is made from one calibration and one record, got {} and {}\n\
             hint: tokmeter export --to fleet-sim calibration.json record.json",
            calibrations.len(),
            sources.len()
        )));
    };
    if !calibration.sources.iter().any(|other| other.sha256 == source.sha256) {
        return Err(source.refuse(format!(
            "is none of the records that {file} was fitted to\nhint: {}",
            match calibration.sources.first() {
                Some(other) => format!("it was fitted to {}", other.file),
                None => "it names no record".to_owned(),
            }
        )));
    }
    Ok((file, calibration, source.clone()))
}

/// The context that H is of: within what was measured, so that nothing is extrapolated.
fn context(settings: &Settings, domain: Range) -> Result<f64, Refusal> {
    let Some(text) = settings.get("calibration_ctx") else {
        return Ok(USUAL_CONTEXT_TOKENS.max(domain.min.ceil()).min(domain.max).floor());
    };
    match text.parse::<u32>() {
        Ok(tokens) if (domain.min..=domain.max).contains(&f64::from(tokens)) => Ok(f64::from(tokens)),
        _ => Err(Refusal(format!(
            "--set calibration_ctx={text}: expected whole tokens from {} to {}, which were measured",
            domain.min.ceil(),
            domain.max.floor()
        ))),
    }
}

fn remarks(law: &Law, calibration: &Calibration) -> Vec<String> {
    let mut notes = vec![format!(
        "calibration of grade {}; H grows with the context in fleet-sim as a whole, in the law only in part",
        calibration.grade
    )];
    if let Some(knot) = law.knot {
        notes.push(format!(
            "the law bends at {knot} sequences and fleet-sim's does not: H is exact at max_slots and too high below"
        ));
    }
    notes
}

fn at(sequences: f64, context: f64) -> Load {
    Load::Decode { batch: sequences, kv_tokens: sequences * context }
}

/// W at 1, 2, 4 … sequences, by the laws of energy and time.
fn powers(time: &Law, energy: &Law, context: f64, max_slots: f64) -> Vec<(f64, f64)> {
    std::iter::successors(Some(1.0), |sequences| Some(sequences * 2.0))
        .take_while(|sequences| *sequences < max_slots)
        .chain([max_slots])
        .map(|sequences| (sequences, energy.at(&at(sequences, context)) / time.at(&at(sequences, context))))
        .collect()
}

/// The curve of a GPU's power, or a note that says why there is none.
fn power(
    time: &Law,
    calibration: &Calibration,
    (context, max_slots): (f64, f64),
    notes: &mut Vec<String>,
) -> Option<Curve> {
    let why = match calibration.law(Phase::Decode, Quantity::Energy) {
        None => "the calibration has no energy law",
        Some(energy) => match fit(&powers(time, energy, context, max_slots)) {
            None => "by the laws it does not rise with the load",
            Some((curve, error_share)) => {
                notes.push(format!("the curve meets the laws' power within {:.1} %", error_share * 100.0));
                return Some(curve);
            }
        },
    };
    notes.push(format!("power is left out, which disables fleet-sim's power model: {why}"));
    None
}

/// The curve of least squares, its ends by linear regression for each steepness and middle of a grid, and its largest
/// relative error. A straight line (k of 0) where no curve rises from a positive end; none where power does not rise.
fn fit(points: &[(f64, f64)]) -> Option<(Curve, f64)> {
    let steps = |from: f64, count: u32| (0..count).map(move |step| from + 0.1 * f64::from(step));
    let curves = steps(0.2, 39).flat_map(|k| steps(-2.0, 121).map(move |x0| (k, x0)));
    let best = curves
        .filter_map(|(k, x0)| {
            let curve = with_ends(points, k, x0)?;
            Some((squares(points, &curve), curve))
        })
        .min_by(|a, b| a.0.total_cmp(&b.0));
    let curve = match best {
        Some((_, curve)) => curve.rounded(),
        None => line(points)?.rounded(),
    };
    let errors = points.iter().map(|(sequences, watts)| (curve.at(*sequences, points) / watts - 1.0).abs());
    Some((curve, errors.fold(0.0, f64::max)))
}

impl Curve {
    /// To a milliwatt and to the grid: further digits would be those of the machine's exponential function.
    fn rounded(self) -> Curve {
        let [idle_w, nominal_w] = [self.idle_w, self.nominal_w].map(|watts| (watts * 1e3).round() / 1e3);
        Curve { idle_w, nominal_w, k: (self.k * 10.0).round() / 10.0, x0: (self.x0 * 10.0).round() / 10.0 }
    }

    /// As fleet-sim computes it; a straight line reaches its end at the largest load.
    fn at(&self, sequences: f64, points: &[(f64, f64)]) -> f64 {
        let share = match self.k > 0.0 {
            true => 1.0 / (1.0 + (-self.k * (sequences.log2() - self.x0)).exp()),
            false => sequences / points.last().map_or(sequences, |(most, _)| *most),
        };
        self.idle_w + (self.nominal_w - self.idle_w) * share
    }
}

fn line(points: &[(f64, f64)]) -> Option<Curve> {
    let ((_, idle_w), (_, nominal_w)) = (*points.first()?, *points.last()?);
    (nominal_w > idle_w && idle_w > 0.0).then_some(Curve { idle_w, nominal_w, k: 0.0, x0: 0.0 })
}

fn with_ends(points: &[(f64, f64)], k: f64, x0: f64) -> Option<Curve> {
    let count = points.len() as f64;
    let shares: Vec<f64> =
        points.iter().map(|(sequences, _)| 1.0 / (1.0 + (-k * (sequences.log2() - x0)).exp())).collect();
    let mean_share = shares.iter().sum::<f64>() / count;
    let mean_w = points.iter().map(|(_, watts)| watts).sum::<f64>() / count;
    let spread: f64 = shares.iter().map(|share| (share - mean_share).powi(2)).sum();
    let product: f64 =
        shares.iter().zip(points).map(|(share, (_, watts))| (share - mean_share) * (watts - mean_w)).sum();
    let range_w = product / spread;
    let idle_w = mean_w - range_w * mean_share;
    let is_physical = range_w.is_finite() && range_w > 0.0 && idle_w > 0.0;
    is_physical.then_some(Curve { idle_w, nominal_w: idle_w + range_w, k, x0 })
}

fn squares(points: &[(f64, f64)], curve: &Curve) -> f64 {
    points.iter().map(|(sequences, watts)| (curve.at(*sequences, points) / watts - 1.0).powi(2)).sum()
}

fn cost_per_hr(source: &Source<'_>, settings: &Settings) -> Result<f64, Refusal> {
    if let Some(text) = settings.get("cost_per_hr") {
        return match text.parse::<f64>() {
            Ok(dollars) if (0.0..=1e6).contains(&dollars) => Ok(dollars),
            _ => Err(Refusal(format!(
                "--set cost_per_hr={text}: expected US dollars per GPU and hour such as 2.50"
            ))),
        };
    }
    rental_usd(source.record).ok_or_else(|| {
        source.refuse("has no rental price in USD, which a ManualProfile needs\nhint: --set cost_per_hr=2.50")
    })
}

fn rental_usd(record: &Record) -> Option<f64> {
    let model = record.cost_model.value().filter(|model| model.currency.to_string() == "USD")?;
    match &model.mode {
        CostMode::Rental { price_per_gpu_hour, .. } => price_per_gpu_hour.value().to_string().parse().ok(),
        CostMode::Owned { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_found_again_from_its_points() {
        let truth = Curve { idle_w: 300.0, nominal_w: 600.0, k: 1.0, x0: 4.2 };
        let loads = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
        let points: Vec<(f64, f64)> = loads.iter().map(|load| (*load, truth.at(*load, &[]))).collect();
        let (found, error_share) = fit(&points).unwrap();
        assert!(error_share < 1e-6, "{error_share}");
        for (found, expected) in
            [(found.idle_w, 300.0), (found.nominal_w, 600.0), (found.k, 1.0), (found.x0, 4.2)]
        {
            assert!((found / expected - 1.0).abs() < 1e-6, "{found}, expected {expected}");
        }
    }

    #[test]
    fn power_that_falls_is_no_curve_and_a_jump_from_nothing_is_a_line() {
        assert_eq!(fit(&[(1.0, 500.0), (2.0, 450.0), (4.0, 400.0)]), None);
        let line = line(&[(1.0, 400.0), (4.0, 500.0)]).unwrap();
        assert_eq!(line, Curve { idle_w: 400.0, nominal_w: 500.0, k: 0.0, x0: 0.0 });
        assert_eq!(line.at(4.0, &[(1.0, 400.0), (4.0, 500.0)]), 500.0);
    }
}
