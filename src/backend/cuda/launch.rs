//! Launches: one kernel with its arguments in one stream, without an allocation. A launch may overlap the end of its
//! predecessor (programmatic dependent launch); every kernel waits by itself before it reads. Which launches do is
//! decided by the queue.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::context::Stream;
use super::error::{CudaError, check_call};
use super::module::Kernel;

/// Arguments of the kernel with the most.
const MAX_ARGUMENTS: usize = 20;

/// Blocks and threads of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    /// x, y, z
    pub(super) blocks: [u32; 3],
    pub(super) threads: u32,
    /// Dynamic shared memory of a block, bytes.
    pub(super) shared_bytes: u32,
}

impl std::fmt::Display for Grid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [x, y, z] = self.blocks;
        write!(f, "grid {x} x {y} x {z}, block {}, {} B shared", self.threads, self.shared_bytes)
    }
}

/// One kernel argument: a pointer, an integer or a float, in the low bytes of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Argument(pub(super) u64);

/// An argument that is passed by its value.
pub(super) fn int(value: usize) -> Argument {
    // All sizes were checked to fit 32 bits with sign when the shapes were.
    Argument(u64::from(value as u32))
}

pub(super) fn float(value: f32) -> Argument {
    Argument(u64::from(value.to_bits()))
}

/// A 64-bit integer.
pub(super) fn long(value: u64) -> Argument {
    Argument(value)
}

/// A device address, or 0 for what is absent.
pub(super) fn at(address: u64) -> Argument {
    Argument(address)
}

/// Queues `kernel`, which with `overlap` may start while what was queued before it ends.
///
/// # Errors
/// Names the kernel and the shape.
///
/// # Safety
/// `arguments` must be the kernel's, in its order and of its types, and point to live device memory that is as large
/// as the kernel expects for them.
#[allow(unsafe_code)]
pub(super) unsafe fn launch(
    stream: &Stream,
    kernel: &Kernel,
    grid: Grid,
    arguments: &[Argument],
    overlap: bool,
) -> Result<(), CudaError> {
    assert!(arguments.len() <= MAX_ARGUMENTS, "{} takes more arguments than a launch passes", kernel.name());
    // Kernel parameters are copied from these addresses during the call; little-endian, so that the low bytes of a word
    // are the 32-bit value.
    let mut pointers = [std::ptr::null_mut::<c_void>(); MAX_ARGUMENTS];
    for (pointer, argument) in pointers.iter_mut().zip(arguments) {
        *pointer = (&raw const argument.0).cast_mut().cast();
    }
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let [x, y, z] = grid.blocks;
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: grid.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: grid.shared_bytes,
        hStream: stream.raw(),
        attrs: &raw mut attribute,
        numAttrs: u32::from(overlap),
    };
    // SAFETY: the caller vouches for the arguments; `config`, `attribute` and `pointers` outlive the call.
    let result = unsafe {
        sys::cuLaunchKernelEx(
            &raw const config,
            kernel.function(),
            pointers.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    };
    check_call(result, || format!("launching {} ({grid})", kernel.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_shape_is_readable() {
        let grid = Grid { blocks: [132, 8, 1], threads: 256, shared_bytes: 49_152 };
        assert_eq!(grid.to_string(), "grid 132 x 8 x 1, block 256, 49152 B shared");
    }

    #[test]
    fn numbers_lie_in_the_low_bytes_of_their_word() {
        assert_eq!(int(7).0.to_le_bytes()[..4], 7i32.to_le_bytes());
        assert_eq!(float(1.5).0.to_le_bytes()[..4], 1.5f32.to_le_bytes());
        assert_eq!(at(u64::MAX).0, u64::MAX);
    }
}
