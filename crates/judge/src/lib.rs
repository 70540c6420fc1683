//! Who wins: rewards, judges, preference making, and win rates with intervals.
//!
//! Completions come as [`Sample`]s. A [`Reward`] gives each a number; from numbers come
//! [preference rows](preferences). A [`Judge`] says which of two completions is better; from
//! verdicts comes an [evaluation](evaluate) of one policy against another. Every reward is a judge
//! ([`RewardJudge`]), and a language model behind a server is one too ([`HttpJudge`]).
//!
//! # Examples
//!
//! ```
//! use judge::{
//!     EvalOptions, MemoReward, PreferenceOptions, RewardJudge, Rule, Sample, evaluate,
//!     pair_samples, preferences, score,
//! };
//!
//! let prompt = "Memo:\nFrom: Maria\nTo: Hansen\nGoods: 40 crates of apples\nPlace: Oslo\n\
//!               Day: Monday\nTime: 9:00\nSummary:";
//! let right = " Maria sends 40 crates of apples to Hansen in Oslo on Monday at 9:00.";
//! let wrong = " Maria sends 40 crates of apples to Hansen in Paris on Monday at 9:00.";
//! let reward = MemoReward::new(Default::default())?;
//!
//! // Preferences from several completions of a prompt.
//! let samples = [Sample::new(prompt, wrong), Sample::new(prompt, right)];
//! let scored = score(&samples, &reward, &mut |_| ())?;
//! let (rows, report) = preferences(&scored, &PreferenceOptions::default())?;
//! assert_eq!(rows[0].chosen, right);
//! assert_eq!(report.n_rows, 1);
//!
//! // One policy against another, on one prompt.
//! let pairs = pair_samples(&samples[1..], &samples[..1])?;
//! let judge = RewardJudge::new(&reward, Rule::default())?;
//! let outcome = evaluate(&pairs, &judge, &EvalOptions::default(), &mut |_| ())?;
//! assert_eq!(outcome.win_rate.unwrap().mean, 1.0);
//! # Ok::<(), judge::JudgeError>(())
//! ```
//!
//! # Map
//!
//! | To | Use |
//! |---|---|
//! | read and write rows | [`Sample`], [`ScoredSample`], [`read_jsonl`], [`write_jsonl`] |
//! | reward completions | [`Reward`], [`MemoReward`], [`CommandReward`], [`score`] |
//! | make preferences | [`preferences`], [`judged_preferences`], [`PreferenceOptions`], [`Pairing`], [`Labelling`], [`PreferenceRow`], [`PreferenceReport`] |
//! | compare completions | [`Judge`], [`Comparison`], [`pair_samples`], [`Judgement`], [`RewardJudge`], [`Rule`] |
//! | ask a language model | [`HttpJudge`], [`HttpJudgeConfig`], [`JudgementCache`] |
//! | sum up | [`evaluate`], [`EvalOptions`], [`EvalOutcome`] |
//! | give intervals | [`Estimate`], [`length_controlled`], [`win_rate_by_length`] |

mod cache;
mod command;
mod error;
mod evaluate;
mod http;
mod judge;
mod preference;
mod question;
mod retry_after;
mod reward;
mod sample;
mod statistics;

pub use cache::{Answer, JudgementCache, QuestionKey};
pub use command::CommandReward;
pub use error::JudgeError;
pub use evaluate::{EvalOptions, EvalOutcome, LengthUnit, PositionBias, evaluate};
pub use http::{DEFAULT_TEMPLATE, HttpJudge, HttpJudgeConfig};
pub use judge::{
    Comparison, Decision, Judge, Judgement, Progress, RewardJudge, Rule, SAME_REWARD, Verdict,
    pair_samples,
};
pub use preference::{
    Labelling, Pairing, PreferenceOptions, PreferenceReport, PreferenceRow, judged_preferences,
    preferences, score,
};
pub use reward::{MemoReward, Reward};
pub use sample::{Sample, ScoredSample, read_jsonl, write_jsonl};
pub use statistics::{
    Estimate, LengthControlled, LengthTercile, length_controlled, win_rate_by_length,
};
