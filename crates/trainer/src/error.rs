use std::path::{Path, PathBuf};

/// Why a run could not begin, go on or end.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A recipe that does not parse, or a value out of its range.
    #[error("{file}: {reason}")]
    Recipe {
        /// The recipe's file.
        file: String,
        /// The key, what was expected and what came.
        reason: String,
    },
    /// A model folder.
    #[error(transparent)]
    Model(#[from] lm::LmError),
    /// A tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] lm::tokenizer::TokenizerError),
    /// A chat template.
    #[error(transparent)]
    Chat(#[from] lm::chat::ChatError),
    /// Preference data.
    #[error(transparent)]
    Data(#[from] lm::data::DataError),
    /// A reward or a judge.
    #[error(transparent)]
    Judge(#[from] judge::JudgeError),
    /// A policy's folder, or what it is to be asked.
    #[error("{path}: {reason}")]
    Policy {
        /// The folder or file.
        path: PathBuf,
        /// What was expected and what came.
        reason: String,
    },
    /// A prompt that cannot be encoded.
    #[error("{path} row {row}, from 0: {reason}")]
    Prompt {
        /// The file.
        path: PathBuf,
        /// The row.
        row: usize,
        /// What was expected and what came.
        reason: String,
    },
    /// The embedded task.
    #[error(transparent)]
    Task(#[from] memo_task::MemoError),
    /// An enumerated process.
    #[error(transparent)]
    Mdp(#[from] mdp_core::MdpError),
    /// The report.
    #[error(transparent)]
    Report(#[from] report::ReportError),
    /// A loss, gradient or logp that is not a number; training stops before the weights are
    /// touched.
    #[error("{place}: expected a finite {what}, got {value}{}", of_rows(rows))]
    NotFinite {
        /// The stage and its step, from 1; or the reference's logps.
        place: String,
        /// The quantity.
        what: &'static str,
        /// Its value.
        value: f64,
        /// The rows that it was computed from.
        rows: Vec<String>,
    },
    /// The metric that tells the best weights is none of those of an evaluation.
    #[error("key `preference.best.metric`: no evaluation has `{name}`; there are {known}")]
    BestMetric {
        /// The name in the recipe.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A data file as a whole, where the reason does not name it.
    #[error("{path}: {source}")]
    DataFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<lm::data::DataError>,
    },
    /// A checkpoint that is damaged or belongs to another run.
    #[error("checkpoint {path}: {reason}")]
    Checkpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What was expected and what came.
        reason: String,
    },
    /// The run's folder already holds a run.
    #[error("{path}: {reason}")]
    RunFolder {
        /// The folder.
        path: PathBuf,
        /// What to do about it.
        reason: String,
    },
    /// Two models that cannot be compared, or a row that cannot be scored.
    #[error("{place}: {reason}")]
    Score {
        /// The folder, or the row.
        place: String,
        /// What was expected and what came.
        reason: String,
    },
    /// A device without memory for what it was asked; what the run has saved is whole.
    #[error(
        "{place}: the device has no memory left ({said}); lower {lower}{}",
        of_rows(rows)
    )]
    OutOfMemory {
        /// What was at work: the stage, its step and its batch.
        place: String,
        /// What the device said.
        said: String,
        /// What to make smaller.
        lower: String,
        /// The rows that were computed on.
        rows: Vec<String>,
    },
    /// A device that this build or machine cannot use.
    #[error("device `{name}`: {reason}")]
    Device {
        /// The name that was asked for.
        name: String,
        /// Why, and what to do.
        reason: String,
    },
}

impl TrainError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_path_buf(),
            source,
        }
    }

    pub(crate) fn checkpoint(path: &Path, reason: impl Into<String>) -> Self {
        Self::Checkpoint {
            path: path.to_path_buf(),
            reason: reason.into(),
        }
    }
}

/// The rows that a value was computed from, in words; nothing for none.
fn of_rows(rows: &[String]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    format!("; rows of the data, from 0: {}", rows.join(", "))
}
