//! Rewards: a number for each completion.

use memo_task::{Memo, MemoConfig, MemoTask};
use serde_json::Value;

use crate::error::excerpt;
use crate::{JudgeError, Sample};

/// What gives each completion a number, the higher the better.
pub trait Reward {
    /// A name that is the same for the same reward, for reports.
    fn identity(&self) -> String;

    /// The reward of each sample, in their order, all finite.
    ///
    /// # Errors
    ///
    /// Whatever kept it from rewarding one of them.
    fn rewards(&self, samples: &[Sample]) -> Result<Vec<f64>, JudgeError>;
}

impl<R: Reward + ?Sized> Reward for &R {
    fn identity(&self) -> String {
        (**self).identity()
    }

    fn rewards(&self, samples: &[Sample]) -> Result<Vec<f64>, JudgeError> {
        (**self).rewards(samples)
    }
}

impl<R: Reward + ?Sized> Reward for Box<R> {
    fn identity(&self) -> String {
        (**self).identity()
    }

    fn rewards(&self, samples: &[Sample]) -> Result<Vec<f64>, JudgeError> {
        (**self).rewards(samples)
    }
}

/// The true reward of the embedded task: the sum over a summary's tokens.
///
/// The memo is read from the sample's prompt. The tokens are the field `completion_ids` where there
/// is one, else the completion's text with an end-of-text token behind it unless `finished` is
/// `false`.
///
/// # Examples
///
/// ```
/// use judge::{MemoReward, Reward, Sample};
///
/// let reward = MemoReward::new(Default::default())?;
/// let prompt = "Memo:\nFrom: Maria\nTo: Hansen\nGoods: 40 crates of apples\nPlace: Oslo\n\
///               Day: Monday\nTime: 9:00\nSummary:";
/// let right = " Maria sends 40 crates of apples to Hansen in Oslo on Monday at 9:00.";
/// let wrong = " Maria sends 40 crates of apples to Hansen in Paris on Monday at 9:00.";
/// let samples = [Sample::new(prompt, right), Sample::new(prompt, wrong)];
/// assert_eq!(reward.rewards(&samples)?, [0.0, -1.0]);
/// # Ok::<(), judge::JudgeError>(())
/// ```
#[derive(Clone, Debug)]
pub struct MemoReward {
    task: MemoTask,
}

impl MemoReward {
    /// The reward of the task with these numbers.
    ///
    /// # Errors
    ///
    /// [`JudgeError::Config`] when a number lies outside its range.
    pub fn new(config: MemoConfig) -> Result<Self, JudgeError> {
        let task = MemoTask::new(config).map_err(|error| JudgeError::Config {
            field: "memo task",
            expected: "in its range",
            value: error.to_string(),
        })?;
        Ok(Self { task })
    }

    /// The reward of a task that is already there.
    #[must_use]
    pub fn of(task: MemoTask) -> Self {
        Self { task }
    }

    fn ids(&self, index: usize, sample: &Sample) -> Result<Vec<u32>, JudgeError> {
        const FIELD: &str = "completion_ids";
        if let Some(value) = sample.metadata.get(FIELD) {
            let ids = value.as_array().and_then(|ids| {
                let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
                ids.iter().map(id).collect()
            });
            return ids.ok_or_else(|| JudgeError::Metadata {
                index,
                field: FIELD,
                expected: "a list of token ids",
                value: excerpt(&value.to_string()),
            });
        }
        let mut ids = self.task.encode(&sample.completion);
        if sample.finished(index)? {
            ids.push(self.task.eos_id());
        }
        Ok(ids)
    }
}

impl Reward for MemoReward {
    fn identity(&self) -> String {
        "memo".into()
    }

    fn rewards(&self, samples: &[Sample]) -> Result<Vec<f64>, JudgeError> {
        let samples = samples.iter().enumerate();
        samples
            .map(|(index, sample)| {
                let memo = Memo::parse(&sample.prompt)
                    .map_err(|source| JudgeError::Memo { index, source })?;
                let ids = self.ids(index, sample)?;
                let rewards = self.task.token_rewards(&memo, &ids);
                // The sum of no numbers is -0.0; nobody wants to read that.
                Ok(rewards.iter().map(|token| token.reward).sum::<f64>() + 0.0)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memo_task::Split;

    /// Sums of at most 40 decimal weights, in the same order.
    const EXACT: f64 = 1e-12;

    fn reward() -> MemoReward {
        MemoReward::new(MemoConfig::default()).unwrap()
    }

    #[test]
    fn texts_and_tokens_earn_what_the_task_says() {
        let reward = reward();
        let pairs = reward.task.pairs(Split::Eval, 50, 1);
        let completions = pairs.iter().flat_map(|pair| {
            let sides = [&pair.chosen, &pair.rejected];
            sides.map(|completion| (&pair.prompt, completion))
        });
        let mut n_wrong = 0;
        for (prompt, completion) in completions {
            let text = Sample::new(prompt, &completion.text);
            let ids = text.clone().with("completion_ids", completion.ids.clone());
            let expected = completion.total_reward();
            n_wrong += usize::from(expected < 0.0);
            for found in reward.rewards(&[text, ids]).unwrap() {
                assert!((found - expected).abs() < EXACT, "{}", completion.text);
            }
        }
        assert!(n_wrong > 30);
    }

    #[test]
    fn a_summary_that_was_cut_off_pays_for_it() {
        let reward = reward();
        let example = &reward.task.examples(Split::Eval, 1, 0)[0];
        let best = reward.task.best_completion(&example.memo).unwrap();
        let sample = Sample::new(&example.prompt, best.text);
        let cut = sample.clone().with("finished", false);
        let rewards = reward.rewards(&[sample, cut]).unwrap();
        let truncated = reward.task.config().weights.truncated;
        assert!((rewards[1] - rewards[0] - truncated).abs() < EXACT);
    }

    #[test]
    fn what_is_no_memo_is_named_by_its_place() {
        let example = &reward().task.examples(Split::Eval, 1, 0)[0];
        let good = Sample::new(&example.prompt, " A");
        let error = reward()
            .rewards(&[good.clone(), Sample::new("Hello", " A")])
            .unwrap_err();
        assert!(error.to_string().starts_with("sample 1: memo: "), "{error}");
        let error = reward()
            .rewards(&[good.with("completion_ids", "12")])
            .unwrap_err();
        assert!(error.to_string().contains("a list of token ids"), "{error}");
    }
}
