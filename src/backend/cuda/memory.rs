//! Memory of the device and pinned memory of the host, and the copies between them. Buffers are typed and know their
//! length; what is in them, and when a copy may be waited for, is decided above.

use std::marker::PhantomData;
use std::sync::Arc;

use anyhow::ensure;
use cudarc::driver::sys::{self, CUresult};

use super::context::{Context, Event, Stream};
use super::error::{CudaError, OutOfMemory, check, check_call};
use crate::units::format_bytes;

/// Bytes that uploads and downloads go through at a time.
const TRANSFER_BYTES: usize = 16 << 20;

/// A type that device memory may hold: plain bits, no padding.
pub(super) trait Element: Copy + Send + Sync + 'static {}
impl Element for u8 {}
impl Element for u16 {}
impl Element for i32 {}
impl Element for u32 {}
impl Element for f32 {}

/// `length` elements on the device. In builds with debug assertions new ones hold 0xFF bytes: NaN, or −1.
#[derive(Debug)]
pub struct DeviceBuffer<T> {
    context: Arc<Context>,
    address: sys::CUdeviceptr,
    length: usize,
    element: PhantomData<T>,
}

impl<T: Element> DeviceBuffer<T> {
    /// `what` says in an error what the memory is for. An empty buffer has no memory.
    ///
    /// # Errors
    /// When it does not fit: what was asked for, and what is free.
    #[allow(unsafe_code)]
    pub(super) fn new(stream: &Stream, length: usize, what: &str) -> anyhow::Result<Self> {
        let context = Arc::clone(stream.context());
        let bytes = length.checked_mul(size_of::<T>());
        let Some(bytes) = bytes else {
            anyhow::bail!("{length} elements for {what} overflow the address space")
        };
        let mut address = 0;
        if bytes > 0 {
            context.bind()?;
            // SAFETY: a context is current; `address` outlives the call.
            match unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) } {
                CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    return Err(out_of_memory(&context, bytes as u64, what));
                }
                code => check_call(code, || {
                    format!("cuMemAlloc_v2 of {} for {what}", format_bytes(bytes as u64))
                })?,
            }
        }
        let buffer = DeviceBuffer { context, address, length, element: PhantomData };
        if cfg!(debug_assertions) {
            buffer.set_bytes(stream, 0xFF)?;
        }
        Ok(buffer)
    }

    /// Filled with zeros.
    pub(super) fn zeroed(stream: &Stream, length: usize, what: &str) -> anyhow::Result<Self> {
        let buffer = Self::new(stream, length, what)?;
        buffer.set_bytes(stream, 0)?;
        Ok(buffer)
    }

    #[allow(unsafe_code)]
    fn set_bytes(&self, stream: &Stream, value: u8) -> Result<(), CudaError> {
        if self.length == 0 {
            return Ok(());
        }
        // SAFETY: the whole of this buffer, and nothing else.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(self.address, value, self.bytes() as usize, stream.raw())
        })
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.length * size_of::<T>()) as u64
    }

    /// Queues a copy of the first `elements` of `from` to `first..` here. `from` must not change before the copy is
    /// done.
    ///
    /// # Errors
    /// When it would not fit, or the driver refuses.
    #[allow(unsafe_code)]
    pub(super) fn copy_from(
        &self,
        stream: &Stream,
        first: usize,
        from: &Pinned,
        elements: usize,
    ) -> anyhow::Result<()> {
        let bytes = elements * size_of::<T>();
        ensure!(
            first + elements <= self.length && bytes <= from.bytes,
            "a copy to the device exceeds its buffer"
        );
        let to = self.address + (first * size_of::<T>()) as u64;
        // SAFETY: both ranges were checked; pinned memory lives until its owner has waited for the copy.
        check_call(
            unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.pointer.cast(), bytes, stream.raw()) },
            || format!("cuMemcpyHtoDAsync_v2 of {bytes} B"),
        )?;
        Ok(())
    }

    /// Queues copies of the first `elements` to all that follows, again and again.
    ///
    /// # Errors
    /// When the driver refuses.
    #[allow(unsafe_code)]
    pub(super) fn repeat(&self, stream: &Stream, elements: usize) -> Result<(), CudaError> {
        let mut filled = elements;
        while filled > 0 && filled < self.length {
            let bytes = filled.min(self.length - filled) * size_of::<T>();
            let to = self.address + (filled * size_of::<T>()) as u64;
            // SAFETY: both ranges lie in this buffer and do not overlap: the second begins where the first ends.
            check("cuMemcpyDtoDAsync_v2", unsafe {
                sys::cuMemcpyDtoDAsync_v2(to, self.address, bytes, stream.raw())
            })?;
            filled *= 2;
        }
        Ok(())
    }

    /// Queues a copy of `first..first + elements` to the start of `to`, which must not be read before it is done.
    ///
    /// # Errors
    /// When it would not fit, or the driver refuses.
    #[allow(unsafe_code)]
    pub(super) fn copy_to(
        &self,
        stream: &Stream,
        first: usize,
        to: &Pinned,
        elements: usize,
    ) -> anyhow::Result<()> {
        let bytes = elements * size_of::<T>();
        ensure!(
            first + elements <= self.length && bytes <= to.bytes,
            "a copy from the device exceeds its buffer"
        );
        let from = self.address + (first * size_of::<T>()) as u64;
        // SAFETY: both ranges were checked; pinned memory lives until its owner has waited for the copy.
        check_call(
            unsafe { sys::cuMemcpyDtoHAsync_v2(to.pointer.cast(), from, bytes, stream.raw()) },
            || format!("cuMemcpyDtoHAsync_v2 of {bytes} B"),
        )?;
        Ok(())
    }
}

impl<T> Drop for DeviceBuffer<T> {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.address != 0 && self.context.bind().is_ok() {
            // SAFETY: allocated in `new` and freed once, after everything queued that may use it.
            let _ = unsafe {
                let _ = sys::cuCtxSynchronize();
                sys::cuMemFree_v2(self.address)
            };
        }
    }
}

/// Says what was asked for, what is free and who may have the rest.
pub(super) fn out_of_memory(context: &Context, bytes: u64, what: &str) -> anyhow::Error {
    let asked = format!("{what} needs {} on {}", format_bytes(bytes), context.properties().name);
    let text = match context.memory() {
        Ok((free, total)) => format!(
            "{asked}, and {} of {} are free\nhint: a smaller model, fewer or shorter sequences \
             (--batch, --depth, --isl), or --kv-memory up to {}; `nvidia-smi` lists other processes",
            format_bytes(free),
            format_bytes(total),
            format_bytes(free / 10 * 9),
        ),
        Err(error) => format!("{asked}; {error}"),
    };
    OutOfMemory(text).into()
}

/// Host memory that the device copies from and to on its own.
#[derive(Debug)]
pub(super) struct Pinned {
    context: Arc<Context>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: the memory has one owner and is not tied to a thread.
#[allow(unsafe_code)]
unsafe impl Send for Pinned {}

impl Pinned {
    #[allow(unsafe_code)]
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, CudaError> {
        context.bind()?;
        let (mut pointer, bytes) = (std::ptr::null_mut(), bytes.max(1));
        // SAFETY: a context is current; `pointer` outlives the call.
        check_call(unsafe { sys::cuMemHostAlloc(&raw mut pointer, bytes, 0) }, || {
            format!("cuMemHostAlloc of {}", format_bytes(bytes as u64))
        })?;
        let pointer: *mut u8 = pointer.cast();
        // SAFETY: `bytes` bytes were just allocated; after this they are initialised.
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(Pinned { context: Arc::clone(context), pointer, bytes })
    }

    pub(super) fn capacity<T: Element>(&self) -> usize {
        self.bytes / size_of::<T>()
    }

    #[allow(unsafe_code)]
    pub(super) fn as_slice<T: Element>(&self) -> &[T] {
        // SAFETY: page-aligned, initialised, any bits are a `T`, and borrowed from the only owner.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.capacity::<T>()) }
    }

    #[allow(unsafe_code)]
    pub(super) fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.capacity::<T>()) }
    }
}

impl Drop for Pinned {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated in `new` and freed once, after the copies that may use it.
            let _ = unsafe {
                let _ = sys::cuCtxSynchronize();
                sys::cuMemFreeHost(self.pointer.cast())
            };
        }
    }
}

/// Moves large arrays in pieces through two pinned halves, so that the host fills one while the other is copied.
#[derive(Debug)]
pub(super) struct Transfer {
    halves: [(Pinned, Event); 2],
    next: usize,
}

impl Transfer {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, CudaError> {
        let half = || Ok((Pinned::new(context, TRANSFER_BYTES)?, Event::new(context)?));
        Ok(Transfer { halves: [half()?, half()?], next: 0 })
    }

    /// Elements that one piece holds.
    pub(super) fn piece<T: Element>() -> usize {
        TRANSFER_BYTES / size_of::<T>()
    }

    /// Lets `fill` write `elements` values, at most a piece, and queues their copy to `first..` of `to`.
    pub(super) fn upload<T: Element>(
        &mut self,
        stream: &Stream,
        to: &DeviceBuffer<T>,
        first: usize,
        elements: usize,
        fill: impl FnOnce(&mut [T]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let (pinned, copied) = &mut self.halves[self.next];
        self.next ^= 1;
        copied.synchronize()?;
        fill(&mut pinned.as_mut_slice::<T>()[..elements])?;
        to.copy_from(stream, first, pinned, elements)?;
        copied.record(stream)?;
        Ok(())
    }

    /// Waits for everything queued and hands out the first `elements` in pieces.
    pub(super) fn download<T: Element>(
        &mut self,
        stream: &Stream,
        from: &DeviceBuffer<T>,
        elements: usize,
        mut take: impl FnMut(&[T]),
    ) -> anyhow::Result<()> {
        let (pinned, copied) = &self.halves[self.next];
        copied.synchronize()?;
        for first in (0..elements).step_by(Self::piece::<T>()) {
            let count = Self::piece::<T>().min(elements - first);
            from.copy_to(stream, first, pinned, count)?;
            stream.synchronize()?;
            take(&pinned.as_slice::<T>()[..count]);
        }
        Ok(())
    }
}
