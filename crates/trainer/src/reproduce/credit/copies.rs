//! Good completions, and copies of them with one wrong value or two.

use memo_task::{Completion, Fact, Memo, MemoTask, Split, UNSEEN_TOGETHER};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::TrainError;

/// A good completion and its copy with one wrong token.
#[derive(Debug)]
pub(super) struct Single {
    pub memo: Memo,
    pub prompt: Vec<u32>,
    pub good: Completion,
    pub bad: Completion,
    pub site: usize,
}

/// A copy with two errors that training never showed together, and one with the later alone.
#[derive(Debug)]
pub(super) struct Double {
    pub prompt: Vec<u32>,
    pub both: Completion,
    pub alone: Completion,
    pub first: usize,
    pub second: usize,
}

#[derive(Debug)]
pub(super) struct Copies {
    pub single: Vec<Single>,
    pub double: Vec<Double>,
}

impl Copies {
    /// Copies of `n` held-out memos, corrupted as writers err: facts in proportion to how often
    /// these are stated wrongly.
    pub(super) fn draw(task: &MemoTask, n: usize, seed: u64) -> Result<Self, TrainError> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (mut single, mut double) = (Vec::new(), Vec::new());
        for example in task.examples(Split::Prompts, n, seed) {
            let (memo, prompt) = (example.memo, example.prompt_ids);
            let good = task.good_completion(&memo, &mut rng)?;
            let rate = |fact: Fact| task.wrong_rate(&memo, fact);
            let fact = pick(&Fact::ALL, |&fact| rate(fact), &mut rng);
            let bad = task.corrupt(&memo, &good, &[fact], &mut rng)?;
            let site = changed(&good, &bad)[0];

            let (a, b) = pick(&UNSEEN_TOGETHER, |&(a, b)| rate(a) * rate(b), &mut rng);
            let place = |fact: Fact| good.facts.iter().position(|&found| found == Some(fact));
            let (early, late) = if place(a) < place(b) { (a, b) } else { (b, a) };
            let alone = task.corrupt(&memo, &good, &[late], &mut rng)?;
            let both = task.corrupt(&memo, &alone, &[early], &mut rng)?;
            let (first, second) = (changed(&alone, &both)[0], changed(&good, &alone)[0]);
            double.push(Double {
                prompt: prompt.clone(),
                both,
                alone,
                first,
                second,
            });
            single.push(Single {
                memo,
                prompt,
                good,
                bad,
                site,
            });
        }
        Ok(Self { single, double })
    }
}

/// Where two completions of one length differ.
fn changed(good: &Completion, bad: &Completion) -> Vec<usize> {
    let pairs = good.ids.iter().zip(&bad.ids).enumerate();
    pairs
        .filter(|(_, (a, b))| a != b)
        .map(|(at, _)| at)
        .collect()
}

/// One of some items, in proportion to their weights.
fn pick<T: Copy>(items: &[T], weight: impl Fn(&T) -> f64, rng: &mut impl Rng) -> T {
    let total: f64 = items.iter().map(&weight).sum();
    let mut left = rng.random::<f64>() * total;
    for item in items {
        left -= weight(item);
        if left < 0.0 {
            return *item;
        }
    }
    items[items.len() - 1]
}

#[cfg(test)]
mod tests {
    use memo_task::MemoConfig;

    use super::*;

    #[test]
    fn copies_differ_at_their_sites_alone_and_cost_what_a_contradiction_costs() {
        let task = MemoTask::new(MemoConfig::default()).unwrap();
        let copies = Copies::draw(&task, 40, 3).unwrap();
        let contradicts = |completion: &Completion, at: usize| {
            (completion.rewards[at] - task.config().weights.contradiction).abs() < f64::EPSILON
        };
        for copy in &copies.single {
            assert_eq!(changed(&copy.good, &copy.bad), [copy.site]);
            assert!(contradicts(&copy.bad, copy.site));
        }
        for copy in &copies.double {
            assert!(copy.first < copy.second);
            assert_eq!(changed(&copy.alone, &copy.both), [copy.first]);
            assert_eq!(copy.both.ids[copy.second], copy.alone.ids[copy.second]);
            assert!(contradicts(&copy.both, copy.first));
            assert!(contradicts(&copy.both, copy.second));
        }
    }
}
