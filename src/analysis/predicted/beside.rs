//! The distance between what was predicted and what was measured. What cannot be compared is said, never left out.

use serde::Serialize;

use super::file::{PredictedDevice, PredictedOp, PredictedStep, Prediction, Products};
use super::measured::{Measured, MeasuredTime};
use crate::record::{Ceiling, Ceilings, Kernels, Maybe};

/// A measurement further from its prediction than this says that the model is wrong there.
pub const TOLERANCE_RATIO: f64 = 0.15;
const SCHEMA: &str = "tokmeter-predicted/1";
/// What stands for a whole step among its operations.
const STEP: &str = "step";

/// Several files beside one prediction.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Beside {
    pub schema: &'static str,
    pub model: String,
    pub compute_dtype: String,
    /// Of the kernels that were predicted.
    pub commit: Maybe<String>,
    pub compiler: String,
    pub tolerance_ratio: f64,
    pub sides: Vec<Side>,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Side {
    pub file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_a_measurement: Option<String>,
    pub device_name: Maybe<String>,
    /// The predicted device that it is.
    pub predicted_device: Maybe<String>,
    /// Why nothing of the file is compared; empty where it is.
    pub not_comparable: Vec<String>,
    /// What the prediction took for the device's ceilings; an operation may miss because one of these does.
    pub ceilings: Vec<Row>,
    pub rows: Vec<Row>,
    /// Steps and cells that have no counterpart, each with the reason.
    pub left_out: Vec<String>,
    pub remarks: Vec<String>,
}

/// A predicted number and its measurement: times in nanoseconds, ceilings in the unit that `what` ends in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// `decode/b8/d1024`; of ceilings `ceiling`.
    pub step: String,
    /// Operation, `step`, or ceiling.
    pub what: String,
    pub predicted: f64,
    pub measured: Maybe<f64>,
    /// Measured over predicted.
    pub ratio: Maybe<f64>,
    /// Of the bound at the assumed ceilings.
    pub predicted_share: Maybe<f64>,
    /// Of the bound at the measured ceilings.
    pub measured_share: Maybe<f64>,
    /// Further apart than the tolerance.
    pub is_miss: bool,
}

/// Lays every file beside the prediction.
pub fn beside(prediction: &Prediction, files: &[Measured]) -> Beside {
    Beside {
        schema: SCHEMA,
        model: prediction.model.clone(),
        compute_dtype: prediction.compute_dtype.clone(),
        commit: prediction.commit.clone(),
        compiler: prediction.compiler.clone(),
        tolerance_ratio: TOLERANCE_RATIO,
        sides: files.iter().map(|file| side(prediction, file)).collect(),
    }
}

fn side(prediction: &Prediction, measured: &Measured) -> Side {
    let device = measured.device_name.value().and_then(|name| {
        prediction.devices.iter().find(|device| device.device_names.iter().any(|known| known == name))
    });
    let mut side = Side {
        file: measured.file.clone(),
        not_a_measurement: measured.not_a_measurement.clone(),
        device_name: measured.device_name.clone(),
        predicted_device: device
            .map_or_else(|| Maybe::missing("not_predicted"), |device| Maybe::Value(device.name.clone())),
        not_comparable: not_comparable(prediction, device, measured),
        ceilings: Vec::new(),
        rows: Vec::new(),
        left_out: measured.left_out.clone(),
        remarks: Vec::new(),
    };
    let Some(device) = device.filter(|_| side.not_comparable.is_empty()) else { return side };
    if let Some(reason) = measured.kernels.reason() {
        side.remarks.push(format!("which kernels ran is not known ({})", reason.replace('_', " ")));
    }
    if let Maybe::Value(ceilings) = &measured.ceilings {
        side.ceilings = ceiling_rows(device, ceilings, &measured.compute_dtype);
    }
    for time in &measured.times {
        match row(device, measured, time) {
            Ok(row) => side.rows.push(row),
            Err(reason) => side.left_out.push(format!("{} {}: {reason}", time.step, name_of(time))),
        }
        side.remarks.extend(time.remark.iter().map(|remark| format!("{}: {remark}", time.step)));
    }
    side.left_out.extend(unmeasured(device, &side.rows));
    side
}

fn name_of(time: &MeasuredTime) -> &str {
    time.op.as_deref().unwrap_or(STEP)
}

/// Every reason for which the file is of something else than what was predicted.
fn not_comparable(
    prediction: &Prediction,
    device: Option<&PredictedDevice>,
    measured: &Measured,
) -> Vec<String> {
    let mut reasons = Vec::new();
    if device.is_none() {
        let known = prediction.devices.iter().flat_map(|device| &device.device_names).map(String::as_str);
        let name = measured.device_name.value().map_or("an unknown device", String::as_str);
        let known: Vec<&str> = known.collect();
        reasons.push(format!("another device: {name}, predicted for {}", known.join(", ")));
    }
    if measured.model != prediction.model {
        reasons.push(format!("another model: {}, predicted for {}", measured.model, prediction.model));
    }
    if measured.compute_dtype != prediction.compute_dtype {
        let (found, expected) = (&measured.compute_dtype, &prediction.compute_dtype);
        reasons.push(format!("another type: {found}, predicted for {expected}"));
    }
    if let (Some(device), Maybe::Value(kernels)) = (device, &measured.kernels) {
        reasons.extend(other_kernels(device, kernels));
    }
    reasons
}

/// How the kernels that ran differ from those that were predicted.
fn other_kernels(device: &PredictedDevice, ran: &Kernels) -> Option<String> {
    if ran.architecture != device.architecture {
        let (found, expected) = (&ran.architecture, &device.architecture);
        return Some(format!("other kernels: compiled for {found}, predicted for {expected}"));
    }
    if ran.deterministic {
        return Some(
            "other kernels: --deterministic takes others for decode and for long prompts".to_owned(),
        );
    }
    if !ran.graphs {
        return Some("decode steps were not captured, predicted as replayed graphs".to_owned());
    }
    let resources = ran.resources.value()?;
    let differences: Vec<String> = device
        .registers()
        .into_iter()
        .filter_map(|(entry, expected)| match resources.get(entry) {
            None => Some(format!("there is no {entry}")),
            Some(found) => {
                let found = found.registers.value().filter(|found| **found != expected)?;
                Some(format!("{entry} has {found} registers, predicted for {expected}"))
            }
        })
        .collect();
    let more = differences.len().saturating_sub(1);
    let first = differences.into_iter().next()?;
    Some(match more {
        0 => format!("other kernels: {first}"),
        _ => format!("other kernels: {first}, and {more} more differ"),
    })
}

/// The predicted step that a measured one is.
fn step_for<'a>(
    device: &'a PredictedDevice,
    measured: &Measured,
    step: &str,
) -> Result<&'a PredictedStep, String> {
    let named: Vec<&PredictedStep> = device.steps.iter().filter(|known| known.step == step).collect();
    match named.as_slice() {
        [] => Err("no such step is predicted".to_owned()),
        [only] if only.products == Products::Own && step.starts_with("decode/") => Ok(*only),
        all => match &measured.products {
            Maybe::Value(products) => all
                .iter()
                .find(|known| known.products == *products)
                .copied()
                .ok_or_else(|| "it is not predicted with what computed its large products".to_owned()),
            Maybe::Missing(_) => Err("what computed its large products is not known".to_owned()),
        },
    }
}

fn row(device: &PredictedDevice, measured: &Measured, time: &MeasuredTime) -> Result<Row, String> {
    let step = step_for(device, measured, &time.step)?;
    let (predicted, share, bound_ns) = match &time.op {
        None => {
            let of_step = |op| bound_ns(measured, op).map(|bound| bound * f64::from(op.times_in_a_step));
            let sum = |sum: Maybe<f64>, op| sum.zip(of_step(op)).map(|(sum, bound)| sum + bound);
            let bound = step.ops.iter().fold(Maybe::Value(0.0), sum);
            (step.time_ns, step.bound_share, bound)
        }
        Some(name) => {
            let op = step.ops.iter().find(|op| op.op == *name).ok_or("no such operation is predicted")?;
            if let Some(bytes) = time.bytes.filter(|bytes| *bytes != op.bytes) {
                return Err(format!("it moves {bytes} bytes at least, predicted for {}", op.bytes));
            }
            (op.time_ns, op.bound_share, bound_ns(measured, op))
        }
    };
    let measured_share = time.time_ns.clone().zip(bound_ns).map(|(time_ns, bound)| bound / time_ns);
    Ok(Row {
        predicted_share: Maybe::Value(share),
        measured_share,
        ..compared(&time.step, name_of(time), predicted, time.time_ns.clone())
    })
}

/// At the ceilings that the file measured.
fn bound_ns(measured: &Measured, op: &PredictedOp) -> Maybe<f64> {
    let bound = measured.ceilings.as_ref();
    let bound = bound.and_then(|ceilings| ceilings.bound(op.bytes, op.flops, &measured.compute_dtype));
    bound.map(|bound| bound.bound_ns)
}

fn compared(step: &str, what: &str, predicted: f64, measured: Maybe<f64>) -> Row {
    let ratio = measured.as_ref().map(|measured| measured / predicted);
    Row {
        step: step.to_owned(),
        what: what.to_owned(),
        predicted,
        is_miss: ratio.value().is_some_and(|ratio| (ratio - 1.0).abs() > TOLERANCE_RATIO),
        measured,
        ratio,
        predicted_share: Maybe::missing("not_a_time"),
        measured_share: Maybe::missing("not_a_time"),
    }
}

/// Ceilings that the prediction assumed and the file measured.
fn ceiling_rows(device: &PredictedDevice, found: &Ceilings, dtype: &str) -> Vec<Row> {
    let of_type = |all: &std::collections::BTreeMap<String, Maybe<Ceiling>>| {
        all.get(dtype).cloned().unwrap_or_else(|| Maybe::missing("no_ceiling_of_this_type"))
    };
    [
        ("read_bandwidth_bytes_per_s", found.read_bandwidth_bytes_per_s.clone()),
        ("matmul_flops_per_s", of_type(&found.matmul_flops_per_s)),
        ("mma_flops_per_s", of_type(&found.mma_flops_per_s)),
        ("graph_node_ns", found.graph_node_ns.clone()),
    ]
    .into_iter()
    .filter_map(|(name, ceiling)| {
        let assumed = device.fact(name)?;
        Some(compared("ceiling", name, assumed, ceiling.map(|ceiling| ceiling.value)))
    })
    .collect()
}

/// Steps of the prediction that the file says nothing of.
fn unmeasured(device: &PredictedDevice, rows: &[Row]) -> Vec<String> {
    let mut steps: Vec<&str> = device.steps.iter().map(|step| step.step.as_str()).collect();
    steps.dedup();
    steps.retain(|step| rows.iter().all(|row| row.step != *step));
    steps.into_iter().map(|step| format!("{step}: predicted, not in the file")).collect()
}
