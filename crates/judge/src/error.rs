//! What can go wrong between a completion and its judgement.

use std::path::PathBuf;
use std::time::Duration;

use memo_task::MemoError;

/// What was expected of a file, a command, a server or the caller's input, and what came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JudgeError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// A line of a JSON lines file is not what it should be.
    #[error("{name}: line {line}: {reason}")]
    Line {
        /// The file, or where the lines came from.
        name: String,
        /// The line, counted from 1.
        line: usize,
        /// What was expected and what came.
        reason: String,
    },
    /// Another process has the cache open.
    #[error("{}: another judge is at work with this cache; wait for it or name another file", path.display())]
    CacheLocked {
        /// The cache.
        path: PathBuf,
    },
    /// A setting lies outside its range.
    #[error("{field} must be {expected}, got {value}")]
    Config {
        /// The setting.
        field: &'static str,
        /// The range in words.
        expected: &'static str,
        /// What came.
        value: String,
    },
    /// The question's template does not work.
    #[error("judge template: {reason}")]
    Template {
        /// What minijinja said, or the variable that the template never shows.
        reason: String,
    },
    /// The environment variable that should hold the API key does not.
    #[error("environment variable {variable} should hold the judge's API key, but {problem}")]
    ApiKey {
        /// The variable's name. Its value is never shown.
        variable: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The server refuses every question alike: wrong address, wrong key, no such model.
    #[error("judge at {url}: {reason}")]
    Refused {
        /// The address that was asked.
        url: String,
        /// What the server said.
        reason: String,
    },
    /// A reward command could not be started.
    #[error("reward command `{command}`: cannot be started: {source}")]
    CommandStart {
        /// The command.
        command: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A reward command answered with something else than a reward.
    #[error("reward command `{command}`: line {line} of its output: {reason}")]
    CommandLine {
        /// The command.
        command: String,
        /// The line of its output, counted from 1 over all batches.
        line: usize,
        /// What was expected and what came.
        reason: String,
    },
    /// A reward command ended before it had answered everything.
    #[error(
        "reward command `{command}`: {ending} after line {line} of its output, \
         {answered} of {asked} rewards were there{}",
        last_words(stderr)
    )]
    CommandEnded {
        /// The command.
        command: String,
        /// How it ended, such as `exit status: 1`.
        ending: String,
        /// Lines it had written, over all batches.
        line: usize,
        /// Rewards of this batch it had given.
        answered: usize,
        /// Completions in this batch.
        asked: usize,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// A reward command was silent for too long.
    #[error(
        "reward command `{command}`: no reward within {seconds} s after line {line} of its output, \
         {answered} of {asked} were there{}",
        last_words(stderr),
        seconds = deadline.as_secs_f64()
    )]
    CommandDeadline {
        /// The command.
        command: String,
        /// The longest silence allowed.
        deadline: Duration,
        /// Lines it had written, over all batches.
        line: usize,
        /// Rewards of this batch it had given.
        answered: usize,
        /// Completions in this batch.
        asked: usize,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// A reward is NaN or infinite.
    #[error("sample {index}: reward is {reward}, expected a finite number")]
    NotFinite {
        /// The sample, counted from 0.
        index: usize,
        /// What came.
        reward: f64,
    },
    /// A prompt is no memo.
    #[error("sample {index}: {source}")]
    Memo {
        /// The sample, counted from 0.
        index: usize,
        /// What the memo task said.
        source: MemoError,
    },
    /// A sample's metadata lacks a field, or holds something else there.
    #[error("sample {index}: field `{field}` should be {expected}, got {value}")]
    Metadata {
        /// The sample, counted from 0.
        index: usize,
        /// The field.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What is there, or `nothing`.
        value: String,
    },
    /// One policy answered a prompt more often than the other.
    #[error("prompt {prompt:?}: {n_a} completions of A and {n_b} of B cannot be paired")]
    Unpaired {
        /// The beginning of the prompt.
        prompt: String,
        /// Completions of A.
        n_a: usize,
        /// Completions of B.
        n_b: usize,
    },
    /// A judge gave another number of judgements than there are pairs.
    #[error("judge {judge}: gave {got} judgements for {expected} pairs")]
    Count {
        /// The judge's identity.
        judge: String,
        /// Pairs it was asked about.
        expected: usize,
        /// Judgements it gave.
        got: usize,
    },
}

impl JudgeError {
    /// Makes an error of the file system name its file.
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }
}

fn last_words(stderr: &str) -> String {
    match stderr.trim() {
        "" => String::new(),
        words => format!("; it wrote: {words}"),
    }
}

/// The beginning of a text, for a message.
pub(crate) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 200;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    }
}
