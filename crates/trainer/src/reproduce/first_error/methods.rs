//! Ways of naming the first wrong step, and how often they are right.

use judge::Estimate;
use serde::{Deserialize, Serialize};

use super::super::statistics::auroc_of_low;

/// The share of the steps of right solutions that a threshold is to call wrong.
pub(super) const FALSE_ALARMS: f64 = 0.1;

/// Means over the tokens of a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Implicit reward, reward units.
    pub reward: f64,
    /// `log π`, nats.
    pub policy_logp: f64,
    /// `log π_ref`, nats: surprise with its sign turned.
    pub reference_logp: f64,
}

/// A held-out pair of solutions, read by both models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReadPair {
    /// Which problem.
    pub problem: usize,
    /// The first wrong step of `wrong`, from 0.
    pub first_error: usize,
    /// Steps of the wrong solution.
    pub wrong: Vec<Step>,
    /// Steps of the right one.
    pub right: Vec<Step>,
    /// Whether the right solution has more implicit reward.
    pub ahead: bool,
}

/// What tells a wrong step: less of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Reward,
    Surprise,
    PolicyLogp,
    Place,
}

impl Method {
    pub(super) const ALL: [Self; 4] = [Self::Reward, Self::Surprise, Self::PolicyLogp, Self::Place];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Reward => "implicit reward",
            Self::Surprise => "surprise, -log π_ref",
            Self::PolicyLogp => "policy alone, log π",
            Self::Place => "always the first step",
        }
    }

    /// Of each step of a solution.
    pub(super) fn of(self, steps: &[Step]) -> Vec<f64> {
        let steps = steps.iter().enumerate();
        steps.map(|(place, step)| self.value(place, step)).collect()
    }

    /// Of the step at some place.
    pub(super) fn value(self, place: usize, step: &Step) -> f64 {
        match self {
            Self::Reward => step.reward,
            Self::Surprise => step.reference_logp,
            Self::PolicyLogp => step.policy_logp,
            Self::Place => place as f64,
        }
    }
}

/// How well a method finds first errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Which method.
    pub method: String,
    /// How often the step with the least of it is the first wrong one.
    pub lowest: Estimate,
    /// How often the first step below the threshold is the first wrong one; none for a method
    /// that gives steps no values.
    pub first_low: Option<Estimate>,
    /// The threshold: a tenth of the steps of right solutions lie below it.
    pub threshold: Option<f64>,
    /// The probability that a first wrong step has less of it than a step that is right.
    pub auroc: Option<f64>,
}

/// The place of the least value; of equals, the first.
fn lowest(values: &[f64]) -> Option<usize> {
    let places = values.iter().enumerate();
    let least = places.min_by(|(_, a), (_, b)| a.total_cmp(b))?;
    Some(least.0)
}

/// For each pair whether the step is named: the lowest one, or the first below a threshold.
pub(super) struct Found {
    pub lowest: Vec<f64>,
    pub first_low: Option<Vec<f64>>,
    threshold: Option<f64>,
    auroc: Option<f64>,
}

impl Found {
    pub(super) fn by(method: Method, pairs: &[ReadPair]) -> Self {
        let hit = |named: Option<usize>, pair: &ReadPair| {
            f64::from(u8::from(named == Some(pair.first_error)))
        };
        let named = |name: &dyn Fn(&[f64]) -> Option<usize>| -> Vec<f64> {
            let pairs = pairs.iter();
            pairs
                .map(|pair| hit(name(&method.of(&pair.wrong)), pair))
                .collect()
        };
        let mut right: Vec<f64> = pairs
            .iter()
            .flat_map(|pair| method.of(&pair.right))
            .collect();
        right.sort_by(f64::total_cmp);
        let threshold = (method != Method::Place)
            .then(|| {
                right
                    .get((FALSE_ALARMS * right.len() as f64) as usize)
                    .copied()
            })
            .flatten();
        let first_low = threshold
            .map(|threshold| named(&|values| values.iter().position(|&value| value < threshold)));
        // What follows an error is neither right nor the first wrong step.
        let (mut errors, mut others) = (Vec::new(), right);
        for pair in pairs {
            let values = method.of(&pair.wrong);
            errors.push(values[pair.first_error]);
            others.extend(&values[..pair.first_error]);
        }
        Self {
            lowest: named(&lowest),
            auroc: threshold.and_then(|_| auroc_of_low(&errors, &others)),
            first_low,
            threshold,
        }
    }

    pub(super) fn figures(&self, method: Method, problems: &[usize]) -> Option<Figures> {
        let estimate = |hits: &Vec<f64>| Estimate::bootstrap_grouped(hits, problems, 0);
        Some(Figures {
            method: method.name().into(),
            lowest: estimate(&self.lowest)?,
            first_low: self.first_low.as_ref().and_then(estimate),
            threshold: self.threshold,
            auroc: self.auroc,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums of a few numbers near 1.
    const ROUNDING: f64 = 1e-12;

    fn step(reward: f64) -> Step {
        Step {
            reward,
            policy_logp: -reward,
            reference_logp: -2.0 * reward,
        }
    }

    fn pair(first_error: usize, wrong: &[f64], right: &[f64]) -> ReadPair {
        ReadPair {
            problem: 0,
            first_error,
            wrong: wrong.iter().copied().map(step).collect(),
            right: right.iter().copied().map(step).collect(),
            ahead: true,
        }
    }

    #[test]
    fn the_lowest_step_and_the_first_low_one_are_told_apart() {
        // Ten right steps: the threshold is the second lowest, 1.
        let right: Vec<f64> = (0..10).map(f64::from).collect();
        let pairs = [
            pair(1, &[5.0, 0.5, 0.0], &right),
            pair(1, &[5.0, 0.0, 2.0], &[]),
            pair(0, &[5.0, 7.0, 8.0], &[]),
        ];
        let found = Found::by(Method::Reward, &pairs);
        assert_eq!(found.lowest, [0.0, 1.0, 1.0]);
        assert_eq!(found.threshold, Some(1.0));
        // No step of the third is below it.
        assert_eq!(found.first_low, Some(vec![1.0, 1.0, 0.0]));
        // Against 0 to 9 and 5, 5: of 12, 11 lie above the error 0.5, 11.5 above 0 and 5.5 above 5.
        let expected = (11.0 + 11.5 + 5.5) / 36.0;
        assert!((found.auroc.unwrap() - expected).abs() < ROUNDING);
        // Surprise turns the order of these steps around.
        assert_eq!(Found::by(Method::Surprise, &pairs).lowest, [0.0, 0.0, 0.0]);
        let place = Found::by(Method::Place, &pairs);
        assert_eq!(place.lowest, [0.0, 0.0, 1.0]);
        assert!(place.first_low.is_none() && place.auroc.is_none());
        let figures = found.figures(Method::Reward, &[0, 1, 2]).unwrap();
        assert!((figures.lowest.mean - 2.0 / 3.0).abs() < ROUNDING);
    }
}
