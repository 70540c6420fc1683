//! The loop that both stages share: order, step, log, evaluate, save.

use std::path::Path;
use std::time::Instant;

use lm::Transformer;
use serde_json::{Map, Value};

use crate::checkpoint::{self, Position};
use crate::error::TrainError;
use crate::learner::{Learner, MicroBatch};
use crate::metrics::MetricsLog;
use crate::order::Order;
use crate::progress::Progress;
use crate::recipe::{CheckpointRecipe, OptimizerRecipe};

/// A stage's numbers.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    /// `sft` or `preference`.
    pub name: &'static str,
    /// What a unit of progress is called.
    pub unit: &'static str,
    /// Examples to learn from.
    pub n_examples: usize,
    /// Passes over them.
    pub epochs: f64,
    /// The most steps; 0 sets no limit.
    pub max_steps: usize,
    /// Examples in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in a step.
    pub accumulation: usize,
    /// Steps between evaluations; 0 evaluates at both ends alone.
    pub eval_every: usize,
    /// The optimizer's numbers.
    pub optimizer: &'a OptimizerRecipe,
    /// Seed of the order.
    pub seed: u64,
}

/// Where a stage writes.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    /// Folder of the checkpoints.
    pub checkpoints: &'a Path,
    /// How often to save, and how much to keep.
    pub saving: &'a CheckpointRecipe,
    /// Digest of the recipe.
    pub recipe: &'a str,
}

/// Where a stage stands, from 0 or from a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Done {
    /// Steps done.
    pub step: usize,
    /// Tokens seen.
    pub n_tokens: u64,
    /// Seconds spent.
    pub seconds: f64,
}

impl Stage<'_> {
    /// Steps of the whole stage.
    pub(crate) fn n_steps(&self) -> usize {
        let per_epoch = self.order().steps_per_epoch();
        let steps = (self.epochs * per_epoch as f64).ceil() as usize;
        match self.max_steps {
            0 => steps,
            most => steps.min(most),
        }
    }

    fn order(&self) -> Order {
        Order::new(
            self.n_examples,
            self.batch_size,
            self.accumulation,
            self.seed,
        )
    }

    /// Trains to the end of the stage.
    ///
    /// `micro` makes the loss of some examples; `evaluate` returns named values to log, or none.
    ///
    /// # Errors
    ///
    /// A loss that is not a number (the weights are then untouched, and the last checkpoint is
    /// whole; the error's rows are indices of examples), or any error of the file system.
    pub(crate) fn run(
        &self,
        learner: &mut Learner,
        mut done: Done,
        log: &mut MetricsLog,
        place: &Place<'_>,
        micro: impl Fn(&Transformer, &[usize]) -> MicroBatch + Sync,
        mut evaluate: impl FnMut(&Transformer) -> Result<Map<String, Value>, TrainError>,
    ) -> Result<Done, TrainError> {
        let mut order = self.order();
        let (n_steps, per_epoch) = (self.n_steps(), order.steps_per_epoch());
        let per_step = self.batch_size * self.accumulation;
        let mut progress = Progress::new(
            self.name,
            self.unit,
            (n_steps * per_step).min((self.epochs * self.n_examples as f64).ceil() as usize),
            done.step * per_step,
        );
        let before = done.seconds;
        let began = Instant::now();
        if done.step == 0 {
            self.log_evaluation(learner, 0, log, &mut evaluate)?;
        }
        while done.step < n_steps {
            let batches = order.step(done.step);
            let learning_rate = self.optimizer.learning_rate_at(done.step, n_steps);
            let step_began = Instant::now();
            let outcome = learner.step(batches.len(), learning_rate, |model, index| {
                micro(model, &batches[index])
            });
            if !outcome.updated {
                let (what, value) = if outcome.loss.is_finite() {
                    ("gradient norm", outcome.grad_norm)
                } else {
                    ("loss", outcome.loss)
                };
                return Err(TrainError::NotFinite {
                    place: format!("{} step {}", self.name, done.step + 1),
                    what,
                    value,
                    rows: batches.concat(),
                });
            }
            done.step += 1;
            done.n_tokens += outcome.n_tokens as u64;
            done.seconds = before + began.elapsed().as_secs_f64();
            let examples: usize = batches.iter().map(Vec::len).sum();
            let mut line = self.line(done.step);
            let epoch = done.step as f64 / per_epoch as f64;
            let seconds = step_began.elapsed().as_secs_f64();
            line.insert("epoch".into(), epoch.into());
            line.insert("loss".into(), outcome.loss.into());
            line.insert("grad_norm".into(), outcome.grad_norm.into());
            line.insert("learning_rate".into(), learning_rate.into());
            for (name, value) in &outcome.metrics {
                line.insert((*name).into(), (*value).into());
            }
            line.insert("num_tokens".into(), done.n_tokens.into());
            line.insert(
                format!("{}_per_second", self.unit),
                (examples as f64 / seconds).into(),
            );
            log.write(line)?;
            progress.advance(examples, &format!("loss {:.4}", outcome.loss));
            let last = done.step == n_steps;
            if last || (self.eval_every > 0 && done.step.is_multiple_of(self.eval_every)) {
                self.log_evaluation(learner, done.step, log, &mut evaluate)?;
            }
            let every = place.saving.every;
            if last || (every > 0 && done.step.is_multiple_of(every)) {
                let position = Position {
                    stage: self.name.to_string(),
                    step: done.step,
                    n_tokens: done.n_tokens,
                    seconds: done.seconds,
                    optimizer_steps: learner.optimizer.steps(),
                    recipe: place.recipe.to_string(),
                };
                log.sync()?;
                checkpoint::save(place.checkpoints, place.saving.keep, learner, &position)?;
            }
        }
        done.seconds = before + began.elapsed().as_secs_f64();
        progress.finish();
        Ok(done)
    }

    fn line(&self, step: usize) -> Map<String, Value> {
        [
            ("stage".to_string(), Value::from(self.name)),
            ("step".to_string(), Value::from(step)),
        ]
        .into_iter()
        .collect()
    }

    fn log_evaluation(
        &self,
        learner: &Learner,
        step: usize,
        log: &mut MetricsLog,
        evaluate: &mut impl FnMut(&Transformer) -> Result<Map<String, Value>, TrainError>,
    ) -> Result<(), TrainError> {
        let values = evaluate(&learner.snapshot())?;
        if values.is_empty() {
            return Ok(());
        }
        // JSON has no NaN: what is not a number has become null.
        if values.get("eval_loss").is_some_and(Value::is_null) {
            return Err(TrainError::NotFinite {
                place: format!("{} step {step}, evaluation", self.name),
                what: "loss",
                value: f64::NAN,
                rows: Vec::new(),
            });
        }
        let mut line = self.line(step);
        line.extend(values);
        log.write(line)
    }
}
