//! One file per verb: its arguments, its help and its `run`. Results go to stdout, everything else to stderr; the exit
//! code and the printing of errors are decided in [`execute`] alone.

mod calibrate;
mod check;
mod compare;
mod device;
mod doctor;
mod export;
mod format;
mod interrupt;
mod model;
mod models;
mod peaks;
mod plan;
mod price;
mod progress;
mod report;
mod run;
mod table;
mod validate;
mod version;

use std::io::Write as _;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

/// Something ran but did not succeed.
pub const FAILED: u8 = 1;
/// The command line asks for something that does not exist or does not fit together.
pub const USAGE: u8 = 2;
/// A file is unreadable, broken or of another kind.
pub const BAD_FILE: u8 = 3;
/// Stopped by a signal; what was measured is saved.
pub const INTERRUPTED: u8 = 130;

#[derive(Debug, Parser)]
#[command(
    name = "tokmeter",
    version = version::one_line(),
    long_version = version::lines(),
    about = "Measures how many tokens a machine makes per second, per joule and per dollar",
    after_help = "Examples:\n  tokmeter run                              measure this machine with the default model\n  \
                  tokmeter run --batch 1,8 --depth 512      only decoding, at two batch sizes\n  \
                  tokmeter check                            is what this machine computes right\n  \
                  tokmeter peaks                            what this device can do at most\n  \
                  tokmeter doctor                           what is here, what is missing, and the remedy\n  \
                  tokmeter report RECORD.json               a record as Markdown\n  \
                  tokmeter compare --baseline A.json --candidate B.json    is B slower than A\n  \
                  tokmeter calibrate RECORD.json            laws of time and energy, with their errors\n  \
                  tokmeter plan --site sites/NAME.toml      tokens, megawatts and money of a site\n  \
                  tokmeter export --to FORMAT FILE          a planner's own format\n\n\
                  Exit codes: 0 done, 1 something failed, 2 usage, 3 broken or foreign file, 130 interrupted; compare has\n\
                  its own, see tokmeter compare --help"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(Box<run::Args>),
    Check(check::Args),
    Peaks(peaks::Args),
    Compare(Box<compare::Args>),
    Doctor(doctor::Args),
    Models(models::Args),
    Validate(validate::Args),
    Report(report::Args),
    Calibrate(calibrate::Args),
    Plan(plan::Args),
    Export(export::Args),
}

/// The command line is wrong.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// A file is wrong; the text names it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadFile(pub String);

/// A signal came.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Marks an error as one of a file.
pub(crate) fn bad_file(error: anyhow::Error) -> anyhow::Error {
    if error.is::<crate::weights::fetch::Interrupted>() {
        return error;
    }
    BadFile(format!("{error:#}")).into()
}

/// Marks an error as one of the command line.
pub(crate) fn usage(error: impl std::fmt::Display) -> anyhow::Error {
    Usage(format!("{error:#}")).into()
}

/// Runs the verb on the command line and returns the program's exit code.
pub fn execute() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { USAGE } else { 0 };
            // A closed pipe must not turn `--help | head` into an error.
            let _ = error.print();
            return code;
        }
    };
    let result = match cli.verb {
        Verb::Run(args) => run::run(*args),
        Verb::Check(args) => check::run(args),
        Verb::Peaks(args) => peaks::run(args),
        Verb::Compare(args) => compare::run(*args),
        Verb::Doctor(args) => doctor::run(args),
        Verb::Models(args) => models::run(args),
        Verb::Validate(args) => validate::run(args),
        Verb::Report(args) => report::run(args),
        Verb::Calibrate(args) => calibrate::run(args),
        Verb::Plan(args) => plan::run(args),
        Verb::Export(args) => export::run(args),
    };
    device::remark_refusals();
    result.unwrap_or_else(|error| fail(&error))
}

fn fail(error: &anyhow::Error) -> u8 {
    let code = if error.is::<Usage>() {
        USAGE
    } else if error.is::<BadFile>() || error.is::<crate::record::ReadError>() {
        BAD_FILE
    } else if error.is::<Interrupted>() || error.is::<crate::weights::fetch::Interrupted>() {
        INTERRUPTED
    } else {
        FAILED
    };
    let _ = writeln!(std::io::stderr(), "error: {error:#}");
    code
}

/// Writes a result to stdout. A reader that has seen enough and closed the pipe is no error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("stdout: cannot write the result")
        }
        _ => Ok(()),
    }
}

/// Writes a remark to stderr.
pub(crate) fn remark(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
