//! Everything that can be wrong with a decision process, with the offending place and number.

/// What can be wrong with the input of this crate.
///
/// Each message names what was expected and what came. States are shown as the tokens that were
/// appended to the prompt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MdpError {
    /// β is not finite or not above zero.
    #[error("beta is {value}, expected a finite number above 0")]
    Beta {
        /// The number that came.
        value: f64,
    },
}
