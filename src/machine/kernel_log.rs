//! The kernel's log: when the GPU driver was loaded, and the faults (XIDs) that it has reported since. Only what is
//! still in the kernel's ring can be seen.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use super::Roots;
use super::files::{Reason, reason};

/// More than any ring holds.
const MAX_LOG_BYTES: usize = 16 << 20;
/// More than any one message with its header.
const MESSAGE_BYTES: usize = 32 << 10;
/// Messages that were overwritten while we read; beyond this many the log grows faster than we do.
const MOST_OVERWRITTEN: u32 = 100;

/// The messages of the kernel's ring, as text.
pub(super) struct KernelLog(String);

impl KernelLog {
    pub(super) fn read(roots: &Roots) -> Result<Self, Reason> {
        let not_waiting = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let path = roots.root.join("dev/kmsg");
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(not_waiting)
            .open(path)
            .map_err(|error| reason(error.kind()))?;
        let (mut log, mut buffer, mut overwritten) = (Vec::new(), vec![0; MESSAGE_BYTES], 0);
        while log.len() < MAX_LOG_BYTES {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => log.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::BrokenPipe && overwritten < MOST_OVERWRITTEN => {
                    overwritten += 1;
                }
                Err(error) => return Err(reason(error.kind())),
            }
        }
        Ok(KernelLog(String::from_utf8_lossy(&log).into_owned()))
    }

    /// Codes of the faults of the GPU at this PCI address, the oldest first.
    pub(super) fn xids(&self, pci_address: &str) -> Result<Vec<u32>, Reason> {
        let wanted = Address::parse(pci_address).ok_or("malformed")?;
        let fault = |line: &str| {
            let (address, rest) = line.split_once("NVRM: Xid (PCI:")?.1.split_once("): ")?;
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            (Address::parse(address)? == wanted).then(|| rest[..digits].parse().ok())?
        };
        Ok(self.0.lines().filter_map(fault).collect())
    }

    /// When the driver last said that it is being loaded, µs after boot.
    pub(super) fn driver_loaded_us(&self) -> Option<u64> {
        let loads = |line: &&str| line.contains("NVRM: loading NVIDIA UNIX");
        let last = self.0.lines().rev().find(loads)?;
        // Priority, number, time; the message follows a semicolon.
        last.split_once(';')?.0.split(',').nth(2)?.parse().ok()
    }
}

/// Domain, bus and device: the log writes four digits of the domain, NVML eight, and the function's number is left out.
#[derive(PartialEq, Eq)]
struct Address(u32, u32, u32);

impl Address {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split([':', '.']).map(|part| u32::from_str_radix(part, 16).ok());
        Some(Address(parts.next()??, parts.next()??, parts.next()??))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;

    const LOG: &str = "6,100,1500000,-;NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.65.06\n\
        6,300,9100000,-;NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.95.05\n\
        4,301,9200000,-;NVRM: Xid (PCI:0000:1b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off\n\
        \u{20}SUBSYSTEM=pci\n\
        4,302,9300000,-;NVRM: Xid (PCI:0000:1c:00): 31, pid=77, name=python\n\
        4,303,9400000,-;NVRM: Xid (PCI:0000:1b:00): 63, Row Remapper: New row marked\n\
        4,304,9500000,-;NVRM: Xid (PCI:broken";

    #[test]
    fn faults_are_told_apart_by_address_and_kept_in_order() {
        let dir = tree(&[("dev/kmsg", LOG)]);
        let log = KernelLog::read(&Roots::under(dir.path())).unwrap();
        assert_eq!(log.xids("00000000:1B:00.0"), Ok(vec![79, 63]));
        assert_eq!(log.xids("00000000:1C:00.0"), Ok(vec![31]));
        assert_eq!(log.xids("00000001:1C:00.0"), Ok(vec![]));
        assert_eq!(log.xids("somewhere"), Err("malformed"));
    }

    #[test]
    fn the_last_load_of_the_driver_counts() {
        let dir = tree(&[("dev/kmsg", LOG)]);
        assert_eq!(KernelLog::read(&Roots::under(dir.path())).unwrap().driver_loaded_us(), Some(9_100_000));
        let dir = tree(&[("dev/kmsg", "6,1,5,-;Linux version\n")]);
        assert_eq!(KernelLog::read(&Roots::under(dir.path())).unwrap().driver_loaded_us(), None);
    }

    #[test]
    fn a_log_that_is_not_there_says_so() {
        assert_eq!(KernelLog::read(&Roots::under("/nonexistent")).err(), Some("not_found"));
    }
}
