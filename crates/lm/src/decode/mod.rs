//! Decoding one token at a time behind a cache of keys and values.

pub(crate) mod device;
mod generate;

use burn::tensor::{Tensor, TensorData};

use self::device::TensorCache;
pub use self::generate::{Decoding, Generate, Generated};
use crate::error::LmError;
use crate::host::{HostCache, HostModel};
use crate::model::Transformer;

/// A model that reads token by token.
///
/// On a CPU the decoder holds a copy of the weights laid out for it, which takes as much memory
/// again and decodes several times as fast; elsewhere it uses the model's own tensors. Training the
/// model further does not change a decoder.
///
/// # Examples
///
/// ```
/// use lm::{Decoder, LlamaShape, ModelConfig, Transformer};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let config = ModelConfig::llama(&LlamaShape {
/// #     vocab_size: 32, hidden_size: 16, intermediate_size: 40, n_layers: 2, n_heads: 4,
/// #     n_kv_heads: 2, max_positions: 64, tied: true, eos_id: 1, pad_id: 0,
/// # })?;
/// let model = Transformer::init(config, 7, &burn::tensor::Device::default())?;
/// let decoder = Decoder::new(&model);
/// let (cache, logits) = decoder.prefill(&[[5, 6, 7]], 2)?;
/// assert_eq!(logits.dims(), [1, 32]);
/// // Two forks of the prompt go separate ways.
/// let mut forks = cache.select(&[0, 0]);
/// assert_eq!(decoder.step(&[8, 9], &mut forks).dims(), [2, 32]);
/// assert_eq!(cache.lengths(), [3]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Decoder<'a> {
    model: &'a Transformer,
    /// The weights for this machine's own processor, where that is the model's device.
    host: Option<HostModel>,
}

/// Keys and values of a batch of prefixes, of the decoder that made it.
///
/// A clone shares its storage until either side appends, and [`KvCache::select`] picks rows, with
/// repeats: the two ways of forking that search needs.
#[derive(Clone, Debug)]
pub struct KvCache(Store);

#[derive(Clone, Debug)]
enum Store {
    Tensors(TensorCache),
    Host(HostCache),
}

impl KvCache {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        match &self.0 {
            Store::Tensors(cache) => cache.rows(),
            Store::Host(cache) => cache.rows(),
        }
    }

    /// Tokens held by each row.
    pub fn lengths(&self) -> Vec<usize> {
        match &self.0 {
            Store::Tensors(cache) => cache.lengths(),
            Store::Host(cache) => cache.lengths(),
        }
    }

    /// Tokens that can still be appended.
    pub fn room(&self) -> usize {
        match &self.0 {
            Store::Tensors(cache) => cache.room(),
            Store::Host(cache) => cache.room(),
        }
    }

    /// A cache of the given rows, in the given order; a row may be named more than once.
    ///
    /// # Panics
    ///
    /// If a row is not there.
    #[must_use]
    pub fn select(&self, rows: &[usize]) -> Self {
        Self(match &self.0 {
            Store::Tensors(cache) => Store::Tensors(cache.select(rows)),
            Store::Host(cache) => Store::Host(cache.select(rows)),
        })
    }
}

impl<'a> Decoder<'a> {
    /// A decoder that suits the model's device.
    pub fn new(model: &'a Transformer) -> Self {
        Self {
            model,
            host: on_cpu(model).then(|| HostModel::new(model)),
        }
    }

    /// A decoder that uses the model's own tensors, on a CPU too.
    pub fn of_tensors(model: &'a Transformer) -> Self {
        Self { model, host: None }
    }

    /// The model that decodes.
    pub fn model(&self) -> &'a Transformer {
        self.model
    }

    /// Bytes of weights that a step reads, where the decoder has a copy laid out for it: all but tables
    /// that are only looked up, each as few bits as hold it exactly.
    pub fn weight_bytes(&self) -> Option<usize> {
        self.host.as_ref().map(HostModel::bytes)
    }

    /// Reads a batch of prompts into a fresh cache with room for `n_new` further tokens.
    ///
    /// Returns the cache and the logits of each row's next token, `[batch, vocab]`.
    ///
    /// # Errors
    ///
    /// An empty batch or prompt, a token outside the vocabulary, or prompts that with `n_new`
    /// tokens exceed the model's longest sequence.
    pub fn prefill<P: AsRef<[u32]>>(
        &self,
        prompts: &[P],
        n_new: usize,
    ) -> Result<(KvCache, Tensor<2>), LmError> {
        let longest = self.model.config().check_prompts(prompts, n_new)?;
        Ok(match &self.host {
            Some(host) => {
                let (cache, logits) = HostCache::prefill(host, prompts, n_new);
                (KvCache(Store::Host(cache)), self.rows(logits))
            }
            None => {
                let (cache, logits) = device::prefill(self.model, prompts, longest, n_new);
                (KvCache(Store::Tensors(cache)), logits)
            }
        })
    }

    /// Appends one token to every row and returns the logits of the next, `[batch, vocab]`.
    ///
    /// # Panics
    ///
    /// If `tokens` has another length than the cache has rows, the cache has no room, a token is
    /// outside the vocabulary, or another kind of decoder made the cache.
    pub fn step(&self, tokens: &[u32], cache: &mut KvCache) -> Tensor<2> {
        assert_eq!(tokens.len(), cache.rows(), "one token for every row");
        assert!(cache.room() > 0, "the cache is full");
        match (&self.host, &mut cache.0) {
            (Some(host), Store::Host(cache)) => self.rows(cache.step(host, tokens)),
            (None, Store::Tensors(cache)) => device::step(self.model, tokens, cache),
            _ => panic!("the cache of another kind of decoder"),
        }
    }

    /// Rows of logits as a tensor on the model's device.
    fn rows(&self, logits: Vec<f32>) -> Tensor<2> {
        rows(self.model, logits)
    }
}

/// Rows of logits as a tensor on the model's device, `[rows, vocab]`.
pub(crate) fn rows(model: &Transformer, logits: Vec<f32>) -> Tensor<2> {
    let vocab = model.config().vocab_size;
    let shape = [logits.len() / vocab, vocab];
    Tensor::from_data(TensorData::new(logits, shape), &model.device())
}

/// Whether the model's device is this machine's own processor.
pub(crate) fn on_cpu(model: &Transformer) -> bool {
    #[cfg(feature = "flex")]
    return model.device() == burn::tensor::Device::flex();
    #[cfg(not(feature = "flex"))]
    {
        let _ = model;
        false
    }
}
