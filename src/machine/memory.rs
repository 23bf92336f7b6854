//! The host's memory, swap and huge pages.

use super::Roots;
use super::files::{Reason, field, number, read};
use crate::record::machine::Memory;

pub(super) fn collect(roots: &Roots) -> Memory {
    let info = read(roots.proc.join("meminfo"));
    let bytes = |key| info.clone().and_then(|info| kib(&info, key));
    let swap_used = bytes("SwapTotal").and_then(|total| Ok(total.saturating_sub(bytes("SwapFree")?)));
    Memory {
        total_bytes: bytes("MemTotal").into(),
        available_bytes: bytes("MemAvailable").into(),
        swap_total_bytes: bytes("SwapTotal").into(),
        swap_used_bytes: swap_used.into(),
        transparent_hugepages: chosen(roots).into(),
        hugepages: info.clone().and_then(|info| number(field(&info, "HugePages_Total")?)).into(),
        hugepage_bytes: bytes("Hugepagesize").into(),
    }
}

/// `12 kB` → 12288.
fn kib(info: &str, key: &str) -> Result<u64, Reason> {
    let digits = field(info, key)?.strip_suffix("kB").ok_or("malformed")?;
    number::<u64>(digits)?.checked_mul(1024).ok_or("malformed")
}

/// The word in brackets of `always [madvise] never`.
fn chosen(roots: &Roots) -> Result<String, Reason> {
    let text = read(roots.sys.join("kernel/mm/transparent_hugepage/enabled"))?;
    let word = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    Ok(word.ok_or("malformed")?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;
    use crate::record::Maybe;

    #[test]
    fn memory_is_in_bytes() {
        let info = "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:    600 kB\nSwapTotal: 50 kB\nSwapFree: 20 kB\n\
            HugePages_Total:       4\nHugepagesize:       2048 kB\n";
        let pages = "always [madvise] never\n";
        let dir = tree(&[("proc/meminfo", info), ("sys/kernel/mm/transparent_hugepage/enabled", pages)]);
        let expected = Memory {
            total_bytes: Maybe::Value(1_024_000),
            available_bytes: Maybe::Value(614_400),
            swap_total_bytes: Maybe::Value(51_200),
            swap_used_bytes: Maybe::Value(30_720),
            transparent_hugepages: Maybe::Value("madvise".to_owned()),
            hugepages: Maybe::Value(4),
            hugepage_bytes: Maybe::Value(2_097_152),
        };
        assert_eq!(collect(&Roots::under(dir.path())), expected);
    }

    #[test]
    fn garbage_is_malformed() {
        let info = "MemTotal: many kB\nMemAvailable: 18446744073709551615 kB\nSwapTotal: 5\n";
        let dir = tree(&[("proc/meminfo", info), ("sys/kernel/mm/transparent_hugepage/enabled", "always")]);
        let memory = collect(&Roots::under(dir.path()));
        assert_eq!(memory.total_bytes.reason(), Some("malformed"));
        assert_eq!(memory.available_bytes.reason(), Some("malformed"));
        assert_eq!(memory.swap_total_bytes.reason(), Some("malformed"));
        assert_eq!(memory.transparent_hugepages.reason(), Some("malformed"));
        assert_eq!(memory.hugepages.reason(), Some("not_found"));
    }
}
