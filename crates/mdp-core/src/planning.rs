//! What planning over an exact solution gives: the objectives and backups that search approximates.

use crate::math::log_sum_exp;
use crate::{MdpError, SoftSolution};

/// The paper's search objective, equation 12, of a prefix given after the prompt, in reward units:
/// `G = Σ_t (r_t + β log π_ref(a_t|s_t)) + V(s_end)`.
///
/// It equals `V(s_0) + β Σ_t log π*(a_t|s_t)` for every prefix, complete or not, so ranking by it is
/// ranking by likelihood. Equation 13 prints the first sign as a minus; harmless to a ranking, wrong
/// as an equality. Where the environment moved in the prefix, its luck `r + V(s') - V(s)` comes in
/// place of the logp.
///
/// # Errors
///
/// If `tokens` is no path of the tree.
pub fn conservative_objective(solution: &SoftSolution, tokens: &[u32]) -> Result<f64, MdpError> {
    Ok(objective(solution, tokens)?.conservative)
}

/// The return so far plus the soft value of where it leads, in reward units:
/// `J = Σ_t r_t + V(s_end)`.
///
/// It equals `V(s_0) + β Σ_t log(π*/π_ref)(a_t|s_t)`: maximising reward is log-ratio search, not
/// likelihood search.
///
/// # Errors
///
/// If `tokens` is no path of the tree.
pub fn reward_objective(solution: &SoftSolution, tokens: &[u32]) -> Result<f64, MdpError> {
    Ok(objective(solution, tokens)?.reward)
}

struct Objectives {
    conservative: f64,
    reward: f64,
}

fn objective(solution: &SoftSolution, tokens: &[u32]) -> Result<Objectives, MdpError> {
    let mdp = solution.mdp();
    let path = mdp.tree().path_of(tokens)?;
    let mut reward = match path.last() {
        None => solution.soft_values()[0],
        Some(&pair) => solution.next_soft_value(pair),
    };
    let mut conservative = reward;
    for pair in path {
        reward += mdp.rewards()[pair];
        conservative += mdp.rewards()[pair];
        if !mdp.is_environment(pair / mdp.tree().vocab()) {
            conservative += solution.beta().get() * mdp.reference().logps()[pair];
        }
    }
    Ok(Objectives {
        conservative,
        reward,
    })
}

/// [`conservative_objective`] of every prefix at once, by last pair, `[pairs]`, in reward units.
#[must_use]
pub fn conservative_objectives(solution: &SoftSolution) -> Vec<f64> {
    let mdp = solution.mdp();
    let steps: Vec<f64> = (0..mdp.tree().n_pairs())
        .map(|pair| {
            let reference = if mdp.is_environment(pair / mdp.tree().vocab()) {
                0.0
            } else {
                solution.beta().get() * mdp.reference().logps()[pair]
            };
            mdp.rewards()[pair] + reference
        })
        .collect();
    let mut sums = mdp.tree().path_sums(&steps);
    for (pair, sum) in sums.iter_mut().enumerate() {
        *sum += solution.next_soft_value(pair);
    }
    sums
}

/// The soft backup of a frontier to the root: `β log Σ_p exp(G(p)/β)` over the prefixes that end
/// with the pairs of `frontier`, in reward units.
///
/// For a frontier that every completion crosses once, and no move of the environment before it, this
/// is `V(s_0)` at any depth: planning with exact leaves changes nothing.
///
/// # Panics
///
/// If the tree has no such pair.
#[must_use]
pub fn soft_backup(solution: &SoftSolution, frontier: &[usize]) -> f64 {
    let objectives = conservative_objectives(solution);
    let beta = solution.beta().get();
    let terms: Vec<f64> = frontier.iter().map(|&p| objectives[p] / beta).collect();
    beta * log_sum_exp(&terms)
}

/// The max backup of `depth` steps: the best prefix's objective and its tokens after the prompt.
///
/// `max_p G(p) = V(s_0) + β max_p log π*(p)`, at most `V(s_0)`; depth 1 is greedy decoding and depth
/// `horizon` the likeliest completion. Ties go to the first prefix in the order of the tree.
#[must_use]
pub fn max_backup(solution: &SoftSolution, depth: usize) -> (f64, Vec<u32>) {
    let objectives = conservative_objectives(solution);
    let tree = solution.mdp().tree();
    let mut best: Option<usize> = None;
    for pair in tree.prefixes(depth) {
        if best.is_none_or(|b| objectives[pair] > objectives[b]) {
            best = Some(pair);
        }
    }
    match best {
        None => (solution.soft_values()[0], Vec::new()),
        Some(pair) => (objectives[pair], tree.pair_tokens(pair)),
    }
}
