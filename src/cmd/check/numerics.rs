//! Every operation, and the forward pass of a slice of the model, against the reference.

use std::collections::BTreeSet;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

use super::Args;
use crate::arch::tensors;
use crate::backend::check::{OpCheck, check_ops};
use crate::backend::{
    Backend, BackendInfo, Cpu, CpuDType, Cuda, CudaDType, CudaOptions, Gemm, Reference, Shape, cuda,
};
use crate::cmd::device::{Target, remark_products};
use crate::cmd::model::{config_of, locate, name_of};
use crate::cmd::progress::FetchBar;
use crate::cmd::{bad_file, usage};
use crate::model::check::{
    ForwardCheck, check_forward, check_invariance, check_log_probabilities, check_same_bits,
};
use crate::model::shape_of;
use crate::record::{CublasLt, Maybe};
use crate::weights::registry::DEFAULT_MODEL;
use crate::weights::slice::{Slice, shallow};
use crate::weights::synthetic::Synthetic;
use crate::weights::{StoredDType, Weights, open};

/// The slice of the model that the reference computes.
const LAYERS: usize = 2;
const VOCAB_SIZE: usize = 4096;
/// Seed of its weights where they are made up.
const SEED: u64 = 0;

/// All that was found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    device: String,
    backend: &'static str,
    compute_dtype: &'static str,
    threads: usize,
    /// What computed products of more than 64 rows: a library, or the backend's own code where there is none.
    large_products: Option<String>,
    /// Whose shapes the forward pass has.
    model: String,
    /// `synthetic`, or the format of the file.
    weights: &'static str,
    ops: Vec<Op>,
    forward: Vec<Forward>,
    pub(super) passed: bool,
}

/// One operation over all cases.
#[derive(Debug, Serialize)]
struct Op {
    op: &'static str,
    /// How the matrices were stored.
    stored: &'static str,
    cases: usize,
    max_error: Option<f64>,
    /// Largest share of the tolerance used by any value; `null` where that is no number.
    tolerance_used: Option<f64>,
    passed: bool,
    failed: Vec<Failure>,
}

#[derive(Debug, Serialize)]
struct Failure {
    case: String,
    max_error: Option<f64>,
    tolerance_used: Option<f64>,
}

/// One way of cutting the prompts into steps.
#[derive(Debug, Serialize)]
struct Forward {
    case: &'static str,
    steps: usize,
    logits: usize,
    max_error: Option<f64>,
    tolerance_used: Option<f64>,
    passed: bool,
}

/// # Errors
/// When the model cannot be had or the device fails.
pub(super) fn check(target: Target, args: &Args) -> anyhow::Result<Report> {
    match target {
        Target::Cpu(dtype) => check_on(target, args, |shape| Ok(Cpu::new(shape, dtype)), |_| true),
        Target::Cuda { index, options } => {
            let cuda = |shape| Cuda::new(index, shape, options);
            let mut report = check_on(target, args, cuda, |shape| cuda::supports(shape).is_ok())?;
            report.add(check_promises(index, options, args)?);
            Ok(report)
        }
    }
}

/// What the CUDA backend promises beyond tolerances: no more loss than a plain implementation in its type, the same
/// bits from graphs as from single launches, and in deterministic mode whatever else is in the batch.
fn check_promises(index: u32, options: CudaOptions, args: &Args) -> anyhow::Result<Vec<ForwardCheck>> {
    let weights = synthetic(args)?;
    let with = |options| move |shape| Cuda::new(index, shape, options);
    let yardstick = |shape| Ok(Reference::rounding(shape, options.dtype.rounding()));
    let mut checks = check_log_probabilities(reference, yardstick, with(options), &weights)?.to_vec();
    if options.graphs {
        let [graphs, eager] = [true, false].map(|graphs| with(CudaOptions { graphs, ..options }));
        checks.push(check_same_bits(
            "the same bits from graphs and from single launches",
            eager,
            graphs,
            &weights,
        )?);
    }
    // Only own kernels promise this, whatever computes large products otherwise.
    let deterministic = CudaOptions { deterministic: true, gemm: Gemm::Own, ..options };
    checks.push(check_invariance(with(deterministic), &weights)?);
    Ok(checks)
}

fn check_on<B: Backend>(
    target: Target,
    args: &Args,
    candidate: impl Fn(Shape) -> anyhow::Result<B>,
    supports: impl Fn(&Shape) -> bool,
) -> anyhow::Result<Report> {
    let model = model_of(args);
    let weights: Box<dyn Weights> = match target {
        Target::Cpu(CpuDType::Quantized) => quantised(model, args.model.is_some(), args.offline)?,
        _ => Box::new(synthetic(args)?),
    };
    let slice = Slice::new(weights.as_ref(), LAYERS, VOCAB_SIZE);
    let info = candidate(shape_of(slice.config()))?.info();
    remark_products(&info);
    let mut ops = Vec::new();
    for stored in stored_dtypes(&slice, target)? {
        ops.extend(grouped(&check_ops(reference, &candidate, stored, &supports)?, stored));
    }
    let forward = check_forward(reference, &candidate, &slice)?;
    let forward: Vec<Forward> = forward.into_iter().map(Forward::from).collect();
    let BackendInfo { name: backend, compute_dtype, threads, .. } = info;
    let passed = ops.iter().all(|op| op.passed) && forward.iter().all(|way| way.passed);
    Ok(Report {
        device: target.to_string(),
        backend,
        compute_dtype,
        threads,
        large_products: large_products(&info.cublaslt),
        model: name_of(model),
        weights: weights.info().format,
        ops,
        forward,
        passed,
    })
}

fn model_of(args: &Args) -> &str {
    args.model.as_deref().unwrap_or(DEFAULT_MODEL)
}

fn synthetic(args: &Args) -> anyhow::Result<Synthetic> {
    Ok(Synthetic::new(shallow(&config_of(model_of(args))?, LAYERS, VOCAB_SIZE), SEED))
}

fn large_products(cublaslt: &Maybe<CublasLt>) -> Option<String> {
    cublaslt.value().map(|library| format!("cuBLASLt {} from {} rows", library.version, library.least_rows))
}

fn reference(shape: Shape) -> anyhow::Result<Reference> {
    Ok(Reference::new(shape))
}

/// The checkpoint whose own blocks are checked. The default one is taken from the cache only: a check of the device
/// fetches nothing that nobody asked for.
fn quantised(model: &str, is_explicit: bool, offline: bool) -> anyhow::Result<Box<dyn Weights>> {
    let path = locate(model, offline || !is_explicit, Box::new(FetchBar::default()))?;
    let weights = open(&path).map_err(bad_file)?;
    let slice = Slice::new(weights.as_ref(), LAYERS, VOCAB_SIZE);
    if quantised_types(&slice)?.is_empty() {
        return Err(usage(format!(
            "{}: no tensor is quantised, expected a quantised GGUF file for --dtype quantized",
            path.display()
        )));
    }
    Ok(weights)
}

/// How matrices are stored for the operations: as the device keeps them.
fn stored_dtypes(weights: &dyn Weights, target: Target) -> anyhow::Result<BTreeSet<StoredDType>> {
    Ok(match target {
        Target::Cpu(CpuDType::F32) => BTreeSet::from([StoredDType::F32]),
        Target::Cpu(CpuDType::Quantized) => quantised_types(weights)?,
        Target::Cuda { options: CudaOptions { dtype: CudaDType::Bf16, .. }, .. } => {
            BTreeSet::from([StoredDType::BF16])
        }
        Target::Cuda { options: CudaOptions { dtype: CudaDType::F16, .. }, .. } => {
            BTreeSet::from([StoredDType::F16])
        }
    })
}

/// The block types that the model's tensors are stored in.
fn quantised_types(weights: &dyn Weights) -> anyhow::Result<BTreeSet<StoredDType>> {
    let mut found = BTreeSet::new();
    for spec in tensors(weights.config()) {
        let dtype = weights.tensor(&spec.name)?.dtype;
        if dtype.is_quantized() {
            found.insert(dtype);
        }
    }
    Ok(found)
}

/// One line for each operation, in the order in which they were first checked.
fn grouped(checks: &[OpCheck], stored: StoredDType) -> Vec<Op> {
    let mut ops: Vec<Op> = Vec::new();
    for check in checks {
        let index = ops.iter().position(|op| op.op == check.op).unwrap_or_else(|| {
            ops.push(Op::new(check.op, stored));
            ops.len() - 1
        });
        ops[index].add(check);
    }
    ops
}

impl Op {
    fn new(op: &'static str, stored: StoredDType) -> Self {
        let (max_error, tolerance_used) = (Some(0.0), Some(0.0));
        let stored = stored.name();
        Op { op, stored, cases: 0, max_error, tolerance_used, passed: true, failed: Vec::new() }
    }

    fn add(&mut self, check: &OpCheck) {
        self.cases += 1;
        self.max_error = larger(self.max_error, number(check.max_error));
        self.tolerance_used = larger(self.tolerance_used, number(check.tolerance_used));
        self.passed &= check.passed;
        if !check.passed {
            self.failed.push(Failure {
                case: check.case.clone(),
                max_error: number(check.max_error),
                tolerance_used: number(check.tolerance_used),
            });
        }
    }
}

impl From<ForwardCheck> for Forward {
    fn from(check: ForwardCheck) -> Self {
        Forward {
            case: check.case,
            steps: check.steps,
            logits: check.logits,
            max_error: number(check.max_error),
            tolerance_used: number(check.tolerance_used),
            passed: check.passed,
        }
    }
}

/// JSON has no NaN and no infinity.
fn number(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// The larger one; none where one of them is no number.
fn larger(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    Some(a?.max(b?))
}

impl Report {
    fn add(&mut self, checks: Vec<ForwardCheck>) {
        self.passed &= checks.iter().all(|check| check.passed);
        self.forward.extend(checks.into_iter().map(Forward::from));
    }

    pub(super) fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "{} · {} on {}, {} threads{}, against the reference\n\n{}\n",
            self.backend,
            self.compute_dtype,
            self.device,
            self.threads,
            self.large_products.as_ref().map_or(String::new(), |library| format!(", {library}")),
            self.ops_table()
        );
        for op in &self.ops {
            for failure in &op.failed {
                text.push_str(&format!(
                    "FAILED  {} ({}): {}: error {}, {} of the tolerance\n",
                    op.op,
                    op.stored,
                    failure.case,
                    scientific(failure.max_error),
                    percent(failure.tolerance_used)
                ));
            }
        }
        text.push_str(&format!(
            "\nforward pass of {}: its shapes, at most {LAYERS} layers and {VOCAB_SIZE} tokens, {} weights\n\n{}\n",
            self.model,
            self.weights,
            self.forward_table()
        ));
        text.push_str(if self.passed { "\nok\n" } else { "\nFAILED\n" });
        text
    }

    fn ops_table(&self) -> String {
        let mut table =
            plain(["OPERATION", "STORED", "CASES", "WORST ERROR", "OF TOLERANCE", "RESULT"], &[2, 3, 4]);
        for op in &self.ops {
            table.add_row([
                op.op.to_owned(),
                op.stored.to_owned(),
                op.cases.to_string(),
                scientific(op.max_error),
                percent(op.tolerance_used),
                verdict(op.passed).to_owned(),
            ]);
        }
        trimmed(&table)
    }

    fn forward_table(&self) -> String {
        let mut table =
            plain(["STEPS", "", "LOGITS", "WORST ERROR", "OF TOLERANCE", "RESULT"], &[0, 2, 3, 4]);
        for way in &self.forward {
            table.add_row([
                way.steps.to_string(),
                way.case.to_owned(),
                way.logits.to_string(),
                scientific(way.max_error),
                percent(way.tolerance_used),
                verdict(way.passed).to_owned(),
            ]);
        }
        trimmed(&table)
    }
}

fn plain<const N: usize>(titles: [&str; N], right_aligned: &[usize]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(titles);
    for &column in right_aligned {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn trimmed(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

fn scientific(value: Option<f64>) -> String {
    value
        .map_or("none".to_owned(), |value| if value == 0.0 { "0".to_owned() } else { format!("{value:.1e}") })
}

fn percent(share: Option<f64>) -> String {
    share.map_or("none".to_owned(), |share| format!("{:.1} %", share * 100.0))
}

fn verdict(passed: bool) -> &'static str {
    if passed { "ok" } else { "FAILED" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op_check(op: &'static str, max_error: f64, tolerance_used: f64) -> OpCheck {
        let passed = tolerance_used <= 1.0;
        OpCheck { op, case: "GQA 3, prompt of 45".to_owned(), max_error, tolerance_used, passed }
    }

    fn report(checks: &[OpCheck]) -> Report {
        let ops = grouped(checks, StoredDType::F32);
        let passed = ops.iter().all(|op| op.passed);
        Report {
            device: "cpu".to_owned(),
            backend: "cpu",
            compute_dtype: "f32",
            threads: 2,
            large_products: None,
            model: "tiny".to_owned(),
            weights: "synthetic",
            ops,
            forward: Vec::new(),
            passed,
        }
    }

    #[test]
    fn an_operation_shows_its_worst_case() {
        let report = report(&[
            op_check("embed", 0.0, 0.0),
            op_check("mlp_in", 1e-6, 0.1),
            op_check("mlp_in", 3e-6, 0.25),
        ]);
        let text = report.table();
        let line = text.lines().find(|line| line.contains("mlp_in")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words, ["mlp_in", "f32", "2", "3.0e-6", "25.0", "%", "ok"]);
        assert!(report.passed && text.ends_with("\nok\n"));
    }

    #[test]
    fn a_value_that_is_no_number_fails_and_stays_visible_among_good_ones() {
        let bad = op_check("attention", f64::NAN, f64::NAN);
        let report = report(&[op_check("attention", 1e-6, 0.1), bad, op_check("attention", 1e-6, 0.1)]);
        let text = report.table();
        assert!(
            text.contains("FAILED  attention (f32): GQA 3, prompt of 45: error none, none of the tolerance")
        );
        assert!(text.ends_with("\nFAILED\n"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        assert_eq!(json["passed"], false);
        assert!(json["ops"][0]["max_error"].is_null());
        assert_eq!(json["ops"][0]["cases"], 3);
    }
}
