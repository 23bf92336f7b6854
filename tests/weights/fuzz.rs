//! Arbitrary and mutated files: any answer but a panic, a long wait or a large allocation.

use std::path::Path;

use proptest::prelude::*;
use tempfile::tempdir;
use tokmeter::arch::tensors;
use tokmeter::weights::gguf::Gguf;
use tokmeter::weights::{first_non_finite, hf_config, open};

use crate::files::safetensors;
use crate::tiny::Tiny;

/// Far more than these files need, far less than a count taken on trust.
const MAX_RESIDENT_KIB: u64 = 1 << 20;

/// Opens the file and, when that works, reads everything in it.
fn exercise(path: &Path) {
    if let Ok(opened) = open(path) {
        for spec in tensors(opened.config()) {
            let tensor = opened.tensor(&spec.name).unwrap();
            let values = tensor.to_f32().unwrap();
            let found = values.iter().position(|value| !value.is_finite());
            assert_eq!(first_non_finite(&tensor), found, "{}", spec.name);
        }
    }
    if let Ok(gguf) = Gguf::open(path) {
        let _ = gguf.vocab();
    }
    assert!(resident_kib() < MAX_RESIDENT_KIB);
}

/// Largest resident size of this process so far.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Places in the first `reach` bytes, and what to do there.
fn mutations(reach: usize) -> impl Strategy<Value = Vec<(usize, u8, u8)>> {
    prop::collection::vec((0..reach, 0u8..5, any::<u8>()), 1..4)
}

fn mutate(bytes: &mut Vec<u8>, mutations: &[(usize, u8, u8)]) {
    for &(at, what, value) in mutations {
        let at = at % bytes.len().max(1);
        match what {
            0 => bytes[at] ^= 1 << (value % 8),
            1 => bytes[at] = value,
            2 => {
                let end = (at + 8).min(bytes.len());
                bytes[at..end].fill(value);
            }
            3 => drop(bytes.remove(at)),
            _ => bytes.insert(at, value),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_mutated_gguf_never_panics(changes in mutations(4000)) {
        let folder = tempdir().unwrap();
        let mut bytes = Tiny::llama().gguf().bytes();
        mutate(&mut bytes, &changes);
        std::fs::write(folder.path().join("m.gguf"), bytes).unwrap();
        exercise(&folder.path().join("m.gguf"));
    }

    #[test]
    fn a_mutated_safetensors_file_never_panics(changes in mutations(3000)) {
        let folder = tempdir().unwrap();
        let tiny = Tiny::new("qwen3", "Qwen3ForCausalLM");
        tiny.save_config(folder.path());
        let mut bytes = safetensors(&tiny.tensors());
        mutate(&mut bytes, &changes);
        std::fs::write(folder.path().join("m.safetensors"), bytes).unwrap();
        exercise(&folder.path().join("m.safetensors"));
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        counts in any::<(u8, u8)>(),
        header_bytes in 0u64..250,
    ) {
        let folder = tempdir().unwrap();
        Tiny::llama().save_config(folder.path());
        let (gguf, whole) = (folder.path().join("m.gguf"), folder.path().join("m.safetensors"));
        let head = [&b"GGUF"[..], &3u32.to_le_bytes(), &u64::from(counts.0).to_le_bytes(),
            &u64::from(counts.1).to_le_bytes()].concat();
        std::fs::write(&gguf, [&head, &bytes[..]].concat()).unwrap();
        std::fs::write(&whole, [&header_bytes.to_le_bytes(), &bytes[..]].concat()).unwrap();
        exercise(&gguf);
        exercise(&whole);
    }

    #[test]
    fn a_mutated_configuration_never_panics(changes in mutations(600)) {
        let mut bytes = Tiny::llama().config.to_string().into_bytes();
        mutate(&mut bytes, &changes);
        let _ = hf_config::parse(&String::from_utf8_lossy(&bytes));
    }
}
