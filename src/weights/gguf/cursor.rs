//! Reads little-endian values from a slice and never past its end.

use anyhow::{Context as _, bail};

/// Longest metadata key or tensor name, bytes: the format's own limit for keys.
const MAX_NAME_BYTES: u64 = (1 << 16) - 1;

pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, at: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Bytes not read yet.
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    /// The next `length` bytes; `what` names them in the error.
    pub(super) fn take(&mut self, length: u64, what: &str) -> anyhow::Result<&'a [u8]> {
        if length > self.left() {
            bail!("{what} at byte {} needs {length} bytes, but only {} are left", self.at, self.left());
        }
        let taken = &self.bytes[self.at..self.at + length as usize];
        self.at += length as usize;
        Ok(taken)
    }

    pub(super) fn u32(&mut self, what: &str) -> anyhow::Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> anyhow::Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> anyhow::Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    /// A string's bytes after its 64-bit length.
    pub(super) fn string(&mut self, what: &str) -> anyhow::Result<&'a [u8]> {
        let length = self.u64(what)?;
        self.take(length, what)
    }

    /// A key or a tensor's name: short UTF-8 without control characters, so that errors can print it.
    pub(super) fn name(&mut self, what: &str) -> anyhow::Result<&'a str> {
        let at = self.at;
        let length = self.u64(what)?;
        if length > MAX_NAME_BYTES.min(self.left()) {
            bail!(
                "{what} at byte {at} has {length} bytes, expected at most {}",
                MAX_NAME_BYTES.min(self.left())
            );
        }
        let bytes = self.take(length, what)?;
        let name = std::str::from_utf8(bytes).with_context(|| format!("{what} at byte {at} is not UTF-8"))?;
        if name.chars().any(char::is_control) {
            bail!("{what} at byte {at} is \"{}\", expected no control characters", name.escape_debug());
        }
        Ok(name)
    }
}
