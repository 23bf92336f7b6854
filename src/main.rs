//! The program: everything is in the library.

use std::io::Write as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(sentence) = tokmeter::machine::unsupported_cpu() {
        let _ = writeln!(std::io::stderr(), "error: {sentence}");
        return ExitCode::from(tokmeter::cmd::FAILED);
    }
    ExitCode::from(tokmeter::cmd::execute())
}
