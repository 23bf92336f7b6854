//! What `-V` and `--version` say: which program this is, from which commit, and for which devices it carries kernels.
//! A record holds the same and more (`src/machine/software.rs`).

use std::sync::LazyLock;

use crate::backend::cuda;

/// Digits of a commit that name it on one line.
const SHORT_DIGITS: usize = 12;

/// Version and commit.
pub(super) fn one_line() -> &'static str {
    static LINE: LazyLock<String> =
        LazyLock::new(|| format!("{} ({})", env!("CARGO_PKG_VERSION"), commit(SHORT_DIGITS)));
    &LINE
}

/// Version, and a line each for the rest of what tells two binaries apart.
pub(super) fn lines() -> &'static str {
    static LINES: LazyLock<String> = LazyLock::new(|| {
        format!(
            "{}\ncommit: {}\nfeatures: {}\ntarget: {}, {} build\nkernels: {}",
            env!("CARGO_PKG_VERSION"),
            commit(usize::MAX),
            or_none(&env!("TOKMETER_FEATURES").replace(',', ", ")),
            env!("TOKMETER_TARGET"),
            env!("TOKMETER_PROFILE"),
            or_none(&cuda::embedded_architectures().join(", "))
        )
    });
    &LINES
}

fn or_none(list: &str) -> &str {
    if list.is_empty() { "none" } else { list }
}

fn commit(digits: usize) -> String {
    described(env!("TOKMETER_GIT_REVISION"), env!("TOKMETER_GIT_DIRTY") == "true", digits)
}

/// `-dirty`: a tracked file that reaches the binary differed from the commit.
fn described(revision: &str, is_dirty: bool, digits: usize) -> String {
    match revision.strip_prefix("missing:") {
        Some(reason) => format!("unknown: {reason}"),
        None => {
            let shown: String = revision.chars().take(digits).collect();
            format!("{shown}{}", if is_dirty { "-dirty" } else { "" })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_says_when_it_is_not_all_and_why_it_is_unknown() {
        assert_eq!(described("0123456789abcdef", false, 12), "0123456789ab");
        assert_eq!(described("0123456789abcdef", true, 99), "0123456789abcdef-dirty");
        assert_eq!(described("missing:not_a_git_checkout", false, 12), "unknown: not_a_git_checkout");
    }
}
