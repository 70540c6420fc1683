//! What can be wrong with data.

use std::path::PathBuf;

use super::Location;
use crate::chat::ChatError;
use crate::tokenizer::TokenizerError;

/// What can be wrong with a data file, a row of it, or its tokens.
///
/// Every variant about a row prints the file, the line where there are lines, and the column.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file could not be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is neither JSON lines, a JSON array of objects, nor Parquet.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was expected and what came.
        message: String,
    },
    /// A file holds no rows.
    #[error("{}: expected at least one row, found none", path.display())]
    NoRows {
        /// The file.
        path: PathBuf,
    },
    /// A row is not valid JSON.
    #[error("{location}: bad JSON: {message}")]
    BadJson {
        /// The row.
        location: Location,
        /// What the parser said, with the column in the line.
        message: String,
    },
    /// A row is JSON, but not an object.
    #[error("{location}: expected an object with columns, got {found}")]
    NotAnObject {
        /// The row.
        location: Location,
        /// The kind that came.
        found: &'static str,
    },
    /// A row lacks a column that it needs.
    #[error("{location}: column `{column}` is missing; the row has {found}")]
    MissingColumn {
        /// The row.
        location: Location,
        /// The column, or the columns of which one is needed.
        column: String,
        /// The columns that are there.
        found: String,
    },
    /// A column holds another type than it must.
    #[error("{location}: column `{column}`: expected {expected}, got {found}")]
    WrongType {
        /// The row.
        location: Location,
        /// The column, with the index of the message where it is one.
        column: String,
        /// What may stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A completion has nothing to learn from.
    #[error(
        "{location}: column `{column}`: expected a completion, got an empty one; --empty-completions drop (or keep) goes on"
    )]
    EmptyCompletion {
        /// The row.
        location: Location,
        /// The column.
        column: String,
    },
    /// A prompt leaves no room for a completion.
    #[error("{location}: the prompt has {tokens} tokens, longest allowed is {allowed}")]
    LongPrompt {
        /// The row.
        location: Location,
        /// Its tokens.
        tokens: usize,
        /// One less than `max_length`.
        allowed: usize,
    },
    /// A sequence is longer than the model's window.
    #[error(
        "{location}: prompt and {column} have {tokens} tokens, the model's window is {window}; set max_length to at most {window}"
    )]
    LongerThanWindow {
        /// The row.
        location: Location,
        /// The completion's column.
        column: String,
        /// Tokens of prompt and completion.
        tokens: usize,
        /// The model's longest sequence.
        window: usize,
    },
    /// The tokenizer gave an id that the model's vocabulary does not have.
    #[error(
        "{location}: column `{column}`: token id {id} is outside the model's vocabulary of {vocab_size}"
    )]
    TokenOutsideVocabulary {
        /// The row.
        location: Location,
        /// The column.
        column: String,
        /// The id.
        id: u32,
        /// The model's vocabulary.
        vocab_size: usize,
    },
    /// A conversational row, and a tokenizer without a chat template.
    #[error("{location}: the row is a conversation, but {} has no chat template", tokenizer.display())]
    NoTemplate {
        /// The row.
        location: Location,
        /// The tokenizer's folder.
        tokenizer: PathBuf,
    },
    /// The chat template failed on a row, or refused it.
    #[error("{location}: column `{column}`: {source}")]
    Template {
        /// The row.
        location: Location,
        /// The column.
        column: String,
        /// What the template said.
        source: Box<ChatError>,
    },
    /// The tokenizer refused a row, or has no end of sequence.
    #[error("{location}: column `{column}`: {source}")]
    Tokenizer {
        /// The row.
        location: Location,
        /// The column.
        column: String,
        /// What the tokenizer said.
        source: Box<TokenizerError>,
    },
    /// Every row of a file was malformed.
    #[error("every row was dropped as malformed, first: {0}")]
    AllMalformed(Box<DataError>),
    /// No row is left to learn from.
    #[error("all {rows} rows were dropped: {reasons}")]
    AllDropped {
        /// How many were read.
        rows: usize,
        /// Counts by reason.
        reasons: String,
    },
}

impl DataError {
    /// Whether the error is about one row's columns, so that the rows after it can still be read.
    #[must_use]
    pub fn is_malformed_row(&self) -> bool {
        matches!(
            self,
            Self::NotAnObject { .. } | Self::MissingColumn { .. } | Self::WrongType { .. }
        )
    }
}
