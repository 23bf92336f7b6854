//! Which planned cells a calibration must not learn from. The choice is a pure function of the planned cells, made before
//! anything is measured and written into the record, so that nobody can choose after seeing the numbers.
//!
//! Two grids are split: decode steps over batch and depth, prompts over length and batch. On each, the axis along which
//! forecasts reach furthest grows (a decode's batch, a prompt's length), and the other axis makes rows:
//!
//! 1. `frontier`: the points of the largest value on the growing axis;
//! 2. `row`: all points of one row that is neither the first nor the last, the one whose hash is least;
//! 3. `interior`: of every other row with at least 4 points left, a fifth of those (rounded up) that are neither first
//!    nor last in it, by ascending hash, no two of them neighbours.
//!
//! The hash is SHA-256 of `tokmeter-holdout/1` and the cell's key (for a row: the name of its axis and value).

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Maybe, Workload};

/// Name and version of the rule; part of every hash.
const RULE: &str = "tokmeter-holdout/1";
/// Points that a row needs before any of them is held out.
const LEAST_ROW: usize = 4;
/// Of so many points in a row one is held out.
const ONE_OF: usize = 5;

/// The cells that are measured but not learnt from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HoldOut {
    /// `tokmeter-holdout/1`
    pub rule: String,
    /// Keys of single points within the grid.
    pub interior: Vec<String>,
    /// Keys of whole rows: one context depth of decode steps, one batch size of prompts.
    pub row: Vec<String>,
    /// Keys at the largest batch of decode steps and the longest prompt.
    pub frontier: Vec<String>,
}

/// A grid point: the growing axis, the row, the key.
type Point = (u32, u32, String);

/// Splits the planned cells. Cells of other kinds, and grids of fewer than three values on an axis, hold nothing out
/// along that axis.
pub fn hold_out(planned: &[Workload]) -> HoldOut {
    let mut split =
        HoldOut { rule: RULE.to_owned(), interior: Vec::new(), row: Vec::new(), frontier: Vec::new() };
    let decode = |cell: &Workload| match *cell {
        Workload::Decode { batch, depth, .. } => Some((batch, depth, cell.key())),
        _ => None,
    };
    let prefill = |cell: &Workload| match *cell {
        Workload::Prefill { batch, isl } => Some((isl, batch, cell.key())),
        _ => None,
    };
    split_grid("depth", planned.iter().filter_map(decode).collect(), &mut split);
    split_grid("batch", planned.iter().filter_map(prefill).collect(), &mut split);
    split
}

fn split_grid(row_name: &str, points: BTreeSet<Point>, split: &mut HoldOut) {
    let sizes: BTreeSet<u32> = points.iter().map(|(size, _, _)| *size).collect();
    let largest = sizes.last().filter(|_| sizes.len() >= 3);
    let rows: Vec<u32> = points.iter().map(|(_, row, _)| *row).collect::<BTreeSet<_>>().into_iter().collect();
    let inner = rows.get(1..rows.len().saturating_sub(1)).unwrap_or_default();
    let left_out = inner.iter().min_by_key(|row| hash(&format!("{row_name} {row}")));
    let mut kept: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for (size, row, key) in points {
        if Some(&size) == largest {
            split.frontier.push(key);
        } else if Some(&row) == left_out {
            split.row.push(key);
        } else {
            kept.entry(row).or_default().push(key);
        }
    }
    kept.values().for_each(|row| split.interior.extend(within(row)));
}

/// The points of a row, in its order, that are held out.
fn within(row: &[String]) -> Vec<String> {
    if row.len() < LEAST_ROW {
        return Vec::new();
    }
    let mut candidates: Vec<usize> = (1..row.len() - 1).collect();
    candidates.sort_by_key(|index| hash(&row[*index]));
    let mut taken: Vec<usize> = Vec::new();
    for index in candidates {
        let is_apart = taken.iter().all(|other: &usize| other.abs_diff(index) > 1);
        if is_apart && taken.len() < row.len().div_ceil(ONE_OF) {
            taken.push(index);
        }
    }
    taken.sort_unstable();
    taken.into_iter().map(|index| row[index].clone()).collect()
}

fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(format!("{RULE}\n{text}")).into()
}

/// Stands in records of versions that did not choose.
pub(super) fn not_recorded() -> Maybe<HoldOut> {
    Maybe::not_recorded()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> Vec<Workload> {
        let mut cells = Vec::new();
        for depth in [128, 256, 512, 1024] {
            for batch in [1, 2, 4, 8, 16, 32, 64] {
                cells.push(Workload::Decode { batch, depth, osl: 32 });
            }
        }
        cells
    }

    #[test]
    fn a_grid_loses_its_frontier_one_inner_row_and_a_fifth_of_the_rest() {
        let split = hold_out(&grid());
        assert_eq!(split.frontier.len(), 4);
        assert!(split.frontier.iter().all(|key| key.starts_with("decode/b64/")));
        assert_eq!(split.row.len(), 6);
        let depth = split.row[0].split('/').nth(2).unwrap();
        assert!(["d256", "d512"].contains(&depth) && split.row.iter().all(|key| key.contains(depth)));
        // Three rows of six points, two of each; never the first or the last batch.
        assert_eq!(split.interior.len(), 6);
        for key in &split.interior {
            assert!(!key.contains("/b1/") && !key.contains("/b32/") && !key.contains("/b64/"), "{key}");
        }
    }

    #[test]
    fn the_order_of_the_cells_and_repeats_among_them_change_nothing() {
        let mut cells = grid();
        let split = hold_out(&cells);
        cells.reverse();
        cells.push(cells[3]);
        cells.push(Workload::Generate { batch: 1, isl: 8, osl: 8 });
        assert_eq!(hold_out(&cells), split);
    }

    #[test]
    fn the_rule_is_the_published_one() {
        // By hand: printf 'tokmeter-holdout/1\ndepth 256' | sha256sum
        let hex = |text: &str| super::super::hex(&hash(text));
        assert_eq!(&hex("depth 256")[..8], DEPTH_256);
        assert_eq!(&hex("depth 512")[..8], DEPTH_512);
        let split = hold_out(&grid());
        let expected = if DEPTH_256 < DEPTH_512 { "/d256/" } else { "/d512/" };
        assert!(split.row.iter().all(|key| key.contains(expected)));
    }

    const DEPTH_256: &str = "6a068af7";
    const DEPTH_512: &str = "420851eb";

    #[test]
    fn small_grids_hold_out_nothing() {
        let cells = [(1, 128), (2, 128), (1, 256), (2, 256)].map(|(batch, depth)| Workload::Decode {
            batch,
            depth,
            osl: 8,
        });
        let split = hold_out(&cells);
        assert!(split.frontier.is_empty() && split.row.is_empty() && split.interior.is_empty());
    }
}
