//! Rewards read off a policy and its reference.

use crate::math::log_softmax;
use crate::tabular::reserve;
use crate::{
    Beta, MdpError, TabularMdp, TabularPolicy, bradley_terry, expectation_to_go, trajectory_kls,
};

/// The implicit reward of each pair, `[pairs]`, in reward units: `β log(π/π_ref)(a|s)`, equation 11
/// of <https://arxiv.org/abs/2404.12358>.
///
/// Exactly 0 where the environment moves: the policy did not choose that token.
///
/// The policy is optimal for this reward, with soft value 0 at every state, so it is the one member
/// of its shaping class with `Σ_a π_ref exp(r/β) = 1` everywhere. At the optimal policy of a reward
/// `r` it is the advantage `r + V(s') - V(s)` (equation 10), not `r` itself.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`] if `policy` is over another tree.
///
/// # Examples
///
/// ```
/// use mdp_core::{Beta, TabularMdp, TabularPolicy, Tree, implicit_rewards};
///
/// let tree = Tree::new(2, 1, 1)?;
/// let mdp = TabularMdp::new(TabularPolicy::uniform(tree.clone()), vec![0.0; 2])?;
/// let policy = TabularPolicy::from_probs(tree, vec![0.75, 0.25])?;
/// let rewards = implicit_rewards(&mdp, &policy, Beta::new(0.1)?)?;
/// assert!((rewards[0] - 0.1 * 1.5_f64.ln()).abs() < 1e-15);
/// # Ok::<(), mdp_core::MdpError>(())
/// ```
pub fn implicit_rewards(
    mdp: &TabularMdp,
    policy: &TabularPolicy,
    beta: Beta,
) -> Result<Vec<f64>, MdpError> {
    mdp.tree().check_same("policy", policy.tree())?;
    let mut rewards = reserve(mdp.tree().n_pairs())?;
    for state in 0..mdp.tree().n_states() {
        if mdp.is_environment(state) {
            rewards.extend(std::iter::repeat_n(0.0, mdp.tree().vocab()));
            continue;
        }
        let reference = mdp.reference().row(state);
        let row = policy.row(state).iter().zip(reference);
        rewards.extend(row.map(|(logp, reference)| beta.get() * (logp - reference)));
    }
    Ok(rewards)
}

/// The implicit reward of a complete completion, and the prompt that it belongs to.
///
/// Its origin is `V(s_0)` of the prompt, which no policy reveals. So two of one prompt can be
/// compared, and two of different prompts cannot: [`preference`](Self::preference) refuses.
#[derive(Clone, Debug, PartialEq)]
pub struct ImplicitReturn {
    prompt: Vec<u32>,
    value: f64,
}

impl ImplicitReturn {
    /// `Σ_t β log(π/π_ref)(a_t|s_t)` over the policy's own tokens, in reward units.
    #[must_use]
    pub fn value(&self) -> f64 {
        self.value
    }

    /// The probability that this completion is preferred to `other`, equation 8: V of the common
    /// prompt cancels.
    ///
    /// # Errors
    ///
    /// [`MdpError::PromptsDiffer`].
    pub fn preference(&self, other: &Self) -> Result<f64, MdpError> {
        if self.prompt == other.prompt {
            Ok(bradley_terry(self.value, other.value))
        } else {
            Err(MdpError::PromptsDiffer {
                chosen: self.prompt.clone(),
                rejected: other.prompt.clone(),
            })
        }
    }
}

/// The implicit return of `completion`, given as tokens after the prompt.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`], or [`MdpError::NotComplete`] and its kin if `completion` is none.
pub fn implicit_return(
    mdp: &TabularMdp,
    policy: &TabularPolicy,
    beta: Beta,
    completion: &[u32],
) -> Result<ImplicitReturn, MdpError> {
    let tree = mdp.tree();
    tree.check_same("policy", policy.tree())?;
    let last = tree.completion(completion)?;
    let logratio: f64 = tree
        .path(last)
        .into_iter()
        .filter(|pair| !mdp.is_environment(pair / tree.vocab()))
        .map(|pair| policy.logps()[pair] - mdp.reference().logps()[pair])
        .sum();
    Ok(ImplicitReturn {
        prompt: tree.prompt().to_vec(),
        value: beta.get() * logratio,
    })
}

/// The mean implicit return of `policy` over completions of `sampler`, in reward units:
/// `E_{y~p}[r̂(y)] = β (KL(p ‖ π_ref) - KL(p ‖ π))`.
///
/// With `p = π_ref` it is `-β KL(π_ref ‖ π)`, equation 16 for whole completions: at most 0, and 0
/// only while the policy still is the reference.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`].
pub fn mean_implicit_return(
    mdp: &TabularMdp,
    policy: &TabularPolicy,
    sampler: &TabularPolicy,
    beta: Beta,
) -> Result<f64, MdpError> {
    let rewards = implicit_rewards(mdp, policy, beta)?;
    Ok(expectation_to_go(mdp, sampler, &rewards)?[0])
}

/// The most that the mean implicit return of `chosen` completions can be under any policy:
/// `β KL(p_w ‖ π_ref)`, in reward units.
///
/// It is 0 if the reference was fitted to the chosen completions, so their implicit reward can then
/// only fall. This is the sharp form of the paper's section 5.4.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`].
pub fn chosen_reward_bound(
    mdp: &TabularMdp,
    chosen: &TabularPolicy,
    beta: Beta,
) -> Result<f64, MdpError> {
    Ok(beta.get() * trajectory_kls(mdp, chosen, mdp.reference())?[0])
}

/// Proxy tuning, equation 14: `π(a|s) ∝ base(a|s) (expert(a|s) / anti_expert(a|s))^alpha`.
///
/// With a pair trained at `β_train`, `(expert / anti_expert)^alpha` is
/// `exp(alpha / β_train * (Q - V))` in the KL form. So `alpha = β_train / β_target` aims at the
/// optimum of the pair's implicit reward under `base` and `β_target`. The paper's equation 15 prints
/// `exp(β (Q - V))` for `alpha = β`, which is right only if `β_train` is 1. The aim is reached only
/// where the soft value of the next state does not depend on the action, as on the last token, or if
/// `base` is the anti-expert and `alpha` is 1.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`], [`MdpError::Parameter`] if `alpha` is not finite, or
/// [`MdpError::NotFinite`] where a logp is minus infinity, so that the product has no meaning.
pub fn proxy_tuned(
    base: &TabularPolicy,
    expert: &TabularPolicy,
    anti_expert: &TabularPolicy,
    alpha: f64,
) -> Result<TabularPolicy, MdpError> {
    base.tree().check_same("expert", expert.tree())?;
    base.tree().check_same("anti-expert", anti_expert.tree())?;
    if !alpha.is_finite() {
        return Err(MdpError::Parameter {
            name: "alpha",
            value: alpha,
            expected: "a finite number",
        });
    }
    let mut logits: Vec<f64> = base
        .logps()
        .iter()
        .zip(expert.logps())
        .zip(anti_expert.logps())
        .map(|((base, expert), anti)| match alpha {
            // Whatever the others rule out.
            0.0 => *base,
            alpha => base + alpha * (expert - anti),
        })
        .collect();
    crate::tabular::check_finite("proxy-tuned logit", base.tree(), &logits)?;
    for row in logits.chunks_exact_mut(base.tree().vocab()) {
        log_softmax(row);
    }
    Ok(TabularPolicy::from_checked(base.tree().clone(), logits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RewardPlacement, Tree};

    #[test]
    fn completions_of_different_prompts_are_not_compared() {
        let beta = Beta::new(1.0).unwrap();
        let of = |prompt: u32| {
            let tree = Tree::new(3, 2, 2).unwrap().with_prompt([prompt]);
            let mdp = TabularMdp::seeded(tree, RewardPlacement::Dense, 1).unwrap();
            implicit_return(&mdp, mdp.reference(), beta, &[2]).unwrap()
        };
        assert!((of(0).preference(&of(0)).unwrap() - 0.5).abs() < 1e-15);
        let error = of(0).preference(&of(1)).unwrap_err().to_string();
        assert!(error.contains("[0]") && error.contains("[1]"), "{error}");
    }

    #[test]
    fn unfinished_completions_have_no_return() {
        let tree = Tree::new(3, 2, 2).unwrap();
        let mdp = TabularMdp::seeded(tree, RewardPlacement::Dense, 1).unwrap();
        let beta = Beta::new(1.0).unwrap();
        assert!(matches!(
            implicit_return(&mdp, mdp.reference(), beta, &[0]),
            Err(MdpError::NotComplete { .. })
        ));
    }

    #[test]
    fn proxy_tuning_refuses_what_has_no_meaning() {
        let tree = Tree::new(2, 1, 1).unwrap();
        let sure = TabularPolicy::from_logps(tree.clone(), vec![0.0, f64::NEG_INFINITY]).unwrap();
        let even = TabularPolicy::uniform(tree);
        assert!(proxy_tuned(&even, &even, &even, f64::NAN).is_err());
        assert!(proxy_tuned(&even, &sure, &sure, 1.0).is_err());
    }
}
