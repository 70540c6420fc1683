//! One training step: micro-batches, backward, clip, update.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use dpo_loss::{Beta, Objectives, PairBatch, PairLogps, PairTokens};
use implicit_reward::PairRewards;
use lm::{CompletionBatch, Scored, Transformer};

use crate::optimizer::{AdamW, FlatGradients};
use crate::workers::Workers;

/// A model in training.
#[derive(Debug)]
pub struct Learner {
    /// The policy, on an autodiff device.
    pub model: Transformer,
    /// Its optimizer.
    pub optimizer: AdamW,
    /// Threads that take micro-batches side by side.
    workers: Workers,
}

/// The loss of a micro-batch, and what is logged of it.
#[derive(Debug)]
pub struct MicroBatch {
    /// One value, with its graph.
    pub loss: Tensor<1>,
    /// Names of `values`.
    pub names: &'static [&'static str],
    /// One value for each name, without graph.
    pub values: Tensor<1>,
    /// Tokens of prompts and completions.
    pub n_tokens: usize,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean of the micro-batches' losses, before the update.
    pub loss: f64,
    /// The gradient's global norm, before clipping.
    pub grad_norm: f64,
    /// Means over the micro-batches, before the update.
    pub metrics: Vec<(&'static str, f64)>,
    /// Loss of each micro-batch.
    pub micro_losses: Vec<f64>,
    /// Tokens of prompts and completions.
    pub n_tokens: usize,
    /// Whether the update was made; it is not where loss or norm is not a number.
    pub updated: bool,
}

impl Learner {
    /// Begins training `model`, which is on a plain device.
    pub fn new(model: Transformer, optimizer: AdamW) -> Self {
        Self {
            model: model.train(),
            optimizer,
            workers: Workers::new(1),
        }
    }

    /// Takes the micro-batches of a step side by side on these threads.
    #[must_use]
    pub fn with_workers(mut self, workers: Workers) -> Self {
        self.workers = workers;
        self
    }

    /// The model without its graph.
    pub fn snapshot(&self) -> Transformer {
        self.model.valid()
    }

    /// Averages the gradients of `n` micro-batches, each made by `micro`, and updates once.
    ///
    /// The result does not depend on the number of workers: each micro-batch is computed alike,
    /// and sums are taken in the order of the micro-batches.
    ///
    /// # Panics
    ///
    /// If `n` is zero, or values cannot be read from the device.
    pub fn step(
        &mut self,
        n: usize,
        learning_rate: f64,
        micro: impl Fn(&Transformer, usize) -> MicroBatch + Sync,
    ) -> StepOutcome {
        assert!(n > 0, "a step has micro-batches");
        let share = 1.0 / n as f64;
        let model = &self.model;
        let alone = n == 1 || self.workers.count() == 1;
        let results = self.workers.map(n, |index| {
            if alone {
                backward(model, micro(model, index))
            } else {
                // A graph of its own for each thread: leaves that two graphs share would tie
                // their backward passes to one lock.
                let model = model.valid().train();
                backward(&model, micro(&model, index))
            }
        });
        let mut gradients = FlatGradients::default();
        let mut metrics: Vec<(&'static str, f64)> = Vec::new();
        let mut micro_losses = Vec::with_capacity(n);
        let mut n_tokens = 0;
        for (index, result) in results.into_iter().enumerate() {
            n_tokens += result.n_tokens;
            gradients.add(result.gradients, share);
            micro_losses.push(f64::from(result.values[0]));
            let named = result.names.iter().copied().zip(&result.values[1..]);
            if index == 0 {
                metrics = named
                    .map(|(name, &x)| (name, f64::from(x) * share))
                    .collect();
            } else {
                for ((_, sum), (_, &x)) in metrics.iter_mut().zip(named) {
                    *sum += f64::from(x) * share;
                }
            }
        }
        let loss = micro_losses.iter().sum::<f64>() * share;
        let grad_norm = gradients.norm();
        let updated = loss.is_finite() && grad_norm.is_finite();
        if updated {
            let model = self.model.clone();
            self.model = self
                .optimizer
                .step(model, gradients, grad_norm, learning_rate);
        }
        StepOutcome {
            loss,
            grad_norm,
            metrics,
            micro_losses,
            n_tokens,
            updated,
        }
    }
}

/// A micro-batch after its backward pass.
struct Backward {
    gradients: FlatGradients,
    names: &'static [&'static str],
    /// The loss, then a value for each name.
    values: Vec<f32>,
    n_tokens: usize,
}

fn backward(model: &Transformer, batch: MicroBatch) -> Backward {
    let gradients = FlatGradients::take(batch.loss.backward(), model);
    // The one read of a micro-batch.
    let values = Tensor::cat(vec![batch.loss.inner(), batch.values], 0)
        .try_into_vec_as()
        .expect("values of a working device can be read");
    Backward {
        gradients,
        names: batch.names,
        values,
        n_tokens: batch.n_tokens,
    }
}

/// Names of the preference stage's metrics, as TRL has them.
pub const PREFERENCE_METRICS: [&str; 10] = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
];

/// Names of the fine-tuning stage's metrics, as TRL has them.
pub const SFT_METRICS: [&str; 2] = ["entropy", "mean_token_accuracy"];

/// A preference micro-batch: the loss of its pairs under the objectives, DPO's by default.
///
/// The batch holds the chosen completions, then in the same order the rejected ones; `reference`
/// holds the reference's summed logps of each.
///
/// # Panics
///
/// If the objectives need more than summed reference logps, which a checked recipe does not ask.
pub fn preference_micro_batch(
    model: &Transformer,
    batch: &CompletionBatch,
    reference: &PairLogps,
    objectives: &Objectives,
    beta: Beta,
) -> MicroBatch {
    let scored = model.score(batch, true);
    let (loss, policy) = preference_loss(&scored, reference, objectives, beta);
    MicroBatch {
        loss,
        names: &PREFERENCE_METRICS,
        values: preference_values(&scored, batch, &policy, reference, beta),
        n_tokens: batch.n_tokens(),
    }
}

/// The loss of a scored batch, and the policy's summed logps as the objectives see them.
pub(crate) fn preference_loss(
    scored: &Scored,
    reference: &PairLogps,
    objectives: &Objectives,
    beta: Beta,
) -> (Tensor<1>, PairLogps) {
    let tokens = PairTokens::from_halves(scored.table.clone());
    let policy = objectives.sums(&tokens);
    let loss = objectives
        .loss(&PairBatch::new(tokens, reference.clone()), beta)
        .expect("a checked recipe names objectives that summed reference logps suffice for");
    (loss, policy)
}

/// The values of [`PREFERENCE_METRICS`] for a scored batch.
///
/// # Panics
///
/// If the batch was scored without statistics.
pub fn preference_values(
    scored: &Scored,
    batch: &CompletionBatch,
    policy: &PairLogps,
    reference: &PairLogps,
    beta: Beta,
) -> Tensor<1> {
    let policy = PairLogps {
        chosen: plain(policy.chosen.clone()),
        rejected: plain(policy.rejected.clone()),
    };
    let rewards = PairRewards::new(&policy, reference, beta);
    let pairs = batch.counts().len() / 2;
    let n_chosen: usize = batch.counts()[..pairs].iter().sum();
    let n_all: usize = batch.counts().iter().sum();
    let stats = scored
        .stats
        .as_ref()
        .expect("preference batches are scored with statistics");
    let mean = |values: &Tensor<1>, from: usize, to: usize| {
        plain(values.clone()).narrow(0, from, to - from).mean()
    };
    Tensor::cat(
        vec![
            rewards.chosen.clone().mean(),
            rewards.rejected.clone().mean(),
            rewards.margins().mean(),
            rewards.accuracies().mean(),
            policy.chosen.clone().mean(),
            policy.rejected.clone().mean(),
            mean(&stats.mean_logit, 0, n_chosen),
            mean(&stats.mean_logit, n_chosen, n_all),
            mean(&stats.entropy, 0, n_all),
            mean(&stats.top1, 0, n_chosen),
        ],
        0,
    )
}

/// A fine-tuning micro-batch: the mean negative logp of its completion tokens.
#[expect(
    clippy::missing_panics_doc,
    reason = "the statistics are asked for here"
)]
pub fn sft_micro_batch(model: &Transformer, batch: &CompletionBatch) -> MicroBatch {
    let scored = model.score(batch, true);
    let stats = scored.stats.expect("the statistics were asked for");
    MicroBatch {
        loss: -scored.flat.mean(),
        names: &SFT_METRICS,
        values: Tensor::cat(
            vec![plain(stats.entropy).mean(), plain(stats.top1).mean()],
            0,
        ),
        n_tokens: batch.n_tokens(),
    }
}

/// The value without its graph, whether it has one or not.
fn plain(tensor: Tensor<1>) -> Tensor<1> {
    if tensor.is_autodiff() {
        tensor.inner()
    } else {
        tensor
    }
}

/// Uploads one number for each pair.
pub fn pair_logps(chosen: &[f32], rejected: &[f32], device: &Device) -> PairLogps {
    PairLogps {
        chosen: Tensor::from_floats(chosen, device),
        rejected: Tensor::from_floats(rejected, device),
    }
}
