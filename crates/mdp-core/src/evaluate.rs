//! What any policy is worth, exactly.

use crate::tabular::reserve;
use crate::{Beta, MdpError, SoftSolution, TabularMdp, TabularPolicy};

/// The exact worth of a policy from every state on.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// `E_π[Σ r] - β KL(π ‖ π_ref)` from each state to the end, `[states]`, in reward units.
    pub soft_values: Vec<f64>,
    /// `E_π[Σ r]` from each state to the end, `[states]`, in reward units.
    pub expected_returns: Vec<f64>,
    /// `KL(π ‖ π_ref)` of the trajectories from each state to the end, `[states]`, in nats.
    pub kls: Vec<f64>,
}

/// Evaluates `policy` by backward induction: the objective that the paper's equation 2 maximises,
/// and its two parts.
///
/// `V^π(s) = Σ_a π(a|s) (r(s,a) - β log(π/π_ref)(a|s) + V^π(s'))`, where the log-ratio is 0 if the
/// environment moves. At the optimal policy it is the soft value of [`solve`](crate::solve), at
/// any other policy less.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`] if `policy` is over another tree.
///
/// # Examples
///
/// ```
/// use mdp_core::{Beta, TabularMdp, TabularPolicy, Tree, evaluate};
///
/// let tree = Tree::new(2, 1, 1)?;
/// let mdp = TabularMdp::new(TabularPolicy::uniform(tree.clone()), vec![4.0, 0.0])?;
/// let policy = TabularPolicy::from_probs(tree, vec![0.75, 0.25])?;
/// let worth = evaluate(&mdp, &policy, Beta::new(2.0)?)?;
/// assert!((worth.expected_returns[0] - 3.0).abs() < 1e-12);
/// // KL = 3/4 log(3/2) + 1/4 log(1/2)
/// assert!((worth.kls[0] - (0.75 * 1.5_f64.ln() + 0.25 * 0.5_f64.ln())).abs() < 1e-12);
/// assert!((worth.soft_values[0] - (3.0 - 2.0 * worth.kls[0])).abs() < 1e-12);
/// # Ok::<(), mdp_core::MdpError>(())
/// ```
pub fn evaluate(
    mdp: &TabularMdp,
    policy: &TabularPolicy,
    beta: Beta,
) -> Result<Evaluation, MdpError> {
    let expected_returns = expectation_to_go(mdp, policy, mdp.rewards())?;
    let kls = trajectory_kls(mdp, policy, mdp.reference())?;
    let soft_values = expected_returns
        .iter()
        .zip(&kls)
        .map(|(r, kl)| r - beta.get() * kl)
        .collect();
    Ok(Evaluation {
        soft_values,
        expected_returns,
        kls,
    })
}

/// `E_π[Σ table(s,a)]` from each state to the end, `[states]`, in the table's units.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`] or [`MdpError::TableLength`].
pub fn expectation_to_go(
    mdp: &TabularMdp,
    policy: &TabularPolicy,
    table: &[f64],
) -> Result<Vec<f64>, MdpError> {
    mdp.tree().check_same("policy", policy.tree())?;
    mdp.tree().check_pairs("table", table.len())?;
    let tree = mdp.tree();
    let mut values = vec![0.0; tree.n_states()];
    for state in (0..tree.n_states()).rev() {
        values[state] = mdp
            .acting_row(policy, state)
            .iter()
            .zip(tree.row(state))
            .map(|(&logp, pair)| {
                let next = tree.child(pair).map_or(0.0, |s| values[s]);
                expected(logp, table[pair] + next)
            })
            .sum();
    }
    Ok(values)
}

/// `KL(p(·|s) ‖ q(·|s))` at each state, `[states]`, in nats; 0 where the environment moves.
///
/// Infinite where `q` gives no probability to a token that `p` may take.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`].
pub fn state_kls(
    mdp: &TabularMdp,
    p: &TabularPolicy,
    q: &TabularPolicy,
) -> Result<Vec<f64>, MdpError> {
    mdp.tree().check_same("first policy", p.tree())?;
    mdp.tree().check_same("second policy", q.tree())?;
    Ok((0..mdp.tree().n_states())
        .map(|state| {
            if mdp.is_environment(state) {
                return 0.0;
            }
            p.row(state)
                .iter()
                .zip(q.row(state))
                .map(|(&p, &q)| expected(p, p - q))
                .sum()
        })
        .collect())
}

/// `KL(p(τ) ‖ q(τ))` of the trajectories from each state to the end, `[states]`, in nats.
///
/// By the chain rule this is the sum of [`state_kls`] along the way, averaged over `p`: equation 16
/// of the paper for whole completions. The environment's moves cancel in it.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`].
pub fn trajectory_kls(
    mdp: &TabularMdp,
    p: &TabularPolicy,
    q: &TabularPolicy,
) -> Result<Vec<f64>, MdpError> {
    let mut kls = state_kls(mdp, p, q)?;
    let tree = mdp.tree();
    for state in (0..tree.n_states()).rev() {
        let later: f64 = mdp
            .acting_row(p, state)
            .iter()
            .zip(tree.row(state))
            .filter_map(|(&logp, pair)| tree.child(pair).map(|s| expected(logp, kls[s])))
            .sum();
        kls[state] += later;
    }
    Ok(kls)
}

/// The probability that an episode of `policy` passes each state, `[states]`, in `[0, 1]`.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`].
pub fn occupancies(mdp: &TabularMdp, policy: &TabularPolicy) -> Result<Vec<f64>, MdpError> {
    mdp.tree().check_same("policy", policy.tree())?;
    let tree = mdp.tree();
    let mut occupancies = vec![0.0; tree.n_states()];
    occupancies[0] = 1.0;
    for state in 0..tree.n_states() {
        for (logp, pair) in mdp.acting_row(policy, state).iter().zip(tree.row(state)) {
            if let Some(next) = tree.child(pair) {
                occupancies[next] = occupancies[state] * logp.exp();
            }
        }
    }
    Ok(occupancies)
}

/// `log π(y|x)` of every completion, in the order of [`Tree::completions`](crate::Tree::completions),
/// in nats. The environment's draws are counted with their own probability, so these are the
/// log-probabilities of a distribution; their exponentials sum to 1.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`].
pub fn completion_logps(mdp: &TabularMdp, policy: &TabularPolicy) -> Result<Vec<f64>, MdpError> {
    let acting = mdp.acting(policy)?;
    let sums = mdp.tree().path_sums(acting.logps());
    Ok(mdp.tree().completions().map(|pair| sums[pair]).collect())
}

/// The Bellman residual of each pair when `policy` is read as a soft Q-function, `[pairs]`, in
/// reward units: `r̂(s,a) - (r(s,a) + V*(s') - V*(s))`, which is exactly `β log(π/π*)(a|s)`.
///
/// Its sum along a path is the error of the path's implicit score ([`path_error`]). It needs a true
/// reward: measured against the policy's own implicit reward, every policy's residual is zero. It
/// is 0 where the environment moves.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`].
pub fn bellman_residuals(
    solution: &SoftSolution,
    policy: &TabularPolicy,
) -> Result<Vec<f64>, MdpError> {
    let (mdp, beta) = (solution.mdp(), solution.beta().get());
    mdp.tree().check_same("policy", policy.tree())?;
    let mut residuals = reserve(mdp.tree().n_pairs())?;
    for state in 0..mdp.tree().n_states() {
        let environment = mdp.is_environment(state);
        let reference = mdp.reference().row(state);
        for ((pair, logp), reference) in mdp.tree().row(state).zip(policy.row(state)).zip(reference)
        {
            residuals.push(if environment {
                0.0
            } else {
                let implicit_reward = beta * (logp - reference);
                let advantage = mdp.rewards()[pair] + solution.next_soft_value(pair)
                    - solution.soft_values()[state];
                implicit_reward - advantage
            });
        }
    }
    Ok(residuals)
}

/// How far the implicit score of a prefix is from the true one, in reward units:
/// `Σ_t β log(π/π*)(a_t|s_t)` over `tokens`, given after the prompt.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`], or if `tokens` is no path of the tree.
pub fn path_error(
    solution: &SoftSolution,
    policy: &TabularPolicy,
    tokens: &[u32],
) -> Result<f64, MdpError> {
    let residuals = bellman_residuals(solution, policy)?;
    let path = solution.mdp().tree().path_of(tokens)?;
    Ok(path.into_iter().map(|pair| residuals[pair]).sum())
}

/// The mean of [`path_error`] over the first `depth` tokens when `sampler` acts, in reward units.
///
/// On the policy's own samples it is `β KL_K(π ‖ π*)`, which is at least 0 and grows with depth: the
/// policy over-rates what it does itself. On the optimal policy's samples it is `-β KL_K(π* ‖ π)`.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`].
pub fn mean_path_error(
    solution: &SoftSolution,
    policy: &TabularPolicy,
    sampler: &TabularPolicy,
    depth: usize,
) -> Result<f64, MdpError> {
    let mdp = solution.mdp();
    let tree = mdp.tree();
    let residuals = bellman_residuals(solution, policy)?;
    let occupancies = occupancies(mdp, sampler)?;
    let states = 0..tree.level(depth).start;
    Ok(states
        .map(|state| {
            let mean: f64 = mdp
                .acting_row(sampler, state)
                .iter()
                .zip(&residuals[tree.row(state)])
                .map(|(&logp, &residual)| expected(logp, residual))
                .sum();
            occupancies[state] * mean
        })
        .sum())
}

/// `exp(logp) * value`, and 0 where the event is impossible, whatever its value.
fn expected(logp: f64, value: f64) -> f64 {
    let p = logp.exp();
    if p > 0.0 { p * value } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RewardPlacement, Tree};
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    /// Sums of at most a few hundred terms of order one.
    const ROUNDING: f64 = 1e-12;

    fn mdp(horizon: usize) -> TabularMdp {
        let tree = Tree::new(3, horizon, 1).unwrap();
        TabularMdp::seeded(tree, RewardPlacement::Dense, 9).unwrap()
    }

    #[test]
    fn backward_evaluation_agrees_with_the_sum_over_all_completions() {
        let mdp = mdp(4);
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let policy = TabularPolicy::random(mdp.tree().clone(), 1.0, &mut rng).unwrap();
        let worth = evaluate(&mdp, &policy, Beta::new(0.5).unwrap()).unwrap();
        let logps = completion_logps(&mdp, &policy).unwrap();
        let reference = completion_logps(&mdp, mdp.reference()).unwrap();
        let returns = mdp.returns();
        let (mut total, mut expected_return, mut kl) = (0.0, 0.0, 0.0);
        for i in 0..logps.len() {
            total += logps[i].exp();
            expected_return += logps[i].exp() * returns[i];
            kl += logps[i].exp() * (logps[i] - reference[i]);
        }
        assert!((total - 1.0).abs() < ROUNDING);
        assert!((worth.expected_returns[0] - expected_return).abs() < ROUNDING);
        assert!((worth.kls[0] - kl).abs() < ROUNDING);
        assert!((worth.soft_values[0] - (expected_return - 0.5 * kl)).abs() < ROUNDING);
    }

    #[test]
    fn a_deterministic_policy_has_finite_worth_and_infinite_reverse_divergence() {
        let mdp = mdp(2);
        let row = [0.0, f64::NEG_INFINITY, f64::NEG_INFINITY];
        let greedy = TabularPolicy::from_logps(mdp.tree().clone(), row.repeat(3)).unwrap();
        let worth = evaluate(&mdp, &greedy, Beta::new(1.0).unwrap()).unwrap();
        assert!(
            (worth.expected_returns[0] - (mdp.rewards()[0] + mdp.rewards()[3])).abs() < ROUNDING
        );
        assert!(worth.kls[0].is_finite());
        let kls = state_kls(&mdp, mdp.reference(), &greedy).unwrap();
        assert!(kls[0].is_infinite() && kls[0] > 0.0);
    }

    #[test]
    fn occupancies_of_a_level_sum_to_the_chance_of_getting_there() {
        let mdp = mdp(3);
        let reach = occupancies(&mdp, mdp.reference()).unwrap();
        let eos = mdp.reference().logps()[1].exp();
        let level: f64 = mdp.tree().level(1).map(|s| reach[s]).sum();
        assert!((level - (1.0 - eos)).abs() < ROUNDING);
    }

    #[test]
    fn tables_of_another_tree_are_refused() {
        let (mdp, other) = (mdp(2), mdp(3));
        let beta = Beta::new(1.0).unwrap();
        let error = evaluate(&mdp, other.reference(), beta).unwrap_err();
        assert!(error.to_string().contains("horizon 3"), "{error}");
        assert!(expectation_to_go(&mdp, mdp.reference(), &[0.0]).is_err());
    }
}
