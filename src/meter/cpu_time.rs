//! CPU time of the calling thread, from the system's own account. The standard library has no call for it.

#![allow(unsafe_code)]

use std::ffi::c_int;

/// `struct timespec` of 64-bit Linux.
#[repr(C)]
struct Timespec {
    seconds: i64,
    nanos: i64,
}

/// Linux' `CLOCK_THREAD_CPUTIME_ID`.
const THREAD_CPU_TIME: c_int = 3;

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
unsafe extern "C" {
    fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int;
}

/// User and system time of this thread since it was started, ns.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub(super) fn of_this_thread_ns() -> Result<u64, &'static str> {
    let mut time = Timespec { seconds: 0, nanos: 0 };
    // SAFETY: the C library has this function with this signature on 64-bit Linux; it writes one structure, which
    // lives here.
    let code = unsafe { clock_gettime(THREAD_CPU_TIME, &raw mut time) };
    let nanos = time.seconds.checked_mul(1_000_000_000).and_then(|nanos| nanos.checked_add(time.nanos));
    match (code, nanos.map(u64::try_from)) {
        (0, Some(Ok(nanos))) if nanos > 0 => Ok(nanos),
        _ => Err("not_counted"),
    }
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
pub(super) fn of_this_thread_ns() -> Result<u64, &'static str> {
    Err("not_counted")
}

#[cfg(all(test, target_os = "linux", target_pointer_width = "64"))]
mod tests {
    use super::*;
    use crate::clock::Clock;

    #[test]
    fn work_counts_and_sleep_does_not() {
        let clock = Clock::monotonic();
        let begin_ns = of_this_thread_ns().unwrap();
        clock.sleep_until_ns(clock.now_ns() + 100_000_000);
        let slept_ns = of_this_thread_ns().unwrap();
        assert!(slept_ns - begin_ns < 20_000_000, "{}", slept_ns - begin_ns);
        let mut sum = 0u64;
        while of_this_thread_ns().unwrap() < slept_ns + 5_000_000 {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(sum > 0 && clock.now_ns() >= 105_000_000);
    }
}
