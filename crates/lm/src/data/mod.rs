//! Preference and fine-tuning data: from files to token ids.
//!
//! Rows are read one by one from JSON lines, JSON arrays and Parquet ([`RowReader`]), checked and
//! typed ([`PreferenceRow`], [`SftRow`], [`LabelledRow`]), and tokenised by TRL's rules
//! ([`tokenize_pairs`], [`tokenize_sft`], [`tokenize_labelled`]). What was dropped or cut, and why,
//! is counted in a [`DataReport`] that prints as a table.
//!
//! Both of TRL's forms are read: text, where columns are strings, and conversational, where they
//! are lists of messages. A preference row has an explicit `prompt`, or an implicit one that is the
//! common start of `chosen` and `rejected`. Other columns are kept.

mod error;
mod read;
mod report;
mod rows;
mod tokenize;

pub use error::DataError;
pub use read::{Format, Location, RawRow, RowReader};
pub use report::{DataReport, DropReason};
pub use rows::{
    Content, LabelledRow, PreferenceRow, SftBody, SftRow, load_rows, read_labelled,
    read_preferences, read_sft,
};
pub use tokenize::{
    Boundary, EmptyCompletions, LabelledExample, PreferencePair, SftExample, TokenizeOptions,
    Tokenized, Treatment, tokenize_labelled, tokenize_pair, tokenize_pairs,
    tokenize_pairs_observed, tokenize_sft,
};
