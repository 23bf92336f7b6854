//! Writers of small GGUF and safetensors models, independent of the readers: they can also write what is broken.

use std::path::{Path, PathBuf};

pub(crate) const GGUF_F32: u32 = 0;

/// A metadata value.
#[derive(Clone)]
pub(crate) enum Meta {
    U32(u32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Text(&'static str),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    /// Type number and bytes as they are.
    Raw(u32, Vec<u8>),
}

impl Meta {
    fn write(&self, out: &mut Vec<u8>) {
        let (kind, bytes): (u32, Vec<u8>) = match self {
            Meta::U32(value) => (4, value.to_le_bytes().into()),
            Meta::U64(value) => (10, value.to_le_bytes().into()),
            Meta::F32(value) => (6, value.to_le_bytes().into()),
            Meta::Bool(value) => (7, vec![u8::from(*value)]),
            Meta::Text(value) => (8, string(value.as_bytes())),
            Meta::Texts(values) => {
                (9, array(8, values.len(), values.iter().flat_map(|v| string(v.as_bytes()))))
            }
            Meta::I32s(values) => (9, array(5, values.len(), values.iter().flat_map(|v| v.to_le_bytes()))),
            Meta::Raw(kind, bytes) => (*kind, bytes.clone()),
        };
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
    }
}

pub(crate) fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

/// Body of an array value.
pub(crate) fn array(kind: u32, len: usize, elements: impl IntoIterator<Item = u8>) -> Vec<u8> {
    let mut out = kind.to_le_bytes().to_vec();
    out.extend((len as u64).to_le_bytes());
    out.extend(elements);
    out
}

#[derive(Clone)]
pub(crate) struct GgufTensor {
    pub(crate) name: Vec<u8>,
    /// Fastest dimension first, as the format has it.
    pub(crate) ne: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
    /// Where it lies after the start of the data, unless right after the one before.
    pub(crate) offset: Option<u64>,
}

#[derive(Clone)]
pub(crate) struct GgufFile {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    pub(crate) metadata: Vec<(Vec<u8>, Meta)>,
    pub(crate) tensors: Vec<GgufTensor>,
    /// Counts to announce instead of the true ones.
    pub(crate) tensor_count: Option<u64>,
    pub(crate) metadata_count: Option<u64>,
    pub(crate) alignment: usize,
}

impl GgufFile {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        for (index, tensor) in self.tensors.iter().enumerate() {
            out.extend(&tensor.data);
            if index + 1 < self.tensors.len() {
                out.resize(out.len().next_multiple_of(self.alignment), 0);
            }
        }
        out
    }

    /// Everything before the tensors' data.
    pub(crate) fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.metadata_count.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            out.extend(string(key));
            value.write(&mut out);
        }
        let mut next = 0u64;
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.ne.len() as u32).to_le_bytes());
            out.extend(tensor.ne.iter().flat_map(|size| size.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(next).to_le_bytes());
            next += (tensor.data.len() as u64).next_multiple_of(self.alignment as u64);
        }
        out
    }

    pub(crate) fn set(&mut self, key: &str, value: Meta) {
        self.metadata.retain(|(name, _)| name != key.as_bytes());
        self.metadata.push((key.into(), value));
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.metadata.retain(|(name, _)| name != key.as_bytes());
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name.as_bytes()).unwrap()
    }

    pub(crate) fn save(&self, path: &Path) -> PathBuf {
        std::fs::write(path, self.bytes()).unwrap();
        path.to_owned()
    }
}

/// One tensor of a safetensors file.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

pub(crate) fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let start = data.len();
        data.extend(&tensor.data);
        header.insert(
            tensor.name.clone(),
            serde_json::json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()]}),
        );
    }
    with_header(serde_json::Value::from(header).to_string().as_bytes(), &data)
}

pub(crate) fn with_header(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}
