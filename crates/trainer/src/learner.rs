//! One training step: micro-batches, backward, clip, update.

use std::ops::Range;
use std::panic::resume_unwind;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use dpo_loss::{
    Beta, Objectives, PairBatch, PairInputs, PairLogps, PairTable, PairTokens, ReferenceLogps,
    TokenLogps, log_sum_sq_probs, position_kls,
};
use implicit_reward::PairRewards;
use lm::{Checkpointed, CompletionBatch, Scored, Transformer};

use crate::mix::mixed;
use crate::optimizer::{AdamW, FlatGradients};
use crate::workers::Workers;

/// A model in training.
#[derive(Debug)]
pub struct Learner {
    /// The policy, on an autodiff device; away while the optimizer has it.
    model: Option<Transformer>,
    /// Its optimizer.
    pub optimizer: AdamW,
    /// A reference that follows the policy, on a plain device.
    pub reference: Option<Transformer>,
    /// Threads that take micro-batches side by side.
    workers: Workers,
    /// Devices that take micro-batches side by side, if they are several; the model is on the first.
    devices: Vec<Device>,
}

/// The loss of a micro-batch, and what is logged of it.
#[derive(Debug)]
pub struct MicroBatch {
    /// One value, with its graph.
    pub loss: Tensor<1>,
    /// Names of `values`.
    pub names: Vec<&'static str>,
    /// One value for each name, without graph.
    pub values: Tensor<1>,
    /// How much each value counts in the mean over a step's micro-batches; where there are none, all
    /// micro-batches count alike.
    pub weights: Vec<f64>,
    /// Tokens of prompts and completions.
    pub n_tokens: usize,
    /// The forward pass, where its blocks are to run again on the way back.
    pub checkpointed: Option<Checkpointed>,
}

impl MicroBatch {
    /// The same with a weight in its step, where 1 is what all have by themselves.
    #[must_use]
    pub fn weighted(self, weight: f64) -> Self {
        Self {
            loss: self.loss.mul_scalar(weight),
            weights: vec![weight; self.names.len()],
            ..self
        }
    }
}

/// What becomes of the activations that a backward pass needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// They are kept.
    #[default]
    Keep,
    /// Those of a block are computed again when its turn comes: gradient checkpointing.
    Recompute,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean of the micro-batches' losses, before the update.
    pub loss: f64,
    /// The gradient's global norm, before clipping.
    pub grad_norm: f64,
    /// Means over the micro-batches that have a value, before the update.
    pub metrics: Vec<(&'static str, f64)>,
    /// Loss of each micro-batch.
    pub micro_losses: Vec<f64>,
    /// Tokens of prompts and completions.
    pub n_tokens: usize,
    /// Whether the update was made; it is not where loss or norm is not a number.
    pub updated: bool,
}

impl StepOutcome {
    /// Which of loss and norm is not a number, and what it is, where no update was made.
    pub(crate) fn not_finite(&self) -> (&'static str, f64) {
        if self.loss.is_finite() {
            ("gradient norm", self.grad_norm)
        } else {
            ("loss", self.loss)
        }
    }
}

impl Learner {
    /// Begins training `model`, which is on a plain device.
    pub fn new(model: Transformer, optimizer: AdamW) -> Self {
        Self {
            workers: Workers::on(&model.device(), 1),
            model: Some(model.train()),
            optimizer,
            reference: None,
            devices: Vec::new(),
        }
    }

    /// Divides the micro-batches of a step among these devices, on the first of which the model is.
    ///
    /// Each has a copy of the policy, made anew at every step, and a thread that computes its
    /// gradients; they are summed on the first device, where the update is made. This is Burn's own
    /// strategy of several devices with the optimizer on the main one, with the sums in the order of
    /// the micro-batches: devices that compute alike do together what one of them does alone.
    #[must_use]
    pub fn with_devices(mut self, devices: &[Device]) -> Self {
        self.devices = devices.to_vec();
        self
    }

    /// Takes the micro-batches of a step side by side on these threads.
    #[must_use]
    pub fn with_workers(mut self, workers: Workers) -> Self {
        self.workers = workers;
        self
    }

    /// Moves the reference that follows the policy: `(1 − alpha) reference + alpha policy`.
    pub fn sync_reference(&mut self, alpha: f64) {
        if let Some(reference) = self.reference.take() {
            self.reference = Some(mixed(reference, &self.snapshot(), alpha));
        }
    }

    /// The model without its graph.
    pub fn snapshot(&self) -> Transformer {
        self.model().valid()
    }

    fn model(&self) -> &Transformer {
        let model = self.model.as_ref();
        model.expect("no step panicked while the optimizer had the model")
    }

    /// Averages the gradients of `n` micro-batches, each made by `micro`, and updates once.
    ///
    /// `micro` computes where the model that it is given is. The result does not depend on the number
    /// of workers or of equal devices: each micro-batch is computed alike, and sums are taken in the
    /// order of the micro-batches.
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
        let workers = self.workers.clone();
        let mut gradients = FlatGradients::default();
        let mut metrics: Vec<(&'static str, f64, f64)> = Vec::new();
        let mut micro_losses = Vec::with_capacity(n);
        let mut n_tokens = 0;
        self.each_backward(n, micro, |result| {
            n_tokens += result.n_tokens;
            workers.run(|| gradients.add(result.gradients));
            micro_losses.push(f64::from(result.values[0]));
            if metrics.is_empty() {
                metrics = result.names.iter().map(|&name| (name, 0.0, 0.0)).collect();
            }
            let weights = result.weights.into_iter().chain(std::iter::repeat(1.0));
            for (((_, sum, all), &x), weight) in
                metrics.iter_mut().zip(&result.values[1..]).zip(weights)
            {
                // What a micro-batch has no example of, the others tell.
                if !x.is_nan() {
                    *sum += weight * f64::from(x);
                    *all += weight;
                }
            }
        });
        let metrics = metrics
            .into_iter()
            .map(|(name, sum, all)| (name, sum / all))
            .collect();
        let loss = micro_losses.iter().sum::<f64>() * share;
        // Handed over, not cloned: weights that nobody else holds are updated where they stand.
        let (model, optimizer) = (&mut self.model, &mut self.optimizer);
        let (grad_norm, updated) = workers.run(|| {
            let grad_norm = share * gradients.norm();
            let updated = loss.is_finite() && grad_norm.is_finite();
            if updated {
                *model = model
                    .take()
                    .map(|model| optimizer.step(model, gradients, share, grad_norm, learning_rate));
            }
            (grad_norm, updated)
        });
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

impl Learner {
    /// Hands the backward passes of `n` micro-batches to `take`, in order, with gradients where the
    /// model is.
    ///
    /// As many at a time as there are workers, or devices if they are several: no more gradients than
    /// that wait to be added up.
    fn each_backward(
        &self,
        n: usize,
        micro: impl Fn(&Transformer, usize) -> MicroBatch + Sync,
        mut take: impl FnMut(Backward),
    ) {
        let several = n > 1 && self.devices.len() > 1;
        let devices = self.devices.iter().take(if several { n } else { 0 });
        let replicas: Vec<Transformer> = devices
            .map(|device| self.snapshot().to_device(device).train())
            .collect();
        let together = if several {
            replicas.len()
        } else {
            self.workers.count()
        };
        for first in (0..n).step_by(together) {
            let wave = first..(first + together).min(n);
            let results = if several {
                self.on_devices(&replicas, wave, &micro)
            } else {
                self.on_workers(wave, &micro)
            };
            results.into_iter().for_each(&mut take);
        }
    }

    /// Some micro-batches side by side, a thread for each, or all threads for one.
    fn on_workers(
        &self,
        wave: Range<usize>,
        micro: &(impl Fn(&Transformer, usize) -> MicroBatch + Sync),
    ) -> Vec<Backward> {
        let model = self.model();
        if wave.len() == 1 {
            let one = || backward(model, micro(model, wave.start));
            return vec![self.workers.run(one)];
        }
        self.workers.map(wave.len(), |index| {
            // A graph of its own for each thread: leaves that two graphs share would tie their
            // backward passes to one lock.
            let model = model.valid().train();
            backward(&model, micro(&model, wave.start + index))
        })
    }

    /// Some micro-batches side by side, a device for each.
    fn on_devices(
        &self,
        replicas: &[Transformer],
        wave: Range<usize>,
        micro: &(impl Fn(&Transformer, usize) -> MicroBatch + Sync),
    ) -> Vec<Backward> {
        let main = &self.model().device().inner();
        std::thread::scope(|scope| {
            let one = |(model, index)| {
                scope.spawn(move || {
                    let mut result = backward(model, micro(model, index));
                    result.gradients = result.gradients.to_device(main);
                    result
                })
            };
            let threads: Vec<_> = replicas.iter().zip(wave).map(one).collect();
            let joined = threads.into_iter().map(|thread| {
                // What a device said of its memory is for the run to tell.
                thread.join().unwrap_or_else(|said| resume_unwind(said))
            });
            joined.collect()
        })
    }
}

/// A micro-batch after its backward pass.
struct Backward {
    gradients: FlatGradients,
    names: Vec<&'static str>,
    /// The loss, then a value for each name.
    values: Vec<f32>,
    weights: Vec<f64>,
    n_tokens: usize,
}

fn backward(model: &Transformer, batch: MicroBatch) -> Backward {
    let gradients = match batch.checkpointed {
        None => FlatGradients::take(batch.loss.backward(), model),
        Some(checkpointed) => {
            let mut sum = FlatGradients::default();
            checkpointed.backward(model, &batch.loss, |part| {
                sum.add(FlatGradients::take(part, model));
            });
            sum
        }
    };
    // The one read of a micro-batch.
    let values = Tensor::cat(vec![batch.loss.inner(), batch.values], 0)
        .try_into_vec_as()
        .expect("values of a working device can be read");
    Backward {
        gradients,
        names: batch.names,
        values,
        weights: batch.weights,
        n_tokens: batch.n_tokens,
    }
}

/// Names of the preference stage's metrics: TRL's, then what the view of tokens adds.
///
/// `kl_estimate/*` are nats per completion token, and need the reference's logps of tokens.
/// `grad_mass/*` need a gradient.
pub const PREFERENCE_METRICS: [&str; 16] = [
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
    "length/chosen",
    "length/rejected",
    "kl_estimate/policy_reference",
    "kl_estimate/reference_policy",
    "grad_mass/chosen",
    "grad_mass/rejected",
];

/// How many of them any batch has.
const ALWAYS: usize = 12;

/// Names of the fine-tuning stage's metrics, as TRL has them.
pub const SFT_METRICS: [&str; 2] = ["entropy", "mean_token_accuracy"];

/// What a preference batch is compared with.
#[derive(Clone, Debug)]
pub struct Compared {
    /// What is known of the reference.
    pub reference: Reference,
    /// A weight for each token, for `token_weighted`.
    pub token_weights: Option<PairTable>,
}

/// What is known of the reference.
#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "one for each batch, beside tensors that are larger still"
)]
pub enum Reference {
    /// Logps that were computed before.
    Logps(ReferenceLogps),
    /// The model, for losses that compare whole distributions, or a reference that changes.
    Model(Box<Transformer>),
}

impl From<PairLogps> for Compared {
    fn from(sums: PairLogps) -> Self {
        Reference::Logps(sums.into()).into()
    }
}

impl From<Reference> for Compared {
    fn from(reference: Reference) -> Self {
        Self {
            reference,
            token_weights: None,
        }
    }
}

/// The loss of a preference batch, and what is logged of it.
#[derive(Debug)]
pub(crate) struct PreferenceOutcome {
    /// One value, with its graph if the model has one.
    pub(crate) loss: Tensor<1>,
    /// Names of `values`.
    pub(crate) names: Vec<&'static str>,
    /// One value for each name, without graph.
    pub(crate) values: Tensor<1>,
}

/// A preference micro-batch: the loss of its pairs under the objectives, DPO's by default.
///
/// The batch holds the chosen completions, then in the same order the rejected ones.
///
/// # Panics
///
/// If the objectives need more than `compared` holds, which a checked recipe does not ask.
pub fn preference_micro_batch(
    model: &Transformer,
    batch: &CompletionBatch,
    compared: &Compared,
    objectives: &Objectives,
    beta: Beta,
    activations: Activations,
) -> MicroBatch {
    let (hidden, checkpointed) = states(model, batch, activations);
    let outcome = preference_outcome(model, hidden, batch, compared, objectives, beta);
    MicroBatch {
        loss: outcome.loss,
        names: outcome.names,
        values: outcome.values,
        weights: Vec::new(),
        n_tokens: batch.n_tokens(),
        checkpointed,
    }
}

/// The hidden states that predict each completion token, `[n_tokens, hidden]`.
pub(crate) fn states(
    model: &Transformer,
    batch: &CompletionBatch,
    activations: Activations,
) -> (Tensor<2>, Option<Checkpointed>) {
    match activations {
        Activations::Keep => (model.completion_hidden(batch), None),
        Activations::Recompute => {
            let checkpointed = model.checkpointed(batch);
            (checkpointed.hidden(), Some(checkpointed))
        }
    }
}

/// As [`preference_micro_batch`], from the policy's hidden states that predict the completion tokens,
/// with a graph or without.
pub(crate) fn preference_outcome(
    model: &Transformer,
    hidden: Tensor<2>,
    batch: &CompletionBatch,
    compared: &Compared,
    objectives: &Objectives,
    beta: Beta,
) -> PreferenceOutcome {
    let needs = objectives.needs();
    // Few objectives look at whole distributions; the others never see a table of logits.
    let logits = (needs.log_sum_sq_probs || needs.position_kls).then(|| model.head(hidden.clone()));
    let halves = |flat: Tensor<1>| PairTable::from_halves(batch.table(flat).values);
    let mut inputs = PairInputs {
        log_sum_sq_probs: logits
            .clone()
            .filter(|_| needs.log_sum_sq_probs)
            .map(|logits| halves(plain(log_sum_sq_probs(logits)))),
        position_kls: None,
        token_weights: compared.token_weights.clone(),
        step_mask: None,
    };
    let reference = match &compared.reference {
        Reference::Logps(logps) => logps.clone(),
        Reference::Model(reference) => {
            let states = reference.completion_hidden(batch);
            if let (true, Some(logits)) = (needs.position_kls, &logits) {
                let kls = position_kls(reference.head(states.clone()), logits.clone());
                inputs.position_kls = Some(halves(kls));
            }
            let scored = reference.score_hidden(batch, states, false);
            PairTokens::from_halves(scored.table).into()
        }
    };
    let scored = match logits {
        Some(logits) => batch.scored(logits, true),
        None => model.score_hidden(batch, hidden, true),
    };
    let loss_of = |table: TokenLogps, inputs: PairInputs| {
        let pairs = PairBatch {
            policy: PairTokens::from_halves(table),
            reference: reference.clone(),
            inputs,
        };
        objectives
            .loss(&pairs, beta)
            .expect("a checked recipe names objectives that have all they need")
    };
    let mut values = preference_values(&scored, batch, &reference, objectives, beta);
    let tracked = scored.flat.is_autodiff();
    if tracked {
        // The loss once more as a function of the logps alone: its gradient says how hard each
        // token is pushed.
        let leaf = scored.flat.clone().inner().autodiff().require_grad();
        let still = PairInputs {
            position_kls: inputs.position_kls.clone().map(|kls| PairTable {
                chosen: plain(kls.chosen),
                rejected: plain(kls.rejected),
            }),
            ..inputs.clone()
        };
        let gradients = loss_of(batch.table(leaf.clone()), still).backward();
        let pushes = leaf.grad(&gradients);
        let pushes = pushes.unwrap_or_else(|| plain(scored.flat.zeros_like()));
        values.push(gradient_mass(pushes, plain(scored.flat.clone()), batch));
    }
    let names = PREFERENCE_METRICS
        .into_iter()
        .filter(|name| match name.split_once('/') {
            Some(("kl_estimate", _)) => token_level(&reference).is_some(),
            Some(("grad_mass", _)) => tracked,
            _ => true,
        })
        .collect();
    PreferenceOutcome {
        loss: loss_of(scored.table, inputs),
        names,
        values: Tensor::cat(values, 0),
    }
}

fn token_level(reference: &ReferenceLogps) -> Option<&PairTokens> {
    match reference {
        ReferenceLogps::Tokens(tokens) => Some(tokens),
        _ => None,
    }
}

/// The L1 norm of the loss's gradient on the logits, summed over the tokens of the chosen and of
/// the rejected completion of a pair, in the mean over pairs: `[2]`.
///
/// A token pushed by `∂L/∂log π(a|s) = c` moves its own logit by `c (1 − π)` and all others by as
/// much together, `2 |c| (1 − π)` in all.
fn gradient_mass(pushes: Tensor<1>, logps: Tensor<1>, batch: &CompletionBatch) -> Tensor<1> {
    let mass = pushes.abs() * (-logps.exp() + 1.0) * 2.0;
    let (n_chosen, n_all) = sizes(batch);
    // The loss is a mean over pairs, and so is this.
    let sum = |from: usize, to: usize| mass.clone().narrow(0, from, to - from).sum();
    Tensor::cat(vec![sum(0, n_chosen), sum(n_chosen, n_all)], 0)
}

/// Chosen tokens, and all completion tokens of a batch.
fn sizes(batch: &CompletionBatch) -> (usize, usize) {
    let pairs = batch.counts().len() / 2;
    let n_chosen = batch.counts()[..pairs].iter().sum();
    (n_chosen, batch.counts().iter().sum())
}

/// The values of [`PREFERENCE_METRICS`], those of gradients left out, for a scored batch.
fn preference_values(
    scored: &Scored,
    batch: &CompletionBatch,
    reference: &ReferenceLogps,
    objectives: &Objectives,
    beta: Beta,
) -> Vec<Tensor<1>> {
    let tokens = PairTokens::from_halves(TokenLogps {
        values: plain(scored.table.values.clone()),
        mask: plain(scored.table.mask.clone()),
    });
    let policy = objectives.sums(&tokens);
    let sums = match reference {
        // Reward zero throughout: nothing to compare with.
        ReferenceLogps::Absent => policy.clone(),
        ReferenceLogps::Sums(sums) => sums.clone(),
        ReferenceLogps::Tokens(tokens) => objectives.sums(tokens),
    };
    let rewards = PairRewards::new(&policy, &sums, beta);
    let (n_chosen, n_all) = sizes(batch);
    let stats = scored
        .stats
        .as_ref()
        .expect("preference batches are scored with statistics");
    let mean = |values: &Tensor<1>, from: usize, to: usize| {
        // One side may have nothing to predict, behind an empty prompt.
        if from == to {
            plain(values.clone()).narrow(0, 0, 1).zeros_like()
        } else {
            plain(values.clone()).narrow(0, from, to - from).mean()
        }
    };
    let lengths = tokens.counts();
    let mut values = vec![
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
        lengths.chosen.mean(),
        lengths.rejected.mean(),
    ];
    debug_assert_eq!(values.len(), ALWAYS);
    if let Some(theirs) = token_level(reference) {
        let ratios =
            |ours: &TokenLogps, theirs: &TokenLogps| ours.values.clone() - theirs.values.clone();
        let estimates = [
            ratios(&tokens.chosen, &theirs.chosen),
            ratios(&tokens.rejected, &theirs.rejected),
        ]
        .map(kl_estimates);
        let [chosen, rejected] = estimates;
        values.push((chosen + rejected) / n_all as f64);
    }
    values
}

/// Sums over tokens of estimates of `KL(π‖π_ref)` and `KL(π_ref‖π)` at their states, `[2]`, nats.
///
/// With `r = π(a|s) / π_ref(a|s)` they are `r log r − r + 1` and `r − 1 − log r`: neither is ever
/// negative, and both are right in the mean over actions that the reference draws (Schulman,
/// *Approximating KL divergence*). Over other data they are sizes of the change, not divergences.
fn kl_estimates(log_ratios: Tensor<2>) -> Tensor<1> {
    let ratios = log_ratios.clone().exp();
    let forward = ratios.clone() * log_ratios.clone() - ratios.clone() + 1.0;
    let backward = ratios - 1.0 - log_ratios;
    Tensor::cat(vec![forward.sum(), backward.sum()], 0)
}

/// A fine-tuning micro-batch: the mean negative logp of its completion tokens.
#[expect(
    clippy::missing_panics_doc,
    reason = "the statistics are asked for here"
)]
pub fn sft_micro_batch(
    model: &Transformer,
    batch: &CompletionBatch,
    activations: Activations,
) -> MicroBatch {
    let (hidden, checkpointed) = states(model, batch, activations);
    let scored = model.score_hidden(batch, hidden, true);
    let stats = scored.stats.expect("the statistics were asked for");
    MicroBatch {
        loss: -scored.flat.mean(),
        names: SFT_METRICS.to_vec(),
        values: Tensor::cat(
            vec![plain(stats.entropy).mean(), plain(stats.top1).mean()],
            0,
        ),
        weights: Vec::new(),
        n_tokens: batch.n_tokens(),
        checkpointed,
    }
}

/// The value without its graph, whether it has one or not.
pub(crate) fn plain<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
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
