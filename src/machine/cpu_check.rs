//! Whether this processor has what the compiler was allowed to use: one sentence instead of an illegal instruction.
//! `main` asks first thing. The feature macros of the standard library cannot answer here: they are constants for
//! what the target enables, so the processor itself is asked.

/// A sentence naming what this processor lacks, if it lacks anything that this build needs.
pub fn unsupported_cpu() -> Option<String> {
    let missing = missing_features();
    if missing.is_empty() {
        return None;
    }
    Some(format!(
        "this build needs an x86-64-v3 processor (2013 or later), and this one has no {}\n\
         hint: build with RUSTFLAGS=\"-C target-cpu=x86-64\"",
        missing.join(", ")
    ))
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "avx2")))]
fn missing_features() -> Vec<&'static str> {
    Vec::new()
}

#[cfg(all(target_arch = "x86_64", target_feature = "avx2"))]
fn missing_features() -> Vec<&'static str> {
    x86::missing(&x86::Registers::read())
}

#[cfg(target_arch = "x86_64")]
#[cfg_attr(not(target_feature = "avx2"), allow(dead_code))]
mod x86 {
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    /// The words of CPUID that tell the features of x86-64-v3. Intel SDM volume 2A, CPUID.
    #[derive(Clone, Copy, Default)]
    pub(super) struct Registers {
        /// Leaf 1, ECX.
        pub(super) leaf_1_ecx: u32,
        /// Leaf 7, subleaf 0, EBX.
        pub(super) leaf_7_ebx: u32,
        /// Leaf 0x8000_0001, ECX.
        pub(super) extended_1_ecx: u32,
    }

    impl Registers {
        /// A leaf beyond the highest one would repeat another leaf's words, so it counts as zero.
        pub(super) fn read() -> Self {
            let (highest, highest_extended) = (__cpuid(0).eax, __cpuid(0x8000_0000).eax);
            Registers {
                leaf_1_ecx: if highest >= 1 { __cpuid(1).ecx } else { 0 },
                leaf_7_ebx: if highest >= 7 { __cpuid_count(7, 0).ebx } else { 0 },
                extended_1_ecx: if highest_extended > 0x8000_0000 { __cpuid(0x8000_0001).ecx } else { 0 },
            }
        }
    }

    pub(super) fn missing(registers: &Registers) -> Vec<&'static str> {
        let Registers { leaf_1_ecx, leaf_7_ebx, extended_1_ecx } = *registers;
        let features = [
            ("fma", leaf_1_ecx, 12),
            ("movbe", leaf_1_ecx, 22),
            ("osxsave", leaf_1_ecx, 27),
            ("avx", leaf_1_ecx, 28),
            ("f16c", leaf_1_ecx, 29),
            ("bmi1", leaf_7_ebx, 3),
            ("avx2", leaf_7_ebx, 5),
            ("bmi2", leaf_7_ebx, 8),
            ("lzcnt", extended_1_ecx, 5),
        ];
        features.into_iter().filter(|(_, word, bit)| word >> bit & 1 == 0).map(|(name, ..)| name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_that_runs_the_tests_is_supported() {
        assert_eq!(unsupported_cpu(), None);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn each_missing_feature_is_named() {
        use super::x86::{Registers, missing};
        // Sandy Bridge, i7-2600: AVX, but none of what came with Haswell.
        let sandy_bridge = Registers { leaf_1_ecx: 0x1fba_e3ff, leaf_7_ebx: 0, extended_1_ecx: 1 };
        assert_eq!(missing(&sandy_bridge), ["fma", "movbe", "f16c", "bmi1", "avx2", "bmi2", "lzcnt"]);
        // Haswell, i7-4770.
        let haswell = Registers { leaf_1_ecx: 0x7ffa_fbff, leaf_7_ebx: 0x0000_27ab, extended_1_ecx: 0x21 };
        assert!(missing(&haswell).is_empty(), "{:?}", missing(&haswell));
        assert_eq!(missing(&Registers::default()).len(), 9);
        assert_eq!(missing(&Registers { leaf_7_ebx: haswell.leaf_7_ebx & !(1 << 5), ..haswell }), ["avx2"]);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_processor_and_the_kernel_agree() {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let flags = info.lines().find(|line| line.starts_with("flags")).unwrap();
        let missing = super::x86::missing(&super::x86::Registers::read());
        for (name, kernel_name) in [
            ("fma", "fma"),
            ("movbe", "movbe"),
            ("avx2", "avx2"),
            ("f16c", "f16c"),
            ("bmi1", "bmi1"),
            ("lzcnt", "abm"),
        ] {
            let in_kernel = flags.split_whitespace().any(|flag| flag == kernel_name);
            assert_eq!(!missing.contains(&name), in_kernel, "{name}");
        }
    }
}
