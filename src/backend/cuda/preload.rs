//! Loads libraries by their absolute path before cudarc asks the loader for them by name: a later request for the same
//! name then finds the one already here, and no LD_LIBRARY_PATH is needed.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::context::Properties;
use super::library::{self, Found, SEARCH_VARIABLE};

const NVRTC: &str = "libnvrtc.so";
const CUBLASLT: &str = "libcublasLt.so";

/// Libraries loaded so far, so that each is loaded once.
static LOADED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Makes the kernel compiler ready to be called; the file that was chosen, if it was ours to choose.
///
/// # Errors
/// When none is found, or it cannot be loaded.
#[allow(unsafe_code)]
pub(super) fn nvrtc(driver_cuda_version: i32) -> anyhow::Result<Option<PathBuf>> {
    let found = library::search_for(NVRTC, Path::new("/"), &|name| std::env::var_os(name));
    let chosen = choose(&found, NVRTC, driver_cuda_version / 1000);
    if let Some(chosen) = chosen {
        // Some releases look for this one without knowing where they lie themselves.
        for builtins in beside(chosen, "libnvrtc-builtins.so") {
            load(&builtins)?;
        }
        load(chosen)?;
    }
    // SAFETY: loads the library that compiling would load.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        anyhow::bail!(
            "the kernel compiler libnvrtc.so was not found\nhint: pip install nvidia-cuda-nvrtc, or name its folder \
             in {SEARCH_VARIABLE}"
        );
    }
    Ok(chosen.map(Path::to_path_buf))
}

/// cuBLASLt is nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "cuBLASLt (libcublasLt.so) was not found in {SEARCH_VARIABLE}, CUDA_HOME, CUDA_PATH, /usr/local/cuda, Python \
     packages (also those of the python3 on PATH), CONDA_PREFIX, LD_LIBRARY_PATH and the system's folders\nhint: pip install nvidia-cublas, name its \
     folder in {SEARCH_VARIABLE}, or use --gemm own"
)]
pub(super) struct NoCublasLt;

/// Makes cuBLASLt ready to be called. The emulated device takes only one that was named for it: NVIDIA's would look for
/// a real device.
///
/// # Errors
/// [`NoCublasLt`], or when it cannot be loaded.
#[allow(unsafe_code)]
pub(super) fn cublaslt(device: &Properties) -> anyhow::Result<()> {
    let (root, variable) = (Path::new("/"), |name: &str| std::env::var_os(name));
    let found = if device.is_emulated() {
        let mut found = library::search(root, &variable);
        found.retain(|file| file.rule == SEARCH_VARIABLE);
        found
    } else {
        library::search_for(CUBLASLT, root, &variable)
    };
    let chosen = choose(&found, CUBLASLT, device.driver_cuda_version / 1000);
    if let Some(chosen) = chosen {
        load(chosen)?;
    }
    let may_look = chosen.is_some() || !device.is_emulated();
    // SAFETY: loads the library that a product would load.
    let is_present = may_look && unsafe { cudarc::cublaslt::sys::is_culib_present() };
    if is_present { Ok(()) } else { Err(NoCublasLt.into()) }
}

/// The preferred file of `library`: the first whose major version the driver knows, else the first.
fn choose<'a>(found: &'a [Found], library: &str, driver_major: i32) -> Option<&'a Path> {
    let files = || found.iter().filter(|file| file.library == library).map(|file| file.path.as_path());
    let is_known = |path: &&Path| major(path).is_none_or(|major| major <= driver_major);
    files().find(is_known).or_else(|| files().next())
}

/// `libnvrtc.so.13` and `libnvrtc.so.13.0.88` → 13.
fn major(path: &Path) -> Option<i32> {
    let name = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let (_, version) = name.file_name()?.to_str()?.split_once(".so.")?;
    version.split('.').next()?.parse().ok()
}

/// Files in the folder of `path` whose names begin with `prefix`.
fn beside(path: &Path, prefix: &str) -> Vec<PathBuf> {
    let Some(Ok(entries)) = path.parent().map(std::fs::read_dir) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
        })
        .collect();
    files.sort();
    files
}

#[allow(unsafe_code)]
fn load(path: &Path) -> anyhow::Result<()> {
    let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if loaded.iter().any(|other| other == path) {
        return Ok(());
    }
    // SAFETY: runs the initialisers of NVIDIA's library, which expect nothing of the process.
    let library = unsafe { libloading::Library::new(path) };
    // Kept for the life of the process: cudarc will hold addresses in it.
    std::mem::forget(
        library.map_err(|error| anyhow::anyhow!("{} cannot be loaded: {error}", path.display()))?,
    );
    loaded.push(path.to_owned());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str) -> Found {
        Found { library: "libnvrtc.so", path: path.into(), rule: "system" }
    }

    #[test]
    fn a_compiler_newer_than_the_driver_is_the_last_choice() {
        let files = [found("/a/libnvrtc.so.13"), found("/b/libnvrtc.so.12.9.86"), found("/c/libnvrtc.so")];
        let chosen = |driver_major| choose(&files, "libnvrtc.so", driver_major).unwrap().to_str().unwrap();
        assert_eq!(chosen(13), "/a/libnvrtc.so.13");
        assert_eq!(chosen(12), "/b/libnvrtc.so.12.9.86");
        assert_eq!(choose(&files[..1], "libnvrtc.so", 12), Some(Path::new("/a/libnvrtc.so.13")));
        assert_eq!(choose(&files, "libcublasLt.so", 13), None);
    }

    #[test]
    fn libraries_beside_one_are_found_by_their_prefix() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libother.so"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let files = beside(&dir.path().join("libnvrtc.so.13"), "libnvrtc-builtins.so");
        assert_eq!(files, [dir.path().join("libnvrtc-builtins.so.13.0")]);
    }

    #[test]
    fn a_file_that_is_no_library_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libnvrtc.so.13");
        std::fs::write(&path, "no library").unwrap();
        let error = load(&path).unwrap_err().to_string();
        assert!(error.contains("libnvrtc.so.13 cannot be loaded"), "{error}");
    }
}
