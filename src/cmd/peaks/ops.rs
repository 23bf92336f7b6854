//! `peaks --ops`: from the sizes on the command line to the times of a model's operations.

use super::{Args, Ops};
use crate::backend::peaks::Protocol;
use crate::backend::{Backend, Cpu, CpuDType, Cuda, Shape};
use crate::cmd::device::Target;
use crate::cmd::model::{config_of, locate, name_of};
use crate::cmd::progress::FetchBar;
use crate::cmd::{bad_file, usage};
use crate::model::op_times::{OpTimer, StepShape};
use crate::record::{Ceilings, Kernels};
use crate::weights::registry::DEFAULT_MODEL;
use crate::weights::synthetic::Synthetic;
use crate::weights::{Weights, open};
use crate::workload::parse_numbers;

/// Context of a decode step when no size is given, tokens.
const DEFAULT_DEPTH: u32 = 512;
/// Seed of the weights where they are made up.
const SEED: u64 = 0;

/// What was asked for.
pub(super) struct Request {
    model: String,
    offline: bool,
    shapes: Vec<StepShape>,
}

impl Request {
    /// # Errors
    /// Usage errors: no such model, or sizes that are no numbers or beyond the model's context.
    pub(super) fn settle(args: &Args) -> anyhow::Result<Self> {
        let model = args.model.clone().unwrap_or_else(|| DEFAULT_MODEL.to_owned());
        let shapes = shapes(args).map_err(usage)?;
        let most = config_of(&model)?.max_position_embeddings;
        match shapes.iter().find(|shape| shape.context() > most) {
            Some(shape) => Err(usage(format!("{shape} exceeds the model's context of {most} tokens"))),
            None => Ok(Request { model, offline: args.offline, shapes }),
        }
    }

    /// # Errors
    /// When the model cannot be had, does not fit or the device fails.
    pub(super) fn time(
        self,
        target: Target,
        ceilings: &Ceilings,
        protocol: &Protocol,
    ) -> anyhow::Result<Ops> {
        match target {
            Target::Cpu(dtype) => {
                let available = protocol.host.available_bytes.value().copied().unwrap_or(0);
                self.time_on(target, ceilings, protocol, available, &|shape| Ok(Cpu::new(shape, dtype)))
            }
            Target::Cuda { index, options } => {
                let make = |shape| Cuda::new(index, shape, options);
                let total = make(crate::model::shape_of(&config_of(&self.model)?))?.properties().total_bytes;
                self.time_on(target, ceilings, protocol, total, &make)
            }
        }
    }

    fn time_on<B: Backend>(
        self,
        target: Target,
        ceilings: &Ceilings,
        protocol: &Protocol,
        memory_bytes: u64,
        make: &dyn Fn(Shape) -> anyhow::Result<B>,
    ) -> anyhow::Result<Ops> {
        let weights: Box<dyn Weights> = match target {
            Target::Cpu(CpuDType::Quantized) => {
                let path = locate(&self.model, self.offline, Box::new(FetchBar::default()))?;
                open(&path).map_err(bad_file)?
            }
            _ => Box::new(Synthetic::new(config_of(&self.model)?, SEED)),
        };
        // Each operation has its own time; there is no deadline for all.
        let protocol = Protocol { deadline_ns: u64::MAX, ..protocol.clone() };
        let timer = OpTimer {
            make,
            weights: weights.as_ref(),
            ceilings,
            protocol: &protocol,
            most_bytes: memory_bytes / 4,
            captures: matches!(target, Target::Cuda { options, .. } if options.graphs),
        };
        let times = timer.time_all(&self.shapes)?;
        let info = make(crate::model::shape_of(weights.config()))?.info();
        Ok(Ops {
            model: name_of(&self.model),
            compute_dtype: info.compute_dtype.to_owned(),
            weights: weights.info().format,
            kernels: info.kernels.map(Kernels::from),
            times,
        })
    }
}

fn shapes(args: &Args) -> Result<Vec<StepShape>, String> {
    let list = |name: &str, text: &Option<String>| -> Result<Vec<u32>, String> {
        let numbers = text.as_deref().map_or(Ok(Vec::new()), parse_numbers);
        let numbers = numbers.map_err(|error| format!("--{name}: {error}"))?;
        let most = 1 << 20;
        match numbers.iter().find(|number| !(1..=most).contains(*number)) {
            Some(number) => Err(format!("--{name} is {number}, expected 1 to {most}")),
            None => Ok(numbers),
        }
    };
    let (mut batches, mut depths) = (list("batch", &args.batch)?, list("depth", &args.depth)?);
    let isls = list("isl", &args.isl)?;
    if batches.is_empty() {
        batches = vec![1];
    }
    if depths.is_empty() && isls.is_empty() {
        depths = vec![DEFAULT_DEPTH];
    }
    let by_batch = batches.iter().flat_map(|&batch| {
        let decode = depths.iter().map(move |&depth| StepShape::Decode { batch, depth });
        decode.chain(isls.iter().map(move |&isl| StepShape::Prefill { batch, isl }))
    });
    Ok(by_batch.collect())
}
