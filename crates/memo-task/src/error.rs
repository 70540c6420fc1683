//! What can go wrong.

use crate::Fact;

/// What was expected of the caller's input, and what came.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum MemoError {
    /// A number of the configuration lies outside its range.
    #[error("memo task: {field} must be {expected}, got {value}")]
    Config {
        /// The field of [`MemoConfig`](crate::MemoConfig) or
        /// [`RewardWeights`](crate::RewardWeights).
        field: &'static str,
        /// The range in words.
        expected: &'static str,
        /// What came.
        value: f64,
    },
    /// A prompt leaves out one of the seven facts.
    #[error("memo: expected a {fact}, found none in {prompt:?}")]
    FactNotFound {
        /// The fact that is not there.
        fact: Fact,
        /// The prompt as given.
        prompt: String,
    },
    /// A prompt states one fact twice.
    #[error("memo: expected one {fact}, found {first:?} and {second:?}")]
    FactTwice {
        /// The fact that is there twice.
        fact: Fact,
        /// The value that came first.
        first: String,
        /// The value that came second.
        second: String,
    },
    /// A memo holds a value that is not in the task's vocabulary.
    #[error("memo: expected a {fact} of the task's vocabulary, got {value:?}")]
    UnknownValue {
        /// The fact that holds it.
        fact: Fact,
        /// The value as given.
        value: String,
    },
    /// A completion was to be corrupted at a fact that it does not state correctly.
    #[error("completion {text:?} does not state the {fact} of the memo, so it cannot be corrupted")]
    NotStated {
        /// The fact to corrupt.
        fact: Fact,
        /// The completion's text.
        text: String,
    },
}
