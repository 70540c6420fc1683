//! Continuing prompts, greedily or at random.

use burn::tensor::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::Decoder;
use crate::error::LmError;
use crate::model::Transformer;
use crate::sample::{Sampling, sample};

/// Stands on a device for the token of a row whose logits are no numbers.
const NO_TOKEN: i64 = -1;

impl Decoder<'_> {
    /// Continues each prompt until an end token or the limit.
    ///
    /// Every row has its own random stream, of the seed and the row's number, so that a row's
    /// text does not depend on its neighbours.
    ///
    /// # Errors
    ///
    /// See [`Decoder::prefill`]; or a temperature, top-k or top-p out of range; or
    /// [`LmError::Logits`].
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
            // All rows that are left have as many.
            let n_drawn = rows[active[0]].ids.len();
            let tokens = self.choose(logits, &options.decoding, &active, &mut rngs, n_drawn)?;
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
            // On a device, dropping rows copies the rest once: no more bytes than a step reads.
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
        n_drawn: usize,
    ) -> Result<Vec<u32>, LmError> {
        let failed = |error| LmError::Request(format!("logits could not be read: {error:?}"));
        let tokens: Option<Vec<u32>> = match decoding {
            Decoding::Greedy => {
                // One token a row comes back from the device, and none where the logits are no
                // distribution: where one is NaN, so is the sum, and else the largest is finite.
                let holed = logits.clone().sum_dim(1).is_nan();
                let ids = logits.clone().argmax(1);
                let endless = logits.gather(1, ids.clone()).is_inf();
                let ids = ids.mask_fill(holed.bool_or(endless), NO_TOKEN);
                let ids = ids.try_into_vec_as::<i64>().map_err(failed)?;
                ids.into_iter().map(|id| u32::try_from(id).ok()).collect()
            }
            Decoding::Sample(sampling) => {
                let values = logits.try_into_vec_as::<f32>().map_err(failed)?;
                values
                    .chunks(self.model.config().vocab_size)
                    .zip(active)
                    .map(|(logits, &row)| sample(logits, sampling, &mut rngs[row]))
                    .collect()
            }
        };
        tokens.ok_or(LmError::Logits { tokens: n_drawn })
    }
}

impl Transformer {
    /// Continues each prompt until an end token or the limit, as [`Decoder::generate`].
    ///
    /// # Errors
    ///
    /// See [`Decoder::generate`].
    pub fn generate<P: AsRef<[u32]>>(
        &self,
        prompts: &[P],
        options: &Generate,
    ) -> Result<Vec<Generated>, LmError> {
        Decoder::new(self).generate(prompts, options)
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
