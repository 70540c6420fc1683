//! The policy, and the models of the baselines.

use std::path::Path;

use burn::tensor::Tensor;
use burn::tensor::activation::log_sigmoid;
use implicit_reward::Beta;
use lm::data::PreferencePair;
use lm::{CompletionBatch, Transformer};
use memo_task::Completion;

use super::{CreditOptions, split, token_logps};
use crate::error::TrainError;
use crate::learner::{Activations, MicroBatch, sft_micro_batch};
use crate::prepare::prepare;
use crate::recipe::Recipe;
use crate::reference::pair_batch;
use crate::reproduce::fit::Descent;
use crate::run::{RunOptions, is_run, train};
use crate::workers::Workers;

/// Rows that are scored together.
const ROWS: usize = 64;

/// All models of a seed.
#[derive(Debug)]
pub(super) struct Models {
    pub policy: Transformer,
    pub reference: Transformer,
    /// The reference, trained further on the chosen completions alone.
    sft_on_chosen: Transformer,
    /// A model that learnt nothing.
    random: Transformer,
    /// The logit of `unknown` behind a text is its reward.
    reward_model: Transformer,
    unknown: u32,
    beta: Beta,
    pub policy_accuracy: f64,
    pub reward_model_accuracy: f64,
    pub accuracy_ceiling: f64,
}

/// Trains the policy by its recipe, or takes it from a run that is whole, then the baselines on the
/// same pairs.
pub(super) fn train_all(
    recipe: &Recipe,
    options: &CreditOptions,
    folder: &Path,
    workers: &Workers,
) -> Result<Models, TrainError> {
    let run = RunOptions {
        out: Some(folder.to_path_buf()),
        device: options.device.clone(),
        resume: is_run(folder),
        cache: None,
        command: options.command.clone(),
    };
    let summary = train(recipe, &run)?.summary;
    let number = |key: &str| summary.get(key).and_then(serde_json::Value::as_f64);
    let device = crate::device::device(&options.device)?;
    let prepared = prepare(recipe, &device)?;
    let reference = Transformer::read(&folder.join("sft"), &device)?;
    let policy = Transformer::read(&folder.join("model"), &device)?;
    let task = prepared.task.as_ref().expect("a checked recipe has a task");
    let unknown = task.task.unk_id();

    let width = reference.config().hidden_size;
    let chosen = |model: &Transformer, batch: &[usize]| {
        let rows: Vec<(&[u32], &[u32])> = batch
            .iter()
            .map(|&index| &prepared.train[index])
            .map(|pair| (&pair.prompt_ids[..], &pair.chosen_ids[..]))
            .collect();
        let batch = CompletionBatch::new(&rows, &model.device());
        sft_micro_batch(model, &batch, Activations::Keep)
    };
    let n = prepared.train.len();
    let sft_on_chosen = fit(&reference, n, recipe, workers, "SFT on chosen", chosen)?;
    let pairs: Vec<PreferencePair> = open_ended(&prepared.train, unknown);
    let compare = |model: &Transformer, batch: &[usize]| {
        let batch = pair_batch(
            batch.iter().map(|&index| &pairs[index]),
            width,
            &model.device(),
        );
        let margins = margins(model, &batch, unknown);
        let right = margins.clone().inner().greater_elem(0.0).float().mean();
        MicroBatch {
            loss: -log_sigmoid(margins).mean(),
            names: vec!["accuracy"],
            values: right,
            weights: Vec::new(),
            n_tokens: batch.n_tokens(),
            checkpointed: None,
        }
    };
    let reward_model = fit(&reference, n, recipe, workers, "reward model", compare)?;
    let held_out = open_ended(&prepared.eval, unknown);
    let chunks: Vec<_> = held_out.chunks(ROWS).collect();
    let right: Vec<f64> = workers.map(chunks.len(), |index| {
        let batch = pair_batch(chunks[index].iter(), width, &device);
        let margins: Vec<f32> = margins(&reward_model, &batch, unknown)
            .try_into_vec_as()
            .expect("margins of a working device can be read");
        margins.iter().filter(|&&margin| margin > 0.0).count() as f64
    });
    // Another seed than the one that the policy began from.
    let random = Transformer::init(reference.config().clone(), !recipe.seed, &device)?;
    Ok(Models {
        policy,
        sft_on_chosen,
        random,
        reward_model,
        unknown,
        beta: recipe.preference.beta,
        policy_accuracy: number("eval_reward_accuracy").unwrap_or(0.0),
        reward_model_accuracy: right.iter().sum::<f64>() / held_out.len().max(1) as f64,
        accuracy_ceiling: task.ceiling,
        reference,
    })
}

/// Pairs whose completions have one more token, so that there are logits behind the last of them.
fn open_ended(pairs: &[PreferencePair], unknown: u32) -> Vec<PreferencePair> {
    let longer = |ids: &[u32]| ids.iter().copied().chain([unknown]).collect();
    let pairs = pairs.iter().map(|pair| PreferencePair {
        prompt_ids: pair.prompt_ids.clone(),
        chosen_ids: longer(&pair.chosen_ids),
        rejected_ids: longer(&pair.rejected_ids),
        row: pair.row,
    });
    pairs.collect()
}

/// Rewards of the chosen completions less those of the rejected, `[n_pairs]`, nats of the label.
fn margins(model: &Transformer, batch: &CompletionBatch, unknown: u32) -> Tensor<1> {
    let mut end = 0;
    let lasts: Vec<i64> = batch
        .counts()
        .iter()
        .map(|&count| {
            end += count;
            end as i64 - 1
        })
        .collect();
    let hidden = model.completion_hidden(batch);
    let lasts = Tensor::from_ints(&lasts[..], &hidden.device());
    let logits = model.head(hidden.select(0, lasts));
    let n = batch.counts().len();
    let rewards = logits.narrow(1, unknown as usize, 1).reshape([n]);
    rewards.clone().narrow(0, 0, n / 2) - rewards.narrow(0, n / 2, n / 2)
}

/// Trains a copy of a model by the numbers of the preference stage.
fn fit(
    model: &Transformer,
    n: usize,
    recipe: &Recipe,
    workers: &Workers,
    name: &str,
    micro: impl Fn(&Transformer, &[usize]) -> MicroBatch + Sync,
) -> Result<Transformer, TrainError> {
    let descent = Descent::preference(name, n, &recipe.preference, recipe.seed);
    descent.run(model, workers, micro, |_, _| Ok(()))
}

impl Models {
    /// Every token of some completions under each of the [`METHODS`](super::METHODS), in their
    /// order: `[method][completion][token]`.
    pub(super) fn scores(
        &self,
        texts: &[(&Vec<u32>, &Completion)],
        workers: &Workers,
    ) -> Vec<Vec<Vec<f64>>> {
        let rows: Vec<(&[u32], &[u32])> = texts
            .iter()
            .map(|(prompt, completion)| (&prompt[..], &completion.ids[..]))
            .collect();
        let policy = token_logps(&self.policy, &rows, workers);
        let reference = token_logps(&self.reference, &rows, workers);
        let chosen = token_logps(&self.sft_on_chosen, &rows, workers);
        let random = token_logps(&self.random, &rows, workers);
        let over = |ours: &[Vec<f64>], theirs: &[Vec<f64>]| -> Vec<Vec<f64>> {
            let pairs = ours.iter().zip(theirs);
            pairs
                .map(|(ours, theirs)| rewards(ours, theirs, self.beta))
                .collect()
        };
        vec![
            over(&policy, &reference),
            reference.clone(),
            policy.clone(),
            over(&chosen, &reference),
            over(&policy, &random),
            self.prefix_differences(&rows, workers),
        ]
    }

    /// How much each token changes what the reward model says of the text so far.
    fn prefix_differences(&self, rows: &[(&[u32], &[u32])], workers: &Workers) -> Vec<Vec<f64>> {
        let longer: Vec<Vec<u32>> = rows
            .iter()
            .map(|(_, ids)| ids.iter().copied().chain([self.unknown]).collect())
            .collect();
        let rows: Vec<(&[u32], &[u32])> = rows
            .iter()
            .zip(&longer)
            .map(|(&(prompt, _), ids)| (prompt, &ids[..]))
            .collect();
        let model = &self.reward_model;
        let chunks: Vec<_> = rows.chunks(ROWS).collect();
        let found = workers.map(chunks.len(), |index| {
            let batch = CompletionBatch::new(chunks[index], &model.device());
            let flat: Vec<f32> = model
                .completion_logits(&batch)
                .narrow(1, self.unknown as usize, 1)
                .try_into_vec_as()
                .expect("logits of a working device can be read");
            let rewards = split(&flat, batch.counts());
            let differences = |rewards: &Vec<f64>| -> Vec<f64> {
                rewards.windows(2).map(|two| two[1] - two[0]).collect()
            };
            rewards.iter().map(differences).collect::<Vec<_>>()
        });
        found.concat()
    }
}

/// `β log(π/π_ref)` of each token, reward units.
fn rewards(ours: &[f64], theirs: &[f64], beta: Beta) -> Vec<f64> {
    let pairs = ours.iter().zip(theirs);
    pairs
        .map(|(ours, theirs)| beta.get() * (ours - theirs))
        .collect()
}
