//! The library that computes large products: which cells it takes part in, and which algorithms are others than before. It
//! chooses by timing, so a choice may change without any change of the machine: a loss that comes with one is neither
//! the driver's nor the device's.

use std::collections::{BTreeMap, BTreeSet};

use super::arms::Arms;
use super::result::{Algorithm, AlgorithmChange};
use super::session::Group;
use crate::record::{CublasLt, Engine, TunedProduct, Workload};

/// Rows of activations in the steps of a cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StepRows {
    /// These, and no others.
    Exactly(Vec<u32>),
    /// Up to so many: batches come as they come.
    UpTo(u32),
}

/// The rows of a cell's steps; none where no step has as many as the library takes.
pub(super) fn step_rows(workload: &Workload, engine: &Engine) -> Option<StepRows> {
    let least = engine.cublaslt.value()?.least_rows;
    let chunk = engine.chunk_tokens.max(1);
    // Prompts are computed in chunks; what remains is a step of its own.
    let prompts = |batch: u32, isl: u32| {
        let tokens = batch.saturating_mul(isl);
        [tokens.min(chunk), tokens % chunk]
    };
    let rows = match *workload {
        Workload::Prefill { batch, isl } => StepRows::Exactly(prompts(batch, isl).to_vec()),
        Workload::Decode { batch, .. } => StepRows::Exactly(vec![batch]),
        Workload::Generate { batch, isl, .. } => {
            StepRows::Exactly([&prompts(batch, isl)[..], &[batch]].concat())
        }
        Workload::ServeClosed { .. } | Workload::ServeOpen { .. } => StepRows::UpTo(chunk),
    };
    let most = match &rows {
        StepRows::Exactly(all) => all.iter().copied().max().unwrap_or(0),
        StepRows::UpTo(most) => *most,
    };
    (most >= least).then_some(rows)
}

impl StepRows {
    /// Whether a product that was tuned for `tuned` rows is one of these steps': it runs on at least two thirds of the
    /// rows that it was tuned for.
    fn has(&self, tuned: u32) -> bool {
        match self {
            StepRows::Exactly(all) => {
                all.iter().any(|rows| *rows <= tuned && 2 * u64::from(tuned) <= 3 * u64::from(*rows))
            }
            StepRows::UpTo(most) => 2 * u64::from(tuned) <= 3 * u64::from(*most),
        }
    }
}

/// A product whatever computes it.
type Product = (String, u32, u32, u32, String);

fn algorithms(groups: &[Group<'_>]) -> BTreeMap<Product, BTreeSet<Algorithm>> {
    let mut found: BTreeMap<Product, BTreeSet<Algorithm>> = BTreeMap::new();
    let libraries =
        groups.iter().flat_map(|group| &group.samples).filter_map(|sample| sample.library.as_ref());
    for product in libraries.flat_map(|library: &CublasLt| &library.products) {
        let TunedProduct { rows, columns, depth, dtype, epilogue, .. } = product;
        let key = (epilogue.clone(), *columns, *depth, *rows, dtype.clone());
        found.entry(key).or_default().insert(Algorithm {
            algorithm_id: product.algorithm_id,
            tile_id: product.tile_id,
            stages_id: product.stages_id,
            split_k: product.split_k,
        });
    }
    found
}

/// Products that both sides compute and for which they have no algorithm in common. Where a side's own sessions differ
/// and meet the other's, the choice moves by itself.
pub(super) fn changes(arms: &Arms<'_>) -> Vec<AlgorithmChange> {
    let (before, after) = (algorithms(&arms.baseline), algorithms(&arms.candidate));
    let cells = library_cells(arms);
    before
        .into_iter()
        .filter_map(|(product, before)| {
            let after = after.get(&product)?;
            if !before.is_disjoint(after) {
                return None;
            }
            let (epilogue, columns, depth, rows, dtype) = product;
            let own = cells.iter().filter(|(_, steps)| steps.has(rows)).map(|(key, _)| (*key).to_owned());
            Some(AlgorithmChange {
                rows,
                columns,
                depth,
                dtype,
                epilogue,
                baseline: before.into_iter().collect(),
                candidate: after.iter().copied().collect(),
                cells: own.collect(),
            })
        })
        .collect()
}

/// Cells that the library takes part in, on either side.
pub(super) fn library_cells<'a>(arms: &Arms<'a>) -> BTreeMap<&'a str, &'a StepRows> {
    let samples = arms.baseline.iter().chain(&arms.candidate).flat_map(|group| group.samples.iter().copied());
    let cells = samples.flat_map(|sample| &sample.cells);
    cells.filter_map(|(key, cell)| Some((key.as_str(), cell.library_rows.as_ref()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_belongs_to_the_steps_that_it_runs_on() {
        let steps = StepRows::Exactly(vec![2048, 100]);
        for (tuned, expected) in
            [(2048, true), (2560, true), (3584, false), (128, true), (100, true), (512, false), (96, false)]
        {
            assert_eq!(steps.has(tuned), expected, "{tuned}");
        }
        assert!(StepRows::UpTo(2048).has(96) && !StepRows::UpTo(2048).has(4096));
    }
}
