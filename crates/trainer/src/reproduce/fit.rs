//! Descent on any loss, for the models of an experiment.

use lm::Transformer;

use crate::error::TrainError;
use crate::learner::{Learner, MicroBatch};
use crate::optimizer::AdamW;
use crate::order::Order;
use crate::progress::Progress;
use crate::recipe::{OptimizerRecipe, PreferenceRecipe, SftRecipe};
use crate::workers::Workers;

/// How long to descend, and by what steps.
#[derive(Clone, Copy)]
pub(super) struct Descent<'a> {
    /// Shown beside the progress.
    pub name: &'a str,
    /// Examples.
    pub n: usize,
    pub batch_size: usize,
    pub accumulation: usize,
    pub epochs: f64,
    /// Without limit if 0.
    pub max_steps: usize,
    pub optimizer: &'a OptimizerRecipe,
    pub seed: u64,
}

impl<'a> Descent<'a> {
    /// By the numbers of a recipe's fine-tuning stage.
    pub(super) fn fine_tuning(name: &'a str, n: usize, stage: &'a SftRecipe, seed: u64) -> Self {
        Self {
            name,
            n,
            batch_size: stage.batch_size,
            accumulation: stage.accumulation,
            epochs: stage.epochs,
            max_steps: 0,
            optimizer: &stage.optimizer,
            seed,
        }
    }

    /// By the numbers of a recipe's preference stage.
    pub(super) fn preference(
        name: &'a str,
        n: usize,
        stage: &'a PreferenceRecipe,
        seed: u64,
    ) -> Self {
        Self {
            name,
            n,
            batch_size: stage.batch_size,
            accumulation: stage.accumulation,
            epochs: stage.epochs,
            max_steps: stage.max_steps,
            optimizer: &stage.optimizer,
            seed,
        }
    }

    fn order(&self) -> Order {
        Order::new(self.n, self.batch_size, self.accumulation, self.seed)
    }

    /// Steps from first to last.
    pub(super) fn n_steps(&self) -> usize {
        let n_steps = (self.epochs * self.order().steps_per_epoch() as f64).ceil() as usize;
        match self.max_steps {
            0 => n_steps,
            most => n_steps.min(most),
        }
    }

    /// Trains a copy of `model`; `watch` sees the learner behind each step, and the number of steps
    /// that were done.
    ///
    /// # Errors
    ///
    /// A loss that is no number, or what `watch` refuses.
    pub(super) fn run(
        &self,
        model: &Transformer,
        workers: &Workers,
        micro: impl Fn(&Transformer, &[usize]) -> MicroBatch + Sync,
        mut watch: impl FnMut(usize, &Learner) -> Result<(), TrainError>,
    ) -> Result<Transformer, TrainError> {
        let mut order = self.order();
        let n_steps = self.n_steps();
        let mut learner =
            Learner::new(model.clone(), AdamW::new(self.optimizer)).with_workers(workers.clone());
        let mut progress = Progress::new(self.name, "steps", n_steps, 0);
        for step in 0..n_steps {
            let batches = order.step(step);
            let rate = self.optimizer.learning_rate_at(step, n_steps);
            let outcome = learner.step(batches.len(), rate, |model, index| {
                micro(model, &batches[index])
            });
            if !outcome.updated {
                let (what, value) = outcome.not_finite();
                return Err(TrainError::NotFinite {
                    place: format!("{} step {}", self.name, step + 1),
                    what,
                    value,
                    rows: batches.concat().iter().map(usize::to_string).collect(),
                });
            }
            progress.advance(1, &format!("loss {:.4}", outcome.loss));
            watch(step + 1, &learner)?;
        }
        progress.finish();
        Ok(learner.snapshot())
    }
}
