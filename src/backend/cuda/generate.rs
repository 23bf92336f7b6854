//! Made-up weights, filled in on the device: nothing crosses the bus, and the bits are those that the host would make.

use std::sync::Arc;

use super::buffers::{CudaWeight, Values};
use super::device::Cuda;
use super::launch::{Grid, at, float, long};
use super::memory::DeviceBuffer;
use crate::backend::WeightUse;
use crate::weights::synthetic::{Generator, Recipe};

const THREADS: u32 = 256;
/// Enough for any device.
const MOST_BLOCKS: u32 = 4096;

impl Cuda {
    /// Made-up parts, stacked by rows, in place.
    pub(super) fn generate_weight(
        &mut self,
        usage: WeightUse,
        parts: &[Recipe],
    ) -> anyhow::Result<CudaWeight> {
        let elements = |part: &Recipe| part.shape.iter().product::<usize>();
        let total = parts.iter().map(elements).sum();
        let columns = parts.first().and_then(|part| part.shape.last()).copied().unwrap_or(0);
        let (rows, columns) =
            if usage == WeightUse::Vector { (1, total) } else { (total / columns.max(1), columns) };
        let what = parts.first().map_or("", |part| &part.name);
        let values = match usage {
            WeightUse::Vector => Values::Full(DeviceBuffer::new(&self.queue.stream, total, what)?),
            _ => Values::Half(DeviceBuffer::new(&self.queue.stream, total, what)?),
        };
        let mut first = 0;
        for part in parts {
            self.generate_part(part, &values, first, elements(part))?;
            first += elements(part);
        }
        Ok(CudaWeight { values: Arc::new(values), rows, columns })
    }

    #[allow(unsafe_code)]
    fn generate_part(
        &mut self,
        part: &Recipe,
        to: &Values,
        first: usize,
        count: usize,
    ) -> anyhow::Result<()> {
        let (kernel, out) = match to {
            Values::Full(values) => {
                (&self.kernels.synthetic_f32, values.address() + (first * size_of::<f32>()) as u64)
            }
            Values::Half(values) => {
                (&self.kernels.synthetic, values.address() + (first * size_of::<u16>()) as u64)
            }
        };
        let Generator { key, center, scale } = part.generator;
        let arguments = [at(out), long(key), float(center), float(scale), long(0), long(count as u64)];
        let blocks = (count.div_ceil(THREADS as usize) as u32).clamp(1, MOST_BLOCKS);
        let grid = Grid { blocks: [blocks, 1, 1], threads: THREADS, shared_bytes: 0 };
        // SAFETY: the arguments of synthetic.cu; `to` was made for all parts, of which this is one.
        unsafe { self.queue.launch(kernel, grid, &arguments) }
    }
}
