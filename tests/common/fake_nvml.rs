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
