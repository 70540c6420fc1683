//! The reference's logps: computed once, before training, and kept beside the run.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use lm::data::PreferencePair;
use lm::weights::{HostTensor, WeightFiles, write_safetensors};
use lm::{CompletionBatch, Transformer};

use crate::checkpoint::digest_of;
use crate::error::TrainError;
use crate::progress::Progress;

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
    pub fn compute(
        reference: &Transformer,
        pairs: &[PreferencePair],
        batch_size: usize,
        label: &str,
    ) -> Self {
        let device = reference.device();
        let mut progress = Progress::new(label, "pairs", pairs.len(), 0);
        let mut logps = Self {
            chosen: vec![0.0; pairs.len()],
            rejected: vec![0.0; pairs.len()],
        };
        // Pairs of like length share a batch, so that little of it is padding.
        let mut order: Vec<usize> = (0..pairs.len()).collect();
        order.sort_by_key(|&index| longest(&pairs[index]));
        for chunk in order.chunks(batch_size) {
            let batch = pair_batch(chunk.iter().map(|&index| &pairs[index]), &device);
            let sums: Vec<f32> = reference
                .score(&batch, false)
                .table
                .sums()
                .try_into_vec_as()
                .expect("logps of a working device can be read");
            for (slot, &index) in chunk.iter().enumerate() {
                logps.chosen[index] = sums[slot];
                logps.rejected[index] = sums[chunk.len() + slot];
            }
            progress.advance(chunk.len(), "");
        }
        progress.finish();
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

/// A batch of the chosen completions of some pairs, followed by their rejected ones.
pub fn pair_batch<'a>(
    pairs: impl Iterator<Item = &'a PreferencePair> + Clone,
    device: &Device,
) -> CompletionBatch {
    let chosen = pairs
        .clone()
        .map(|pair| (&pair.prompt_ids[..], &pair.chosen_ids[..]));
    let rejected = pairs.map(|pair| (&pair.prompt_ids[..], &pair.rejected_ids[..]));
    let rows: Vec<(&[u32], &[u32])> = chosen.chain(rejected).collect();
    CompletionBatch::new(&rows, device)
}
