//! Builds the stand-in for NVML (`tests/fake_nvml`).

#![allow(dead_code, unreachable_pub)] // each test crate uses its own part
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The stand-in's library, built once for each test program; without the functions that NVIDIA has withdrawn, or with
/// them.
pub fn library(withdrawn: bool) -> &'static Path {
    static BUILT: [OnceLock<PathBuf>; 2] = [OnceLock::new(), OnceLock::new()];
    BUILT[usize::from(withdrawn)].get_or_init(|| {
        let name = format!("fake_nvml_{withdrawn}_{}.so", env!("CARGO_CRATE_NAME"));
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_nvml/lib.rs");
        let mut rustc = Command::new(std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned()));
        rustc.args(["--edition", "2024", "--crate-type", "cdylib", "-O", "--check-cfg", "cfg(withdrawn)"]);
        if withdrawn {
            rustc.args(["--cfg", "withdrawn"]);
        }
        let built = rustc.arg("-o").arg(&place).arg(source).output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        place
    })
}

/// A file of its own with a stand-in that is set up so and stays loaded: another file has another state.
#[allow(unsafe_code)] // the stand-in is a C library
pub fn configured(settings: &str, withdrawn: bool) -> PathBuf {
    static COPIES: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let copy = COPIES.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = library(withdrawn).with_extension(format!("set-{}-{copy}.so", std::process::id()));
    std::fs::copy(library(withdrawn), &path).unwrap();
    let text = std::ffi::CString::new(settings).unwrap();
    // SAFETY: the stand-in's initialisers do nothing; the function has this signature and copies the text.
    unsafe {
        let loaded = libloading::Library::new(&path).unwrap();
        let configure: libloading::Symbol<'_, unsafe extern "C" fn(*const std::ffi::c_char)> =
            loaded.get(b"fake_configure").unwrap();
        configure(text.as_ptr());
        std::mem::forget(loaded);
    }
    path
}
