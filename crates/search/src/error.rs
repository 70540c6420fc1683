//! What can go wrong in a search.

use std::error::Error;

use mdp_core::MdpError;

/// What can be wrong with a request, or with what a model answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SearchError {
    /// A setting is outside its range.
    #[error("{name} is {value}, expected {expected}")]
    Setting {
        /// Which setting.
        name: &'static str,
        /// What came.
        value: String,
        /// The range, in words.
        expected: &'static str,
    },
    /// A token is not in the model's vocabulary.
    #[error("{place} holds token {token}, outside the vocabulary of {vocab}")]
    TokenOutside {
        /// Where it was found.
        place: &'static str,
        /// The token.
        token: u32,
        /// The number of tokens.
        vocab: usize,
    },
    /// The score needs a reference and the model has none.
    #[error("score {score} needs the logps of a reference, and the model gives none")]
    NoReference {
        /// The score asked for.
        score: String,
    },
    /// A model answered with tables of the wrong size.
    #[error("the model's {table} has {got} entries, expected {expected}")]
    Rows {
        /// Which table.
        table: &'static str,
        /// Entries needed.
        expected: usize,
        /// Entries that came.
        got: usize,
    },
    /// A model answered with something that is no log-probability.
    #[error("{table} of token {token} after {state:?} is {value}, expected {expected}")]
    NotALogp {
        /// Which table.
        table: &'static str,
        /// The state's tokens after the prompt.
        state: Vec<u32>,
        /// The token.
        token: u32,
        /// What came.
        value: f64,
        /// The range, in words.
        expected: &'static str,
    },
    /// A value function or a judge answered with the wrong number of values, or with NaN.
    #[error("{name} gave {got}, expected {expected}")]
    Values {
        /// Which function.
        name: &'static str,
        /// What came, in words.
        got: String,
        /// What was expected, in words.
        expected: String,
    },
    /// The tree holds as many prefixes as can be numbered.
    #[error("the search tree holds {nodes} prefixes, the most that can be numbered")]
    TooManyNodes {
        /// Prefixes in the tree.
        nodes: usize,
    },
    /// A policy or value of `mdp-core` failed.
    #[error(transparent)]
    Mdp(#[from] MdpError),
    /// A model outside this crate failed.
    #[error("model failed: {source}")]
    Model {
        /// What it said.
        source: Box<dyn Error + Send + Sync>,
    },
}

impl SearchError {
    /// Wraps the error of a model that lives outside this crate.
    pub fn model(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Model {
            source: source.into(),
        }
    }

    pub(crate) fn setting(
        name: &'static str,
        value: impl ToString,
        expected: &'static str,
    ) -> Self {
        Self::Setting {
            name,
            value: value.to_string(),
            expected,
        }
    }
}
