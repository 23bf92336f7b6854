//! A backend that computes hashes instead of products. A row of activations is one integer; "attention" folds the
//! keys of the whole visible context, read back through the page table; so any wrong page, slot, position, chunk
//! boundary, batch neighbour or stale token changes every later token. [`direct_logits`] says the same without
//! pages, batches or engine.

use std::collections::VecDeque;

use tokmeter::arch::{Architecture, Config, Rope, RopeScaling, TensorRole};
use tokmeter::backend::*;
use tokmeter::clock::Clock;
use tokmeter::model::{Model, shape_of};
use tokmeter::record::Maybe;
use tokmeter::weights::{HostTensor, StoredDType, Weights, WeightsInfo};

pub(crate) const VOCAB: usize = 97;
const LAYERS: usize = 2;
/// What the scripted clock moves on by while the host waits for a step, ns.
pub(crate) const WAIT_NS: u64 = 1000;

pub(crate) fn hash(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(23) ^ b.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn key_value(x: u64, layer: usize, position: usize) -> u64 {
    hash(hash(x, layer as u64), position as u64)
}

/// `[vocab_size]`, between 0 and 16
fn logits_of(x: u64) -> Vec<f32> {
    (0..VOCAB as u64).map(|token| (hash(x, token) >> 40) as f32 / (1 << 20) as f32).collect()
}

fn sample(x: u64, sampling: Sampling) -> u32 {
    if sampling.temperature > 0.0 {
        return (hash(x, sampling.seed) % VOCAB as u64) as u32;
    }
    let logits = logits_of(x);
    (0..VOCAB).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

/// The residual stream after the last layer at every position of a text alone, `[tokens]`.
fn direct_stream(tokens: &[u32]) -> Vec<u64> {
    let mut stream: Vec<u64> = tokens.iter().map(|&token| hash(u64::from(token), 0)).collect();
    for layer in 0..LAYERS {
        let mut attended = 0;
        for (position, x) in stream.iter_mut().enumerate() {
            attended = hash(attended, key_value(*x, layer, position));
            *x = hash(hash(hash(*x, attended), 1), 2);
        }
    }
    stream
}

/// Logits after every position, `[tokens][vocab_size]`.
pub(crate) fn direct_logits(tokens: &[u32]) -> Vec<Vec<f32>> {
    direct_stream(tokens).into_iter().map(logits_of).collect()
}

/// The continuation of a prompt by `count` tokens, one whole forward pass each.
pub(crate) fn direct_continuation(prompt: &[u32], count: u32, sampling: Sampling) -> Vec<u32> {
    let mut text = prompt.to_vec();
    for _ in 0..count {
        text.push(sample(*direct_stream(&text).last().unwrap(), sampling));
    }
    text.split_off(prompt.len())
}

/// One integer per row.
pub(crate) struct HashBackend<const IN_FLIGHT: usize> {
    shape: Shape,
    clock: Clock,
    /// Samples of the step queued last, which the next one may read on the device.
    previous: Vec<u32>,
    /// Samples of every step that the host did not take yet.
    waiting: VecDeque<Vec<u32>>,
    /// A fault to be noticed: leaves one sample out.
    pub(crate) loses_a_sample: bool,
}

impl<const IN_FLIGHT: usize> HashBackend<IN_FLIGHT> {
    pub(crate) fn with_model(clock: Clock) -> (Self, Model<Self>) {
        let weights = NoWeights::new();
        let mut backend = HashBackend {
            shape: shape_of(&weights.config),
            clock,
            previous: Vec::new(),
            waiting: VecDeque::new(),
            loses_a_sample: false,
        };
        let model = Model::load(&mut backend, &weights, &mut |_| {}).unwrap();
        (backend, model)
    }
}

impl<const IN_FLIGHT: usize> Backend for HashBackend<IN_FLIGHT> {
    type Weight = ();
    type Buf = Vec<u64>;
    /// `[layers][slots]`
    type Kv = Vec<Vec<u64>>;

    const STEPS_IN_FLIGHT: usize = IN_FLIGHT;

    fn info(&self) -> BackendInfo {
        BackendInfo {
            name: "hash",
            compute_dtype: "u64",
            kv_dtype: "u64",
            threads: 1,
            kernels: None,
            cublaslt: Maybe::missing("not_cuda"),
        }
    }

    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn upload(&mut self, _: WeightUse, _: &[HostTensor<'_>]) -> anyhow::Result<()> {
        Ok(())
    }

    fn buffer(&mut self, _: BufferUse, rows: usize, _columns: usize) -> anyhow::Result<Vec<u64>> {
        Ok(vec![0xdead; rows])
    }

    fn kv_cache(&mut self, pages: usize) -> anyhow::Result<Self::Kv> {
        Ok(vec![vec![0xbeef; pages * PAGE_SIZE]; LAYERS])
    }

    fn page_bytes(&self) -> u64 {
        (LAYERS * PAGE_SIZE * 8) as u64
    }

    fn memory(&self) -> Memory {
        Memory::default()
    }

    fn embed(&mut self, batch: &Batch, (): &(), x: &mut Vec<u64>) -> anyhow::Result<()> {
        assert!(self.waiting.len() <= IN_FLIGHT, "more steps are queued than the device takes");
        for (x, &token) in x.iter_mut().zip(&batch.tokens) {
            let id = match token {
                TokenInput::Id(id) => id,
                TokenInput::Sampled(_) if IN_FLIGHT == 0 => panic!("the host already knows this token"),
                TokenInput::Sampled(index) => self.previous[index as usize],
            };
            *x = hash(u64::from(id), 0);
        }
        assert!(x.len() >= batch.num_tokens(), "the workspace is too small");
        Ok(())
    }

    fn attn_in(
        &mut self,
        batch: &Batch,
        layer: usize,
        _: &AttnIn<()>,
        x: &Vec<u64>,
        kv: &mut Self::Kv,
        _q: &mut Vec<u64>,
    ) -> anyhow::Result<()> {
        for (row, (&slot, &position)) in batch.slots.iter().zip(&batch.positions).enumerate() {
            kv[layer][slot as usize] = key_value(x[row], layer, position as usize);
        }
        Ok(())
    }

    fn attention(
        &mut self,
        batch: &Batch,
        layer: usize,
        _q: &Vec<u64>,
        kv: &Self::Kv,
        out: &mut Vec<u64>,
    ) -> anyhow::Result<()> {
        for sequence in 0..batch.num_sequences() {
            let pages = batch.sequence_pages(sequence);
            let rows = batch.query_rows(sequence);
            let first = batch.context_len[sequence] as usize - rows.len();
            for (offset, row) in rows.enumerate() {
                let slots =
                    (0..=first + offset).map(|p| pages[p / PAGE_SIZE] as usize * PAGE_SIZE + p % PAGE_SIZE);
                out[row] = slots.fold(0, |attended, slot| hash(attended, kv[layer][slot]));
            }
        }
        Ok(())
    }

    fn attn_out(
        &mut self,
        batch: &Batch,
        (): &(),
        attended: &Vec<u64>,
        x: &mut Vec<u64>,
    ) -> anyhow::Result<()> {
        for (x, &attended) in x.iter_mut().zip(attended).take(batch.num_tokens()) {
            *x = hash(*x, attended);
        }
        Ok(())
    }

    fn mlp_in(
        &mut self,
        batch: &Batch,
        _: &MlpIn<()>,
        x: &Vec<u64>,
        out: &mut Vec<u64>,
    ) -> anyhow::Result<()> {
        for (out, &x) in out.iter_mut().zip(x).take(batch.num_tokens()) {
            *out = hash(x, 1);
        }
        Ok(())
    }

    fn mlp_out(
        &mut self,
        batch: &Batch,
        (): &(),
        activated: &Vec<u64>,
        x: &mut Vec<u64>,
    ) -> anyhow::Result<()> {
        for (x, &activated) in x.iter_mut().zip(activated).take(batch.num_tokens()) {
            *x = hash(activated, 2);
        }
        Ok(())
    }

    fn logits(
        &mut self,
        batch: &Batch,
        _: &Head<()>,
        x: &Vec<u64>,
        logits: &mut Vec<u64>,
    ) -> anyhow::Result<()> {
        self.previous.clear();
        for (index, (&row, &sampling)) in batch.sample_rows.iter().zip(&batch.sampling).enumerate() {
            logits[index] = if batch.keep_logits { x[row as usize] } else { 0xdead };
            self.previous.push(sample(x[row as usize], sampling));
        }
        self.waiting.push_back(self.previous.clone());
        Ok(())
    }

    fn sampled(&mut self, out: &mut Vec<u32>) -> anyhow::Result<()> {
        self.clock.advance_ns(WAIT_NS);
        let samples = self.waiting.pop_front().expect("a step is waited for");
        let lost = usize::from(self.loses_a_sample);
        out.extend(&samples[..samples.len() - lost]);
        Ok(())
    }

    fn download(&mut self, buf: &Vec<u64>, rows: usize, columns: usize) -> anyhow::Result<Vec<f32>> {
        assert_eq!(columns, VOCAB, "only logits are downloaded");
        Ok(buf[..rows].iter().flat_map(|&x| logits_of(x)).collect())
    }

    fn fill(&mut self, _: &mut Vec<u64>, _: &[f32]) -> anyhow::Result<()> {
        unreachable!("only tests of single operations fill buffers")
    }
}

/// A checkpoint with a configuration and nothing in its tensors.
struct NoWeights {
    config: Config,
    info: WeightsInfo,
}

impl NoWeights {
    fn new() -> Self {
        let config = Config {
            architecture: Architecture::Llama,
            hidden_size: 2,
            intermediate_size: 2,
            num_hidden_layers: LAYERS,
            num_attention_heads: 1,
            num_key_value_heads: 1,
            head_dim: 2,
            vocab_size: VOCAB,
            max_position_embeddings: 512,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: RopeScaling::None },
            tie_word_embeddings: true,
        };
        let info = WeightsInfo {
            format: "synthetic",
            files: Vec::new(),
            synthetic_seed: Some(0),
            stored_bytes: Default::default(),
        };
        NoWeights { config, info }
    }
}

impl Weights for NoWeights {
    fn config(&self) -> &Config {
        &self.config
    }

    fn info(&self) -> &WeightsInfo {
        &self.info
    }

    fn tensor(&self, name: &str) -> anyhow::Result<HostTensor<'_>> {
        Ok(HostTensor {
            name: name.to_owned(),
            role: TensorRole::Linear,
            dtype: StoredDType::F32,
            shape: vec![0],
            bytes: Default::default(),
        })
    }
}
