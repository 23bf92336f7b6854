//! The header of a GGUF file, parsed without trusting it: every count is held against the bytes that are left before
//! anything is allocated or looped over, and tensors must lie inside the file, aligned and apart. Values borrow from
//! the map, so a vocabulary of 150 000 tokens costs one walk over its bytes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use anyhow::{Context as _, bail};

use super::cursor::Cursor;
use super::value::Value;
use crate::weights::StoredDType;

const MAGIC: &[u8] = b"GGUF";
/// More than any model has; the format itself sets no limit.
const MAX_TENSORS: u64 = 1 << 16;
const MAX_METADATA_KEYS: u64 = 1 << 16;
const MAX_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
/// Smallest encodings: an empty key with one byte of value; an empty name with one dimension.
const MIN_METADATA_BYTES: u64 = 8 + 4 + 1;
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// One tensor as the file describes it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TensorInfo {
    pub(super) dtype: StoredDType,
    /// Slowest dimension first: the file's order reversed.
    pub(super) shape: Vec<usize>,
    /// Bytes in the file.
    pub(super) range: Range<usize>,
}

#[derive(Debug)]
pub(super) struct Header<'a> {
    pub(super) metadata: HashMap<&'a str, Value<'a>>,
    pub(super) tensors: HashMap<&'a str, TensorInfo>,
    /// The whole file.
    pub(super) bytes: &'a [u8],
}

/// A tensor's entry before the start of the data is known.
struct RawInfo<'a> {
    name: &'a str,
    dtype: StoredDType,
    shape: Vec<usize>,
    size_bytes: usize,
    /// From the start of the data.
    offset: u64,
}

impl<'a> Header<'a> {
    /// # Errors
    /// Names the thing in the file that is wrong, and its byte offset where one is known.
    pub(super) fn parse(bytes: &'a [u8]) -> anyhow::Result<Self> {
        let mut cursor = Cursor::new(bytes);
        check_magic(&mut cursor)?;
        let tensor_count = cursor.u64("the tensor count")?;
        let metadata_count = cursor.u64("the metadata count")?;
        check_count("metadata keys", metadata_count, MAX_METADATA_KEYS, MIN_METADATA_BYTES, &cursor)?;
        check_count("tensors", tensor_count, MAX_TENSORS, MIN_TENSOR_BYTES, &cursor)?;
        let metadata = read_metadata(&mut cursor, metadata_count)?;
        let alignment = alignment(&metadata)?;
        let raw: Vec<RawInfo<'a>> =
            (0..tensor_count).map(|_| read_info(&mut cursor)).collect::<anyhow::Result<_>>()?;
        let data_start = (cursor.position() as u64).next_multiple_of(alignment);
        let tensors = place(raw, data_start, alignment, bytes.len() as u64)?;
        Ok(Header { metadata, tensors, bytes })
    }

    pub(super) fn text(&self, key: &str) -> anyhow::Result<Option<&'a str>> {
        self.metadata.get(key).map(|value| value.text()).transpose().with_context(|| key.to_owned())
    }

    pub(super) fn unsigned(&self, key: &str) -> anyhow::Result<Option<u64>> {
        self.metadata.get(key).map(Value::unsigned).transpose().with_context(|| key.to_owned())
    }

    pub(super) fn float(&self, key: &str) -> anyhow::Result<Option<f64>> {
        self.metadata.get(key).map(Value::float).transpose().with_context(|| key.to_owned())
    }

    pub(super) fn boolean(&self, key: &str) -> anyhow::Result<Option<bool>> {
        self.metadata.get(key).map(Value::boolean).transpose().with_context(|| key.to_owned())
    }
}

fn check_magic(cursor: &mut Cursor<'_>) -> anyhow::Result<()> {
    let magic = cursor.take(4, "the magic")?;
    if magic != MAGIC {
        bail!("is not a GGUF file: it begins with \"{}\", expected \"GGUF\"", magic.escape_ascii());
    }
    match cursor.u32("the version")? {
        2 | 3 => Ok(()),
        version if matches!(version.swap_bytes(), 1..=3) => {
            bail!("is a big-endian GGUF file, expected little-endian")
        }
        version => bail!("has GGUF version {version}, expected 2 or 3"),
    }
}

/// Refuses a count that the rest of the file cannot hold.
fn check_count(
    what: &str,
    count: u64,
    limit: u64,
    min_bytes: u64,
    cursor: &Cursor<'_>,
) -> anyhow::Result<()> {
    let fitting = cursor.left() / min_bytes;
    if count > limit.min(fitting) {
        bail!(
            "the header announces {count} {what}, expected at most {} in the {} bytes that follow",
            limit.min(fitting),
            cursor.left()
        );
    }
    Ok(())
}

fn read_metadata<'a>(cursor: &mut Cursor<'a>, count: u64) -> anyhow::Result<HashMap<&'a str, Value<'a>>> {
    let mut metadata = HashMap::with_capacity(count as usize);
    for _ in 0..count {
        let key = cursor.name("a metadata key")?;
        let value = Value::read(cursor).with_context(|| format!("value of {key}"))?;
        match metadata.entry(key) {
            Entry::Occupied(_) => bail!("the metadata key {key} occurs twice"),
            Entry::Vacant(vacant) => vacant.insert(value),
        };
    }
    Ok(metadata)
}

fn alignment(metadata: &HashMap<&str, Value<'_>>) -> anyhow::Result<u64> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    let alignment = value.unsigned().context("general.alignment")?;
    if !alignment.is_power_of_two() || alignment > u64::from(u32::MAX) {
        bail!("general.alignment is {alignment}, expected a power of two below 2^32");
    }
    Ok(alignment)
}

fn read_info<'a>(cursor: &mut Cursor<'a>) -> anyhow::Result<RawInfo<'a>> {
    let name = cursor.name("a tensor name")?;
    read_named_info(cursor, name).with_context(|| format!("tensor {name}"))
}

fn read_named_info<'a>(cursor: &mut Cursor<'a>, name: &'a str) -> anyhow::Result<RawInfo<'a>> {
    let dimensions = cursor.u32("the number of dimensions")?;
    if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
        bail!("has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}");
    }
    let mut shape = Vec::with_capacity(dimensions as usize);
    for _ in 0..dimensions {
        let size = cursor.u64("a dimension")?;
        if size == 0 || size > isize::MAX as u64 {
            bail!("has a dimension of {size}, expected 1 or more");
        }
        shape.push(size as usize);
    }
    shape.reverse();
    let dtype = dtype_of(cursor.u32("the tensor's type")?)?;
    let offset = cursor.u64("the tensor's offset")?;
    let Some(size_bytes) = dtype.bytes_for(&shape) else {
        bail!(
            "has shape {shape:?} of type {}, expected rows of whole blocks of {} values",
            dtype.name(),
            dtype.block_elements()
        );
    };
    Ok(RawInfo { name, dtype, shape, size_bytes, offset })
}

/// Puts each tensor at its place in the file and refuses those outside, unaligned or overlapping.
fn place<'a>(
    raw: Vec<RawInfo<'a>>,
    data_start: u64,
    alignment: u64,
    file_bytes: u64,
) -> anyhow::Result<HashMap<&'a str, TensorInfo>> {
    let mut tensors = HashMap::with_capacity(raw.len());
    let mut ranges = Vec::with_capacity(raw.len());
    for info in raw {
        let RawInfo { name, offset, size_bytes, .. } = info;
        if !offset.is_multiple_of(alignment) {
            bail!("tensor {name} is at offset {offset}, expected a multiple of the alignment {alignment}");
        }
        let start = data_start.checked_add(offset);
        let end =
            start.and_then(|start| start.checked_add(size_bytes as u64)).filter(|&end| end <= file_bytes);
        let (Some(start), Some(end)) = (start, end) else {
            bail!(
                "tensor {name} has {size_bytes} bytes at offset {offset} of the data, which begins at byte \
                 {data_start}; expected it inside the file of {file_bytes} bytes"
            );
        };
        let range = start as usize..end as usize;
        ranges.push((range.clone(), name));
        if tensors.insert(name, TensorInfo { dtype: info.dtype, shape: info.shape, range }).is_some() {
            bail!("tensor {name} occurs twice");
        }
    }
    check_apart(ranges)?;
    Ok(tensors)
}

fn check_apart(mut ranges: Vec<(Range<usize>, &str)>) -> anyhow::Result<()> {
    ranges.sort_by_key(|(range, _)| range.start);
    for pair in ranges.windows(2) {
        let [(before, first), (after, second)] = pair else { continue };
        if after.start < before.end {
            bail!(
                "tensor {second} begins at byte {}, inside tensor {first}, which ends at byte {}",
                after.start,
                before.end
            );
        }
    }
    Ok(())
}

fn dtype_of(id: u32) -> anyhow::Result<StoredDType> {
    Ok(match id {
        0 => StoredDType::F32,
        1 => StoredDType::F16,
        2 => StoredDType::Q4_0,
        3 => StoredDType::Q4_1,
        6 => StoredDType::Q5_0,
        7 => StoredDType::Q5_1,
        8 => StoredDType::Q8_0,
        10 => StoredDType::Q2K,
        11 => StoredDType::Q3K,
        12 => StoredDType::Q4K,
        13 => StoredDType::Q5K,
        14 => StoredDType::Q6K,
        30 => StoredDType::BF16,
        _ => bail!(
            "has type {id} ({}), expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K",
            unsupported_name(id)
        ),
    })
}

/// ggml's name of a type that is not supported here.
fn unsupported_name(id: u32) -> &'static str {
    match id {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => "unknown",
    }
}
