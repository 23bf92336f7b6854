//! The backend's state: one device, one stream, the kernels for one model's shape, and the room that operations need
//! for themselves.

use std::sync::Arc;

use anyhow::ensure;

use super::attend::Attention;
use super::buffers::{CudaWeight, Values};
use super::compile::{Form, Origin};
use super::context::{Context, Properties, Stream};
use super::convert::{CudaDType, rows_to_bits};
use super::kernels::{HEAD_DIMS, Kernels, MAX_GROUP};
use super::memory::{DeviceBuffer, Transfer, out_of_memory};
use super::products::Products;
use super::queue::{Mode, Queue};
use super::samples::Samples;
use super::staging::{Staged, Staging};
use crate::backend::{Batch, KernelInfo, Memory, Shape, WeightUse, stack};
use crate::weights::HostTensor;

/// Words of a batch's description at first; it grows.
const STAGING_WORDS: usize = 1 << 14;

/// What computes products of more than 64 rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gemm {
    /// cuBLASLt where it is there, else our own kernels.
    #[default]
    Auto,
    Own,
    CublasLt,
}

/// How the backend computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    pub dtype: CudaDType,
    /// The same bits for a sequence whatever else is in the batch, at some cost.
    pub deterministic: bool,
    pub gemm: Gemm,
    /// Capture decode steps as graphs and replay them.
    pub graphs: bool,
    /// Let kernels start while their predecessor ends, where device and driver can.
    pub dependent_launch: bool,
    /// What the driver is given of the model's kernels.
    pub form: Form,
}

impl Default for CudaOptions {
    fn default() -> Self {
        CudaOptions {
            dtype: CudaDType::Bf16,
            deterministic: false,
            gemm: Gemm::Auto,
            graphs: true,
            dependent_launch: true,
            form: Form::Sass,
        }
    }
}

/// The step that is being queued.
#[derive(Debug, Default)]
pub(super) struct Step {
    /// Operations belong to one step, whose batch is staged once.
    pub(super) is_open: bool,
    pub(super) staged: Option<Staged>,
    /// Sequences that the step is padded to.
    pub(super) bucket: Option<usize>,
    /// Rows that it samples, padding not counted.
    pub(super) samples: usize,
}

/// The CUDA backend.
#[derive(Debug)]
pub struct Cuda {
    pub(super) context: Arc<Context>,
    pub(super) shape: Shape,
    pub(super) options: CudaOptions,
    pub(super) kernels: Kernels,
    pub(super) queue: Queue,
    pub(super) products: Products,
    pub(super) attention: Attention,
    pub(super) staging: Staging,
    pub(super) samples: Samples,
    pub(super) scratch: Scratch,
    pub(super) transfer: Transfer,
    /// f32 `[head_dim / 2]`
    pub(super) inv_freq: DeviceBuffer<f32>,
    pub(super) memory: Memory,
    pub(super) step: Step,
}

/// Values that live within one operation.
#[derive(Debug)]
pub(super) struct Scratch {
    /// 16-bit `[rows, hidden_size]`
    pub(super) normed: DeviceBuffer<u16>,
    /// f32 `[rows, q_size + 2 kv_size]`
    pub(super) qkv: DeviceBuffer<f32>,
    /// `[samples, chunks]`
    pub(super) best_value: DeviceBuffer<f32>,
    pub(super) best_id: DeviceBuffer<i32>,
}

impl Cuda {
    /// Opens `cuda:index` for a model of this shape.
    ///
    /// # Errors
    /// When there is no such device, the driver is too old, the kernels or a library that is asked for cannot be had, or
    /// the kernels do not support the shape.
    pub fn new(index: u32, shape: Shape, options: CudaOptions) -> anyhow::Result<Self> {
        supports(&shape)?;
        let context = Context::open(index)?;
        let kernels = Kernels::load(&context, options.dtype, shape.head_dim, options.form)?;
        let overlap = options.dependent_launch && context.properties().has_dependent_launch();
        let queue = Queue::new(Stream::new(&context)?, overlap);
        let stream = Arc::clone(&queue.stream);
        let mut cuda = Cuda {
            products: Products::new(&queue, &shape, options)?,
            attention: Attention::new(&queue, options.deterministic)?,
            staging: Staging::new(&stream, STAGING_WORDS)?,
            samples: Samples::new(&stream, 1)?,
            scratch: Scratch::new(&stream)?,
            transfer: Transfer::new(&context)?,
            inv_freq: DeviceBuffer::new(&stream, shape.inv_freq.len(), "rotary frequencies")?,
            memory: Memory::default(),
            step: Step::default(),
            context,
            shape,
            options,
            kernels,
            queue,
        };
        let inv_freq = cuda.shape.inv_freq.clone();
        cuda.transfer.upload(&stream, &cuda.inv_freq, 0, inv_freq.len(), |to| {
            to.copy_from_slice(&inv_freq);
            Ok(())
        })?;
        Ok(cuda)
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        self.context.properties()
    }

    pub(super) fn kernel_info(&self) -> KernelInfo {
        let name = |&(file, origin): &(&'static str, Origin)| (file, origin.name());
        KernelInfo {
            architecture: self.kernels.architecture.clone(),
            origins: self.kernels.origins.iter().map(name).collect(),
            form: self.options.form.name(),
            graphs: self.options.graphs,
            dependent_launch: self.queue.dependent_launch,
            capture_retry: self.context.refusal().map(|refusal| refusal.error.clone()),
            deterministic: self.options.deterministic,
            resources: self.kernels.resources(),
        }
    }

    /// The batch on the device; once for a whole step.
    pub(super) fn stage(&mut self, batch: &Batch) -> anyhow::Result<Staged> {
        if let Some(staged) = self.step.staged {
            return Ok(staged);
        }
        self.context.bind()?;
        let staged = self.staging.stage(&self.queue.stream, batch, self.step.bucket, self.samples.last())?;
        if self.step.is_open {
            self.step.staged = Some(staged);
        }
        Ok(staged)
    }

    /// Whether operations run (or will, when the host looks), rather than being rehearsed or captured.
    pub(super) fn queues(&self) -> bool {
        self.queue.mode == Mode::Queue
    }

    pub(super) fn upload_vector(&mut self, parts: &[HostTensor<'_>]) -> anyhow::Result<CudaWeight> {
        let values = stack::to_f32(parts)?;
        let buffer = DeviceBuffer::new(&self.queue.stream, values.len(), &parts[0].name)?;
        let stream = Arc::clone(&self.queue.stream);
        let piece = Transfer::piece::<f32>();
        for (index, values) in values.chunks(piece).enumerate() {
            self.transfer.upload(&stream, &buffer, index * piece, values.len(), |to| {
                to.copy_from_slice(values);
                Ok(())
            })?;
        }
        let columns = values.len();
        Ok(CudaWeight { values: Arc::new(Values::Full(buffer)), rows: 1, columns })
    }

    /// Parts stacked by rows, converted on the host while the piece before is copied.
    pub(super) fn upload_matrix(
        &mut self,
        usage: WeightUse,
        parts: &[HostTensor<'_>],
    ) -> anyhow::Result<CudaWeight> {
        let (rows, columns) = stack::stacked_shape(usage, parts)?;
        let stream = Arc::clone(&self.queue.stream);
        let buffer = DeviceBuffer::<u16>::new(&stream, rows * columns, &parts[0].name)?;
        let most = Transfer::piece::<u16>();
        ensure!((1..=most).contains(&columns), "tensor {} has rows of {columns} values", parts[0].name);
        let mut first = 0;
        for part in parts {
            let expected = part.dtype.bytes_for(&part.shape);
            ensure!(
                expected == Some(part.bytes.len()),
                "tensor {} has {} bytes, expected {expected:?} for its shape",
                part.name,
                part.bytes.len()
            );
            for row in (0..part.rows()).step_by(most / columns) {
                let elements = (most / columns).min(part.rows() - row) * columns;
                let dtype = self.options.dtype;
                self.transfer
                    .upload(&stream, &buffer, first, elements, |to| rows_to_bits(part, row, dtype, to))?;
                first += elements;
            }
        }
        Ok(CudaWeight { values: Arc::new(Values::Half(buffer)), rows, columns })
    }
}

impl Cuda {
    /// # Errors
    /// When `bytes` more do not fit on the device, in whole: with what is free, and a hint.
    pub fn expect_room(&self, bytes: u64, what: &str) -> anyhow::Result<()> {
        let (free, _) = self.context.memory()?;
        if bytes > free {
            return Err(out_of_memory(&self.context, bytes, what));
        }
        Ok(())
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Buffers are freed next, and nothing may still use them.
        let _ = self.queue.stream.synchronize();
    }
}

impl Scratch {
    fn new(stream: &Stream) -> anyhow::Result<Self> {
        let what = "activations";
        Ok(Scratch {
            normed: DeviceBuffer::new(stream, 0, what)?,
            qkv: DeviceBuffer::new(stream, 0, what)?,
            best_value: DeviceBuffer::new(stream, 0, what)?,
            best_id: DeviceBuffer::new(stream, 0, what)?,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.normed.bytes() + self.qkv.bytes() + self.best_value.bytes() + self.best_id.bytes()
    }
}

/// # Errors
/// Names the size that the kernels are not made for.
pub fn supports(shape: &Shape) -> anyhow::Result<()> {
    let head_dim = shape.head_dim;
    ensure!(
        HEAD_DIMS.contains(&head_dim),
        "head_dim is {head_dim}, and the CUDA kernels are made for {HEAD_DIMS:?}\nhint: use --device cpu"
    );
    let group = shape.num_heads / shape.num_kv_heads;
    ensure!(
        group <= MAX_GROUP,
        "{group} query heads share a key/value head, and the CUDA kernels take at most {MAX_GROUP}\nhint: use \
         --device cpu"
    );
    for (name, size) in [("hidden_size", shape.hidden_size), ("intermediate_size", shape.intermediate_size)] {
        ensure!(
            size % 8 == 0,
            "{name} is {size}, and the CUDA kernels need a multiple of 8\nhint: use --device cpu"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape {
            hidden_size: 64,
            intermediate_size: 96,
            num_layers: 1,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 64,
            vocab_size: 100,
            rms_norm_eps: 1e-5,
            inv_freq: vec![1.0; 32],
        }
    }

    #[test]
    fn a_shape_without_kernels_is_refused_by_name() {
        supports(&shape()).unwrap();
        for (change, message) in [
            (Shape { head_dim: 80, ..shape() }, "head_dim is 80"),
            (Shape { num_heads: 68, ..shape() }, "34 query heads"),
            (Shape { hidden_size: 36, ..shape() }, "hidden_size is 36"),
            (Shape { intermediate_size: 100, ..shape() }, "intermediate_size is 100"),
        ] {
            let error = supports(&change).unwrap_err().to_string();
            assert!(error.starts_with(message) && error.ends_with("hint: use --device cpu"), "{error}");
        }
    }
}
