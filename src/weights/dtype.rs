//! Storage types of weights, their block geometry, and their values as f32 (through candle's dequantisation).

use std::borrow::Cow;

use anyhow::{Context as _, bail};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};

/// How a tensor's values are stored in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StoredDType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl StoredDType {
    /// The name used in records: GGUF's own spelling in lower case.
    pub fn name(self) -> &'static str {
        match self {
            StoredDType::F32 => "f32",
            StoredDType::F16 => "f16",
            StoredDType::BF16 => "bf16",
            StoredDType::Q4_0 => "q4_0",
            StoredDType::Q4_1 => "q4_1",
            StoredDType::Q5_0 => "q5_0",
            StoredDType::Q5_1 => "q5_1",
            StoredDType::Q8_0 => "q8_0",
            StoredDType::Q2K => "q2_k",
            StoredDType::Q3K => "q3_k",
            StoredDType::Q4K => "q4_k",
            StoredDType::Q5K => "q5_k",
            StoredDType::Q6K => "q6_k",
        }
    }

    /// candle's name for the same type.
    pub fn ggml(self) -> GgmlDType {
        match self {
            StoredDType::F32 => GgmlDType::F32,
            StoredDType::F16 => GgmlDType::F16,
            StoredDType::BF16 => GgmlDType::BF16,
            StoredDType::Q4_0 => GgmlDType::Q4_0,
            StoredDType::Q4_1 => GgmlDType::Q4_1,
            StoredDType::Q5_0 => GgmlDType::Q5_0,
            StoredDType::Q5_1 => GgmlDType::Q5_1,
            StoredDType::Q8_0 => GgmlDType::Q8_0,
            StoredDType::Q2K => GgmlDType::Q2K,
            StoredDType::Q3K => GgmlDType::Q3K,
            StoredDType::Q4K => GgmlDType::Q4K,
            StoredDType::Q5K => GgmlDType::Q5K,
            StoredDType::Q6K => GgmlDType::Q6K,
        }
    }

    /// Values that are stored together.
    pub fn block_elements(self) -> usize {
        self.ggml().block_size()
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        self.ggml().type_size()
    }

    pub fn is_quantized(self) -> bool {
        self.block_elements() > 1
    }

    /// Bytes of a row-major tensor of this shape; `None` when a row is not whole blocks or the product overflows.
    pub fn bytes_for(self, shape: &[usize]) -> Option<usize> {
        let columns = *shape.last()?;
        if !columns.is_multiple_of(self.block_elements()) {
            return None;
        }
        let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))?;
        (elements / self.block_elements()).checked_mul(self.block_bytes())
    }
}

/// `elements` values of type `dtype` as f32.
///
/// # Errors
/// When `bytes` is not exactly as long as `elements` values of this type.
pub fn to_f32(dtype: StoredDType, bytes: &[u8], elements: usize) -> anyhow::Result<Vec<f32>> {
    let expected = dtype.bytes_for(&[elements]);
    if expected != Some(bytes.len()) {
        bail!("{} bytes hold {elements} values of type {}, expected {expected:?}", bytes.len(), dtype.name());
    }
    match dtype {
        StoredDType::F32 => Ok(bytes.as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect()),
        StoredDType::F16 => {
            Ok(bytes.as_chunks::<2>().0.iter().map(|raw| half::f16::from_le_bytes(*raw).to_f32()).collect())
        }
        StoredDType::BF16 => {
            Ok(bytes.as_chunks::<2>().0.iter().map(|raw| half::bf16::from_le_bytes(*raw).to_f32()).collect())
        }
        _ => dequantize(dtype, bytes, elements),
    }
}

fn dequantize(dtype: StoredDType, bytes: &[u8], elements: usize) -> anyhow::Result<Vec<f32>> {
    let storage = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, dtype.ggml())?;
    let tensor: Tensor = QTensor::new(storage, elements)?.dequantize(&Device::Cpu)?;
    tensor.to_vec1().with_context(|| format!("dequantising {}", dtype.name()))
}
