//! A copy of a record that can go public: nothing in it names a host, a person's folders or a serial number. What was
//! measured is untouched, and identities that comparisons need stay recognisable without being readable.

use sha2::{Digest as _, Sha256};

use super::{Cell, Maybe, Record, hex};

const REASON: &str = "redacted";
/// Hexadecimal digits kept of a hashed identity: 128 bits.
const IDENTITY_DIGITS: usize = 32;

/// `record` without host name, kernel command line, command line arguments, serial numbers, names of programs and
/// paths; boot ids and device UUIDs
/// hashed, so that the same machine or boot still gives the same text. Doing it twice changes nothing more.
pub fn redacted(record: &Record) -> Record {
    let mut copy = record.clone();
    let host = &mut copy.machine.host;
    hide(&mut host.hostname);
    hide(&mut host.kernel_cmdline);
    host.boot_id = hashed_identity(&host.boot_id);
    copy.session.boot_id = hashed_identity(&copy.session.boot_id);
    for gpu in &mut copy.machine.gpus {
        gpu.uuid = hashed_identity(&gpu.uuid);
        if let Maybe::Value(setup) = &mut gpu.setup {
            hide(&mut setup.serial);
        }
    }
    if let Maybe::Value(library) = &mut copy.machine.gpu_driver.library {
        REASON.clone_into(&mut library.path);
    }
    copy.cells.iter_mut().for_each(hide_processes);
    // Names of other people's programs are theirs.
    copy.interference.busiest.clear();
    copy.command.argv = vec![REASON.to_owned()];
    // A list of folders or a file tells where somebody works; a number or a word does not.
    copy.machine.env.values_mut().filter(|value| value.contains(['/', '\\'])).for_each(|value| {
        REASON.clone_into(value);
    });
    copy
}

/// How many there were is kept, and which is this program.
fn hide_processes(cell: &mut Cell) {
    let Maybe::Value(gpus) = &mut cell.gpus else { return };
    for gpu in gpus {
        let warm = match &mut gpu.warm {
            Maybe::Value(warm) => Some(warm),
            Maybe::Missing(_) => None,
        };
        for reading in [&mut gpu.before, &mut gpu.after].into_iter().chain(warm) {
            if let Maybe::Value(processes) = &mut reading.processes {
                for process in processes {
                    hide(&mut process.name);
                    process.pid = 0;
                }
            }
        }
    }
}

/// What stood there is gone; that nothing stood there is kept.
fn hide(value: &mut Maybe<String>) {
    if value.value().is_some() {
        *value = Maybe::missing(REASON);
    }
}

/// A boot id or a UUID as a redacted copy has it. Hashing twice changes nothing more.
pub fn hashed_identity(identity: &Maybe<String>) -> Maybe<String> {
    identity.clone().map(|text| {
        if text.starts_with("sha256:") {
            return text;
        }
        let digits = hex(&Sha256::digest(format!("tokmeter identity {text}")));
        format!("sha256:{}", &digits[..IDENTITY_DIGITS])
    })
}
