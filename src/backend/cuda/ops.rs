//! The fused operations, each a few launches in the backend's stream. A decode step is captured as a graph for its
//! bucket of sequences and replayed as long as it would launch the very same things.

use anyhow::{Context as _, ensure};

use super::attend::Operands;
use super::buffers::{CudaBuf, CudaKv, CudaWeight, Values};
use super::device::Cuda;
use super::kernels::Epilogue;
use super::launch::{Grid, at, float, int};
use super::memory::{DeviceBuffer, Element, Transfer};
use super::products::Product;
use super::queue::{Mode, bucket, last_of_each};
use super::staging::Staged;
use crate::backend::peaks::{Load, Protocol};
use crate::backend::{
    AttnIn, Backend, BackendInfo, Batch, BufferUse, FirstSteps, Head, Memory, MlpIn, Shape, StepKey,
    TokenInput, WeightUse,
};
use crate::record::Ceilings;
use crate::weights::HostTensor;
use crate::weights::synthetic::Recipe;

const THREADS: u32 = 256;
/// Logits that one block of the sampler looks at.
const SAMPLE_CHUNK: usize = 4096;

impl Cuda {
    /// `scratch.normed = norm(x)` for `rows` rows of `x`, or for those that `gather` lists on the device.
    #[allow(unsafe_code)]
    fn norm(&mut self, gain: &CudaWeight, x: u64, gather: u64, rows: usize) -> anyhow::Result<u64> {
        let hidden = self.shape.hidden_size;
        self.grow(|cuda| &mut cuda.scratch.normed, rows * hidden)?;
        let out = self.scratch.normed.address();
        let arguments = [
            at(out),
            at(x),
            at(gain.vector(hidden)?),
            at(gather),
            int(hidden),
            float(self.shape.rms_norm_eps),
        ];
        // SAFETY: the arguments of norm.cu; x was checked by the caller, and normed has room.
        unsafe { self.queue.launch(&self.kernels.rms_norm, flat(rows), &arguments) }?;
        Ok(out)
    }

    /// Makes room in scratch memory. Never needed during a capture: the rehearsal has made the same room.
    fn grow<T: Element>(
        &mut self,
        buffer: impl Fn(&mut Cuda) -> &mut DeviceBuffer<T>,
        elements: usize,
    ) -> anyhow::Result<()> {
        if buffer(self).len() < elements {
            let grown = DeviceBuffer::new(&self.queue.stream, elements, "activations")?;
            *buffer(self) = grown;
        }
        Ok(())
    }

    fn product(&mut self, product: Product) -> anyhow::Result<()> {
        self.products.queue(&mut self.queue, &self.kernels, product)
    }

    /// `x += y · weightᵀ`
    fn add_product(
        &mut self,
        batch: &Batch,
        weight: &CudaWeight,
        y: &CudaBuf,
        x: &CudaBuf,
        depth: usize,
    ) -> anyhow::Result<()> {
        let rows = self.stage(batch)?.counts.tokens;
        let columns = self.shape.hidden_size;
        self.product(Product {
            epilogue: Epilogue::Residual,
            y: x.full(rows, columns)?,
            a: y.half(rows, depth)?,
            w: weight.matrix(columns, depth)?,
            rows,
            columns,
            depth,
        })
    }

    /// One token for each row of logits.
    #[allow(unsafe_code)]
    fn sample(&mut self, staged: &Staged, logits: u64) -> anyhow::Result<()> {
        let (rows, vocab) = (staged.counts.samples, self.shape.vocab_size);
        let chunks = vocab.div_ceil(SAMPLE_CHUNK);
        ensure!(
            rows <= self.samples.capacity(),
            "{rows} rows to sample, expected at most the logits buffer's"
        );
        self.grow(|cuda| &mut cuda.scratch.best_value, rows * chunks)?;
        self.grow(|cuda| &mut cuda.scratch.best_id, rows * chunks)?;
        let (best_value, best_id) = (self.scratch.best_value.address(), self.scratch.best_id.address());
        let arguments = [
            at(logits),
            at(staged.at(|layout| layout.temperature)),
            at(staged.at(|layout| layout.seed_low)),
            at(staged.at(|layout| layout.seed_high)),
            at(staged.at(|layout| layout.sample_positions)),
            at(best_value),
            at(best_id),
            int(vocab),
        ];
        let grid = Grid { blocks: [chunks as u32, rows as u32, 1], threads: THREADS, shared_bytes: 0 };
        // SAFETY: the arguments of sample.cu's first stage; the logits were checked by the caller, the rest has room.
        unsafe { self.queue.launch(&self.kernels.sample_stage1, grid, &arguments) }?;
        let arguments = [at(self.samples.address()), at(best_value), at(best_id), int(chunks)];
        let grid = Grid { blocks: [rows as u32, 1, 1], threads: 32, shared_bytes: 0 };
        // SAFETY: the arguments of sample.cu's second stage; there is room for `rows` samples.
        unsafe { self.queue.launch(&self.kernels.sample_stage2, grid, &arguments) }
    }

    fn run_step(
        &mut self,
        key: StepKey,
        body: &mut (dyn FnMut(&mut Self) -> anyhow::Result<()> + Send),
    ) -> anyhow::Result<()> {
        self.step.is_open = true;
        if !(self.options.graphs && key.decode_only && key.sequences > 0) {
            return body(self);
        }
        let bucket = bucket(key.sequences);
        self.step.bucket = Some(bucket);
        self.queue.begin(Mode::Rehearse);
        body(self)?;
        if !self.queue.replay(bucket)? {
            let graph = self
                .capture(body)
                .with_context(|| format!("capturing a decode step of {bucket} sequences"))?;
            self.queue.keep(bucket, graph)?;
        }
        self.samples.push(&self.queue.stream, self.step.samples)
    }
}

impl Backend for Cuda {
    type Weight = CudaWeight;
    type Buf = CudaBuf;
    type Kv = CudaKv;

    const STEPS_IN_FLIGHT: usize = 1;
    const CHECKS_VALUES: bool = true;

    fn info(&self) -> BackendInfo {
        let dtype = self.options.dtype.name();
        BackendInfo {
            name: "cuda",
            compute_dtype: dtype,
            kv_dtype: dtype,
            threads: 1,
            kernels: Some(self.kernel_info()),
            cublaslt: self.products.record(),
        }
    }

    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn upload(&mut self, usage: WeightUse, parts: &[HostTensor<'_>]) -> anyhow::Result<CudaWeight> {
        self.context.bind()?;
        let weight = match usage {
            WeightUse::Vector => {
                crate::backend::stack::stacked_shape(usage, parts)?;
                self.upload_vector(parts)?
            }
            _ => self.upload_matrix(usage, parts)?,
        };
        self.memory.weights_bytes += weight.values.bytes();
        Ok(weight)
    }

    fn generate(&mut self, usage: WeightUse, parts: &[Recipe]) -> anyhow::Result<Option<CudaWeight>> {
        self.context.bind()?;
        let weight = self.generate_weight(usage, parts)?;
        self.memory.weights_bytes += weight.values.bytes();
        Ok(Some(weight))
    }

    fn free_bytes(&self) -> anyhow::Result<Option<u64>> {
        Ok(Some(self.context.memory()?.0))
    }

    fn buffer(&mut self, usage: BufferUse, rows: usize, columns: usize) -> anyhow::Result<CudaBuf> {
        // A padded decode step writes as many rows as its bucket has sequences.
        let rows = bucket(rows);
        if usage == BufferUse::Residual {
            // As many rows will be normed: what this takes is known before the cache takes the rest.
            self.grow(|cuda| &mut cuda.scratch.normed, rows * self.shape.hidden_size)?;
            let qkv = self.shape.q_size() + 2 * self.shape.kv_size();
            self.grow(|cuda| &mut cuda.scratch.qkv, rows * qkv)?;
        }
        let (stream, what) = (&self.queue.stream, "activations");
        let values = match usage {
            BufferUse::Activation => Values::Half(DeviceBuffer::new(stream, rows * columns, what)?),
            BufferUse::Residual => Values::Full(DeviceBuffer::new(stream, rows * columns, what)?),
            BufferUse::Logits => {
                self.samples.reserve(stream, rows)?;
                Values::Full(DeviceBuffer::new(stream, rows * columns, "logits")?)
            }
        };
        self.memory.activations_bytes += values.bytes();
        Ok(CudaBuf(values))
    }

    fn kv_cache(&mut self, pages: usize) -> anyhow::Result<CudaKv> {
        let kv = CudaKv::new(&self.queue.stream, &self.shape, pages)?;
        self.memory.kv_bytes += kv.values.bytes();
        Ok(kv)
    }

    fn page_bytes(&self) -> u64 {
        self.shape.page_bytes(size_of::<u16>())
    }

    fn memory(&self) -> Memory {
        let own =
            self.scratch.bytes() + self.products.bytes() + self.attention.bytes() + self.staging.bytes();
        Memory { activations_bytes: self.memory.activations_bytes + own, ..self.memory }
    }

    #[allow(unsafe_code)]
    fn embed(&mut self, batch: &Batch, table: &CudaWeight, x: &mut CudaBuf) -> anyhow::Result<()> {
        let hidden = self.shape.hidden_size;
        for token in &batch.tokens {
            if let TokenInput::Id(id) = *token {
                let rows = table.rows;
                ensure!((id as usize) < rows, "token id {id} is outside the embedding table of {rows} rows");
            }
        }
        let staged = self.stage(batch)?;
        let rows = staged.counts.tokens;
        if rows == 0 {
            return Ok(());
        }
        let arguments = [
            at(x.full(rows, hidden)?),
            at(table.matrix(table.rows, hidden)?),
            at(staged.at(|layout| layout.tokens)),
            at(self.samples.address()),
            int(hidden),
        ];
        // SAFETY: the arguments of embed.cu; ids were checked here, samples when the batch was staged.
        unsafe { self.queue.launch(&self.kernels.embed, flat(rows), &arguments) }
    }

    #[allow(unsafe_code)]
    fn attn_in(
        &mut self,
        batch: &Batch,
        layer: usize,
        weights: &AttnIn<CudaWeight>,
        x: &CudaBuf,
        kv: &mut CudaKv,
        q: &mut CudaBuf,
    ) -> anyhow::Result<()> {
        let staged = self.stage(batch)?;
        let rows = staged.counts.tokens;
        if rows == 0 {
            return Ok(());
        }
        let Shape { hidden_size, num_heads, num_kv_heads, head_dim, rms_norm_eps, .. } = self.shape;
        let (q_size, width) = (self.shape.q_size(), self.shape.q_size() + 2 * self.shape.kv_size());
        let a = self.norm(&weights.norm, x.full(rows, hidden_size)?, 0, rows)?;
        self.grow(|cuda| &mut cuda.scratch.qkv, rows * width)?;
        let y = self.scratch.qkv.address();
        let w = weights.qkv.matrix(width, hidden_size)?;
        let epilogue = Epilogue::Store;
        self.product(Product { epilogue, y, a, w, rows, columns: width, depth: hidden_size })?;
        let (keys, values) = kv.layer(layer, staged.pages_needed)?;
        let (q_norm, k_norm) = match &weights.qk_norm {
            Some((q_norm, k_norm)) => (q_norm.vector(head_dim)?, k_norm.vector(head_dim)?),
            None => (0, 0),
        };
        let bias = weights.bias.as_ref().map_or(Ok(0), |bias| bias.vector(width))?;
        let arguments = [
            at(q.half(rows, q_size)?),
            at(keys),
            at(values),
            at(y),
            at(bias),
            at(q_norm),
            at(k_norm),
            at(self.inv_freq.address()),
            at(staged.at(|layout| layout.positions)),
            at(staged.at(|layout| layout.slots)),
            int(num_heads),
            int(num_kv_heads),
            int(head_dim),
            float(rms_norm_eps),
        ];
        let heads = (num_heads + 2 * num_kv_heads) as u32;
        let threads = (head_dim as u32 / 2).next_multiple_of(32).clamp(32, 128);
        let grid = Grid { blocks: [rows as u32, heads, 1], threads, shared_bytes: 0 };
        // SAFETY: the arguments of rope.cu; every address was checked for its size above.
        unsafe { self.queue.launch(&self.kernels.rope_kv, grid, &arguments) }
    }

    fn attention(
        &mut self,
        batch: &Batch,
        layer: usize,
        q: &CudaBuf,
        kv: &CudaKv,
        out: &mut CudaBuf,
    ) -> anyhow::Result<()> {
        let staged = self.stage(batch)?;
        let (rows, q_size) = (staged.counts.tokens, self.shape.q_size());
        if rows == 0 {
            return Ok(());
        }
        let (keys, values) = kv.layer(layer, staged.pages_needed)?;
        let operands = Operands { out: out.half(rows, q_size)?, q: q.half(rows, q_size)?, keys, values };
        self.attention.queue(&mut self.queue, &self.kernels, &self.shape, &staged, operands)
    }

    fn attn_out(
        &mut self,
        batch: &Batch,
        o_proj: &CudaWeight,
        attended: &CudaBuf,
        x: &mut CudaBuf,
    ) -> anyhow::Result<()> {
        self.add_product(batch, o_proj, attended, x, self.shape.q_size())
    }

    fn mlp_in(
        &mut self,
        batch: &Batch,
        weights: &MlpIn<CudaWeight>,
        x: &CudaBuf,
        out: &mut CudaBuf,
    ) -> anyhow::Result<()> {
        let rows = self.stage(batch)?.counts.tokens;
        let (depth, columns) = (self.shape.hidden_size, self.shape.intermediate_size);
        let (x, y) = (x.full(rows, depth)?, out.half(rows, columns)?);
        if rows == 0 {
            return Ok(());
        }
        let a = self.norm(&weights.norm, x, 0, rows)?;
        let w = weights.gate_up.matrix(2 * columns, depth)?;
        self.product(Product { epilogue: Epilogue::Silu, y, a, w, rows, columns, depth })
    }

    fn mlp_out(
        &mut self,
        batch: &Batch,
        down_proj: &CudaWeight,
        activated: &CudaBuf,
        x: &mut CudaBuf,
    ) -> anyhow::Result<()> {
        self.add_product(batch, down_proj, activated, x, self.shape.intermediate_size)
    }

    fn logits(
        &mut self,
        batch: &Batch,
        head: &Head<CudaWeight>,
        x: &CudaBuf,
        logits: &mut CudaBuf,
    ) -> anyhow::Result<()> {
        let staged = self.stage(batch)?;
        let (rows, depth, columns) = (staged.counts.samples, self.shape.hidden_size, self.shape.vocab_size);
        if rows > 0 {
            let x = x.full(staged.counts.tokens, depth)?;
            let a = self.norm(&head.norm, x, staged.at(|layout| layout.sample_rows), rows)?;
            let (y, w) = (logits.full(rows, columns)?, head.lm_head.matrix(columns, depth)?);
            self.product(Product { epilogue: Epilogue::Store, y, a, w, rows, columns, depth })?;
            self.sample(&staged, y)?;
        }
        self.step.samples = batch.sample_rows.len();
        if self.queues() {
            self.samples.push(&self.queue.stream, batch.sample_rows.len())?;
        }
        Ok(())
    }

    fn step(
        &mut self,
        key: StepKey,
        body: &mut (dyn FnMut(&mut Self) -> anyhow::Result<()> + Send),
    ) -> anyhow::Result<()> {
        let result = self.run_step(key, body);
        self.queue.begin(Mode::Queue);
        self.step = Default::default();
        result
    }

    fn first_steps(&self, most_tokens: usize, most_sequences: usize) -> FirstSteps {
        let graphs = if self.options.graphs { most_sequences } else { 0 };
        FirstSteps {
            prefill_tokens: self.products.tuned_numbers(most_tokens),
            decode_sequences: last_of_each(1..=graphs, bucket),
        }
    }

    fn sampled(&mut self, out: &mut Vec<u32>) -> anyhow::Result<()> {
        self.samples.take(out)
    }

    fn download(&mut self, buf: &CudaBuf, rows: usize, columns: usize) -> anyhow::Result<Vec<f32>> {
        self.context.bind()?;
        let elements = rows * columns;
        let mut out = Vec::with_capacity(elements);
        let stream = &self.queue.stream;
        match &buf.0 {
            Values::Full(values) => {
                self.transfer.download(stream, values, elements, |piece| out.extend_from_slice(piece))?;
            }
            Values::Half(values) => {
                let dtype = self.options.dtype;
                let widen = |piece: &[u16]| out.extend(piece.iter().map(|&bits| dtype.value(bits)));
                self.transfer.download(stream, values, elements, widen)?;
            }
        }
        Ok(out)
    }

    fn fill(&mut self, buf: &mut CudaBuf, values: &[f32]) -> anyhow::Result<()> {
        self.context.bind()?;
        let stream = &self.queue.stream;
        match &buf.0 {
            Values::Full(to) => fill(&mut self.transfer, stream, to, values, |value| value),
            Values::Half(to) => {
                let dtype = self.options.dtype;
                fill(&mut self.transfer, stream, to, values, |value| dtype.bits(value))
            }
        }
    }

    fn ceilings(&mut self, protocol: &Protocol) -> anyhow::Result<Ceilings> {
        self.measured_ceilings(protocol)
    }

    fn lend_load(
        &mut self,
        user: &mut dyn FnMut(&mut Load<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool> {
        self.lend_reading(user)
    }
}

fn fill<T: Element>(
    transfer: &mut Transfer,
    stream: &super::context::Stream,
    to: &DeviceBuffer<T>,
    values: &[f32],
    convert: impl Fn(f32) -> T,
) -> anyhow::Result<()> {
    for (index, values) in values.chunks(Transfer::piece::<T>()).enumerate() {
        transfer.upload(stream, to, index * Transfer::piece::<T>(), values.len(), |to| {
            to.iter_mut().zip(values).for_each(|(to, &value)| *to = convert(value));
            Ok(())
        })?;
    }
    Ok(())
}

/// One block for each row.
fn flat(rows: usize) -> Grid {
    Grid { blocks: [rows as u32, 1, 1], threads: THREADS, shared_bytes: 0 }
}
