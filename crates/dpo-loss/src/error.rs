use thiserror::Error;

use crate::objective::Objective;

/// What can be wrong with a choice of losses or with a batch for them.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum LossError {
    /// No loss by this name.
    #[error("unknown loss `{name}`, expected one of {known}")]
    UnknownObjective {
        /// The name given.
        name: String,
        /// All names, separated by commas.
        known: String,
    },
    /// An empty list of losses.
    #[error("`loss` names no loss, expected at least one")]
    NoTerms,
    /// Weights and losses differ in number.
    #[error("`loss_weights` has {weights} entries for {terms} losses, expected one for each")]
    WeightCount {
        /// Number of losses.
        terms: usize,
        /// Number of weights.
        weights: usize,
    },
    /// A weight that is no number.
    #[error("`loss_weights`: weight of `{objective}` is {value}, expected a finite number")]
    Weight {
        /// Whose weight.
        objective: Objective,
        /// The weight.
        value: f64,
    },
    /// A parameter out of its range.
    #[error("`{name}` is {value}, expected {expected}")]
    Parameter {
        /// The key in the recipe.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What is allowed, and for which loss.
        expected: &'static str,
    },
    /// A loss that an option cannot change.
    #[error("`{option}` does not work with loss `{objective}`: {reason}")]
    Unsupported {
        /// The key in the recipe.
        option: &'static str,
        /// The loss in the list that has no form with it.
        objective: Objective,
        /// Why.
        reason: &'static str,
    },
    /// A batch without something that the loss is a function of.
    #[error("loss `{objective}` needs {input}, but the batch has none")]
    MissingInput {
        /// The loss.
        objective: Objective,
        /// What it needs.
        input: &'static str,
    },
    /// Tensors of a batch that do not fit together.
    #[error("{what} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// The shape of the batch.
        expected: Vec<usize>,
        /// Its shape.
        got: Vec<usize>,
    },
}
