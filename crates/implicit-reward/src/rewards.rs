//! Implicit rewards from log-probabilities that are already there.

use burn::tensor::Tensor;
use dpo_loss::PairLogps;
use mdp_core::Beta;

/// The implicit reward of each token: `β (log π(a|s) − log π_ref(a|s))`, in reward units.
///
/// Equation 11 of arXiv 2404.12358. Both tables hold log-probabilities in nats, `[batch, seq]`, zero
/// outside the completion; so is the result.
pub fn token_rewards(policy: Tensor<2>, reference: Tensor<2>, beta: Beta) -> Tensor<2> {
    (policy - reference).mul_scalar(beta.get())
}

/// Implicit rewards of the completions of each pair, in reward units.
#[derive(Clone, Debug)]
pub struct PairRewards {
    /// `[batch]`, reward units.
    pub chosen: Tensor<1>,
    /// `[batch]`, reward units.
    pub rejected: Tensor<1>,
}

impl PairRewards {
    /// The sums over tokens of the implicit reward: `β (log π(y|x) − log π_ref(y|x))`.
    pub fn new(policy: &PairLogps, reference: &PairLogps, beta: Beta) -> Self {
        let logratios = policy.minus(reference);
        Self {
            chosen: logratios.chosen.mul_scalar(beta.get()),
            rejected: logratios.rejected.mul_scalar(beta.get()),
        }
    }

    /// Chosen minus rejected, `[batch]`, reward units.
    pub fn margins(&self) -> Tensor<1> {
        self.chosen.clone() - self.rejected.clone()
    }

    /// One where the chosen completion has strictly more reward, `[batch]`; ties count zero.
    pub fn accuracies(&self) -> Tensor<1> {
        self.chosen.clone().greater(self.rejected.clone()).float()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    #[expect(clippy::float_cmp, reason = "f32 holds every number here exactly")]
    fn token_rewards_sum_to_the_sequence_reward_and_ties_are_no_hit() {
        let device = Device::default();
        let beta = Beta::new(0.5).unwrap();
        let policy = Tensor::<2>::from_floats([[-1.0, -2.0, 0.0], [-3.0, -1.0, -2.0]], &device);
        let reference = Tensor::<2>::from_floats([[-2.0, -2.5, 0.0], [-3.0, -2.0, -1.0]], &device);
        let sums = |x: &Tensor<2>| PairLogps::from_halves(x.clone().sum_dim(1).reshape([2]));
        let pair = PairRewards::new(&sums(&policy), &sums(&reference), beta);
        let by_token = token_rewards(policy, reference, beta).sum_dim(1);
        let by_token: Vec<f32> = by_token.try_into_vec_as().unwrap();
        assert_eq!(by_token, [0.75, 0.0]);
        assert_eq!(pair.chosen.clone().into_scalar::<f32>(), 0.75);
        assert_eq!(pair.margins().into_scalar::<f32>(), 0.75);
        assert_eq!(pair.accuracies().into_scalar::<f32>(), 1.0);
        let tie = PairRewards {
            rejected: pair.chosen.clone(),
            ..pair
        };
        assert_eq!(tie.accuracies().into_scalar::<f32>(), 0.0);
    }
}
