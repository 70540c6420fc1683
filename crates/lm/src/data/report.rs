//! What became of the rows.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a row was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// The prompt fills `max_length`, so no completion token would be left.
    PromptTooLong,
    /// A completion is empty.
    EmptyCompletion,
    /// A column is missing or of the wrong type.
    Malformed,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PromptTooLong => "the prompt fills max_length",
            Self::EmptyCompletion => "a completion is empty",
            Self::Malformed => "a column is missing or of the wrong type",
        })
    }
}

/// Counts of what was read, kept, dropped and changed; prints as a table.
///
/// For preferences `completions` counts both sides, so it is twice `kept`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DataReport {
    /// Rows given.
    pub rows: usize,
    /// Rows kept.
    pub kept: usize,
    /// Rows dropped, by reason.
    pub dropped: BTreeMap<DropReason, usize>,
    /// Chosen completions (or only completions) that `max_length` cut.
    pub chosen_truncated: usize,
    /// Rejected completions that `max_length` cut.
    pub rejected_truncated: usize,
    /// Completion tokens lost to `max_length`.
    pub tokens_cut: usize,
    /// Kept rows whose prompt ends within a token of prompt and completion together, so that this
    /// end of the prompt went to the completion.
    pub boundary_merged: usize,
    /// Completions to which the end of sequence was appended.
    pub eos_appended: usize,
    /// Kept pairs whose two completions are the same tokens: they teach nothing.
    pub identical: usize,
    /// Kept rows with no prompt token: the first completion token has nothing to be predicted from.
    pub without_prompt: usize,
    /// Completions kept.
    pub completions: usize,
    /// Prompt tokens kept, counted once a row.
    pub prompt_tokens: usize,
    /// Completion tokens kept.
    pub completion_tokens: usize,
    /// Tokens of the longest prompt with completion kept.
    pub longest: usize,
}

impl DataReport {
    /// Rows dropped for any reason.
    #[must_use]
    pub fn n_dropped(&self) -> usize {
        self.dropped.values().sum()
    }

    /// The counts as label and number, in the order shown; zero counts of rare events are left out.
    #[must_use]
    pub fn lines(&self) -> Vec<(String, usize)> {
        let mut lines = vec![
            ("rows read".to_owned(), self.rows),
            ("rows kept".to_owned(), self.kept),
        ];
        for (reason, &n) in &self.dropped {
            lines.push((format!("dropped: {reason}"), n));
        }
        let rare = [
            (
                "chosen completions cut at max_length",
                self.chosen_truncated,
            ),
            (
                "rejected completions cut at max_length",
                self.rejected_truncated,
            ),
            ("completion tokens cut", self.tokens_cut),
            (
                "prompts merged with the completion's first token",
                self.boundary_merged,
            ),
            ("completions given an end of sequence", self.eos_appended),
            ("pairs with two equal completions", self.identical),
            ("rows without a prompt", self.without_prompt),
        ];
        lines.extend(
            rare.into_iter()
                .filter(|&(_, n)| n > 0)
                .map(|(label, n)| (label.to_owned(), n)),
        );
        lines.extend([
            ("prompt tokens".to_owned(), self.prompt_tokens),
            ("completion tokens".to_owned(), self.completion_tokens),
            ("longest sequence".to_owned(), self.longest),
        ]);
        lines
    }

    /// The reasons and counts of dropped rows in one line, such as `3 (a completion is empty)`.
    #[must_use]
    pub fn drop_summary(&self) -> String {
        self.dropped
            .iter()
            .map(|(reason, n)| format!("{n} ({reason})"))
            .collect::<Vec<_>>()
            .join(", ")
    }
}

impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.lines();
        let width = lines
            .iter()
            .map(|(label, _)| label.len())
            .max()
            .unwrap_or(0);
        for (i, (label, n)) in lines.iter().enumerate() {
            let end = if i + 1 < lines.len() { "\n" } else { "" };
            write!(f, "{label:<width$}  {n:>9}{end}")?;
        }
        Ok(())
    }
}

impl std::ops::AddAssign<&DataReport> for DataReport {
    fn add_assign(&mut self, other: &DataReport) {
        self.rows += other.rows;
        self.kept += other.kept;
        for (&reason, n) in &other.dropped {
            *self.dropped.entry(reason).or_default() += n;
        }
        self.chosen_truncated += other.chosen_truncated;
        self.rejected_truncated += other.rejected_truncated;
        self.tokens_cut += other.tokens_cut;
        self.boundary_merged += other.boundary_merged;
        self.eos_appended += other.eos_appended;
        self.identical += other.identical;
        self.without_prompt += other.without_prompt;
        self.completions += other.completions;
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.longest = self.longest.max(other.longest);
    }
}
