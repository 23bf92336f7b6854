//! A shallow slice of a model: its first layers and the first rows of its vocabulary, every other shape as it is. Small
//! enough for the reference to compute, and still that model's own shapes and values.

use std::borrow::Cow;

use super::{HostTensor, Weights, WeightsInfo};
use crate::arch::{Config, TensorRole};

/// The configuration with at most `layers` layers and `vocab_size` tokens.
pub fn shallow(config: &Config, layers: usize, vocab_size: usize) -> Config {
    Config {
        num_hidden_layers: config.num_hidden_layers.min(layers),
        vocab_size: config.vocab_size.min(vocab_size),
        ..config.clone()
    }
}

/// Opened weights, of which only a slice is handed out.
pub struct Slice<'a> {
    whole: &'a dyn Weights,
    config: Config,
}

impl<'a> Slice<'a> {
    pub fn new(whole: &'a dyn Weights, layers: usize, vocab_size: usize) -> Self {
        Slice { whole, config: shallow(whole.config(), layers, vocab_size) }
    }

    /// Whether the rows of this tensor are tokens.
    fn is_cut(&self, tensor: &HostTensor<'_>) -> bool {
        let by_token = tensor.role == TensorRole::Embedding || tensor.name == "lm_head.weight";
        by_token && tensor.rows() > self.config.vocab_size
    }
}

impl Weights for Slice<'_> {
    fn config(&self) -> &Config {
        &self.config
    }

    /// The whole model's.
    fn info(&self) -> &WeightsInfo {
        self.whole.info()
    }

    fn tensor(&self, name: &str) -> anyhow::Result<HostTensor<'_>> {
        let mut tensor = self.whole.tensor(name)?;
        if self.is_cut(&tensor) {
            let kept_bytes = tensor.bytes.len() / tensor.rows() * self.config.vocab_size;
            tensor.shape[0] = self.config.vocab_size;
            match &mut tensor.bytes {
                Cow::Borrowed(bytes) => *bytes = &bytes[..kept_bytes],
                Cow::Owned(bytes) => bytes.truncate(kept_bytes),
            }
        }
        Ok(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::tensors;
    use crate::weights::open;

    #[test]
    fn a_slice_has_the_first_values_of_the_whole_and_the_shapes_of_its_configuration() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny/");
        for model in ["llama/model.gguf", "llama/model.safetensors", "qwen2", "qwen3"] {
            let whole = open(format!("{folder}{model}").as_ref()).unwrap();
            let slice = Slice::new(whole.as_ref(), 1, 17);
            assert_eq!((slice.config().num_hidden_layers, slice.config().vocab_size), (1, 17));
            for spec in tensors(slice.config()) {
                let (part, all) = (slice.tensor(&spec.name).unwrap(), whole.tensor(&spec.name).unwrap());
                assert_eq!(part.shape, spec.shape, "{model} {}", spec.name);
                let (part, all) = (part.to_f32().unwrap(), all.to_f32().unwrap());
                assert_eq!(part, all[..part.len()], "{model} {}", spec.name);
            }
        }
    }

    #[test]
    fn a_small_model_is_not_cut() {
        let whole = open(concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny/qwen3").as_ref()).unwrap();
        assert_eq!(shallow(whole.config(), 2, 4096), *whole.config());
    }
}
