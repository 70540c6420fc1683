/// What can be wrong with logits.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ReadoutError {
    /// A logit is NaN or infinite.
    #[error("token {row}: expected finite logits of the {model}, got {value} for token id {id}")]
    NotFinite {
        /// `policy` or `reference`.
        model: &'static str,
        /// The row of logits, from 0.
        row: usize,
        /// The token id whose logit it is.
        id: usize,
        /// The logit.
        value: f32,
    },
    /// Logits could not be brought from their device.
    #[error("logits could not be read: {0}")]
    Device(String),
}
