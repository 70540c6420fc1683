//! Everything that can be wrong with a decision process, with the offending place and number.

use std::error::Error;
use std::path::PathBuf;

/// What can be wrong with the input of this crate.
///
/// Each message names what was expected and what came. A state is shown as its tokens, the prompt
/// left out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MdpError {
    /// β is not finite or not above zero.
    #[error("beta is {value}, expected a finite number above 0")]
    Beta {
        /// The number that came.
        value: f64,
    },
    /// The vocabulary cannot hold EOS and one more token.
    #[error("vocabulary has {vocab} tokens, expected at least 2: eos and one more")]
    Vocabulary {
        /// The number of tokens that came.
        vocab: usize,
    },
    /// An episode of no actions.
    #[error("horizon is 0, expected at least 1 action per episode")]
    Horizon,
    /// EOS is not a token of the vocabulary.
    #[error("eos is token {eos}, expected one below the vocabulary's {vocab}")]
    EosOutside {
        /// The EOS that came.
        eos: u32,
        /// The number of tokens.
        vocab: usize,
    },
    /// The complete tree has more state-action pairs than the limit allows.
    #[error(
        "a tree of {vocab} tokens and horizon {horizon} has {pairs} state-action pairs \
         ({bytes} bytes for reference and rewards), allowed are {limit} pairs"
    )]
    TreeTooLarge {
        /// The number of tokens.
        vocab: usize,
        /// The most actions per episode.
        horizon: usize,
        /// State-action pairs; `u128::MAX` if there are more than that.
        pairs: u128,
        /// Bytes of the reference and reward tables; `u128::MAX` if there are more than that.
        bytes: u128,
        /// The most pairs allowed.
        limit: usize,
    },
    /// The machine refused the memory for a table.
    #[error("no memory for a table of {entries} numbers ({bytes} bytes)")]
    OutOfMemory {
        /// Numbers in the table.
        entries: usize,
        /// Bytes asked for.
        bytes: usize,
    },
    /// A table has the wrong number of entries.
    #[error("{table} has {got} entries, expected {expected}")]
    TableLength {
        /// Which table.
        table: &'static str,
        /// Entries that the tree needs.
        expected: usize,
        /// Entries that came.
        got: usize,
    },
    /// The reference gives a token no probability, or its number is not a probability.
    #[error(
        "reference at state {state:?} gives token {action} probability {probability}, \
         expected a number above 0: every token needs support"
    )]
    ReferenceSupport {
        /// The state's tokens after the prompt.
        state: Vec<u32>,
        /// The token.
        action: u32,
        /// The probability that came.
        probability: f64,
    },
    /// A policy's log-probability is NaN or above zero.
    #[error("{table} at state {state:?} gives token {action} logp {logp}, expected at most 0")]
    Logp {
        /// Which table.
        table: &'static str,
        /// The state's tokens after the prompt.
        state: Vec<u32>,
        /// The token.
        action: u32,
        /// The log-probability that came, in nats.
        logp: f64,
    },
    /// A row of probabilities does not sum to one.
    #[error("{table} at state {state:?} sums to {sum}, expected 1 within {tolerance}")]
    RowSum {
        /// Which table.
        table: &'static str,
        /// The state's tokens after the prompt.
        state: Vec<u32>,
        /// The sum that came.
        sum: f64,
        /// How far from one a sum may be.
        tolerance: f64,
    },
    /// A reward, logit, value or potential is NaN or infinite.
    #[error("{table} at state {state:?}, token {action}, is {value}, expected a finite number")]
    NotFinite {
        /// Which table.
        table: &'static str,
        /// The state's tokens after the prompt.
        state: Vec<u32>,
        /// The token.
        action: u32,
        /// The number that came.
        value: f64,
    },
    /// Rewards sum past the largest float, so the state has no finite value.
    #[error("soft value at state {state:?} is {value}: its rewards overflow")]
    Overflow {
        /// The state's tokens after the prompt.
        state: Vec<u32>,
        /// The value that came.
        value: f64,
    },
    /// A potential is not zero, nor one constant, on the terminal states.
    #[error(
        "potential is {value} where completion {completion:?} ends and {first} where another \
         ends, expected one constant on every terminal state"
    )]
    TerminalPotential {
        /// The completion's tokens.
        completion: Vec<u32>,
        /// Its potential.
        value: f64,
        /// The potential of the first terminal state.
        first: f64,
    },
    /// A token is not in the vocabulary.
    #[error("token {token} in state {state:?} is outside the vocabulary of {vocab}")]
    TokenOutside {
        /// The tokens that came.
        state: Vec<u32>,
        /// The offending token.
        token: u32,
        /// The number of tokens.
        vocab: usize,
    },
    /// A state does not begin with the prompt.
    #[error("state {state:?} does not begin with the prompt {prompt:?}")]
    Prompt {
        /// The tokens that came.
        state: Vec<u32>,
        /// The prompt of this process.
        prompt: Vec<u32>,
    },
    /// Tokens follow the end of an episode.
    #[error("state {state:?} goes on after its episode ended at token {ended_at}")]
    PastTheEnd {
        /// The tokens after the prompt.
        state: Vec<u32>,
        /// Actions until the episode ended.
        ended_at: usize,
    },
    /// A state that still has actions came where a completion was expected.
    #[error("{state:?} is not complete: expected eos {eos} or {horizon} tokens")]
    NotComplete {
        /// The tokens after the prompt.
        state: Vec<u32>,
        /// The end token.
        eos: u32,
        /// The most actions per episode.
        horizon: usize,
    },
    /// A terminal state came where one with actions was expected.
    #[error("state {state:?} is terminal, expected one with actions")]
    Terminal {
        /// The tokens after the prompt.
        state: Vec<u32>,
    },
    /// Two tables belong to different trees.
    #[error("{table} belongs to {got}, expected {expected}")]
    TreeMismatch {
        /// Which argument.
        table: &'static str,
        /// The tree expected, in words.
        expected: String,
        /// The tree that came, in words.
        got: String,
    },
    /// Comparisons need two completions of one prompt; rewards of different prompts have different
    /// origins.
    #[error("pair compares completions of prompt {chosen:?} and prompt {rejected:?}")]
    PromptsDiffer {
        /// The chosen side's prompt.
        chosen: Vec<u32>,
        /// The rejected side's prompt.
        rejected: Vec<u32>,
    },
    /// A weight of a pair or completion is negative, NaN or infinite, or all are zero.
    #[error("weight {index} is {value}, expected a finite number of at least 0 and one above 0")]
    Weight {
        /// Which weight.
        index: usize,
        /// The number that came.
        value: f64,
    },
    /// A rate such as label noise is outside its range.
    #[error("{name} is {value}, expected {expected}")]
    Parameter {
        /// Which parameter.
        name: &'static str,
        /// The number that came.
        value: f64,
        /// The range, in words.
        expected: &'static str,
    },
    /// A process description could not be read.
    #[error("{path}: {message}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system or the parser said, with line and column.
        message: String,
    },
    /// A process description is not valid TOML of the expected shape.
    #[error("process description: {message}")]
    Toml {
        /// What the parser said, with line and column.
        message: String,
    },
    /// A policy or value function outside this crate failed.
    #[error("policy failed: {source}")]
    Policy {
        /// What it said.
        source: Box<dyn Error + Send + Sync>,
    },
}

impl MdpError {
    /// Wraps the error of a policy or value function that lives outside this crate.
    pub fn policy(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Policy {
            source: source.into(),
        }
    }
}
