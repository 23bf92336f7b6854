//! Every operation, and the forward pass of a slice of the model, against the reference; or the cases of one operation.
//! Decides what is computed on which backend. What of it is shown, and how, is `report`'s.

use std::cell::OnceCell;
use std::collections::BTreeSet;

use anyhow::Context as _;

use super::Args;
use super::report::{Forward, Only, Op, Report, grouped};
use crate::arch::{Op as OpKind, tensors};
use crate::backend::check::{Case, cases, check_cases};
use crate::backend::{
    Backend, BackendInfo, Cpu, CpuDType, Cuda, CudaDType, CudaOptions, Gemm, Reference, Shape, cuda,
};
use crate::cmd::device::{Target, remark_products};
use crate::cmd::model::{config_of, locate, name_of};
use crate::cmd::progress::FetchBar;
use crate::cmd::{bad_file, usage};
use crate::model::check::{
    Expected, ForwardCheck, Subject, check_forward, check_invariance, check_log_probabilities,
    check_same_bits,
};
use crate::model::shape_of;
use crate::record::{CublasLt, Maybe};
use crate::weights::registry::DEFAULT_MODEL;
use crate::weights::slice::{Slice, shallow};
use crate::weights::synthetic::Synthetic;
use crate::weights::{StoredDType, Weights, open};

/// The slice of the model that the reference computes.
pub(super) const LAYERS: usize = 2;
pub(super) const VOCAB_SIZE: usize = 4096;
/// Seed of its weights where they are made up.
const SEED: u64 = 0;

/// # Errors
/// When the model cannot be had or the device fails.
pub(super) fn check(target: Target, args: &Args) -> anyhow::Result<Report> {
    match target {
        Target::Cpu(dtype) => {
            let cpu = |shape| Ok(Cpu::new(shape, dtype));
            check_on(target, args, cpu, |_| true, |weights| forward_on_cpu(dtype, weights))
        }
        Target::Cuda { index, options } => {
            let cuda = |shape| Cuda::new(index, shape, options);
            let supports = |shape: &Shape| cuda::supports(shape).is_ok();
            check_on(target, args, cuda, supports, |weights| forward_on_cuda(index, options, weights))
        }
    }
}

/// The operations on what `candidate` makes, then, unless one operation was asked for, `forward`.
fn check_on<B: Backend>(
    target: Target,
    args: &Args,
    candidate: impl Fn(Shape) -> anyhow::Result<B>,
    supports: impl Fn(&Shape) -> bool,
    forward: impl Fn(&dyn Weights) -> anyhow::Result<Vec<ForwardCheck>>,
) -> anyhow::Result<Report> {
    let (cases, only) = chosen(args, cases(supports))?;
    let weights = match target {
        Target::Cpu(CpuDType::Quantized) => Some(quantised(args)?),
        _ if only.is_none() => Some(Box::new(synthetic(args)?) as Box<dyn Weights>),
        _ => None,
    };
    let info = OnceCell::new();
    let candidate = |shape| {
        let backend = candidate(shape)?;
        if info.get().is_none() {
            remark_products(info.get_or_init(|| backend.info()));
        }
        Ok(backend)
    };
    let mut ops: Vec<Op> = Vec::new();
    for stored in stored_dtypes(weights.as_deref(), target)? {
        ops.extend(grouped(&check_cases(reference, candidate, stored, &cases)?, stored));
    }
    let forward = match (&only, &weights) {
        (None, Some(weights)) => forward(weights.as_ref())?.into_iter().map(Forward::from).collect(),
        _ => Vec::new(),
    };
    let info = info.into_inner().context("no shape is supported by this backend")?;
    let BackendInfo { name: backend, compute_dtype, threads, .. } = info;
    Ok(Report {
        device: target.to_string(),
        backend,
        compute_dtype,
        threads,
        large_products: large_products(&info.cublaslt),
        model: weights.is_some().then(|| name_of(model_of(args))),
        weights: weights.map(|weights| weights.info().format),
        only,
        passed: ops.iter().all(Op::passed) && forward.iter().all(Forward::passed),
        ops,
        forward,
    })
}

/// All cases, or those that `--op` and `--case` keep.
fn chosen(args: &Args, all: Vec<Case>) -> anyhow::Result<(Vec<Case>, Option<Only>)> {
    let Some(op) = args.op else { return Ok((all, None)) };
    let of_op: Vec<Case> = all.into_iter().filter(|case| case.op() == op).collect();
    let text = args.case.as_deref().unwrap_or_default();
    let kept: Vec<Case> = of_op.iter().filter(|case| case.text().contains(text)).cloned().collect();
    if kept.is_empty() {
        return Err(usage(no_such_case(op, text, &of_op)));
    }
    let only = Only::new(op, args.case.clone(), kept.len(), of_op.len());
    Ok((kept, Some(only)))
}

/// Every case is a combination of these words.
fn no_such_case(op: OpKind, text: &str, cases: &[Case]) -> String {
    let list = |word: fn(&Case) -> &'static str| {
        let mut words: Vec<String> = Vec::new();
        for word in cases.iter().map(word).filter(|word| !word.is_empty()).map(|word| format!("\"{word}\"")) {
            if !words.contains(&word) {
                words.push(word);
            }
        }
        words.join(", ")
    };
    let parts = list(Case::part);
    let (third, parts) = match parts.as_str() {
        "" => ("", String::new()),
        _ => (", PART", format!("\n  PART   {parts}")),
    };
    format!(
        "--case is '{text}', expected a part of one of the {} cases of {}\n\
         hint: a case is \"SHAPE, BATCH{third}\", of\n  SHAPE  {}\n  BATCH  {}{parts}",
        cases.len(),
        op.name(),
        list(|case| case.shape),
        list(|case| case.batch),
    )
}

fn forward_on_cpu(dtype: CpuDType, weights: &dyn Weights) -> anyhow::Result<Vec<ForwardCheck>> {
    let slice = Slice::new(weights, LAYERS, VOCAB_SIZE);
    let shape = shape_of(slice.config());
    let expected = Expected::new(Reference::new(shape.clone()), &slice)?;
    check_forward(&expected, &mut Subject::load(Cpu::new(shape, dtype), &slice)?)
}

/// The forward pass of weights that the host brings, then, with those that the device makes, what the CUDA backend
/// promises beyond tolerances: no more loss than a plain implementation in its type, the same bits from graphs as from
/// single launches, and in deterministic mode whatever else is in the batch.
fn forward_on_cuda(
    index: u32,
    options: CudaOptions,
    weights: &dyn Weights,
) -> anyhow::Result<Vec<ForwardCheck>> {
    let shape = || shape_of(weights.config());
    let load = |options: CudaOptions, weights: &dyn Weights| {
        Subject::load(Cuda::new(index, shape(), options)?, weights)
    };
    let expected = Expected::new(Reference::new(shape()), weights)?;
    let plain = Expected::new(Reference::rounding(shape(), options.dtype.rounding()), weights)?;
    // A slice hands out values, not how to make them.
    let brought = Slice::new(weights, LAYERS, VOCAB_SIZE);
    let mut checks = check_forward(&expected, &mut load(options, &brought)?)?;
    let mut subject = load(options, weights)?;
    checks.extend(check_log_probabilities(&expected, &plain, &mut subject)?);
    if options.graphs {
        let mut eager = load(CudaOptions { graphs: false, ..options }, weights)?;
        let case = "the same bits from graphs and from single launches";
        checks.push(check_same_bits(case, &mut eager, &mut subject)?);
    }
    drop(subject);
    // Only own kernels promise this, whatever computes large products otherwise.
    let deterministic = CudaOptions { deterministic: true, gemm: Gemm::Own, ..options };
    checks.push(check_invariance(&mut load(deterministic, weights)?)?);
    Ok(checks)
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
fn quantised(args: &Args) -> anyhow::Result<Box<dyn Weights>> {
    let is_offline = args.offline || args.model.is_none();
    let path = locate(model_of(args), is_offline, Box::new(FetchBar::default()))?;
    let weights = open(&path).map_err(bad_file)?;
    if quantised_types(weights.as_ref())?.is_empty() {
        return Err(usage(format!(
            "{}: no tensor is quantised, expected a quantised GGUF file for --dtype quantized",
            path.display()
        )));
    }
    Ok(weights)
}

/// How matrices are stored for the operations: as the device keeps them.
fn stored_dtypes(weights: Option<&dyn Weights>, target: Target) -> anyhow::Result<BTreeSet<StoredDType>> {
    let one = |dtype| Ok(BTreeSet::from([dtype]));
    match (target, weights) {
        (Target::Cpu(CpuDType::Quantized), Some(weights)) => quantised_types(weights),
        (Target::Cpu(_), _) => one(StoredDType::F32),
        (Target::Cuda { options, .. }, _) => match options.dtype {
            CudaDType::Bf16 => one(StoredDType::BF16),
            CudaDType::F16 => one(StoredDType::F16),
        },
    }
}

/// The block types that the tensors of the model's slice are stored in.
fn quantised_types(weights: &dyn Weights) -> anyhow::Result<BTreeSet<StoredDType>> {
    let slice = Slice::new(weights, LAYERS, VOCAB_SIZE);
    let mut found = BTreeSet::new();
    for spec in tensors(slice.config()) {
        let dtype = slice.tensor(&spec.name)?.dtype;
        if dtype.is_quantized() {
            found.insert(dtype);
        }
    }
    Ok(found)
}
