//! Policy against policy: verdicts of a judge, summed up.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::error::excerpt;
use crate::statistics::mean;
use crate::{
    Comparison, Decision, Estimate, Judge, JudgeError, Judgement, LengthControlled, LengthTercile,
    Progress, Sample, Verdict, length_controlled, win_rate_by_length,
};

/// What the length of a completion is counted in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LengthUnit {
    /// Unicode characters of the text.
    #[default]
    Characters,
    /// The field `n_tokens` of each sample.
    Tokens,
}

impl LengthUnit {
    /// The length of a sample; `index` is the place to name in the error.
    fn of(self, sample: &Sample, index: usize) -> Result<f64, JudgeError> {
        const FIELD: &str = "n_tokens";
        match self {
            Self::Characters => Ok(sample.completion.chars().count() as f64),
            Self::Tokens => {
                let value = sample.metadata.get(FIELD);
                let tokens = value.and_then(serde_json::Value::as_u64);
                let tokens = tokens.ok_or_else(|| JudgeError::Metadata {
                    index,
                    field: FIELD,
                    expected: "a number of tokens",
                    value: value.map_or("nothing".into(), |found| excerpt(&found.to_string())),
                })?;
                Ok(tokens as f64)
            }
        }
    }
}

/// How an evaluation counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalOptions {
    /// Seed of the bootstrap. Default 0.
    pub seed: u64,
    /// The unit of lengths. Default: characters.
    pub length_unit: LengthUnit,
}

/// How often a judge that was asked in both orders went by the order.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PositionBias {
    /// Pairs that were judged in both orders.
    pub n_pairs: usize,
    /// Of these, pairs where the two orders disagreed.
    pub n_disagreed: usize,
    /// Of the latter, pairs where the completion shown first won both times.
    pub n_first_twice: usize,
    /// Of the latter, pairs where the completion shown second won both times.
    pub n_second_twice: usize,
    /// The share of pairs where the orders disagreed, with its interval. 0 for a judge that never
    /// minds the order; one half for a coin that never ties.
    pub disagreement: Estimate,
}

/// An evaluation of policy A against policy B.
///
/// Pairs that were not decided are in no figure but their count; if there are many, the others may
/// not stand for them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalOutcome {
    /// Who judged.
    pub judge: String,
    /// Pairs that came.
    pub n_pairs: usize,
    /// Different prompts that came.
    pub n_prompts: usize,
    /// Pairs that A won.
    pub wins: usize,
    /// Pairs that neither won.
    pub ties: usize,
    /// Pairs that B won.
    pub losses: usize,
    /// Pairs with an answer that held no verdict.
    pub unparsed: usize,
    /// Pairs that could not be asked about or had no answer.
    pub errors: usize,
    /// The first reason for an error.
    pub first_error: Option<String>,
    /// A's mean credit over the decided pairs: a tie counts half. `None` if none was decided, here
    /// and below.
    pub win_rate: Option<Estimate>,
    /// The win rate at equal length; see [`length_controlled`].
    pub length_controlled: Option<LengthControlled>,
    /// The win rate by thirds of length difference; see [`win_rate_by_length`].
    pub by_length: Vec<LengthTercile>,
    /// What lengths are counted in.
    pub length_unit: LengthUnit,
    /// Mean length of A's completions, over the decided pairs.
    pub mean_length_a: Option<f64>,
    /// Mean length of B's.
    pub mean_length_b: Option<f64>,
    /// Mean reward of A's completions, where the judge compares rewards.
    pub mean_reward_a: Option<Estimate>,
    /// Mean reward of B's.
    pub mean_reward_b: Option<Estimate>,
    /// How much the order mattered, where the judge was asked in both.
    pub position: Option<PositionBias>,
    /// The judgement of each pair, in the order of the pairs; not written with the rest.
    #[serde(skip)]
    pub judgements: Vec<Judgement>,
}

/// Has each pair judged and sums up.
///
/// Intervals are at 95%, by the percentile bootstrap over prompts: several pairs of one prompt are
/// drawn together. They say what other prompts of the same kind would have given, not what another
/// judge would have said.
///
/// # Errors
///
/// Those of the judge, and [`JudgeError::Metadata`] when tokens are to be counted and a sample does
/// not say how many it has.
///
/// # Examples
///
/// ```
/// use judge::{Comparison, EvalOptions, MemoReward, RewardJudge, Rule, evaluate};
///
/// let prompt = "Memo:\nFrom: Maria\nTo: Hansen\nGoods: 40 crates of apples\nPlace: Oslo\n\
///               Day: Monday\nTime: 9:00\nSummary:";
/// let right = " Maria sends 40 crates of apples to Hansen in Oslo on Monday at 9:00.";
/// let wrong = " Maria sends 40 crates of apples to Hansen in Paris on Monday at 9:00.";
/// let pairs = [Comparison::new(prompt, right, wrong), Comparison::new(prompt, right, right)];
///
/// let judge = RewardJudge::new(MemoReward::new(Default::default())?, Rule::default())?;
/// let outcome = evaluate(&pairs, &judge, &EvalOptions::default(), &mut |_| ())?;
/// assert_eq!((outcome.wins, outcome.ties, outcome.losses), (1, 1, 0));
/// assert_eq!(outcome.win_rate.unwrap().mean, 0.75);
/// # Ok::<(), judge::JudgeError>(())
/// ```
pub fn evaluate(
    pairs: &[Comparison],
    judge: &(impl Judge + ?Sized),
    options: &EvalOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<EvalOutcome, JudgeError> {
    // Lengths first: a missing field is found before anything is asked.
    let lengths: Vec<[f64; 2]> = pairs
        .iter()
        .enumerate()
        .map(|(index, pair)| {
            let length = |sample, place| options.length_unit.of(sample, 2 * index + place);
            Ok([length(&pair.a, 0)?, length(&pair.b, 1)?])
        })
        .collect::<Result<_, JudgeError>>()?;
    let judgements = judge.judge(pairs, progress)?;
    if judgements.len() != pairs.len() {
        return Err(JudgeError::Count {
            judge: judge.identity(),
            expected: pairs.len(),
            got: judgements.len(),
        });
    }
    let mut prompts = HashMap::new();
    let groups: Vec<usize> = pairs
        .iter()
        .map(|pair| {
            let next = prompts.len();
            *prompts.entry(pair.prompt()).or_insert(next)
        })
        .collect();
    let decided: Vec<(usize, &Decision)> = judgements
        .iter()
        .enumerate()
        .filter_map(|(place, judgement)| match judgement {
            Judgement::Decided(decision) => Some((place, decision)),
            _ => None,
        })
        .collect();
    let count = |verdict| decided.iter().filter(|(_, d)| d.verdict == verdict).count();
    let groups: Vec<usize> = decided.iter().map(|(place, _)| groups[*place]).collect();
    let credits: Vec<f64> = decided
        .iter()
        .map(|(_, decision)| decision.credit)
        .collect();
    let length = |side: usize| -> Vec<f64> {
        let places = decided.iter().map(|(place, _)| lengths[*place][side]);
        places.collect()
    };
    let (length_a, length_b) = (length(0), length(1));
    let differences: Vec<f64> = length_a.iter().zip(&length_b).map(|(a, b)| a - b).collect();
    let estimate = |values: &[f64]| Estimate::bootstrap_grouped(values, &groups, options.seed);
    let reward = |side: usize| -> Option<Estimate> {
        let rewards = decided
            .iter()
            .map(|(_, decision)| Some(decision.rewards?[side]));
        estimate(&rewards.collect::<Option<Vec<f64>>>()?)
    };
    let errors = || {
        judgements.iter().filter_map(|judgement| match judgement {
            Judgement::Failed { reason } => Some(reason),
            _ => None,
        })
    };
    let unparsed = |judgement: &&Judgement| matches!(judgement, Judgement::Unparsed { .. });
    let some = !decided.is_empty();
    Ok(EvalOutcome {
        judge: judge.identity(),
        n_pairs: pairs.len(),
        n_prompts: prompts.len(),
        wins: count(Verdict::A),
        ties: count(Verdict::Tie),
        losses: count(Verdict::B),
        unparsed: judgements.iter().filter(unparsed).count(),
        errors: errors().count(),
        first_error: errors().next().cloned(),
        win_rate: estimate(&credits),
        length_controlled: length_controlled(&credits, &differences, &groups, options.seed),
        by_length: win_rate_by_length(&credits, &differences, &groups, options.seed),
        length_unit: options.length_unit,
        mean_length_a: some.then(|| mean(&length_a)),
        mean_length_b: some.then(|| mean(&length_b)),
        mean_reward_a: reward(0),
        mean_reward_b: reward(1),
        position: position_bias(&decided, &groups, options.seed),
        judgements,
    })
}

/// What the two orders say, where both were asked.
fn position_bias(
    decided: &[(usize, &Decision)],
    groups: &[usize],
    seed: u64,
) -> Option<PositionBias> {
    let (orders, groups): (Vec<[Verdict; 2]>, Vec<usize>) = decided
        .iter()
        .zip(groups)
        .filter_map(|((_, decision), group)| Some((decision.orders?, *group)))
        .unzip();
    let disagreed: Vec<f64> = orders
        .iter()
        .map(|[first, second]| f64::from(u8::from(first != second)))
        .collect();
    let count = |both: [Verdict; 2]| orders.iter().filter(|orders| **orders == both).count();
    Some(PositionBias {
        n_pairs: orders.len(),
        n_disagreed: orders.iter().filter(|[one, other]| one != other).count(),
        // A is shown first in the first order, B in the second.
        n_first_twice: count([Verdict::A, Verdict::B]),
        n_second_twice: count([Verdict::B, Verdict::A]),
        disagreement: Estimate::bootstrap_grouped(&disagreed, &groups, seed)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums and quotients of small integers.
    const ROUNDING: f64 = 1e-12;

    /// Gives the judgements it was made with.
    struct Script(Vec<Judgement>);

    impl Judge for Script {
        fn identity(&self) -> String {
            "script".into()
        }

        fn judge(
            &self,
            _: &[Comparison],
            _: &mut dyn FnMut(Progress),
        ) -> Result<Vec<Judgement>, JudgeError> {
            Ok(self.0.clone())
        }
    }

    fn decided(verdict: Verdict, orders: Option<[Verdict; 2]>) -> Judgement {
        Judgement::Decided(Decision {
            verdict,
            credit: verdict.credit(),
            rewards: None,
            orders,
        })
    }

    fn mirrored(judgement: &Judgement) -> Judgement {
        match judgement {
            Judgement::Decided(decision) => decided(decision.verdict.swapped(), None),
            other => other.clone(),
        }
    }

    #[test]
    fn every_pair_is_counted_once_and_only_decided_ones_in_the_rate() {
        use Verdict::{A, B, Tie};
        let script = vec![
            decided(A, Some([A, A])),
            decided(A, Some([A, A])),
            decided(Tie, Some([A, B])),
            decided(B, Some([B, B])),
            decided(Tie, Some([Tie, B])),
            Judgement::Unparsed { reply: "?".into() },
            Judgement::Failed {
                reason: "status 500".into(),
            },
        ];
        let pairs: Vec<Comparison> = (0..7)
            .map(|i| Comparison::new(&i.to_string(), "four", "to"))
            .collect();
        let outcome = evaluate(
            &pairs,
            &Script(script),
            &EvalOptions::default(),
            &mut |_| (),
        )
        .unwrap();
        let counts = [
            outcome.n_pairs,
            outcome.wins,
            outcome.ties,
            outcome.losses,
            outcome.unparsed,
            outcome.errors,
        ];
        assert_eq!(counts, [7, 2, 2, 1, 1, 1]);
        assert_eq!(outcome.first_error.as_deref(), Some("status 500"));
        assert!((outcome.win_rate.unwrap().mean - 3.0 / 5.0).abs() < ROUNDING);
        assert_eq!(
            (outcome.mean_length_a, outcome.mean_length_b),
            (Some(4.0), Some(2.0))
        );
        let position = outcome.position.unwrap();
        assert_eq!((position.n_pairs, position.n_disagreed), (5, 2));
        assert_eq!((position.n_first_twice, position.n_second_twice), (1, 0));
        assert!((position.disagreement.mean - 0.4).abs() < ROUNDING);
    }

    #[test]
    #[expect(clippy::float_cmp, reason = "quotients by 64 are exact")]
    fn swapping_a_and_b_gives_one_minus_the_win_rate() {
        use Verdict::{A, B, Tie};
        let script: Vec<Judgement> = (0..64)
            .map(|i| decided([A, B, A, Tie][(i * 7 + i / 5) % 4], None))
            .collect();
        let pairs: Vec<Comparison> = (0..64)
            .map(|i| Comparison::new(&(i / 2).to_string(), "x".repeat(i * 37 % 23), "y".repeat(i)))
            .collect();
        let swapped: Vec<Comparison> = pairs.iter().cloned().map(Comparison::swapped).collect();
        let back = Script(script.iter().map(mirrored).collect());
        let options = EvalOptions::default();
        let one = evaluate(&pairs, &Script(script), &options, &mut |_| ()).unwrap();
        let other = evaluate(&swapped, &back, &options, &mut |_| ()).unwrap();
        assert_eq!(
            (one.wins, one.ties, one.losses),
            (other.losses, other.ties, other.wins)
        );
        let (a, b) = (one.win_rate.unwrap(), other.win_rate.unwrap());
        assert_eq!(b.mean, 1.0 - a.mean);
        assert!((b.ci_low - (1.0 - a.ci_high)).abs() < ROUNDING);
        assert!((b.ci_high - (1.0 - a.ci_low)).abs() < ROUNDING);
        // Newton's last step is the error of the fit.
        let rate = |outcome: &EvalOutcome| outcome.length_controlled.unwrap().win_rate.mean;
        assert!((rate(&other) - (1.0 - rate(&one))).abs() < 1e-9);
    }

    #[test]
    fn nothing_decided_gives_no_rate() {
        let failed = Judgement::Failed { reason: "x".into() };
        let pairs = [Comparison::new("p", "a", "b")];
        let script = Script(vec![failed]);
        let outcome = evaluate(&pairs, &script, &EvalOptions::default(), &mut |_| ()).unwrap();
        assert_eq!((outcome.errors, outcome.win_rate), (1, None));
        assert_eq!(
            (outcome.length_controlled, outcome.mean_length_a),
            (None, None)
        );
        assert_eq!(outcome.position, None);
    }

    #[test]
    fn tokens_are_counted_only_where_each_sample_says_how_many() {
        let mut pair = Comparison::new("p", "a", "b");
        pair.a = pair.a.with("n_tokens", 5);
        let options = EvalOptions {
            length_unit: LengthUnit::Tokens,
            ..EvalOptions::default()
        };
        let judge = Script(vec![decided(Verdict::A, None)]);
        let error = evaluate(&[pair.clone()], &judge, &options, &mut |_| ()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "sample 1: field `n_tokens` should be a number of tokens, got nothing"
        );
        pair.b = pair.b.with("n_tokens", 3);
        let outcome = evaluate(&[pair], &judge, &options, &mut |_| ()).unwrap();
        assert_eq!(
            (outcome.mean_length_a, outcome.mean_length_b),
            (Some(5.0), Some(3.0))
        );
    }

    #[test]
    fn a_judge_that_miscounts_is_found_out() {
        let pairs = [Comparison::new("p", "a", "b")];
        let judge = Script(Vec::new());
        let error = evaluate(&pairs, &judge, &EvalOptions::default(), &mut |_| ()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "judge script: gave 0 judgements for 1 pairs"
        );
    }
}
