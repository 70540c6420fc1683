//! The best token, again and again.

use crate::space::Space;
use crate::{NodeId, PrefixModel, Request, SearchError, SearchOutput};

/// The completion that takes the token of the highest score at every state; the lowest token among
/// equals.
///
/// Beam search of width 1 is the same but for one thing: like every beam search, it may go on past
/// an end token that another token beats later.
///
/// # Errors
///
/// A request that cannot be searched, or those of the model.
///
/// # Examples
///
/// ```
/// use mdp_core::{TabularPolicy, Tree};
/// use search::{Policies, Request, greedy};
///
/// // 0.6 for token 0, then 0.5 for each end; but EOS at once has 0.4, more than 0.6 * 0.5.
/// let policy = TabularPolicy::from_probs(Tree::new(2, 2, 1)?, vec![0.6, 0.4, 0.5, 0.5])?;
/// let output = greedy(&mut Policies::new(&policy), &Request::of(policy.tree()))?;
/// assert_eq!(output.completions[0].tokens, [0, 0]);
/// assert!((output.completions[0].logp - 0.3_f64.ln()).abs() < 1e-15);
/// // It knows that it may have missed something of probability 0.4.
/// assert!(!output.is_optimal());
/// assert!((output.upper_bound.unwrap() - 0.4_f64.ln()).abs() < 1e-15);
/// # Ok::<(), search::SearchError>(())
/// ```
pub fn greedy<M: PrefixModel + ?Sized>(
    model: &mut M,
    request: &Request<'_>,
) -> Result<SearchOutput, SearchError> {
    let mut space = Space::new(model, request)?;
    // One candidate is enough if the policy's order is the score's.
    let at_most = space.ranks_by_logp().then_some(1);
    let mut node = NodeId::ROOT;
    while space.end(node).is_none() {
        let Some(expansion) = space.expand(&[node], at_most)? else {
            break;
        };
        let candidates = expansion.of(0).iter();
        let better = |a: &_, b: &_| b > a;
        let best = candidates.copied().reduce(|best, other| {
            if better(&best.step, &other.step) {
                other
            } else {
                best
            }
        });
        let Some(best) = best else {
            break;
        };
        node = space.child(node, &best)?;
        space.retain(&[node]);
    }
    space.stats.covered_mass = space.logp(node).exp();
    // With a processor there is no bound anyway; else what was left out is the bound.
    let open = at_most.map(|_| space.score(node));
    Ok(space.finish(&[node], open))
}
