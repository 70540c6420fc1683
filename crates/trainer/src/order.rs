//! Which examples each step sees: a function of the seed and the step alone.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// The order of a stage's examples. A fresh permutation each epoch; resuming needs no more than
/// the number of the step.
#[derive(Clone, Debug)]
pub struct Order {
    n_examples: usize,
    batch_size: usize,
    accumulation: usize,
    seed: u64,
    /// The epoch at hand and its permutation.
    epoch: Option<(usize, Vec<usize>)>,
}

impl Order {
    /// An order over `n_examples`, which must not be zero.
    pub fn new(n_examples: usize, batch_size: usize, accumulation: usize, seed: u64) -> Self {
        Self {
            n_examples,
            batch_size,
            accumulation,
            seed,
            epoch: None,
        }
    }

    /// Steps of one pass; the last may be smaller.
    pub fn steps_per_epoch(&self) -> usize {
        let micro = self.n_examples.div_ceil(self.batch_size);
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
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(epoch as u64);
            let mut permutation: Vec<usize> = (0..self.n_examples).collect();
            permutation.shuffle(&mut rng);
            self.epoch = Some((epoch, permutation));
        }
        let (_, permutation) = self.epoch.as_ref().expect("the epoch was just set");
        permutation
            .chunks(self.batch_size)
            .skip(within * self.accumulation)
            .take(self.accumulation)
            .map(<[usize]>::to_vec)
            .collect()
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
}
