//! The ceilings of a CUDA device. Time is the host's clock around many launches and one wait: a repetition lasts 20 ms
//! or more, so that the error is below 0.1 % while starting and waiting take less than 20 µs. Events with time stamps
//! would need a symbol that the oldest supported driver lacks. Decides which work is timed; how often, and what becomes
//! of the times, is decided in [`crate::backend::peaks`].

use std::sync::Arc;

use anyhow::ensure;

use super::context::Stream;
use super::device::Cuda;
use super::error::OutOfMemory;
use super::kernels::{Epilogue, PeakKernels};
use super::launch::{Argument, Grid, at, float, int};
use super::memory::{DeviceBuffer, Element, Pinned};
use super::module::Kernel;
use super::products::Product;
use crate::backend::peaks::{Kind, Load, Protocol, TIMES_CACHE, TOO_LITTLE, Work};
use crate::record::{Ceiling, Ceilings, Maybe};

/// Shortest repetition, ns.
const LEAST_NS: u64 = 20_000_000;
const THREADS: u32 = 256;
/// The buffer that is read and copied, as a multiple of the L2 cache: starting a kernel then takes little of the time
/// that it runs.
const TIMES_L2: u64 = 64;
/// Blocks on a multiprocessor that the bandwidth probes are tried with.
const BLOCKS_EACH: [u32; 4] = [4, 6, 8, 16];
/// The same for the load that is lent.
const LOAD_BLOCKS_EACH: u32 = 8;
/// Bytes that move between host and device in one copy, at most.
const COPY_BYTES: u64 = 64 << 20;
/// Sides of the square product are multiples of two of its tiles, up to a largest.
const SIDE_STEP: u64 = 256;
const LARGEST_SIDE: u64 = 16_384;
/// Chains of mma that a warp of `mma_peak` runs, and flops of one mma (m16n8k16).
const MMA_CHAINS: u64 = 8;
const MMA_FLOPS: u64 = 2 * 16 * 8 * 16;
/// Rounds of them in one launch.
const MMA_ROUNDS: u64 = 4096;
const MMA_BLOCKS_EACH: u32 = 4;
/// Kernels in the graph whose nodes are timed.
const GRAPH_NODES: u64 = 256;
/// Keys of the random data.
const SEED: u64 = 0x5EED;

impl Cuda {
    pub(super) fn measured_ceilings(&mut self, protocol: &Protocol) -> anyhow::Result<Ceilings> {
        let begin_ns = protocol.clock.now_ns();
        self.context.bind()?;
        let probe = Probe {
            protocol,
            kernels: PeakKernels::load(&self.context, self.options.dtype)?,
            multiprocessors: self.context.properties().multiprocessors,
            l2_bytes: self.context.l2_bytes()?,
        };
        let mut found = Ceilings::missing("probed_before");
        found.last_level_cache_bytes = Maybe::Value(probe.l2_bytes);
        let dtype = self.options.dtype.name().to_owned();
        if !protocol.arithmetic_only {
            found.launch_ns = probe.launches(self)?;
            found.graph_node_ns = probe.graph_nodes(self)?;
            (found.read_bandwidth_bytes_per_s, found.copy_bandwidth_bytes_per_s) =
                pair(fitting(probe.bandwidths(self))?);
            (found.host_to_device_bytes_per_s, found.device_to_host_bytes_per_s) =
                pair(fitting(probe.transfers(self))?);
        }
        found.mma_flops_per_s.insert(dtype.clone(), flat(fitting(probe.mma(self))?));
        found.matmul_flops_per_s.insert(dtype, flat(fitting(probe.square_product(self))?));
        found.duration_ns = protocol.clock.now_ns() - begin_ns;
        Ok(found)
    }

    /// Lends the kernel that reads memory as fast as it can, over a buffer of many times the L2 cache: a millisecond or
    /// less on a GPU, at nearly the power of its memory's full load.
    #[allow(unsafe_code)]
    pub(super) fn lend_reading(
        &mut self,
        user: &mut dyn FnMut(&mut Load<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool> {
        self.context.bind()?;
        let kernels = PeakKernels::load(&self.context, self.options.dtype)?;
        let blocks = LOAD_BLOCKS_EACH * self.context.properties().multiprocessors;
        let l2_bytes = self.context.l2_bytes()?;
        let free_bytes = self.context.memory()?.0;
        let bytes = (l2_bytes * TIMES_L2).min(free_bytes / 4) & !0xFFF;
        ensure!(
            bytes > 0 && bytes >= l2_bytes * TIMES_CACHE,
            "the device has {free_bytes} bytes of free memory, expected room for a load of 8 times its L2 cache"
        );
        let buffer = new_buffer::<u16>(&self.queue.stream, bytes / 2)?;
        let sink = new_buffer::<u32>(&self.queue.stream, u64::from(blocks))?;
        let random = [at(buffer.address()), at(SEED), float(0.0), float(1.0), at(0), at(bytes / 2)];
        // SAFETY: the arguments of synthetic.cu; the buffer holds so many values.
        unsafe { self.probe_with(&kernels.random, blocks, &random) }?;
        let arguments = [at(buffer.address()), at(bytes / 16), at(sink.address())];
        user(&mut || {
            // SAFETY: the arguments of `read_bandwidth` in peaks.cu, for a buffer of this size and a sink with a word for
            // each block; both live until `user` has returned.
            unsafe { self.probe_with(&kernels.read_bandwidth, blocks, &arguments) }?;
            Ok(self.queue.stream.synchronize()?)
        })?;
        Ok(true)
    }

    /// Queues `kernel`.
    ///
    /// # Safety
    /// As for [`super::queue::Queue::launch`].
    #[allow(unsafe_code)]
    unsafe fn probe_with(
        &mut self,
        kernel: &Kernel,
        blocks: u32,
        arguments: &[Argument],
    ) -> anyhow::Result<()> {
        let grid = Grid { blocks: [blocks, 1, 1], threads: THREADS, shared_bytes: 0 };
        // SAFETY: the caller's promise.
        unsafe { self.queue.launch(kernel, grid, arguments) }
    }
}

/// What does not fit into the device's memory is a reason, not an error.
fn fitting<T>(result: anyhow::Result<Maybe<T>>) -> anyhow::Result<Maybe<T>> {
    match result {
        Err(error) if error.is::<OutOfMemory>() => Ok(Maybe::missing(TOO_LITTLE)),
        other => other,
    }
}

type Pair = (Maybe<Ceiling>, Maybe<Ceiling>);

fn pair(both: Maybe<Pair>) -> Pair {
    match both {
        Maybe::Value(both) => both,
        Maybe::Missing(missing) => (Maybe::Missing(missing.clone()), Maybe::Missing(missing)),
    }
}

fn flat(ceiling: Maybe<Maybe<Ceiling>>) -> Maybe<Ceiling> {
    match ceiling {
        Maybe::Value(ceiling) => ceiling,
        Maybe::Missing(missing) => Maybe::Missing(missing),
    }
}

struct Probe<'a> {
    protocol: &'a Protocol,
    kernels: PeakKernels,
    multiprocessors: u32,
    l2_bytes: u64,
}

impl Probe<'_> {
    /// One launch after another, as fast as the host can and the device takes them.
    fn launches(&self, cuda: &mut Cuda) -> anyhow::Result<Maybe<Ceiling>> {
        let timed = self.protocol.time(LEAST_NS, |count| {
            (0..count).try_for_each(|_| self.empty(cuda))?;
            Ok(cuda.queue.stream.synchronize()?)
        })?;
        Ok(timed.ceiling(Kind::Latency, Work { by: "driver", per_unit: 1, working_set_bytes: 0 }))
    }

    fn graph_nodes(&self, cuda: &mut Cuda) -> anyhow::Result<Maybe<Ceiling>> {
        if !cuda.options.graphs {
            return Ok(Maybe::missing("graphs_switched_off"));
        }
        let stream = Arc::clone(&cuda.queue.stream);
        let graph = cuda.capture(|cuda| (0..GRAPH_NODES).try_for_each(|_| self.empty(cuda)))?;
        let timed = self.protocol.time(LEAST_NS, |count| {
            (0..count).try_for_each(|_| graph.launch(&stream))?;
            Ok(stream.synchronize()?)
        })?;
        Ok(timed.ceiling(Kind::Latency, Work { by: "driver", per_unit: GRAPH_NODES, working_set_bytes: 0 }))
    }

    #[allow(unsafe_code)]
    fn empty(&self, cuda: &mut Cuda) -> anyhow::Result<()> {
        // SAFETY: `empty` has no arguments.
        unsafe { cuda.probe_with(&self.kernels.empty, self.multiprocessors, &[]) }
    }

    /// Random 16-bit values of the backend's type, at `scale`, filled by the device.
    #[allow(unsafe_code)]
    fn random(
        &self,
        cuda: &mut Cuda,
        length: u64,
        scale: f32,
        key: u64,
    ) -> anyhow::Result<DeviceBuffer<u16>> {
        let buffer = new_buffer(&cuda.queue.stream, length)?;
        let arguments = [at(buffer.address()), at(key), float(0.0), float(scale), at(0), at(length)];
        // SAFETY: the arguments of synthetic.cu; the buffer holds `length` values.
        unsafe { cuda.probe_with(&self.kernels.random, 8 * self.multiprocessors, &arguments) }?;
        Ok(buffer)
    }

    /// Bytes for a probe of the memory: many times the L2 cache, at most a quarter of what is free.
    fn buffer_bytes(&self, cuda: &Cuda) -> anyhow::Result<Option<u64>> {
        let (free, _) = cuda.context.memory()?;
        let bytes = (self.l2_bytes * TIMES_L2).min(free / 4) & !0xFFF;
        Ok((bytes >= self.l2_bytes * TIMES_CACHE && bytes > 0).then_some(bytes))
    }

    fn bandwidths(&self, cuda: &mut Cuda) -> anyhow::Result<Maybe<Pair>> {
        let Some(bytes) = self.buffer_bytes(cuda)? else { return Ok(Maybe::missing(TOO_LITTLE)) };
        let buffer = self.random(cuda, bytes / 2, 1.0, SEED)?;
        let most_blocks = self.multiprocessors * BLOCKS_EACH[BLOCKS_EACH.len() - 1];
        let sink = new_buffer::<u32>(&cuda.queue.stream, u64::from(most_blocks))?;
        let (first, half) = (buffer.address(), bytes / 2);
        // read_bandwidth(from, vectors, sink) · copy_bandwidth(to, from, vectors)
        let read = [at(first), at(bytes / 16), at(sink.address())];
        let copy = [at(first + half), at(first), at(half / 16)];
        let work = Work { by: "own", per_unit: bytes, working_set_bytes: bytes };
        let read = self.best_grid(cuda, &self.kernels.read_bandwidth, &read, work)?;
        let copy = self.best_grid(cuda, &self.kernels.copy_bandwidth, &copy, work)?;
        Ok(Maybe::Value((read, copy)))
    }

    /// The ceiling with the number of blocks that is fastest in one launch of each.
    #[allow(unsafe_code)]
    fn best_grid(
        &self,
        cuda: &mut Cuda,
        kernel: &Kernel,
        arguments: &[Argument; 3],
        work: Work,
    ) -> anyhow::Result<Maybe<Ceiling>> {
        let mut run = |blocks: u32, count: u64| -> anyhow::Result<()> {
            for _ in 0..count {
                // SAFETY: the arguments of peaks.cu, made by `bandwidths` for buffers of this size and at most as many
                // blocks as the sink has words.
                unsafe { cuda.probe_with(kernel, blocks, arguments) }?;
            }
            Ok(cuda.queue.stream.synchronize()?)
        };
        let clock = &self.protocol.clock;
        let mut best = (u64::MAX, 0);
        for each in BLOCKS_EACH {
            let blocks = each * self.multiprocessors;
            run(blocks, 1)?;
            let begin_ns = clock.now_ns();
            run(blocks, 1)?;
            best = best.min((clock.now_ns() - begin_ns, blocks));
        }
        let timed = self.protocol.time(LEAST_NS, |count| run(best.1, count))?;
        Ok(timed.ceiling(Kind::Rate, work))
    }

    /// Between pinned host memory and the device, one direction at a time.
    fn transfers(&self, cuda: &mut Cuda) -> anyhow::Result<Maybe<Pair>> {
        let Some(bytes) = self.buffer_bytes(cuda)?.map(|bytes| bytes.min(COPY_BYTES)) else {
            return Ok(Maybe::missing(TOO_LITTLE));
        };
        let stream = Arc::clone(&cuda.queue.stream);
        let device = self.random(cuda, bytes / 2, 1.0, SEED)?;
        let mut pinned = Pinned::new(&cuda.context, bytes as usize)?;
        fill_randomly(pinned.as_mut_slice::<u32>());
        let elements = device.len();
        let both = |stream: &Stream, count: u64, copy: &dyn Fn() -> anyhow::Result<()>| {
            (0..count).try_for_each(|_| copy())?;
            Ok(stream.synchronize()?)
        };
        let up = self.protocol.time(LEAST_NS, |count| {
            both(&stream, count, &|| device.copy_from(&stream, 0, &pinned, elements))
        })?;
        let down = self.protocol.time(LEAST_NS, |count| {
            both(&stream, count, &|| device.copy_to(&stream, 0, &pinned, elements))
        })?;
        let work = Work { by: "driver", per_unit: device.bytes(), working_set_bytes: device.bytes() };
        Ok(Maybe::Value((up.ceiling(Kind::Rate, work), down.ceiling(Kind::Rate, work))))
    }

    /// Tensor-core instructions on registers alone.
    #[allow(unsafe_code)]
    fn mma(&self, cuda: &mut Cuda) -> anyhow::Result<Maybe<Maybe<Ceiling>>> {
        let blocks = MMA_BLOCKS_EACH * self.multiprocessors;
        let threads = u64::from(blocks) * u64::from(THREADS);
        // The emulated device computes one mma in microseconds; what it measures means nothing anyway.
        let rounds = if cuda.context.properties().is_emulated() { 2 } else { MMA_ROUNDS };
        let stream = Arc::clone(&cuda.queue.stream);
        let sums = new_buffer::<f32>(&stream, threads)?;
        let arguments = [at(sums.address()), at(SEED), int(rounds as usize)];
        let timed = self.protocol.time(LEAST_NS, |count| {
            for _ in 0..count {
                // SAFETY: the arguments of peaks.cu; `sums` has a value for each thread.
                unsafe { cuda.probe_with(&self.kernels.mma_peak, blocks, &arguments) }?;
            }
            Ok(stream.synchronize()?)
        })?;
        let per_unit = threads / 32 * MMA_CHAINS * rounds * MMA_FLOPS;
        Ok(Maybe::Value(timed.ceiling(Kind::Rate, Work { by: "own", per_unit, working_set_bytes: 0 })))
    }

    /// The product that prefill uses, at a size whose operands the L2 cache does not hold.
    fn square_product(&self, cuda: &mut Cuda) -> anyhow::Result<Maybe<Maybe<Ceiling>>> {
        let side = side_for(self.l2_bytes);
        let (free, _) = cuda.context.memory()?;
        let bytes = 8 * side * side;
        if bytes > free / 2 {
            return Ok(Maybe::missing(TOO_LITTLE));
        }
        // A product keeps the rms of its input.
        let scale = (3.0 / side as f64).sqrt() as f32;
        let (a, w) =
            (self.random(cuda, side * side, 1.0, SEED)?, self.random(cuda, side * side, scale, !SEED)?);
        let stream = Arc::clone(&cuda.queue.stream);
        let y = new_buffer::<f32>(&stream, side * side)?;
        let n = side as usize;
        let product = Product {
            epilogue: Epilogue::Store,
            y: y.address(),
            a: a.address(),
            w: w.address(),
            rows: n,
            columns: n,
            depth: n,
        };
        let timed = self.protocol.time(LEAST_NS, |count| {
            for _ in 0..count {
                cuda.products.queue(&mut cuda.queue, &cuda.kernels, product)?;
            }
            Ok(stream.synchronize()?)
        })?;
        let by = cuda.products.by(&product);
        let work = Work { by, per_unit: 2 * side.pow(3), working_set_bytes: bytes };
        Ok(Maybe::Value(timed.ceiling(Kind::Rate, work)))
    }
}

fn new_buffer<T: Element>(stream: &Stream, length: u64) -> anyhow::Result<DeviceBuffer<T>> {
    DeviceBuffer::new(stream, length as usize, "a probe of the device")
}

/// The smallest side at which both 16-bit operands together are eight times the cache.
fn side_for(l2_bytes: u64) -> u64 {
    let side = (TIMES_CACHE * l2_bytes / 4).isqrt().next_multiple_of(SIDE_STEP);
    side.clamp(SIDE_STEP, LARGEST_SIDE)
}

fn fill_randomly(words: &mut [u32]) {
    let mut state = SEED;
    for word in words {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *word = (state >> 32) as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_square_product_outgrows_the_cache() {
        // An H100 has 50 MiB, the emulated device 16 KiB, an RTX 5090 96 MiB.
        assert_eq!(side_for(50 << 20), 10_240);
        assert_eq!(side_for(16 << 10), 256);
        assert_eq!(side_for(96 << 20), 14_336);
        assert_eq!(side_for(1 << 30), LARGEST_SIDE);
        for l2_bytes in [3 << 20, 40 << 20, 72 << 20] {
            assert!(4 * side_for(l2_bytes).pow(2) >= TIMES_CACHE * l2_bytes);
        }
    }
}
