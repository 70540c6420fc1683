//! Splits, and what they hold.

use serde::{Deserialize, Serialize};

use crate::{Completion, Memo};

/// The disjoint parts of the task's memos.
///
/// Which part a memo belongs to is a function of its facts alone (a hash), so that no memo is ever
/// in two splits, whatever the seeds and sizes and however it is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// For supervised fine-tuning.
    Sft,
    /// For preference training.
    Train,
    /// Held-out, drawn as [`Split::Train`] is.
    Eval,
    /// Held-out; each completion has two wrong facts that never occur together elsewhere
    /// ([`UNSEEN_TOGETHER`](crate::UNSEEN_TOGETHER)).
    Unseen,
    /// Held-out prompts for sampling from policies.
    Prompts,
}

impl Split {
    /// All five.
    pub const ALL: [Self; 5] = [
        Self::Sft,
        Self::Train,
        Self::Eval,
        Self::Unseen,
        Self::Prompts,
    ];

    /// The lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Train => "train",
            Self::Eval => "eval",
            Self::Unseen => "unseen",
            Self::Prompts => "prompts",
        }
    }

    /// The split that a memo belongs to.
    pub fn of(memo: &Memo) -> Self {
        // FNV-1a over the facts: the same on every platform, unlike the standard hasher.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for fact in crate::Fact::ALL {
            for byte in memo.value(fact).bytes().chain([b'\n']) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        }
        match (hash >> 32) % 8 {
            0..=2 => Self::Sft,
            3 | 4 => Self::Train,
            5 => Self::Eval,
            6 => Self::Unseen,
            _ => Self::Prompts,
        }
    }
}

/// A prompt with one completion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// The facts.
    pub memo: Memo,
    /// The memo as text, ending in `Summary:`.
    pub prompt: String,
    /// The prompt's tokens. `[seq]`
    pub prompt_ids: Vec<u32>,
    /// A summary of varied quality.
    pub completion: Completion,
}

/// A prompt with a chosen and a rejected completion, never equal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// The facts.
    pub memo: Memo,
    /// The memo as text, ending in `Summary:`.
    pub prompt: String,
    /// The prompt's tokens. `[seq]`
    pub prompt_ids: Vec<u32>,
    /// The preferred completion by the drawn label, which may be the worse one.
    pub chosen: Completion,
    /// The other completion.
    pub rejected: Completion,
    /// The probability that the label fell as it did:
    /// `σ(label_sharpness · (R_chosen − R_rejected))`. Below 0.5 where the label is noise.
    pub p_chosen: f64,
}

/// The best accuracy that any judge can expect on these labels: the mean of `max(p, 1 − p)`.
///
/// Labels are drawn, so even the true reward does not predict all of them. 0.5 for no pairs.
pub fn ceiling(pairs: &[Pair]) -> f64 {
    if pairs.is_empty() {
        return 0.5;
    }
    let best = |pair: &Pair| pair.p_chosen.max(1.0 - pair.p_chosen);
    pairs.iter().map(best).sum::<f64>() / pairs.len() as f64
}
