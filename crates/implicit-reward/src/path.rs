//! What the rewards of a completion's tokens add up to.

/// `Σ_{i≤t} r̂_i` after each token, `[n_tokens]`, in reward units; the last is the completion's
/// implicit reward.
///
/// # Examples
///
/// ```
/// assert_eq!(implicit_reward::running_sums(&[0.5, -0.25, 1.0]), [0.5, 0.25, 1.25]);
/// ```
pub fn running_sums(rewards: &[f64]) -> Vec<f64> {
    let mut sum = 0.0;
    let add = |reward: &f64| {
        sum += reward;
        sum
    };
    rewards.iter().map(add).collect()
}

/// `V(s_t) − V(s_0) + Σ_{i<t} r_i` at each state from the prompt to the end, `[n_tokens + 1]`, in
/// reward units: `Σ_{i<t} r̂_i`, the first 0.
///
/// This sum of a value and the true rewards so far is all that a policy tells of either. Equation 10
/// of arXiv 2404.12358, `r̂ = r + V(s') − V(s)`, telescopes to it, and any shaping of `r` moves `V`
/// and `Σ r` by opposite amounts: the policy is the same, and so is this. `V(s_0)` itself is lost,
/// so that completions of different prompts have no common origin. At the end `V` is 0 and it is
/// the completion's true reward less `V(s_0)`.
///
/// # Examples
///
/// ```
/// assert_eq!(implicit_reward::value_differences(&[0.5, -0.25]), [0.0, 0.5, 0.25]);
/// ```
pub fn value_differences(rewards: &[f64]) -> Vec<f64> {
    let mut values = vec![0.0];
    values.extend(running_sums(rewards));
    values
}

/// `V(s_t) − V(s_0)` at each state, `[n_tokens + 1]`, in reward units, where the true reward of each
/// token is known: [`value_differences`] less the rewards so far.
///
/// It is the optimum's value if the policy is the optimum of `true_rewards`, and of nothing else
/// otherwise.
///
/// # Panics
///
/// If the two lists differ in length.
pub fn soft_value_differences(rewards: &[f64], true_rewards: &[f64]) -> Vec<f64> {
    assert_eq!(rewards.len(), true_rewards.len(), "one true reward a token");
    let earned: Vec<f64> = rewards
        .iter()
        .zip(true_rewards)
        .map(|(a, b)| a - b)
        .collect();
    value_differences(&earned)
}

/// How far each token's implicit reward is from the optimal advantage, `[n_tokens]`, in reward
/// units: `r̂_t − (r_t + V*(s_{t+1}) − V*(s_t))`, which is `β log(π/π*)(a_t|s_t)`.
///
/// It takes the true reward of each token and the optimal soft value of each state from the prompt
/// to the end, `[n_tokens + 1]`. Without them there is no residual: measured against its own
/// implicit reward, every policy's is zero.
///
/// # Panics
///
/// If there is not one true reward a token, or not one value more than that.
///
/// # Examples
///
/// ```
/// // The implicit reward is 1; 0.5 was earned and the value rose from 2 to 2.25.
/// let residuals = implicit_reward::bellman_residuals(&[1.0], &[0.5], &[2.0, 2.25]);
/// assert_eq!(residuals, [0.25]);
/// ```
pub fn bellman_residuals(rewards: &[f64], true_rewards: &[f64], soft_values: &[f64]) -> Vec<f64> {
    assert_eq!(rewards.len(), true_rewards.len(), "one true reward a token");
    assert_eq!(
        soft_values.len(),
        rewards.len() + 1,
        "one soft value a state, the end's too"
    );
    let advantages = true_rewards
        .iter()
        .zip(soft_values.windows(2))
        .map(|(reward, values)| reward + values[1] - values[0]);
    let residual = |(reward, advantage): (&f64, f64)| reward - advantage;
    rewards.iter().zip(advantages).map(residual).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Sums of a few dozen numbers of size one in f64.
    const ROUNDING: f64 = 1e-12;

    proptest! {
        #[test]
        fn shaping_moves_values_and_rewards_but_not_their_sum(
            steps in prop::collection::vec((-2f64..2.0, -2f64..2.0, -3f64..3.0), 1..20),
        ) {
            // An optimum: any rewards and values, and the implicit rewards that follow from them.
            let rewards: Vec<f64> = steps.iter().map(|step| step.0).collect();
            let n = rewards.len();
            let mut values: Vec<f64> = steps.iter().map(|step| step.1).collect();
            values.push(0.0);
            let mut potential: Vec<f64> = steps.iter().map(|step| step.2).collect();
            potential.push(0.0);
            let implicit: Vec<f64> =
                (0..n).map(|t| rewards[t] + values[t + 1] - values[t]).collect();
            let shaped: Vec<f64> =
                (0..n).map(|t| rewards[t] + potential[t + 1] - potential[t]).collect();
            let moved: Vec<f64> = (0..=n).map(|t| values[t] - potential[t]).collect();
            for (rewards, values) in [(&rewards, &values), (&shaped, &moved)] {
                let differences = value_differences(&implicit);
                let learned = soft_value_differences(&implicit, rewards);
                for t in 0..=n {
                    let earned: f64 = rewards[..t].iter().sum();
                    let expected = values[t] - values[0] + earned;
                    prop_assert!((differences[t] - expected).abs() < ROUNDING);
                    prop_assert!((learned[t] - (values[t] - values[0])).abs() < ROUNDING);
                }
                for residual in bellman_residuals(&implicit, rewards, values) {
                    prop_assert!(residual.abs() < ROUNDING);
                }
            }
        }
    }
}
