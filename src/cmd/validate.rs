//! `tokmeter validate`: is a file a record of this format, and does it contradict itself?

use std::path::PathBuf;

use crate::cmd::{BAD_FILE, print, remark};
use crate::record;

/// Check records: format, identities, canonical SHA-256
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Prints the SHA-256 of the canonical JSON (RFC 8785) and the name of each valid file.\n\n\
    Examples:\n  tokmeter validate tokmeter-cpu-20261122T101112Z.json\n  tokmeter validate results/*/*.json\n\n\
    Exit codes: 0 all valid, 3 a file is unreadable, of another format, or contradicts itself"
)]
pub struct Args {
    /// Record files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// # Errors
/// Only when stdout fails; a bad file is reported and changes the exit code.
pub fn run(args: Args) -> anyhow::Result<u8> {
    let mut code = 0;
    for path in &args.files {
        match validate(path) {
            Ok(sha256) => print(&format!("{sha256}  {}\n", path.display()))?,
            Err(reasons) => {
                code = BAD_FILE;
                reasons.iter().for_each(|reason| remark(&format!("error: {reason}")));
            }
        }
    }
    Ok(code)
}

fn validate(path: &std::path::Path) -> Result<String, Vec<String>> {
    let record = record::read(path).map_err(|error| vec![error.to_string()])?;
    let violations = record::violations(&record);
    if !violations.is_empty() {
        return Err(violations
            .iter()
            .map(|violation| format!("{}: {}: {}", path.display(), violation.place, violation.what))
            .collect());
    }
    record::canonical_sha256(&record).map_err(|error| vec![format!("{}: {error:#}", path.display())])
}
