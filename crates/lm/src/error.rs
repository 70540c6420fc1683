use std::path::{Path, PathBuf};

/// What can be wrong with a model folder, its configuration or its weights.
#[derive(Debug, thiserror::Error)]
pub enum LmError {
    /// A file could not be read, written or renamed.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A JSON file does not parse, or has another form than expected.
    #[error("{path}: not valid JSON: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// A configuration field is missing, has a wrong type, or a value that is not supported.
    #[error("{path}: field `{field}`: {reason}")]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What was expected and what came.
        reason: String,
    },
    /// A weights file is damaged or does not hold what its header says.
    #[error("{path}: {reason}")]
    Weights {
        /// The weights file or index.
        path: PathBuf,
        /// What was expected and what came.
        reason: String,
    },
    /// Logits that are no distribution: the weights are too large, or the numbers too small a type.
    #[error(
        "the logits after {tokens} new tokens are not all numbers; nothing can be drawn from them"
    )]
    Logits {
        /// Tokens that were drawn before.
        tokens: usize,
    },
    /// A request to the decoder or the model that cannot be served.
    #[error("{0}")]
    Request(String),
}

impl LmError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_path_buf(),
            source,
        }
    }

    pub(crate) fn config(path: &Path, field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config {
            path: path.to_path_buf(),
            field: field.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn weights(path: &Path, reason: impl Into<String>) -> Self {
        Self::Weights {
            path: path.to_path_buf(),
            reason: reason.into(),
        }
    }
}
