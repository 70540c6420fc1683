//! Judges: which of two completions is better.

use mdp_core::bradley_terry;
use serde::{Deserialize, Serialize};

use crate::error::excerpt;
use crate::{JudgeError, Reward, Sample};

/// Two completions of one prompt, to be compared. A is the policy in question, B the one it is
/// measured against.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// A's completion.
    pub a: Sample,
    /// B's completion of the same prompt.
    pub b: Sample,
}

impl Comparison {
    /// Two completions without metadata.
    pub fn new(prompt: &str, a: impl Into<String>, b: impl Into<String>) -> Self {
        Self {
            a: Sample::new(prompt, a),
            b: Sample::new(prompt, b),
        }
    }

    /// The prompt of both.
    #[must_use]
    pub fn prompt(&self) -> &str {
        &self.a.prompt
    }

    /// The same with A and B exchanged.
    #[must_use]
    pub fn swapped(self) -> Self {
        Self {
            a: self.b,
            b: self.a,
        }
    }
}

/// Pairs the completions of two policies by prompt: A's first completion of a prompt with B's
/// first, the second with the second, in A's order.
///
/// # Errors
///
/// [`JudgeError::Unpaired`] for a prompt that one side has answered more often than the other.
///
/// # Examples
///
/// ```
/// use judge::{Comparison, Sample, pair_samples};
///
/// let a = [Sample::new("x", "1"), Sample::new("y", "2")];
/// let b = [Sample::new("y", "4"), Sample::new("x", "3")];
/// let pairs = pair_samples(&a, &b)?;
/// assert_eq!(pairs, [Comparison::new("x", "1", "3"), Comparison::new("y", "2", "4")]);
/// # Ok::<(), judge::JudgeError>(())
/// ```
pub fn pair_samples(a: &[Sample], b: &[Sample]) -> Result<Vec<Comparison>, JudgeError> {
    use std::collections::{HashMap, VecDeque};
    let mut of_b: HashMap<&str, VecDeque<&Sample>> = HashMap::new();
    for sample in b {
        of_b.entry(&sample.prompt).or_default().push_back(sample);
    }
    let unpaired = |prompt: &str| {
        let count = |side: &[Sample]| side.iter().filter(|s| s.prompt == prompt).count();
        JudgeError::Unpaired {
            prompt: excerpt(prompt),
            n_a: count(a),
            n_b: count(b),
        }
    };
    let mut pairs = Vec::with_capacity(a.len());
    for ours in a {
        let theirs = of_b.get_mut(ours.prompt.as_str());
        let theirs = theirs
            .and_then(VecDeque::pop_front)
            .ok_or_else(|| unpaired(&ours.prompt))?;
        pairs.push(Comparison {
            a: ours.clone(),
            b: theirs.clone(),
        });
    }
    // In B's order, so that the message is the same every time.
    match b.iter().find(|s| !of_b[s.prompt.as_str()].is_empty()) {
        Some(left) => Err(unpaired(&left.prompt)),
        None => Ok(pairs),
    }
}

/// Who is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// A's completion.
    A,
    /// B's completion.
    B,
    /// Neither.
    Tie,
}

impl Verdict {
    /// 1 for a win of A, 0 for a loss, 0.5 for a tie.
    #[must_use]
    pub fn credit(self) -> f64 {
        match self {
            Self::A => 1.0,
            Self::B => 0.0,
            Self::Tie => 0.5,
        }
    }

    /// The verdict with A and B exchanged.
    #[must_use]
    pub fn swapped(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
            Self::Tie => Self::Tie,
        }
    }
}

/// What a judge made of one comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Judgement {
    /// It has a verdict.
    Decided(Decision),
    /// It answered, but with no verdict that could be read; not guessed at.
    Unparsed {
        /// The beginning of the answer.
        reply: String,
    },
    /// It could not be asked, or did not answer.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A verdict and what it rests on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Who is better.
    pub verdict: Verdict,
    /// What A gets for it: the verdict's [`credit`](Verdict::credit), or the probability that A is
    /// better where the judge gives one.
    pub credit: f64,
    /// The rewards of A and B, where the judge compares rewards.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rewards: Option<[f64; 2]>,
    /// The verdict when A was shown first and when B was shown first, where both were asked.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub orders: Option<[Verdict; 2]>,
}

/// How far a judge has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Questions answered, those from a cache among them.
    pub done: usize,
    /// Questions in all; a pair may take two.
    pub total: usize,
}

/// What decides which of two completions is better.
pub trait Judge {
    /// A name that is the same for the same judge, for reports.
    fn identity(&self) -> String;

    /// The judgement of each pair, in their order. `progress` is called now and then, from the
    /// calling thread.
    ///
    /// # Errors
    ///
    /// What would fail for every pair alike. What concerns one pair is a
    /// [`Judgement::Failed`].
    fn judge(
        &self,
        pairs: &[Comparison],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Judgement>, JudgeError>;
}

impl<J: Judge + ?Sized> Judge for &J {
    fn identity(&self) -> String {
        (**self).identity()
    }

    fn judge(
        &self,
        pairs: &[Comparison],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Judgement>, JudgeError> {
        (**self).judge(pairs, progress)
    }
}

impl<J: Judge + ?Sized> Judge for Box<J> {
    fn identity(&self) -> String {
        (**self).identity()
    }

    fn judge(
        &self,
        pairs: &[Comparison],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Judgement>, JudgeError> {
        (**self).judge(pairs, progress)
    }
}

/// How a [`RewardJudge`] turns two rewards into what A gets.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// The higher reward wins; a difference of at most `band` is a tie.
    Strict {
        /// Reward units, at least 0.
        band: f64,
    },
    /// A gets `σ(sharpness · (reward_a − reward_b))`, the Bradley-Terry probability that it is
    /// preferred (equation 1 of <https://arxiv.org/abs/2404.12358>, scaled). The verdict is the
    /// higher reward's.
    BradleyTerry {
        /// Nats per reward unit, above 0.
        sharpness: f64,
    },
}

/// Rewards are sums of decimal fractions; two that differ by rounding alone are equal.
pub const SAME_REWARD: f64 = 1e-9;

impl Default for Rule {
    /// The higher reward wins; rewards that differ by rounding alone tie.
    fn default() -> Self {
        Self::Strict { band: SAME_REWARD }
    }
}

/// A judge that compares the rewards of both completions.
///
/// # Examples
///
/// ```
/// use judge::{Comparison, Judge, JudgeError, Judgement, Reward, RewardJudge, Rule, Sample, Verdict};
///
/// /// Shorter is better.
/// struct Brevity;
///
/// impl Reward for Brevity {
///     fn identity(&self) -> String {
///         "brevity".into()
///     }
///     fn rewards(&self, samples: &[Sample]) -> Result<Vec<f64>, JudgeError> {
///         Ok(samples.iter().map(|s| -(s.completion.len() as f64)).collect())
///     }
/// }
///
/// let judge = RewardJudge::new(Brevity, Rule::default())?;
/// let pairs = [Comparison::new("Say hello.", "Hello!", "Good day to you!")];
/// let judgements = judge.judge(&pairs, &mut |_| ())?;
/// assert!(matches!(&judgements[0], Judgement::Decided(d) if d.verdict == Verdict::A));
/// # Ok::<(), JudgeError>(())
/// ```
#[derive(Clone, Debug)]
pub struct RewardJudge<R> {
    reward: R,
    rule: Rule,
}

impl<R: Reward> RewardJudge<R> {
    /// A judge by this reward and rule.
    ///
    /// # Errors
    ///
    /// [`JudgeError::Config`] for a band below zero, a sharpness of zero or less, or a number that
    /// is not finite.
    pub fn new(reward: R, rule: Rule) -> Result<Self, JudgeError> {
        match rule {
            Rule::Strict { band } => check_band(band)?,
            Rule::BradleyTerry { sharpness } => check_sharpness(sharpness)?,
        }
        Ok(Self { reward, rule })
    }

    fn decide(&self, a: f64, b: f64) -> Decision {
        let (band, credit) = match self.rule {
            Rule::Strict { band } => (band, None),
            Rule::BradleyTerry { sharpness } => (
                SAME_REWARD,
                Some(bradley_terry(sharpness * a, sharpness * b)),
            ),
        };
        let verdict = match a - b {
            difference if difference > band => Verdict::A,
            difference if difference < -band => Verdict::B,
            _ => Verdict::Tie,
        };
        Decision {
            verdict,
            credit: credit.unwrap_or(verdict.credit()),
            rewards: Some([a, b]),
            orders: None,
        }
    }
}

impl<R: Reward> Judge for RewardJudge<R> {
    fn identity(&self) -> String {
        match self.rule {
            Rule::Strict { .. } => self.reward.identity(),
            Rule::BradleyTerry { sharpness } => {
                format!(
                    "{}, Bradley-Terry of {sharpness} nats",
                    self.reward.identity()
                )
            }
        }
    }

    fn judge(
        &self,
        pairs: &[Comparison],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Judgement>, JudgeError> {
        // Enough pairs to keep an external command busy, few enough to show that it is alive.
        const PAIRS: usize = 64;
        let total = pairs.len();
        let mut judgements = Vec::with_capacity(total);
        for chunk in pairs.chunks(PAIRS) {
            let sides = chunk.iter().flat_map(|pair| [&pair.a, &pair.b]);
            let samples: Vec<Sample> = sides.cloned().collect();
            let rewards = finite_rewards(&self.reward, &samples).map_err(|error| {
                // Places are counted over all pairs, two samples each.
                at_offset(error, 2 * judgements.len())
            })?;
            let decided = rewards.chunks(2).map(|both| self.decide(both[0], both[1]));
            judgements.extend(decided.map(Judgement::Decided));
            let done = judgements.len();
            progress(Progress { done, total });
        }
        Ok(judgements)
    }
}

/// The rewards of samples, as many as there are samples and all finite.
pub(crate) fn finite_rewards(
    reward: &(impl Reward + ?Sized),
    samples: &[Sample],
) -> Result<Vec<f64>, JudgeError> {
    let rewards = reward.rewards(samples)?;
    if rewards.len() != samples.len() {
        return Err(JudgeError::Count {
            judge: reward.identity(),
            expected: samples.len(),
            got: rewards.len(),
        });
    }
    match rewards.iter().position(|reward| !reward.is_finite()) {
        Some(index) => Err(JudgeError::NotFinite {
            index,
            reward: rewards[index],
        }),
        None => Ok(rewards),
    }
}

/// An error about a sample of a chunk, naming its place among all.
pub(crate) fn at_offset(mut error: JudgeError, offset: usize) -> JudgeError {
    if let JudgeError::NotFinite { index, .. }
    | JudgeError::Memo { index, .. }
    | JudgeError::Metadata { index, .. } = &mut error
    {
        *index += offset;
    }
    error
}

pub(crate) fn check_band(band: f64) -> Result<(), JudgeError> {
    if band.is_finite() && band >= 0.0 {
        return Ok(());
    }
    Err(JudgeError::Config {
        field: "band",
        expected: "finite and at least 0",
        value: band.to_string(),
    })
}

pub(crate) fn check_sharpness(sharpness: f64) -> Result<(), JudgeError> {
    if sharpness.is_finite() && sharpness > 0.0 {
        return Ok(());
    }
    Err(JudgeError::Config {
        field: "sharpness",
        expected: "finite and above 0",
        value: sharpness.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A completion's own text is its reward.
    struct Literal;

    impl Reward for Literal {
        fn identity(&self) -> String {
            "literal".into()
        }

        fn rewards(&self, samples: &[Sample]) -> Result<Vec<f64>, JudgeError> {
            Ok(samples
                .iter()
                .map(|s| s.completion.parse().unwrap())
                .collect())
        }
    }

    fn decide(rule: Rule, a: &str, b: &str) -> Decision {
        let judge = RewardJudge::new(Literal, rule).unwrap();
        let pairs = [Comparison::new("p", a, b)];
        match judge.judge(&pairs, &mut |_| ()).unwrap().remove(0) {
            Judgement::Decided(decision) => decision,
            other => panic!("a reward always decides, got {other:?}"),
        }
    }

    #[test]
    fn the_band_is_a_tie_up_to_its_edge() {
        let rule = Rule::Strict { band: 0.5 };
        assert_eq!(decide(rule, "1.5", "1").verdict, Verdict::Tie);
        assert_eq!(decide(rule, "1.75", "1").verdict, Verdict::A);
        assert_eq!(decide(rule, "0.25", "1").verdict, Verdict::B);
        // 0.1 + 0.2 and 0.3 differ by rounding.
        let sum = (0.1f64 + 0.2).to_string();
        assert_eq!(decide(Rule::default(), &sum, "0.3").verdict, Verdict::Tie);
    }

    #[test]
    fn bradley_terry_gives_the_probability() {
        let rule = Rule::BradleyTerry {
            sharpness: 3.0f64.ln(),
        };
        let decision = decide(rule, "2", "1");
        assert!((decision.credit - 0.75).abs() < 1e-15);
        assert_eq!(decision.verdict, Verdict::A);
        assert_eq!(decision.rewards, Some([2.0, 1.0]));
        let swapped = decide(rule, "1", "2");
        assert!((decision.credit + swapped.credit - 1.0).abs() < 1e-15);
    }

    #[test]
    fn a_reward_that_is_not_finite_is_named_by_its_place() {
        let judge = RewardJudge::new(Literal, Rule::default()).unwrap();
        let mut pairs = vec![Comparison::new("p", "1", "2"); 70];
        pairs[66].b.completion = "inf".into();
        let error = judge.judge(&pairs, &mut |_| ()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "sample 133: reward is inf, expected a finite number"
        );
    }

    #[test]
    fn a_setting_out_of_range_is_refused() {
        for rule in [
            Rule::Strict { band: -1.0 },
            Rule::Strict { band: f64::NAN },
            Rule::BradleyTerry { sharpness: 0.0 },
        ] {
            assert!(RewardJudge::new(Literal, rule).is_err(), "{rule:?}");
        }
    }

    #[test]
    fn a_prompt_answered_by_one_side_alone_is_named() {
        let one = [Sample::new("x", "1"), Sample::new("y", "2")];
        let other = [Sample::new("x", "3")];
        let expected = "prompt \"y\": 1 completions of A and 0 of B cannot be paired";
        assert_eq!(
            pair_samples(&one, &other).unwrap_err().to_string(),
            expected
        );
        let error = pair_samples(&other, &one).unwrap_err();
        let expected = "prompt \"y\": 0 completions of A and 1 of B cannot be paired";
        assert_eq!(error.to_string(), expected);
    }
}
