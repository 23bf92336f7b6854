//! Metadata values of a GGUF file, borrowed from its map.

use anyhow::{Context as _, bail};

use super::cursor::Cursor;

/// Arrays inside arrays, at most; real files have none.
const MAX_DEPTH: usize = 4;

/// Strings that are decoded from one array, at most: the largest vocabulary a configuration may have.
const MAX_STRINGS: usize = 1 << 24;

/// A value's type as the file numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn read(cursor: &mut Cursor<'_>) -> anyhow::Result<Self> {
        use Kind::*;
        const KINDS: [Kind; 13] = [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        let id = cursor.u32("a value's type")?;
        KINDS.get(id as usize).copied().with_context(|| format!("has value type {id}, expected 0 to 12"))
    }

    /// Bytes of one value; `None` where values differ in length.
    fn size_bytes(self) -> Option<u64> {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => Some(1),
            Kind::U16 | Kind::I16 => Some(2),
            Kind::U32 | Kind::I32 | Kind::F32 => Some(4),
            Kind::U64 | Kind::I64 | Kind::F64 => Some(8),
            Kind::String | Kind::Array => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    /// Not yet known to be UTF-8.
    String(&'a [u8]),
    Array(Array<'a>),
}

/// An array whose elements have been walked but not decoded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Array<'a> {
    kind: Kind,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Value<'a> {
    pub(super) fn read(cursor: &mut Cursor<'a>) -> anyhow::Result<Self> {
        Ok(match Kind::read(cursor)? {
            Kind::U8 => Value::Unsigned(u64::from(cursor.array::<1>("a number")?[0])),
            Kind::I8 => Value::Signed(i64::from(i8::from_le_bytes(cursor.array("a number")?))),
            Kind::U16 => Value::Unsigned(u64::from(u16::from_le_bytes(cursor.array("a number")?))),
            Kind::I16 => Value::Signed(i64::from(i16::from_le_bytes(cursor.array("a number")?))),
            Kind::U32 => Value::Unsigned(u64::from(cursor.u32("a number")?)),
            Kind::I32 => Value::Signed(i64::from(i32::from_le_bytes(cursor.array("a number")?))),
            Kind::F32 => Value::Float(widen(f32::from_le_bytes(cursor.array("a number")?))),
            Kind::Bool => Value::Bool(cursor.array::<1>("a bool")?[0] != 0),
            Kind::String => Value::String(cursor.string("a string")?),
            Kind::Array => Value::Array(Array::read(cursor)?),
            Kind::U64 => Value::Unsigned(cursor.u64("a number")?),
            Kind::I64 => Value::Signed(i64::from_le_bytes(cursor.array("a number")?)),
            Kind::F64 => Value::Float(f64::from_le_bytes(cursor.array("a number")?)),
        })
    }

    pub(super) fn unsigned(&self) -> anyhow::Result<u64> {
        match *self {
            Value::Unsigned(value) => Ok(value),
            Value::Signed(value) if value >= 0 => Ok(value as u64),
            _ => self.mismatch("a non-negative integer"),
        }
    }

    pub(super) fn float(&self) -> anyhow::Result<f64> {
        match *self {
            Value::Float(value) => Ok(value),
            _ => self.mismatch("a floating-point number"),
        }
    }

    pub(super) fn boolean(&self) -> anyhow::Result<bool> {
        match *self {
            Value::Bool(value) => Ok(value),
            _ => self.mismatch("a bool"),
        }
    }

    pub(super) fn text(&self) -> anyhow::Result<&'a str> {
        match *self {
            Value::String(bytes) => std::str::from_utf8(bytes).context("is not UTF-8"),
            _ => self.mismatch("a string"),
        }
    }

    pub(super) fn array(&self) -> anyhow::Result<Array<'a>> {
        match *self {
            Value::Array(array) => Ok(array),
            _ => self.mismatch("an array"),
        }
    }

    fn mismatch<T>(&self, expected: &str) -> anyhow::Result<T> {
        match self {
            Value::Unsigned(value) => bail!("is {value}, expected {expected}"),
            Value::Signed(value) => bail!("is {value}, expected {expected}"),
            Value::Float(value) => bail!("is {value:?}, expected {expected}"),
            Value::Bool(value) => bail!("is {value}, expected {expected}"),
            Value::String(_) => bail!("is a string, expected {expected}"),
            Value::Array(array) => bail!("is an array of {} values, expected {expected}", array.len),
        }
    }
}

/// The shortest decimal that rounds to `value`, so that a stored 1e-5 stays 1e-5.
fn widen(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

impl<'a> Array<'a> {
    fn read(cursor: &mut Cursor<'a>) -> anyhow::Result<Self> {
        let mut whole = Cursor::new(cursor.rest());
        let (kind, len) = read_array_head(&mut whole)?;
        let head = whole.position();
        skip_elements(&mut whole, kind, len, 1)?;
        let bytes = &cursor.take(whole.position() as u64, "an array")?[head..];
        Ok(Array { kind, len: len as usize, bytes })
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// All elements of an array of strings.
    pub(super) fn strings(&self) -> anyhow::Result<Vec<String>> {
        if self.kind != Kind::String {
            bail!("is an array of {:?}, expected one of strings", self.kind);
        }
        if self.len > MAX_STRINGS {
            bail!("has {} strings, expected at most {MAX_STRINGS}", self.len);
        }
        let mut cursor = Cursor::new(self.bytes);
        (0..self.len)
            .map(|index| {
                let bytes = cursor.string("a string")?;
                let text =
                    std::str::from_utf8(bytes).with_context(|| format!("string {index} is not UTF-8"))?;
                Ok(text.to_owned())
            })
            .collect()
    }

    /// All elements of an array of 32-bit integers.
    pub(super) fn i32s(&self) -> anyhow::Result<Vec<i32>> {
        if !matches!(self.kind, Kind::I32 | Kind::U32) {
            bail!("is an array of {:?}, expected one of 32-bit integers", self.kind);
        }
        Ok(self.bytes.as_chunks::<4>().0.iter().map(|raw| i32::from_le_bytes(*raw)).collect())
    }
}

fn read_array_head(cursor: &mut Cursor<'_>) -> anyhow::Result<(Kind, u64)> {
    let kind = Kind::read(cursor)?;
    let len = cursor.u64("an array's length")?;
    // The shortest string is its length of 8 bytes, the shortest array its head of 12.
    let min_bytes = kind.size_bytes().unwrap_or(if kind == Kind::String { 8 } else { 12 });
    if len > cursor.left() / min_bytes {
        bail!("is an array of {len} {kind:?} values, but only {} bytes are left", cursor.left());
    }
    Ok((kind, len))
}

fn skip_elements(cursor: &mut Cursor<'_>, kind: Kind, len: u64, depth: usize) -> anyhow::Result<()> {
    if let Some(size_bytes) = kind.size_bytes() {
        cursor.take(len * size_bytes, "an array")?;
        return Ok(());
    }
    if depth == MAX_DEPTH && kind == Kind::Array {
        bail!("nests arrays deeper than {MAX_DEPTH}");
    }
    for _ in 0..len {
        if kind == Kind::String {
            cursor.string("a string in an array")?;
        } else {
            let (inner, inner_len) = read_array_head(cursor)?;
            skip_elements(cursor, inner, inner_len, depth + 1)?;
        }
    }
    Ok(())
}
