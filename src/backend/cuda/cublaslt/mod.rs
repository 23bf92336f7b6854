//! Products of many rows by cuBLASLt, where it is there: which algorithm, tuned once for each product and kept on
//! disk. `shape` says how the library sees a product, `library` owns its objects, `tune` chooses and `stored` keeps the
//! choice. Sits beside our own kernels, below [`super::products`], which decides between them.

mod library;
mod shape;
mod stored;
mod tune;

use std::collections::HashMap;

use anyhow::{Context as _, bail, ensure};

use super::cache::{self, Cache};
use super::context::Stream;
use super::convert::CudaDType;
use super::device::{CudaOptions, Gemm};
use super::kernels::{Epilogue, Kernels};
use super::launch::{Grid, at, int};
use super::memory::DeviceBuffer;
use super::preload::{self, NoCublasLt};
use super::products::{Product, STREAM_ROWS};
use super::queue::{Mode, Queue};
use crate::clock::Clock;
use crate::record::{self, Maybe};

use library::{Addresses, Handle};
use shape::ProductShape;
pub(in crate::backend::cuda) use shape::tuned_rows;
use stored::{Place, Stored};
use tune::{Choice, Tuner};

/// What algorithms may use. NVIDIA recommends as much from Hopper on; older devices need less.
const WORKSPACE_BYTES: usize = 32 << 20;
/// The library's guesses are for addresses that are multiples of so much.
const ALIGNMENT: u64 = 256;
const THREADS: u32 = 256;
/// Values that one block of `silu_mul` makes.
const SILU_CHUNK: usize = 8 * THREADS as usize;

/// What computes products of more rows than the streaming kernel takes.
#[derive(Debug)]
pub(super) enum Large {
    Library(Box<CublasLt>),
    /// Our tiled kernel; the reason code says why.
    Own(&'static str),
}

impl Large {
    /// # Errors
    /// When the library is asked for and cannot be had, or contradicts what else is asked for.
    pub(super) fn new(stream: &Stream, options: CudaOptions) -> anyhow::Result<Self> {
        match (options.deterministic, options.gemm) {
            (true, Gemm::CublasLt) => {
                bail!("deterministic output is computed by own kernels only, expected no cuBLASLt")
            }
            (true, _) => Ok(Large::Own("deterministic")),
            (false, Gemm::Own) => Ok(Large::Own("own_kernels")),
            (false, gemm) => match open(stream) {
                Ok(handle) => Ok(Large::Library(Box::new(CublasLt::new(stream, handle, options.dtype)?))),
                Err(error) if gemm == Gemm::CublasLt => Err(error),
                Err(error) if error.is::<NoCublasLt>() => Ok(Large::Own("cublaslt_not_found")),
                Err(_) => Ok(Large::Own("cublaslt_unusable")),
            },
        }
    }

    pub(super) fn record(&self) -> Maybe<record::CublasLt> {
        match self {
            Large::Library(library) => Maybe::Value(library.record()),
            Large::Own(reason) => Maybe::missing(*reason),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        match self {
            Large::Library(library) => library.workspace.bytes() + library.gate_up.bytes(),
            Large::Own(_) => 0,
        }
    }
}

fn open(stream: &Stream) -> anyhow::Result<Handle> {
    const HINT: &str = "hint: install a cuBLAS of the driver's CUDA version, or use --gemm own";
    let context = stream.context();
    preload::cublaslt(context.properties())?;
    context.bind()?;
    Handle::new().map_err(|error| {
        anyhow::anyhow!("cuBLASLt {} cannot be started: {error}\n{HINT}", library::dotted(library::version()))
    })
}

/// The library, and what was chosen so far.
#[derive(Debug)]
pub(super) struct CublasLt {
    handle: Handle,
    version: usize,
    dtype: CudaDType,
    workspace: DeviceBuffer<u8>,
    /// 16-bit `[rows, 2 intermediate_size]`, between the product and `silu_mul`
    gate_up: DeviceBuffer<u16>,
    stored: Stored,
    clock: Clock,
    tuning_ns: u64,
    choices: HashMap<ProductShape, Choice>,
}

impl CublasLt {
    fn new(stream: &Stream, handle: Handle, dtype: CudaDType) -> anyhow::Result<Self> {
        let (version, device) = (library::version(), stream.context().properties());
        let place = Place {
            device: device.name.clone(),
            multiprocessors: device.multiprocessors,
            driver_cuda_version: device.driver_cuda_version,
            cublaslt_version: version,
            dtype,
            workspace_bytes: WORKSPACE_BYTES,
        };
        Ok(CublasLt {
            handle,
            version,
            dtype,
            workspace: DeviceBuffer::new(stream, WORKSPACE_BYTES, "cuBLASLt")?,
            gate_up: DeviceBuffer::new(stream, 0, "activations")?,
            stored: Stored::new(Cache::of_user(cache::ALGORITHMS), place),
            clock: Clock::monotonic(),
            tuning_ns: 0,
            choices: HashMap::new(),
        })
    }

    /// # Errors
    /// When no algorithm can do the product, or the device fails.
    pub(super) fn queue(
        &mut self,
        queue: &mut Queue,
        kernels: &Kernels,
        product: Product,
    ) -> anyhow::Result<()> {
        if product.epilogue != Epilogue::Silu {
            return self.multiply(queue, product);
        }
        let columns = 2 * product.columns;
        if self.gate_up.len() < product.rows * columns {
            // Never during a capture: the rehearsal has made the same room.
            self.gate_up = DeviceBuffer::new(&queue.stream, product.rows * columns, "activations")?;
        }
        let gate_up = self.gate_up.address();
        self.multiply(queue, Product { y: gate_up, columns, ..product })?;
        silu_mul(queue, kernels, product, gate_up)
    }

    /// `product.columns` are the weight's rows, and `product.y` has as many.
    #[allow(unsafe_code)]
    fn multiply(&mut self, queue: &mut Queue, product: Product) -> anyhow::Result<()> {
        let Product { epilogue, y, a, w, rows, columns, depth } = product;
        let is_aligned = [y, a, w].iter().all(|address| address.is_multiple_of(ALIGNMENT));
        ensure!(
            is_aligned,
            "operands of cuBLASLt lie at {y:#x}, {a:#x} and {w:#x}, expected multiples of 256"
        );
        let shape = self.choose(queue, ProductShape { epilogue, columns, depth, rows }, w)?;
        let Choice { problem, candidate, .. } = &self.choices[&shape];
        let workspace = self.workspace.address();
        let addresses = Addresses { y, a, w, workspace, workspace_bytes: self.workspace.len() };
        let sizes = [rows, columns, depth, epilogue as usize].map(|size| size as u64);
        let note = [&candidate.algorithm.0[..], &sizes, &[y, a, w]].concat();
        let handle = &self.handle;
        queue.work(&note, |stream| {
            // SAFETY: the caller checked the addresses against the shape, which `choose` has set the problem to; graphs
            // that hold this are replayed only while all of it is the same.
            unsafe { handle.multiply(problem, candidate.algorithm, addresses, stream) }
                .with_context(|| format!("the product of {shape}, run for {rows} rows"))
        })
    }

    /// The shape whose algorithm computes `exact`, its problem set to the rows of `exact`. Chosen first if it is new.
    fn choose(&mut self, queue: &Queue, exact: ProductShape, w: u64) -> anyhow::Result<ProductShape> {
        // An algorithm that cannot do fewer rows than it was chosen for leaves these rows to a choice of their own.
        for shape in [ProductShape { rows: tuned_rows(exact.rows), ..exact }, exact] {
            if !self.choices.contains_key(&shape) {
                ensure!(
                    !matches!(queue.mode, Mode::Capture { .. }),
                    "the product of {shape} was not seen before its capture"
                );
                let choice = self.tune(&queue.stream, &shape, w)?;
                self.choices.insert(shape, choice);
            }
            if self.takes(&shape, exact.rows)? {
                return Ok(shape);
            }
        }
        bail!("cuBLASLt refuses the algorithm that it was asked for: the product of {exact}")
    }

    fn tune(&mut self, stream: &Stream, shape: &ProductShape, w: u64) -> anyhow::Result<Choice> {
        let begin_ns = self.clock.now_ns();
        let CublasLt { handle, dtype, workspace, stored, .. } = self;
        let choice = Tuner { handle, stream, dtype: *dtype, workspace, stored }.choose(shape, w)?;
        self.tuning_ns += self.clock.now_ns() - begin_ns;
        Ok(choice)
    }

    /// Whether the algorithm chosen for `shape` can do `rows` rows; its problem is then set to them.
    fn takes(&mut self, shape: &ProductShape, rows: usize) -> anyhow::Result<bool> {
        let Some(choice) = self.choices.get_mut(shape) else { return Ok(false) };
        if choice.rows == rows {
            return Ok(true);
        }
        choice.problem.set_rows(rows)?;
        let checked = self.handle.check(&choice.problem, choice.candidate.algorithm, self.workspace.len());
        match checked {
            Some(_) => choice.rows = rows,
            None => choice.problem.set_rows(choice.rows)?,
        }
        Ok(checked.is_some())
    }

    fn record(&self) -> record::CublasLt {
        let mut shapes: Vec<(&ProductShape, &Choice)> = self.choices.iter().collect();
        shapes.sort_by_key(|(shape, _)| **shape);
        let products = shapes.into_iter().map(|(shape, choice)| record::TunedProduct {
            rows: shape.rows as u32,
            columns: shape.columns as u32,
            depth: shape.depth as u32,
            dtype: self.dtype.name().to_owned(),
            epilogue: shape.epilogue.name().to_owned(),
            algorithm_id: choice.numbers.id,
            tile_id: choice.numbers.tile_id,
            stages_id: choice.numbers.stages_id,
            split_k: choice.numbers.split_k,
            workspace_bytes: choice.candidate.workspace_bytes as u64,
            chosen: choice.chosen,
            timed_algorithms: choice.timed,
            best_ns: choice.best_ns.map_or_else(|| Maybe::missing("no_memory_for_tuning"), Maybe::Value),
        });
        record::CublasLt {
            version: library::dotted(self.version),
            least_rows: STREAM_ROWS as u32 + 1,
            workspace_limit_bytes: WORKSPACE_BYTES as u64,
            tuning_ns: self.tuning_ns,
            products: products.collect(),
        }
    }
}

/// `product.y = silu(gate) · up`
#[allow(unsafe_code)]
fn silu_mul(queue: &mut Queue, kernels: &Kernels, product: Product, gate_up: u64) -> anyhow::Result<()> {
    let Product { rows, columns, .. } = product;
    let blocks = [rows as u32, columns.div_ceil(SILU_CHUNK) as u32, 1];
    let arguments = [at(product.y), at(gate_up), int(columns)];
    // SAFETY: the arguments of silu.cu; the caller checked `product.y`, and gate_up holds `rows` rows of both halves.
    unsafe { queue.launch(&kernels.silu_mul, Grid { blocks, threads: THREADS, shared_bytes: 0 }, &arguments) }
}
