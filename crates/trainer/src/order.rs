//! Which examples each step sees: a function of the seed and the step alone.

use std::ops::Range;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Some examples that lie side by side in the data, and how often an epoch shows them.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// Their indices.
    pub examples: Range<usize>,
    /// How often each is seen in an epoch: 1 once, 0.5 a fresh half of them each epoch, 2 twice.
    pub weight: f64,
}

impl Source {
    /// Examples that an epoch shows, repeats counted.
    pub(crate) fn per_epoch(&self) -> usize {
        (self.weight * self.examples.len() as f64).round() as usize
    }
}

/// The order of a stage's examples. A fresh permutation each epoch; resuming needs no more than
/// the number of the step.
#[derive(Clone, Debug)]
pub struct Order {
    sources: Vec<Source>,
    batch_size: usize,
    accumulation: usize,
    seed: u64,
    /// Lengths of the examples, where those of like length are to share a step.
    lengths: Vec<usize>,
    /// The epoch at hand and its permutation.
    epoch: Option<(usize, Vec<usize>)>,
}

/// Steps whose examples are sorted by length together: enough that a step's lengths are alike,
/// few enough that an epoch's order stays random. The number is that of transformers.
const STEPS_SORTED_TOGETHER: usize = 50;

impl Order {
    /// An order over `n_examples`, which must not be zero.
    pub fn new(n_examples: usize, batch_size: usize, accumulation: usize, seed: u64) -> Self {
        let all = Source {
            examples: 0..n_examples,
            weight: 1.0,
        };
        Self::mixed(vec![all], batch_size, accumulation, seed)
    }

    /// An order over several sources, each seen as often as its weight says.
    pub fn mixed(sources: Vec<Source>, batch_size: usize, accumulation: usize, seed: u64) -> Self {
        Self {
            sources,
            batch_size,
            accumulation,
            seed,
            lengths: Vec::new(),
            epoch: None,
        }
    }

    /// Lets examples of like length share a step; one length for each example.
    #[must_use]
    pub fn grouped_by_length(mut self, lengths: Vec<usize>) -> Self {
        self.lengths = lengths;
        self
    }

    /// Examples of one pass, repeats counted.
    pub fn examples_per_epoch(&self) -> usize {
        self.sources.iter().map(Source::per_epoch).sum()
    }

    /// Steps of one pass; the last may be smaller.
    pub fn steps_per_epoch(&self) -> usize {
        let micro = self.examples_per_epoch().div_ceil(self.batch_size);
        micro.div_ceil(self.accumulation)
    }

    /// The micro-batches of a step, counted from 0.
    ///
    /// # Panics
    ///
    /// If there are no examples.
    pub fn step(&mut self, step: usize) -> Vec<Vec<usize>> {
        let per_epoch = self.steps_per_epoch();
        let (epoch, within) = (step / per_epoch, step % per_epoch);
        if self.epoch.as_ref().is_none_or(|(at, _)| *at != epoch) {
            self.epoch = Some((epoch, self.permutation(epoch)));
        }
        let (_, permutation) = self.epoch.as_ref().expect("the epoch was just set");
        permutation
            .chunks(self.batch_size)
            .skip(within * self.accumulation)
            .take(self.accumulation)
            .map(<[usize]>::to_vec)
            .collect()
    }

    /// The examples of an epoch, a function of the seed and the epoch alone.
    fn permutation(&self, epoch: usize) -> Vec<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(epoch as u64);
        let mut permutation = Vec::with_capacity(self.examples_per_epoch());
        for source in &self.sources {
            let (n, mut left) = (source.examples.len(), source.per_epoch());
            while left >= n && n > 0 {
                permutation.extend(source.examples.clone());
                left -= n;
            }
            if left > 0 {
                let mut part: Vec<usize> = source.examples.clone().collect();
                part.shuffle(&mut rng);
                permutation.extend(&part[..left]);
            }
        }
        permutation.shuffle(&mut rng);
        if !self.lengths.is_empty() {
            self.group(&mut permutation, &mut rng);
        }
        permutation
    }

    /// Sorts stretches of the permutation by length, and shuffles the steps that result.
    fn group(&self, permutation: &mut Vec<usize>, rng: &mut ChaCha8Rng) {
        let per_step = self.batch_size * self.accumulation;
        for stretch in permutation.chunks_mut(per_step * STEPS_SORTED_TOGETHER) {
            stretch.sort_by_key(|&example| self.lengths[example]);
        }
        // The step that is not full stays the last, so that no other has to be broken for it.
        let full = permutation.len() / per_step * per_step;
        let rest = permutation.split_off(full);
        let mut steps: Vec<&[usize]> = permutation.chunks(per_step).collect();
        steps.shuffle(rng);
        *permutation = steps.concat();
        permutation.extend(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_holds_every_example_once_and_epochs_differ() {
        let mut order = Order::new(11, 2, 3, 5);
        assert_eq!(order.steps_per_epoch(), 2);
        let mut epoch = |from: usize| -> Vec<usize> {
            (from..from + 2)
                .flat_map(|step| order.step(step).concat())
                .collect()
        };
        let (first, second) = (epoch(0), epoch(2));
        assert_ne!(first, second);
        for mut seen in [first, second] {
            seen.sort_unstable();
            assert_eq!(seen, (0..11).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_step_does_not_depend_on_the_steps_before_it() {
        let mut through = Order::new(10, 3, 1, 9);
        let all: Vec<_> = (0..12).map(|step| through.step(step)).collect();
        let mut fresh = Order::new(10, 3, 1, 9);
        assert_eq!(fresh.step(9), all[9]);
        assert_eq!(fresh.step(2), all[2]);
    }

    #[test]
    fn a_source_is_seen_as_often_as_its_weight_says() {
        let sources = vec![
            Source {
                examples: 0..8,
                weight: 0.5,
            },
            Source {
                examples: 8..11,
                weight: 2.0,
            },
        ];
        let mut order = Order::mixed(sources, 2, 1, 3);
        assert_eq!(
            (order.examples_per_epoch(), order.steps_per_epoch()),
            (10, 5)
        );
        let mut epoch = |number: usize| -> Vec<usize> {
            let mut seen: Vec<usize> = (5 * number..5 * number + 5)
                .flat_map(|step| order.step(step).concat())
                .collect();
            seen.sort_unstable();
            seen
        };
        let (first, second) = (epoch(0), epoch(1));
        for seen in [&first, &second] {
            assert_eq!(seen[4..], [8, 8, 9, 9, 10, 10]);
            assert!(seen[..4].windows(2).all(|two| two[0] < two[1]));
        }
        assert_ne!(first, second, "each epoch draws a fresh half");
    }

    #[test]
    fn grouping_keeps_every_example_and_lets_a_step_be_of_one_length() {
        let lengths: Vec<usize> = (0..203).map(|example| example * 37 % 41).collect();
        let spread = |order: &mut Order| -> usize {
            let mut seen = Vec::new();
            let mut spread = 0;
            for step in 0..order.steps_per_epoch() {
                let examples = order.step(step).concat();
                let of = |example: &usize| lengths[*example];
                spread +=
                    examples.iter().map(of).max().unwrap() - examples.iter().map(of).min().unwrap();
                seen.extend(examples);
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..203).collect::<Vec<_>>());
            spread
        };
        let mut grouped = Order::new(203, 4, 2, 1).grouped_by_length(lengths.clone());
        let apart = spread(&mut Order::new(203, 4, 2, 1));
        assert!(spread(&mut grouped) * 4 < apart);
        let firsts: Vec<usize> = (0..8)
            .map(|step| lengths[grouped.step(step)[0][0]])
            .collect();
        assert!(!firsts.is_sorted(), "steps come in no order of length");
    }
}
