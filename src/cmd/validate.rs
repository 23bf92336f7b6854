//! `tokmeter validate`: is a file a record of this format, and does it contradict itself? And its public copy.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::cmd::{BAD_FILE, print, remark, usage};
use crate::record::{self, Record};

/// Check records: format, identities, canonical SHA-256; make a public copy
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Prints the SHA-256 of the canonical JSON (RFC 8785) and the name of each valid file.\n\n\
    Examples:\n  tokmeter validate tokmeter-cpu-20261122T101112Z.json\n  tokmeter validate results/*/*.json\n  \
    tokmeter validate --redact tokmeter-cpu-20261122T101112Z.json --out public.json\n\n\
    Exit codes: 0 all valid, 3 a file is unreadable, of another format, or contradicts itself"
)]
pub struct Args {
    /// Record files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Write a copy without host name, paths and arguments; boot ids and UUIDs hashed
    #[arg(long, requires = "out")]
    redact: bool,
    /// Where the redacted copy goes
    #[arg(long, short, value_name = "FILE", requires = "redact")]
    out: Option<PathBuf>,
}

/// # Errors
/// When stdout fails or the copy cannot be written; a bad file is reported and changes the exit code.
pub fn run(args: Args) -> anyhow::Result<u8> {
    if args.redact && args.files.len() != 1 {
        return Err(usage(format!("--redact takes one file, got {}", args.files.len())));
    }
    let mut code = 0;
    for path in &args.files {
        match validate(path) {
            Ok((record, sha256)) => {
                print(&format!("{sha256}  {}\n", path.display()))?;
                if let Some(out) = &args.out {
                    write_redacted(&record, out)?;
                }
            }
            Err(reasons) => {
                code = BAD_FILE;
                reasons.iter().for_each(|reason| remark(&format!("error: {reason}")));
            }
        }
    }
    Ok(code)
}

fn validate(path: &Path) -> Result<(Record, String), Vec<String>> {
    let record = record::read(path).map_err(|error| vec![error.to_string()])?;
    let violations = record::violations(&record);
    if !violations.is_empty() {
        return Err(violations
            .iter()
            .map(|violation| format!("{}: {}: {}", path.display(), violation.place, violation.what))
            .collect());
    }
    let sha256 =
        record::canonical_sha256(&record).map_err(|error| vec![format!("{}: {error:#}", path.display())])?;
    Ok((record, sha256))
}

fn write_redacted(record: &Record, out: &Path) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(&record::redacted(record))? + "\n";
    record::write_atomically(out, text.as_bytes())
        .with_context(|| format!("{}: cannot write the redacted copy", out.display()))?;
    remark(&format!("redacted copy: {}", out.display()));
    Ok(())
}
