//! The numbers of the task: rewards, and how often a writer errs.

use serde::{Deserialize, Serialize};

use crate::MemoError;

/// What each kind of token earns, in reward units. All are losses: nothing is above 0.
///
/// The defaults are the task's definition; experiments that compare figures keep them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RewardWeights {
    /// A value that stands in a role where the memo has another one. Default -1.0.
    pub contradiction: f64,
    /// A fact that was never stated, each, on the end-of-text token. Default -0.7.
    ///
    /// Milder than a contradiction, so that leaving a fact out is better than guessing it wrong,
    /// and dearer than filler.
    pub missing: f64,
    /// A token that says nothing new: filler phrases, and facts said again. Default -0.1.
    pub filler: f64,
    /// A token that fits nowhere in the sentence, or is not a word of summaries. Default -0.2.
    pub ungrammatical: f64,
    /// A text without an end-of-text token, on its last token, on top of the missing facts.
    /// Default -1.0.
    pub truncated: f64,
}

impl Default for RewardWeights {
    fn default() -> Self {
        Self {
            contradiction: -1.0,
            missing: -0.7,
            filler: -0.1,
            ungrammatical: -0.2,
            truncated: -1.0,
        }
    }
}

/// The task's definition: rewards, label noise, and how often the writers of completions err.
///
/// Facts are corrupted and left out independently of each other, except that the pairs in
/// [`UNSEEN_TOGETHER`](crate::UNSEEN_TOGETHER) are kept apart outside [`Split::Unseen`].
///
/// [`Split::Unseen`]: crate::Split::Unseen
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoConfig {
    /// What each token earns.
    pub weights: RewardWeights,
    /// Nats per reward unit in the Bradley-Terry label, at least 0. Default 5.0.
    ///
    /// A pair's first completion is chosen with probability
    /// `σ(label_sharpness · (R_first − R_second))`, where `R` is the summed true reward. The
    /// default leaves the best possible accuracy ([`ceiling`](crate::ceiling)) near 0.9.
    pub label_sharpness: f64,
    /// Probability that a stated fact is stated wrongly where the memo's value is unusual, each.
    /// Default 0.6.
    ///
    /// Above one half, so that writers as a whole, and a model of them, find the right value more
    /// surprising than the wrong one.
    pub unusual_wrong_rate: f64,
    /// Probability that a stated fact is stated wrongly where the memo's value is usual, each.
    /// Default 0.04.
    pub usual_wrong_rate: f64,
    /// Probability that a wrong value is the one usual value that writers take the right one for,
    /// rather than any value of the pool by its frequency. Default 0.9.
    pub lookalike_rate: f64,
    /// Probability that a fact is left out, each. Default 0.11.
    pub omit_rate: f64,
    /// Probability that a completion holds a filler phrase. Default 0.3.
    pub filler_rate: f64,
    /// Probability that a completion ends by saying facts again. Default 0.12.
    pub repeat_rate: f64,
}

impl Default for MemoConfig {
    fn default() -> Self {
        Self {
            weights: RewardWeights::default(),
            label_sharpness: 5.0,
            unusual_wrong_rate: 0.6,
            usual_wrong_rate: 0.04,
            lookalike_rate: 0.9,
            omit_rate: 0.11,
            filler_rate: 0.3,
            repeat_rate: 0.12,
        }
    }
}

impl MemoConfig {
    /// Nothing when every number lies in its range.
    pub(crate) fn check(&self) -> Result<(), MemoError> {
        let w = &self.weights;
        for (field, value) in [
            ("weights.contradiction", w.contradiction),
            ("weights.missing", w.missing),
            ("weights.filler", w.filler),
            ("weights.ungrammatical", w.ungrammatical),
            ("weights.truncated", w.truncated),
        ] {
            require(
                value.is_finite() && value <= 0.0,
                field,
                "finite and at most 0",
                value,
            )?;
        }
        let sharpness = self.label_sharpness;
        require(
            sharpness.is_finite() && sharpness >= 0.0,
            "label_sharpness",
            "finite and at least 0",
            sharpness,
        )?;
        for (field, value) in [
            ("unusual_wrong_rate", self.unusual_wrong_rate),
            ("usual_wrong_rate", self.usual_wrong_rate),
            ("lookalike_rate", self.lookalike_rate),
            ("omit_rate", self.omit_rate),
            ("filler_rate", self.filler_rate),
            ("repeat_rate", self.repeat_rate),
        ] {
            require(
                (0.0..=1.0).contains(&value),
                field,
                "between 0 and 1",
                value,
            )?;
        }
        Ok(())
    }
}

fn require(
    holds: bool,
    field: &'static str,
    expected: &'static str,
    value: f64,
) -> Result<(), MemoError> {
    if holds {
        Ok(())
    } else {
        Err(MemoError::Config {
            field,
            expected,
            value,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_in_range() {
        assert_eq!(MemoConfig::default().check(), Ok(()));
    }

    #[test]
    fn a_number_out_of_range_is_refused_by_name() {
        let config = MemoConfig {
            omit_rate: 1.5,
            ..MemoConfig::default()
        };
        let message = config.check().unwrap_err().to_string();
        assert_eq!(
            message,
            "memo task: omit_rate must be between 0 and 1, got 1.5"
        );
        let weights = RewardWeights {
            filler: f64::NAN,
            ..RewardWeights::default()
        };
        let config = MemoConfig {
            weights,
            ..MemoConfig::default()
        };
        assert!(
            config
                .check()
                .unwrap_err()
                .to_string()
                .contains("weights.filler")
        );
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = serde_json::from_str::<MemoConfig>(r#"{"omit_rat": 0.1}"#).unwrap_err();
        assert!(error.to_string().contains("omit_rat"));
    }
}
