//! This program as it was built, and the environment variables that change how it runs. What the build script found
//! out arrives as environment variables of the compiler.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;

use sha2::{Digest, Sha256};

use super::Roots;
use super::files::{Reason, reason};
use crate::record::Maybe;
use crate::record::machine::Software;

/// What the build script writes before the reason when it has no value.
const MISSING_PREFIX: &str = "missing:";

/// Variables that change speed or choose devices. Never the whole environment: it holds secrets.
const VARIABLES: [&str; 40] = [
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_CACHE_DISABLE",
    "CUDA_CACHE_MAXSIZE",
    "CUDA_CACHE_PATH",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_DEVICE_ORDER",
    "CUDA_DISABLE_PTX_JIT",
    "CUDA_FORCE_JIT",
    "CUDA_FORCE_PTX_JIT",
    "CUDA_HOME",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_DATA_LOADING",
    "CUDA_MODULE_LOADING",
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
    "CUDA_MPS_LOG_DIRECTORY",
    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
    "CUDA_MPS_PIPE_DIRECTORY",
    "CUDA_PATH",
    "CUDA_SCALE_LAUNCH_QUEUES",
    "CUDA_VISIBLE_DEVICES",
    "GLIBC_TUNABLES",
    "GOMP_CPU_AFFINITY",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
    "NVIDIA_DISABLE_REQUIRE",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_TF32_OVERRIDE",
    "NVIDIA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "RAYON_NUM_THREADS",
    "RAYON_RS_NUM_CPUS",
    "TOKMETER_CUDA_GRAPHS",
    "TOKMETER_CUDA_LIBS",
    "TOKMETER_CUDA_PDL",
];

pub(super) fn collect(roots: &Roots) -> Software {
    Software {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        git_revision: built(env!("TOKMETER_GIT_REVISION")),
        git_dirty: built(env!("TOKMETER_GIT_DIRTY")).map(|dirty| dirty == "true"),
        rustc: built(env!("TOKMETER_RUSTC")),
        target: env!("TOKMETER_TARGET").to_owned(),
        profile: env!("TOKMETER_PROFILE").to_owned(),
        features: words(env!("TOKMETER_FEATURES")),
        target_features: words(env!("TOKMETER_TARGET_FEATURES")),
        libraries: built(env!("TOKMETER_LIBRARIES")).map(|text| libraries(&text)),
        binary_sha256: binary_sha256(roots).into(),
    }
}

/// The variables of the list that are set, found through `lookup`.
pub(super) fn environment(lookup: impl Fn(&str) -> Option<OsString>) -> BTreeMap<String, String> {
    VARIABLES
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), lookup(name)?.to_string_lossy().into_owned())))
        .collect()
}

fn built(value: &str) -> Maybe<String> {
    match value.strip_prefix(MISSING_PREFIX) {
        Some(reason) => Maybe::missing(reason),
        None => Maybe::Value(value.to_owned()),
    }
}

fn words(list: &str) -> Vec<String> {
    list.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// `candle-core=0.11.1,cudarc=0.19.10`
fn libraries(list: &str) -> BTreeMap<String, String> {
    let pairs = list.split(',').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, version)| (name.to_owned(), version.to_owned())).collect()
}

fn binary_sha256(roots: &Roots) -> Result<String, Reason> {
    let mut file = File::open(roots.proc.join("self/exe")).map_err(|error| reason(error.kind()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(|error| reason(error.kind()))? {
            0 => break,
            length => hash.update(&buffer[..length]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;

    #[test]
    fn the_build_is_described() {
        let software = collect(&Roots::default());
        assert_eq!(software.version, env!("CARGO_PKG_VERSION"));
        assert!(software.rustc.value().unwrap().starts_with("rustc 1."), "{software:?}");
        assert!(software.target.contains(std::env::consts::ARCH), "{software:?}");
        assert!(["debug", "release"].contains(&software.profile.as_str()), "{software:?}");
        let revision = software.git_revision.value().map_or(40, String::len);
        assert_eq!(
            (revision, software.git_dirty.value().is_some()),
            (40, software.git_revision.value().is_some())
        );
        assert!(software.libraries.value().unwrap().contains_key("candle-core"), "{software:?}");
        assert_eq!(cfg!(target_feature = "avx2"), software.target_features.contains(&"avx2".to_owned()));
    }

    #[test]
    fn what_the_build_script_could_not_find_says_why() {
        assert_eq!(built("missing:not_a_git_checkout").reason(), Some("not_a_git_checkout"));
        assert_eq!(built("abc"), Maybe::Value("abc".to_owned()));
    }

    #[test]
    fn the_hash_is_that_of_the_executable() {
        let dir = tree(&[("proc/self/exe", "abc")]);
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(binary_sha256(&Roots::under(dir.path())).unwrap(), abc);
        assert_eq!(binary_sha256(&Roots::under("/nonexistent")), Err("not_found"));
    }

    #[test]
    fn only_listed_variables_are_recorded() {
        let environment = environment(|name| match name {
            "RAYON_NUM_THREADS" => Some("4".into()),
            "API_TOKEN" => panic!("{name} was asked for"),
            _ => None,
        });
        assert_eq!(environment, BTreeMap::from([("RAYON_NUM_THREADS".to_owned(), "4".to_owned())]));
        assert!(VARIABLES.is_sorted());
    }
}
