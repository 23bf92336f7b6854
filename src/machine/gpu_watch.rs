//! The GPUs in use, read around each cell: through NVML, and their faults from the kernel's log.

use super::Roots;
use super::kernel_log::KernelLog;
use crate::meter::Absent;
use crate::meter::nvml::{GpuId, Library};
use crate::record::Maybe;
use crate::record::environment::{CellGpu, GpuReading};

/// What reads them.
pub struct GpuWatch {
    roots: Roots,
    gpus: Vec<GpuId>,
    /// Reason code where there is none.
    library: Result<Library, String>,
}

/// One reading of every GPU, or why there is none.
pub type Readings = Result<Vec<GpuReading>, String>;

impl GpuWatch {
    /// `gpus` are those in use; none on a CPU.
    pub fn new(roots: Roots, library: Result<Library, Absent>, gpus: Vec<GpuId>) -> Self {
        let library = match gpus.is_empty() {
            true => Err("no_gpu_in_use".to_owned()),
            false => library.map_err(|absent| absent.reason),
        };
        GpuWatch { roots, gpus, library }
    }

    /// All of them at this moment. Takes some milliseconds.
    ///
    /// # Errors
    /// Reason code.
    pub fn read(&self) -> Readings {
        let library = self.library.as_ref().map_err(Clone::clone)?;
        let log = KernelLog::read(&self.roots);
        let read = |gpu: &GpuId| {
            let described = library.described(&gpu.uuid)?;
            let address = described.pci_address();
            let xids = match (&log, address) {
                (Ok(log), Ok(address)) => log.xids(&address).into(),
                (Err(reason), _) => Maybe::missing(*reason),
                (_, Err(reason)) => Maybe::missing(reason),
            };
            Ok(GpuReading { xids, ..described.reading() })
        };
        self.gpus.iter().map(read).collect()
    }

    /// What a cell's record says, of readings before it, after its warm-up and after it.
    pub fn around(&self, before: Readings, warm: Option<Readings>, after: Readings) -> Maybe<Vec<CellGpu>> {
        let (before, after) = match (before, after) {
            (Ok(before), Ok(after)) => (before, after),
            (Err(reason), _) | (_, Err(reason)) => return Maybe::missing(reason),
        };
        let warm = warm.unwrap_or_else(|| Err("not_reached".to_owned()));
        let gpus = self.gpus.iter().zip(before).zip(after).enumerate();
        let around = gpus.map(|(index, ((gpu, before), after))| CellGpu {
            device: gpu.name.clone(),
            before,
            warm: warm.as_ref().map(|readings| readings[index].clone()).map_err(Clone::clone).into(),
            after,
        });
        Maybe::Value(around.collect())
    }
}
