//! Decoding one token at a time behind a cache of keys and values.

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::error::LmError;
use crate::model::{SeqLayout, Transformer};
use crate::sample::{Sampling, sample};

/// Keys and values of a batch of prefixes.
///
/// Rows of unequal length are padded on the left, so that every row appends at the same slot.
/// A clone shares its storage until either side appends, and [`KvCache::select`] gathers rows
/// (with repeats) in one pass: the two ways of forking that search needs.
#[derive(Clone, Debug)]
pub struct KvCache {
    /// `[batch, kv_heads, capacity, head_dim]`, keys then values.
    layers: Vec<(Tensor<4>, Tensor<4>)>,
    /// How many slots of each row are padding.
    starts: Vec<usize>,
    /// Slots in use.
    len: usize,
    capacity: usize,
}

impl KvCache {
    fn new(model: &Transformer, starts: Vec<usize>, capacity: usize, device: &Device) -> Self {
        let config = model.config();
        let shape = [starts.len(), config.n_kv_heads, capacity, config.head_dim];
        let layers = (0..config.n_layers)
            .map(|_| (Tensor::zeros(shape, device), Tensor::zeros(shape, device)))
            .collect();
        Self {
            layers,
            starts,
            len: 0,
            capacity,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.starts.len()
    }

    /// Tokens held by each row.
    pub fn lengths(&self) -> Vec<usize> {
        self.starts.iter().map(|start| self.len - start).collect()
    }

    /// Tokens that can still be appended.
    pub fn room(&self) -> usize {
        self.capacity - self.len
    }

    /// A cache of the given rows, in the given order; a row may be named more than once.
    ///
    /// # Panics
    ///
    /// If a row is not there.
    pub fn select(&self, rows: &[usize]) -> Self {
        let device = self.layers[0].0.device();
        let indices: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let indices = Tensor::<1, Int>::from_data(TensorData::new(indices, [rows.len()]), &device);
        let pick = |x: &Tensor<4>| x.clone().select(0, indices.clone());
        Self {
            layers: self
                .layers
                .iter()
                .map(|(k, v)| (pick(k), pick(v)))
                .collect(),
            starts: rows.iter().map(|&row| self.starts[row]).collect(),
            len: self.len,
            capacity: self.capacity,
        }
    }

    /// Keys and values of each layer, `[batch, kv_heads, capacity, head_dim]`.
    pub(crate) fn into_layers(self) -> Vec<(Tensor<4>, Tensor<4>)> {
        self.layers
    }

    fn layout(&self, seq: usize, device: &Device) -> SeqLayout {
        layout(&self.starts, self.len, seq, device)
    }
}

/// Earlier tokens' keys and values, as the blocks of a model see them.
pub(crate) trait Past {
    /// Takes a layer's new keys and values, `[batch, kv_heads, seq, head_dim]`, and returns them
    /// behind the old ones.
    fn append(&mut self, layer: usize, key: Tensor<4>, value: Tensor<4>) -> (Tensor<4>, Tensor<4>);

    /// Counts the new tokens, once, after the last layer.
    fn advance(&mut self, seq: usize);
}

impl Past for KvCache {
    fn append(&mut self, layer: usize, key: Tensor<4>, value: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let [batch, heads, seq, width] = key.dims();
        let end = self.len + seq;
        let slot = [0..batch, 0..heads, self.len..end, 0..width];
        let (keys, values) = &mut self.layers[layer];
        // `inplace` hands over the only reference, so that storage nobody else holds is reused.
        keys.inplace(|keys| keys.slice_assign(slot.clone(), key));
        values.inplace(|values| values.slice_assign(slot, value));
        (
            keys.clone().narrow(2, 0, end),
            values.clone().narrow(2, 0, end),
        )
    }

    fn advance(&mut self, seq: usize) {
        self.len += seq;
    }
}

/// How `seq` new tokens lie behind `len` slots of which each row's first `starts` are padding.
pub(crate) fn layout(starts: &[usize], len: usize, seq: usize, device: &Device) -> SeqLayout {
    let (batch, keys) = (starts.len(), len + seq);
    let padded = starts.iter().any(|&start| start > 0);
    let positions = starts
        .iter()
        .take(if padded { batch } else { 1 })
        .flat_map(|&start| (len..keys).map(move |slot| slot.saturating_sub(start) as u32))
        .collect();
    let mask = (padded || seq > 1).then(|| {
        let rows = if padded { batch } else { 1 };
        let mut mask = Vec::with_capacity(rows * seq * keys);
        for &start in &starts[..rows] {
            for query in len..keys {
                mask.extend((0..keys).map(|key| key < start || key > query));
            }
        }
        Tensor::<4, Bool>::from_data(TensorData::new(mask, [rows, 1, seq, keys]), device)
    });
    SeqLayout {
        batch,
        seq,
        positions,
        mask,
    }
}

impl Transformer {
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
        let device = self.device();
        let longest = self.check(prompts, n_new)?;
        let starts: Vec<usize> = prompts
            .iter()
            .map(|prompt| longest - prompt.as_ref().len())
            .collect();
        let batch = prompts.len();
        let mut cache = KvCache::new(self, starts, longest + n_new, &device);
        let mut ids = Vec::with_capacity(batch * longest);
        for prompt in prompts {
            let prompt = prompt.as_ref();
            // Padding is masked, so that any valid id does; the row's own first token is one.
            ids.extend(std::iter::repeat_n(
                i64::from(prompt[0]),
                longest - prompt.len(),
            ));
            ids.extend(prompt.iter().map(|&id| i64::from(id)));
        }
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, longest]), &device);
        let layout = cache.layout(longest, &device);
        let hidden = self.hidden_cached(ids, &layout, &mut cache);
        let [_, width] = hidden.dims();
        let last = hidden
            .reshape([batch, longest, width])
            .narrow(1, longest - 1, 1)
            .reshape([batch, width]);
        Ok((cache, self.head(last)))
    }

    /// The longest of the prompts, if the model can read them and `n_new` further tokens.
    pub(crate) fn check<P: AsRef<[u32]>>(
        &self,
        prompts: &[P],
        n_new: usize,
    ) -> Result<usize, LmError> {
        let config = self.config();
        if prompts.is_empty() {
            return Err(LmError::Request("no prompt to decode from".into()));
        }
        let mut longest = 0;
        for (row, prompt) in prompts.iter().enumerate() {
            let prompt = prompt.as_ref();
            if prompt.is_empty() {
                return Err(LmError::Request(format!("prompt {row} is empty")));
            }
            if let Some(id) = prompt.iter().find(|&&id| id as usize >= config.vocab_size) {
                return Err(LmError::Request(format!(
                    "prompt {row} holds token id {id}, outside the vocabulary of {}",
                    config.vocab_size
                )));
            }
            if prompt.len() + n_new > config.max_positions {
                return Err(LmError::Request(format!(
                    "prompt {row} has {} tokens; with {n_new} new ones it exceeds the model's {}",
                    prompt.len(),
                    config.max_positions
                )));
            }
            longest = longest.max(prompt.len());
        }
        Ok(longest)
    }

    /// Appends one token to every row and returns the logits of the next, `[batch, vocab]`.
    ///
    /// # Panics
    ///
    /// If `tokens` has another length than the cache has rows, or the cache has no room.
    pub fn step(&self, tokens: &[u32], cache: &mut KvCache) -> Tensor<2> {
        assert_eq!(tokens.len(), cache.rows(), "one token for every row");
        let ids: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_data(TensorData::new(ids, [tokens.len(), 1]), &self.device());
        self.step_tensor(ids, cache)
    }

    fn step_tensor(&self, ids: Tensor<2, Int>, cache: &mut KvCache) -> Tensor<2> {
        assert!(
            cache.room() > 0,
            "the cache of {} tokens is full",
            cache.capacity
        );
        let layout = cache.layout(1, &ids.device());
        self.head(self.hidden_cached(ids, &layout, cache))
    }

    /// Continues each prompt until an end token or the limit.
    ///
    /// Every row has its own random stream, of the seed and the row's number, so that a row's
    /// text does not depend on its neighbours.
    ///
    /// # Errors
    ///
    /// See [`Transformer::prefill`]; or a temperature, top-k or top-p out of range.
    pub fn generate<P: AsRef<[u32]>>(
        &self,
        prompts: &[P],
        options: &Generate,
    ) -> Result<Vec<Generated>, LmError> {
        if let Decoding::Sample(sampling) = &options.decoding {
            sampling.check()?;
        }
        let mut rows: Vec<Generated> = (0..prompts.len())
            .map(|_| Generated {
                ids: Vec::new(),
                ended: false,
            })
            .collect();
        if options.max_new_tokens == 0 || prompts.is_empty() {
            return Ok(rows);
        }
        let mut rngs: Vec<ChaCha8Rng> = (0..prompts.len() as u64)
            .map(|row| {
                let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
                rng.set_stream(row);
                rng
            })
            .collect();
        let (mut cache, mut logits) = self.prefill(prompts, options.max_new_tokens)?;
        // Which prompt each row of the cache belongs to.
        let mut active: Vec<usize> = (0..prompts.len()).collect();
        loop {
            let tokens = self.choose(logits, &options.decoding, &active, &mut rngs)?;
            let mut alive = Vec::with_capacity(active.len());
            for (slot, (&row, &token)) in active.iter().zip(&tokens).enumerate() {
                rows[row].ids.push(token);
                if options.eos_ids.contains(&token) {
                    rows[row].ended = true;
                } else if rows[row].ids.len() < options.max_new_tokens {
                    alive.push(slot);
                }
            }
            if alive.is_empty() {
                return Ok(rows);
            }
            // Dropping rows copies the rest once: no more bytes than a step reads anyway.
            if alive.len() < active.len() {
                cache = cache.select(&alive);
                active = alive.iter().map(|&slot| active[slot]).collect();
            }
            let tokens: Vec<u32> = alive.iter().map(|&slot| tokens[slot]).collect();
            logits = self.step(&tokens, &mut cache);
        }
    }

    fn choose(
        &self,
        logits: Tensor<2>,
        decoding: &Decoding,
        active: &[usize],
        rngs: &mut [ChaCha8Rng],
    ) -> Result<Vec<u32>, LmError> {
        let failed = |error| LmError::Request(format!("logits could not be read: {error:?}"));
        match decoding {
            Decoding::Greedy => {
                let ids = logits.argmax(1).try_into_vec_as::<i64>().map_err(failed)?;
                Ok(ids.into_iter().map(|id| id as u32).collect())
            }
            Decoding::Sample(sampling) => {
                let values = logits.try_into_vec_as::<f32>().map_err(failed)?;
                Ok(values
                    .chunks(self.config().vocab_size)
                    .zip(active)
                    .map(|(logits, &row)| sample(logits, sampling, &mut rngs[row]))
                    .collect())
            }
        }
    }
}

/// How to continue prompts.
#[derive(Clone, Debug, PartialEq)]
pub struct Generate {
    /// The most tokens to add.
    pub max_new_tokens: usize,
    /// Ids that end a row; the end token itself is kept.
    pub eos_ids: Vec<u32>,
    /// How to choose each token.
    pub decoding: Decoding,
    /// Seed of the random streams.
    pub seed: u64,
}

/// How to choose a token from its logits.
#[derive(Clone, Debug, PartialEq)]
pub enum Decoding {
    /// The most likely token; the lowest id among equals.
    Greedy,
    /// A random token.
    Sample(Sampling),
}

/// A continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// New tokens, the end token included.
    pub ids: Vec<u32>,
    /// Whether an end token came before the limit.
    pub ended: bool,
}
