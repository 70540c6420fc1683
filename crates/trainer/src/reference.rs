//! The reference's logps: computed once, before training, and kept beside the run.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use burn::tensor::{Device, Tensor};
use dpo_loss::PairTokens;
use lm::data::PreferencePair;
use lm::weights::{HostTensor, WeightFiles, write_safetensors};
use lm::{CompletionBatch, Transformer};

use crate::checkpoint::digest_of;
use crate::error::TrainError;
use crate::progress::Progress;
use crate::workers::Workers;

/// Logps of the tokens of chosen and rejected completions under one model, in the order of the
/// data.
#[derive(Clone, Debug, PartialEq)]
pub struct ReferenceLogps {
    /// Of the chosen completions.
    pub chosen: TokenRows,
    /// Of the rejected completions.
    pub rejected: TokenRows,
}

/// A number for each predicted token of some completions, one completion after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRows {
    values: Vec<f32>,
    /// Where each completion begins, and at last where the last one ends.
    bounds: Vec<usize>,
}

impl TokenRows {
    fn new(counts: impl Iterator<Item = usize>) -> Self {
        let mut bounds = vec![0];
        bounds.extend(counts.scan(0, |end, count| {
            *end += count;
            Some(*end)
        }));
        Self {
            values: vec![0.0; bounds[bounds.len() - 1]],
            bounds,
        }
    }

    /// The numbers of one completion.
    ///
    /// # Panics
    ///
    /// If there is no such completion.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[self.bounds[index]..self.bounds[index + 1]]
    }

    /// The numbers of all completions.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    fn row_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.values[self.bounds[index]..self.bounds[index + 1]]
    }

    /// The sum over each completion.
    pub fn sums(&self) -> Vec<f32> {
        (0..self.bounds.len() - 1)
            .map(|index| self.row(index).iter().sum())
            .collect()
    }
}

/// Predicted tokens of a completion; the first after an empty prompt is not.
fn n_predicted(prompt: &[u32], completion: &[u32]) -> usize {
    completion.len() - usize::from(prompt.is_empty()).min(completion.len())
}

impl ReferenceLogps {
    /// Zeros for the completions of some pairs.
    fn zeros(pairs: &[PreferencePair]) -> Self {
        let rows = |completion: fn(&PreferencePair) -> &[u32]| {
            TokenRows::new(
                pairs
                    .iter()
                    .map(|pair| n_predicted(&pair.prompt_ids, completion(pair))),
            )
        };
        Self {
            chosen: rows(|pair| &pair.chosen_ids),
            rejected: rows(|pair| &pair.rejected_ids),
        }
    }

    /// Scores all pairs, `batch_size` at a time.
    ///
    /// # Panics
    ///
    /// If the device fails.
    pub fn compute(
        reference: &Transformer,
        pairs: &[PreferencePair],
        batch_size: usize,
        workers: &Workers,
        label: &str,
    ) -> Self {
        let device = reference.device();
        let progress = Mutex::new(Progress::new(label, "pairs", pairs.len(), 0));
        let mut logps = Self::zeros(pairs);
        // Pairs of like length share a batch, so that little of it is padding.
        let mut order: Vec<usize> = (0..pairs.len()).collect();
        order.sort_by_key(|&index| longest(&pairs[index]));
        let chunks: Vec<&[usize]> = order.chunks(batch_size).collect();
        let scored = workers.map(chunks.len(), |index| {
            let chunk = chunks[index];
            let batch = pair_batch(
                chunk.iter().map(|&index| &pairs[index]),
                reference.config().hidden_size,
                &device,
            );
            let flat: Vec<f32> = reference
                .score(&batch, false)
                .flat
                .try_into_vec_as()
                .expect("logps of a working device can be read");
            progress
                .lock()
                .expect("no worker panics holding the lock")
                .advance(chunk.len(), "");
            flat
        });
        for (chunk, flat) in chunks.into_iter().zip(scored) {
            let mut left = &flat[..];
            for side in [&mut logps.chosen, &mut logps.rejected] {
                for &index in chunk {
                    let row = side.row_mut(index);
                    let (own, rest) = left.split_at(row.len());
                    row.copy_from_slice(own);
                    left = rest;
                }
            }
        }
        progress
            .into_inner()
            .expect("no worker panics holding the lock")
            .finish();
        logps
    }

    /// Other numbers of the same tokens: for each pair those of its chosen and of its rejected
    /// completion, one for each token; that of a first token which is not predicted is left out.
    ///
    /// # Panics
    ///
    /// If a completion has fewer numbers than tokens.
    pub(crate) fn of_tokens(pairs: &[PreferencePair], values: &[[Vec<f32>; 2]]) -> Self {
        let mut table = Self::zeros(pairs);
        for (index, [chosen, rejected]) in values.iter().enumerate() {
            let pair = &pairs[index];
            for (side, ids, values) in [
                (&mut table.chosen, &pair.chosen_ids, chosen),
                (&mut table.rejected, &pair.rejected_ids, rejected),
            ] {
                let row = side.row_mut(index);
                row.copy_from_slice(&values[ids.len() - row.len()..ids.len()]);
            }
        }
        table
    }

    /// The logps of some pairs, laid out as `batch`, which holds those pairs in that order.
    ///
    /// # Panics
    ///
    /// If the batch holds other completions.
    pub fn of(&self, pairs: &[usize], batch: &CompletionBatch, device: &Device) -> PairTokens {
        let flat: Vec<f32> = [&self.chosen, &self.rejected]
            .into_iter()
            .flat_map(|side| pairs.iter().flat_map(|&index| side.row(index)))
            .copied()
            .collect();
        PairTokens::from_halves(batch.table(Tensor::from_floats(&flat[..], device)))
    }

    /// The first pair with a logp that is not a finite number, and that logp.
    pub fn not_finite(&self) -> Option<(usize, f32)> {
        [&self.chosen, &self.rejected].into_iter().find_map(|side| {
            (0..side.bounds.len() - 1).find_map(|index| {
                let bad = side.row(index).iter().find(|logp| !logp.is_finite())?;
                Some((index, *bad))
            })
        })
    }

    /// Writes the logps, whole or not at all, under a key that names model and data.
    ///
    /// # Errors
    ///
    /// Any error of the file system.
    pub fn write(&self, path: &Path, key: &str) -> Result<(), TrainError> {
        let host = |values: &[f32]| HostTensor {
            shape: vec![values.len()],
            values: values.to_vec(),
        };
        let tensors: BTreeMap<String, HostTensor> = [
            ("chosen".to_string(), host(&self.chosen.values)),
            ("rejected".to_string(), host(&self.rejected.values)),
            // Key and digest are a tensor's name, so that a file of another key, or with other
            // values than were written, does not read.
            (self.seal(key), host(&[])),
        ]
        .into();
        write_safetensors(path, &tensors, &Default::default())?;
        Ok(())
    }

    /// Reads logps that were written under the same key for the same pairs; nothing where the
    /// file is missing, damaged, or of another key.
    pub fn read(path: &Path, key: &str, pairs: &[PreferencePair]) -> Option<Self> {
        let files = WeightFiles::open_file(path).ok()?;
        let mut logps = Self::zeros(pairs);
        for (name, side) in [
            ("chosen", &mut logps.chosen),
            ("rejected", &mut logps.rejected),
        ] {
            side.values = files.read(name, &[side.values.len()]).ok()?.values;
        }
        files.shape(&logps.seal(key))?;
        Some(logps)
    }

    /// The key with a digest of the values.
    fn seal(&self, key: &str) -> String {
        let values = self.chosen.values.iter().chain(&self.rejected.values);
        let bytes: Vec<u8> = values.flat_map(|value| value.to_le_bytes()).collect();
        format!("key.{key}.{}", digest_of(&bytes))
    }
}

fn longest(pair: &PreferencePair) -> usize {
    pair.prompt_ids.len() + pair.chosen_ids.len().max(pair.rejected_ids.len())
}

/// A batch of the chosen completions of some pairs, followed by their rejected ones, for a model
/// `hidden_size` wide.
pub fn pair_batch<'a>(
    pairs: impl Iterator<Item = &'a PreferencePair>,
    hidden_size: usize,
    device: &Device,
) -> CompletionBatch {
    let pairs: Vec<(&[u32], &[u32], &[u32])> = pairs
        .map(|pair| {
            (
                &pair.prompt_ids[..],
                &pair.chosen_ids[..],
                &pair.rejected_ids[..],
            )
        })
        .collect();
    CompletionBatch::for_pairs(&pairs, hidden_size, device)
}
