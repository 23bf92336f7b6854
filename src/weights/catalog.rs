//! The join of what a configuration needs with what a file holds: every needed tensor is present, has the right
//! shape and lies inside its file. Made once when a model is opened, so that later look-ups cannot surprise.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use anyhow::{Context as _, bail};

use super::{HostTensor, StoredDType};
use crate::arch::{Config, TensorRole, TensorSpec, tensors};

/// Where a tensor lies and how it is stored.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stored {
    /// Index of the file.
    pub(super) file: usize,
    pub(super) dtype: StoredDType,
    /// Slowest dimension first.
    pub(super) shape: Vec<usize>,
    /// Bytes in the file.
    pub(super) range: Range<usize>,
}

#[derive(Debug)]
pub(super) struct Entry {
    role: TensorRole,
    pub(super) stored: Stored,
}

impl Entry {
    pub(super) fn host_tensor<'a>(&self, name: &str, bytes: Cow<'a, [u8]>) -> HostTensor<'a> {
        HostTensor {
            name: name.to_owned(),
            role: self.role,
            dtype: self.stored.dtype,
            shape: self.stored.shape.clone(),
            bytes,
        }
    }
}

/// All tensors of one model by canonical name.
#[derive(Debug)]
pub(super) struct Catalog {
    entries: HashMap<String, Entry>,
    /// Stored type → bytes.
    pub(super) stored_bytes: BTreeMap<String, u64>,
}

impl Catalog {
    /// Asks `find` for each tensor of `config`.
    ///
    /// # Errors
    /// Passes on what `find` says, and names a tensor whose shape or length is not the configuration's.
    pub(super) fn build(
        config: &Config,
        mut find: impl FnMut(&TensorSpec) -> anyhow::Result<Stored>,
    ) -> anyhow::Result<Self> {
        let mut catalog = Catalog { entries: HashMap::new(), stored_bytes: BTreeMap::new() };
        for spec in tensors(config) {
            let stored = find(&spec)?;
            check(&spec, &stored)?;
            *catalog.stored_bytes.entry(stored.dtype.name().to_owned()).or_default() +=
                stored.range.len() as u64;
            catalog.entries.insert(spec.name, Entry { role: spec.role, stored });
        }
        Ok(catalog)
    }

    /// # Errors
    /// When the model has no tensor of this name.
    pub(super) fn get(&self, name: &str) -> anyhow::Result<&Entry> {
        self.entries.get(name).with_context(|| format!("tensor {name} is not one of this model's"))
    }
}

fn check(spec: &TensorSpec, stored: &Stored) -> anyhow::Result<()> {
    let TensorSpec { name, shape, .. } = spec;
    if stored.shape != *shape {
        bail!("tensor {name} has shape {:?}, expected {shape:?} from the configuration", stored.shape);
    }
    let expected = stored.dtype.bytes_for(shape);
    if expected != Some(stored.range.len()) {
        bail!(
            "tensor {name} has {} bytes, expected {expected:?} for {shape:?} of type {}",
            stored.range.len(),
            stored.dtype.name()
        );
    }
    Ok(())
}
