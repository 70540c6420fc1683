//! The reference's logps: computed once, before training, and kept beside the run.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use burn::tensor::{Device, Tensor};
use dpo_loss::{Objectives, PairTokens};
use lm::data::PreferencePair;
use lm::weights::{HostTensor, WeightFiles, write_safetensors};
use lm::{CompletionBatch, Transformer};

use crate::checkpoint::digest_of;
use crate::error::TrainError;
use crate::progress::Progress;
use crate::workers::Workers;

/// Summed logps of chosen and rejected completions under the reference, in the order of the data.
#[derive(Clone, Debug, PartialEq)]
pub struct ReferenceLogps {
    /// One for each pair, nats.
    pub chosen: Vec<f32>,
    /// One for each pair, nats.
    pub rejected: Vec<f32>,
}

impl ReferenceLogps {
    /// Scores all pairs, `batch_size` at a time.
    ///
    /// # Panics
    ///
    /// If the device fails.
    pub fn compute(
        reference: &Transformer,
        pairs: &[PreferencePair],
        batch_size: usize,
        objectives: &Objectives,
        workers: &Workers,
        label: &str,
    ) -> Self {
        let device = reference.device();
        let progress = Mutex::new(Progress::new(label, "pairs", pairs.len(), 0));
        let mut logps = Self {
            chosen: vec![0.0; pairs.len()],
            rejected: vec![0.0; pairs.len()],
        };
        // Pairs of like length share a batch, so that little of it is padding.
        let mut order: Vec<usize> = (0..pairs.len()).collect();
        order.sort_by_key(|&index| longest(&pairs[index]));
        let chunks: Vec<&[usize]> = order.chunks(batch_size).collect();
        let sums = workers.map(chunks.len(), |index| {
            let chunk = chunks[index];
            let batch = pair_batch(
                chunk.iter().map(|&index| &pairs[index]),
                reference.config().hidden_size,
                &device,
            );
            let table = reference.score(&batch, false).table;
            // As the objectives sum the policy's, so that both sides are alike.
            let sums = objectives.sums(&PairTokens::from_halves(table));
            let sums: Vec<f32> = Tensor::cat(vec![sums.chosen, sums.rejected], 0)
                .try_into_vec_as()
                .expect("logps of a working device can be read");
            progress
                .lock()
                .expect("no worker panics holding the lock")
                .advance(chunk.len(), "");
            sums
        });
        for (chunk, sums) in chunks.into_iter().zip(sums) {
            for (slot, &index) in chunk.iter().enumerate() {
                logps.chosen[index] = sums[slot];
                logps.rejected[index] = sums[chunk.len() + slot];
            }
        }
        progress
            .into_inner()
            .expect("no worker panics holding the lock")
            .finish();
        logps
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
            ("chosen".to_string(), host(&self.chosen)),
            ("rejected".to_string(), host(&self.rejected)),
            // Key and digest are a tensor's name, so that a file of another key, or with other
            // values than were written, does not read.
            (self.seal(key), host(&[])),
        ]
        .into();
        write_safetensors(path, &tensors, &Default::default())?;
        Ok(())
    }

    /// Reads logps that were written under the same key for as many pairs; nothing where the file
    /// is missing, damaged, or of another key.
    pub fn read(path: &Path, key: &str, n_pairs: usize) -> Option<Self> {
        let files = WeightFiles::open_file(path).ok()?;
        let logps = Self {
            chosen: files.read("chosen", &[n_pairs]).ok()?.values,
            rejected: files.read("rejected", &[n_pairs]).ok()?.values,
        };
        files.shape(&logps.seal(key))?;
        Some(logps)
    }

    /// The key with a digest of the values.
    fn seal(&self, key: &str) -> String {
        let values = self.chosen.iter().chain(&self.rejected);
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
