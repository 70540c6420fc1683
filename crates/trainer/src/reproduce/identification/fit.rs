//! The two learners: one loss, two ways to write a policy down.

use burn::tensor::{Device, Int, Tensor, TensorData};
use lm::{LlamaShape, ModelConfig, Transformer};
use mdp_core::{Beta, MdpError, PairTable, TabularMdp, TabularPolicy, Tree, dpo_loss, margin_loss};

use crate::error::TrainError;
use crate::learner::{Learner, MicroBatch};
use crate::optimizer::AdamW;
use crate::recipe::{OptimizerRecipe, Schedule};

/// Steps between looks at the held-out loss.
const EVERY: usize = 20;

/// What a learner is given.
pub(super) struct Data<'a> {
    pub(super) mdp: &'a TabularMdp,
    pub(super) beta: Beta,
    pub(super) train: &'a PairTable,
    pub(super) held_out: &'a PairTable,
    pub(super) steps: usize,
}

/// The policy of the least held-out loss so far.
struct Best {
    loss: f64,
    logits: Vec<f64>,
}

impl Best {
    fn new() -> Self {
        Self {
            loss: f64::INFINITY,
            logits: Vec::new(),
        }
    }

    fn look(&mut self, data: &Data<'_>, logits: &[f64]) -> Result<(), MdpError> {
        let loss = margin_loss(data.mdp, data.held_out, data.beta, logits, dpo_loss)?.loss;
        if loss < self.loss {
            self.loss = loss;
            self.logits = logits.to_vec();
        }
        Ok(())
    }

    fn policy(self, data: &Data<'_>) -> Result<TabularPolicy, MdpError> {
        TabularPolicy::from_logits(data.mdp.tree().clone(), self.logits)
    }
}

/// A language model with fresh weights whose distributions are far from uniform.
pub(super) fn fresh_model(
    tree: &Tree,
    seed: u64,
    device: &Device,
) -> Result<Transformer, TrainError> {
    let mut config = ModelConfig::llama(&LlamaShape {
        vocab_size: tree.vocab(),
        hidden_size: 32,
        intermediate_size: 64,
        n_layers: 2,
        n_heads: 2,
        n_kv_heads: 2,
        max_positions: tree.horizon() + 1,
        tied: false,
        eos_id: tree.eos(),
        pad_id: tree.eos(),
    })?;
    // Normalised hidden states have length √32, so logits get a standard deviation of 0.8.
    config.initializer_range = 0.15;
    Ok(Transformer::init(config, seed, device)?)
}

/// A model's logits at every state of a tree, `[pairs]`, in the tree's order.
struct Enumerated {
    ids: Tensor<2, Int>,
    /// Where each state's logits stand among those of all rows.
    places: Tensor<1, Int>,
    n_pairs: usize,
}

impl Enumerated {
    /// One row for each state of the deepest level: its prefixes are all the states there are.
    fn new(tree: &Tree, device: &Device) -> Result<Self, MdpError> {
        let width = tree.prompt().len() + tree.horizon() - 1;
        let (mut ids, mut places) = (Vec::new(), vec![None; tree.n_states()]);
        for (row, deepest) in tree.level(tree.horizon() - 1).enumerate() {
            let tokens = tree.tokens(deepest);
            ids.extend(tree.prompt().iter().chain(&tokens).map(|&id| i64::from(id)));
            let mut place = row * width + width - 1;
            let mut state = deepest;
            places[state] = Some(place as i64);
            while let Some(before) = tree.parent(state) {
                state = before / tree.vocab();
                place -= 1;
                places[state].get_or_insert(place as i64);
            }
        }
        let rows = ids.len() / width;
        let places: Vec<i64> = places
            .into_iter()
            .map(|place| place.expect("every state has a state of the deepest level behind it"))
            .collect();
        Ok(Self {
            ids: Tensor::from_data(TensorData::new(ids, [rows, width]), device),
            places: Tensor::from_ints(&places[..], device),
            n_pairs: tree.n_pairs(),
        })
    }

    fn logits(&self, model: &Transformer) -> Tensor<1> {
        let hidden = model
            .hidden(self.ids.clone())
            .select(0, self.places.clone());
        model.head(hidden).reshape([self.n_pairs])
    }

    fn on_host(&self, model: &Transformer) -> Vec<f64> {
        host(self.logits(model))
    }
}

fn host(values: Tensor<1>) -> Vec<f64> {
    let values: Vec<f32> = values
        .try_into_vec_as()
        .expect("logits of a working device can be read");
    values.into_iter().map(f64::from).collect()
}

/// A model written down as a table.
pub(super) fn tabulate(tree: &Tree, model: &Transformer) -> Result<TabularPolicy, MdpError> {
    let all = Enumerated::new(tree, &model.device())?;
    TabularPolicy::from_logits(tree.clone(), all.on_host(model))
}

/// DPO of a language model that begins as the reference.
///
/// The loss and its gradient by the logits at every state are the table's; the model carries that
/// gradient on to its weights.
pub(super) fn language_model(
    data: &Data<'_>,
    model: &Transformer,
) -> Result<TabularPolicy, TrainError> {
    let optimizer = OptimizerRecipe {
        learning_rate: 3e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
        schedule: Schedule::Cosine,
        warmup_steps: 20.min(data.steps / 10),
    };
    let all = Enumerated::new(data.mdp.tree(), &model.device())?;
    let mut best = Best::new();
    let mut learner = Learner::new(model.clone(), AdamW::new(&optimizer));
    for step in 0..data.steps {
        if step % EVERY == 0 {
            best.look(data, &all.on_host(&learner.snapshot()))?;
        }
        let rate = optimizer.learning_rate_at(step, data.steps);
        let outcome = learner.step(1, rate, |model, _| {
            let logits = all.logits(model);
            let values = host(logits.clone().inner());
            let found = margin_loss(data.mdp, data.train, data.beta, &values, dpo_loss);
            // Logits that are no numbers make a loss that is none, which the learner reports.
            let (loss, gradient) = match found {
                Ok(found) => (found.loss, found.gradient),
                Err(_) => (f64::NAN, vec![f64::NAN; values.len()]),
            };
            let gradient: Vec<f32> = gradient.into_iter().map(|g| g as f32).collect();
            let device = logits.device();
            let gradient = Tensor::<1>::from_floats(&gradient[..], &device);
            MicroBatch {
                // Its value means nothing; its gradient by the logits is that of the loss.
                loss: (logits * gradient).sum(),
                names: vec!["loss"],
                values: Tensor::<1>::from_floats([loss as f32], &model.device()).inner(),
                weights: Vec::new(),
                n_tokens: data.mdp.tree().n_states(),
                checkpointed: None,
            }
        });
        if !outcome.updated {
            return Err(TrainError::NotFinite {
                place: format!("language model step {}", step + 1),
                what: "loss",
                value: outcome.loss,
                rows: Vec::new(),
            });
        }
    }
    best.look(data, &all.on_host(&learner.snapshot()))?;
    Ok(best.policy(data)?)
}

/// DPO of a table that begins as the reference: Adam on the logits of every state.
pub(super) fn table(data: &Data<'_>) -> Result<TabularPolicy, MdpError> {
    const STEP_SIZE: f64 = 0.05;
    const DECAYS: [f64; 2] = [0.9, 0.999];
    // Small beside any gradient that matters: at 1e-8 rarely visited states would crawl.
    const EPSILON: f64 = 1e-14;
    let mut logits = data.mdp.reference().logps().to_vec();
    let mut moments = vec![[0.0; 2]; logits.len()];
    let mut left = [1.0; 2];
    let mut best = Best::new();
    for step in 0..data.steps {
        if step % EVERY == 0 {
            best.look(data, &logits)?;
        }
        let gradient = margin_loss(data.mdp, data.train, data.beta, &logits, dpo_loss)?.gradient;
        let done = step as f64 / data.steps as f64;
        let size = STEP_SIZE * 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        left = [left[0] * DECAYS[0], left[1] * DECAYS[1]];
        for ((logit, [mean, square]), g) in logits.iter_mut().zip(&mut moments).zip(gradient) {
            *mean = DECAYS[0] * *mean + (1.0 - DECAYS[0]) * g;
            *square = DECAYS[1] * *square + (1.0 - DECAYS[1]) * g * g;
            let scale = (*square / (1.0 - left[1])).sqrt() + EPSILON;
            *logit -= size * *mean / (1.0 - left[0]) / scale;
        }
    }
    best.look(data, &logits)?;
    best.policy(data)
}
