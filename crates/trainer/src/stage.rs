//! The loop that both stages share: order, step, log, evaluate, save.

use std::path::Path;
use std::time::Instant;

use lm::Transformer;
use serde_json::{Map, Value};

use crate::checkpoint::{self, Beside, Best, Position};
use crate::error::TrainError;
use crate::failure::{Shortage, within_memory};
use crate::learner::{Learner, MicroBatch};
use crate::metrics::MetricsLog;
use crate::order::{Order, Source};
use crate::progress::Progress;
use crate::recipe::{BestRecipe, CheckpointRecipe, OptimizerRecipe, SyncRecipe};

/// A stage's numbers.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    /// `sft` or `preference`.
    pub name: &'static str,
    /// What a unit of progress is called.
    pub unit: &'static str,
    /// Examples to learn from, and how often each is seen.
    pub sources: Vec<Source>,
    /// Their lengths, where examples of like length are to share a step.
    pub lengths: Option<Vec<usize>>,
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
    /// How the reference follows the policy, if it does.
    pub sync: Option<&'a SyncRecipe>,
    /// What the best weights are, and when to stop waiting for better ones.
    pub best: Option<&'a BestRecipe>,
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
    /// What is saved beside the weights.
    pub beside: Beside<'a>,
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
    /// The best evaluation, where one is looked for.
    pub best: Option<Best>,
}

/// What a stage calls upon.
pub(crate) struct Calls<M, E, R> {
    /// Makes the loss of some examples, from the model and the reference that follows it.
    pub micro: M,
    /// Returns named values to log, or none, from the same and the number of steps.
    pub evaluate: E,
    /// Names the row of the data that an example was made of.
    pub row: R,
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
        let (batch_size, accumulation) = (self.batch_size, self.accumulation);
        let order = Order::mixed(self.sources.clone(), batch_size, accumulation, self.seed);
        match &self.lengths {
            Some(lengths) => order.grouped_by_length(lengths.clone()),
            None => order,
        }
    }

    /// Examples that the whole stage sees, repeats counted.
    pub(crate) fn n_seen(&self, steps: usize) -> usize {
        let order = self.order();
        let (an_epoch, a_step) = (
            order.examples_per_epoch(),
            self.batch_size * self.accumulation,
        );
        // The last step of an epoch may be smaller.
        let (epochs, rest) = match order.steps_per_epoch() {
            0 => (0, 0),
            n => (steps / n, steps % n),
        };
        epochs * an_epoch + (rest * a_step).min(an_epoch)
    }

    /// Whether the stage was left before its last step, for want of better evaluations.
    pub(crate) fn is_over(&self, done: &Done) -> bool {
        let stale = || {
            let patience = self.best?.patience;
            Some(patience > 0 && done.best.as_ref()?.stale >= patience)
        };
        done.step >= self.n_steps() || stale().unwrap_or(false)
    }

    /// Trains to the end of the stage, or until evaluations get no better.
    ///
    /// # Errors
    ///
    /// A loss that is not a number (the weights are then untouched, and the last checkpoint is
    /// whole), or any error of the file system.
    pub(crate) fn run(
        &self,
        learner: &mut Learner,
        mut done: Done,
        log: &mut MetricsLog,
        place: &Place<'_>,
        mut calls: Calls<
            impl Fn(&Transformer, Option<&Transformer>, &[Vec<usize>], usize) -> MicroBatch + Sync,
            impl FnMut(&Learner, usize) -> Result<Map<String, Value>, TrainError>,
            impl Fn(usize) -> String,
        >,
    ) -> Result<Done, TrainError> {
        let mut order = self.order();
        let (n_steps, per_epoch) = (self.n_steps(), order.steps_per_epoch());
        let mut progress = Progress::new(
            self.name,
            self.unit,
            self.n_seen(n_steps),
            self.n_seen(done.step),
        );
        let before = done.seconds;
        let began = Instant::now();
        if done.step == 0 {
            self.log_evaluation(learner, &mut done, log, place, &mut calls.evaluate)?;
        }
        while !self.is_over(&done) {
            let batches = order.step(done.step);
            let learning_rate = self.optimizer.learning_rate_at(done.step, n_steps);
            let step_began = Instant::now();
            let (micro, reference) = (&calls.micro, learner.reference.clone());
            let step = || {
                Ok::<_, TrainError>(learner.step(batches.len(), learning_rate, |model, index| {
                    micro(model, reference.as_ref(), &batches, index)
                }))
            };
            let outcome = within_memory(step, || self.shortage(done.step, &batches, &calls.row))?;
            if !outcome.updated {
                let (what, value) = outcome.not_finite();
                return Err(TrainError::NotFinite {
                    place: format!("{} step {}", self.name, done.step + 1),
                    what,
                    value,
                    rows: batches.concat().into_iter().map(&calls.row).collect(),
                });
            }
            done.step += 1;
            if let Some(sync) = self
                .sync
                .filter(|sync| done.step.is_multiple_of(sync.every))
            {
                learner.sync_reference(sync.alpha);
            }
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
                self.log_evaluation(learner, &mut done, log, place, &mut calls.evaluate)?;
            }
            let every = place.saving.every;
            if self.is_over(&done) || (every > 0 && done.step.is_multiple_of(every)) {
                log.sync()?;
                let position = self.position(learner, &done, place);
                // Work that a device still owes from this step comes due when weights are read.
                let save = || {
                    let keep = place.saving.keep;
                    checkpoint::save(place.checkpoints, keep, learner, &position, place.beside)
                };
                within_memory(save, || self.shortage(done.step - 1, &batches, &calls.row))?;
            }
        }
        done.seconds = before + began.elapsed().as_secs_f64();
        progress.finish();
        if done.step < n_steps {
            let best = done.best.as_ref().map_or(0, |best| best.step);
            eprintln!(
                "{}: stopped at step {} of {n_steps}, since no evaluation after step {best} was better",
                self.name, done.step
            );
        }
        Ok(done)
    }

    /// What a step was at, for a device that had no memory for it.
    fn shortage(
        &self,
        step: usize,
        batches: &[Vec<usize>],
        row: impl Fn(usize) -> String,
    ) -> Shortage {
        let (n, most) = (batches.len(), batches.iter().map(Vec::len).max());
        Shortage {
            place: format!(
                "{} step {}, batches of {} {}, accumulated: {n}",
                self.name,
                step + 1,
                most.unwrap_or_default(),
                self.unit
            ),
            lower: format!(
                "`{0}.batch_size` (with as much more of `{0}.accumulation` a step sees the same {1}) \
                 or `data.max_length`, or set `gradient_checkpointing = true`",
                self.name, self.unit
            ),
            rows: batches.concat().into_iter().map(row).collect(),
        }
    }

    fn position(&self, learner: &Learner, done: &Done, place: &Place<'_>) -> Position {
        Position {
            stage: self.name.to_string(),
            step: done.step,
            n_tokens: done.n_tokens,
            seconds: done.seconds,
            optimizer_steps: learner.optimizer.steps(),
            recipe: place.recipe.to_string(),
            best: done.best,
        }
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
        done: &mut Done,
        log: &mut MetricsLog,
        place: &Place<'_>,
        evaluate: &mut impl FnMut(&Learner, usize) -> Result<Map<String, Value>, TrainError>,
    ) -> Result<(), TrainError> {
        let step = done.step;
        let values = within_memory(
            || evaluate(learner, step),
            || Shortage {
                place: format!("{} step {step}, evaluation", self.name),
                lower: format!("`{}.eval_batch_size`", self.name),
                rows: Vec::new(),
            },
        )?;
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
        if let Some(recipe) = self.best {
            let value = values.get(&recipe.metric).and_then(Value::as_f64);
            let value = value.ok_or_else(|| TrainError::BestMetric {
                name: recipe.metric.clone(),
                known: values.keys().cloned().collect::<Vec<_>>().join(", "),
            })?;
            let better = done.best.is_none_or(|best| {
                let gain = if recipe.is_better_when_greater() {
                    value - best.value
                } else {
                    best.value - value
                };
                gain > recipe.min_delta
            });
            if better {
                done.best = Some(Best {
                    step,
                    value,
                    stale: 0,
                });
                let position = self.position(learner, done, place);
                checkpoint::save_best(place.checkpoints, learner, &position, place.beside)?;
            } else if let Some(best) = &mut done.best {
                best.stale += 1;
            }
        }
        let mut line = self.line(step);
        line.extend(values);
        log.write(line)
    }
}
