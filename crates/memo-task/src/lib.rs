//! The embedded task: memos, summaries of them, and a true reward for every token.
//!
//! A [`Memo`] states seven facts: sender, recipient, amount, item, place, day and time. A
//! *completion* summarises it in one or two sentences. Everything is made from a seed, nothing is
//! downloaded, and a person can read it:
//!
//! ```text
//! Note: It lands in Oslo. It goes to Hansen. It holds 40 crates of apples. It is due on Monday.
//! It comes from Maria. It is due at 9:00.
//! Summary: Maria sends 40 crates of apples to Hansen in Oslo on Monday at 9:00.
//! ```
//!
//! What makes it a task for credit assignment is the [`Reader`]: a small finite-state machine that
//! gives each token of *any* token sequence, also of garbage, its true reward from the memo and
//! the tokens before it. A value that contradicts the memo costs [`RewardWeights::contradiction`]
//! where it stands, filler costs [`RewardWeights::filler`] a token, and each fact that was never
//! stated costs [`RewardWeights::missing`] at the end-of-text token. Preference labels are drawn by
//! Bradley-Terry from the *sums* of these rewards, so a policy trained on the labels never sees
//! where the reward was lost, and one can measure whether it found out.
//!
//! # Examples
//!
//! ```
//! use memo_task::{Memo, MemoConfig, MemoTask};
//!
//! let task = MemoTask::new(MemoConfig::default())?;
//! let memo = Memo::parse(
//!     "Memo:\nFrom: Maria\nTo: Hansen\nGoods: 40 crates of apples\nPlace: Oslo\nDay: Monday\n\
//!      Time: 9:00\nSummary:",
//! )?;
//!
//! // Paris contradicts the memo (-1.0), and the time was left out (-0.7 at the end of the text).
//! let mut ids = task.encode(" Maria sends 40 crates of apples to Hansen in Paris on Monday.");
//! ids.push(task.eos_id());
//! let rewards = task.token_rewards(&memo, &ids);
//! let total: f64 = rewards.iter().map(|r| r.reward).sum();
//! assert!((total - -1.7).abs() < 1e-12);
//! assert_eq!(task.decode(&ids[9..10]), " Paris");
//! assert_eq!(rewards[9].reward, -1.0);
//! assert_eq!(rewards[13].reward, -0.7);
//!
//! // A summary with nothing wrong loses nothing.
//! let best = task.best_completion(&memo)?;
//! assert_eq!(best.text, " Maria sends 40 crates of apples to Hansen in Oslo on Monday at 9:00.");
//! assert_eq!(best.total_reward(), 0.0);
//! # Ok::<(), memo_task::MemoError>(())
//! ```
//!
//! # Map
//!
//! | To | Use |
//! |---|---|
//! | make the task | [`MemoTask`], [`MemoConfig`], [`RewardWeights`] |
//! | draw data | [`MemoTask::examples`], [`MemoTask::pairs`], [`Split`], [`Example`], [`Pair`] |
//! | know the best accuracy | [`ceiling`] |
//! | judge any tokens | [`MemoTask::token_rewards`], [`Reader`], [`TokenReward`], [`RewardKind`] |
//! | study credit | [`MemoTask::good_completion`], [`MemoTask::corrupt`], [`UNSEEN_TOGETHER`] |
//! | tokenise | [`MemoTask::encode`], [`MemoTask::decode`], [`MemoTask::tokenizer_json`] |

mod config;
mod error;
mod memo;
mod reader;
mod split;
mod task;
mod vocab;
mod writer;

pub use config::{MemoConfig, RewardWeights};
pub use error::MemoError;
pub use memo::{Fact, Layout, Memo};
pub use reader::{Reader, RewardKind, TokenReward};
pub use split::{Example, Pair, Split, ceiling};
pub use task::MemoTask;
pub use writer::{Completion, Corruption, CorruptionKind, UNSEEN_TOGETHER};
