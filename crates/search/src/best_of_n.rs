//! Draw many, keep the best.

use std::fmt;

use crate::sampling::draw_completions;
use crate::space::Seen;
use crate::{
    Completion, End, PrefixModel, Request, SampleConfig, SearchError, SearchOutput, ValueFunction,
};

/// Who says which of the drawn completions is best.
pub enum Judge<'a> {
    /// The request's score: with [`Score::Likelihood`](crate::Score::Likelihood) the policy's
    /// likeliest, with [`Score::LogRatio`](crate::Score::LogRatio) the one of the highest implicit
    /// reward.
    Score,
    /// A reward from outside: one number for each completion, given as tokens after the prompt.
    External(ValueFunction<'a>),
}

impl fmt::Debug for Judge<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Score => "Score",
            Self::External(_) => "External",
        })
    }
}

/// `n` completions drawn as by [`sample`](crate::sample()), best first by `judge`, the earlier first
/// among equals. Unfinished ones come last.
///
/// Reranking by implicit reward reranks by the true reward exactly if the policy is optimal for it;
/// reranking by likelihood does not.
///
/// # Errors
///
/// As [`sample`](crate::sample()), those of the judge, and [`SearchError::Values`] if it does not give
/// one number for each completion.
///
/// # Examples
///
/// ```
/// use mdp_core::{TabularPolicy, Tree};
/// use search::{Judge, Policies, Request, SampleConfig, best_of_n};
///
/// let policy = TabularPolicy::uniform(Tree::new(3, 4, 2)?);
/// let config = SampleConfig { n: 16, ..SampleConfig::default() };
/// // The shortest is best.
/// let mut judge = |completions: &[&[u32]]| {
///     Ok(completions.iter().map(|tokens| -(tokens.len() as f64)).collect())
/// };
/// let request = Request::of(policy.tree());
/// let model = &mut Policies::new(&policy);
/// let output = best_of_n(model, &request, &config, Judge::External(&mut judge))?;
/// let lengths: Vec<usize> = output.completions.iter().map(|c| c.tokens.len()).collect();
/// assert!(lengths.is_sorted());
/// # Ok::<(), search::SearchError>(())
/// ```
pub fn best_of_n<M: PrefixModel + ?Sized>(
    model: &mut M,
    request: &Request<'_>,
    config: &SampleConfig,
    judge: Judge<'_>,
) -> Result<SearchOutput, SearchError> {
    let (space, nodes) = draw_completions(model, request, config)?;
    let mut drawn: Vec<_> = nodes
        .iter()
        .map(|&node| (space.completion(node), node))
        .collect();
    if let Judge::External(judge) = judge {
        let completions: Vec<&[u32]> = drawn.iter().map(|(c, _)| c.tokens.as_slice()).collect();
        let rewards = judge(&completions)?;
        check_values("the judge", &rewards, drawn.len())?;
        for ((completion, _), reward) in drawn.iter_mut().zip(rewards) {
            completion.score = reward;
        }
    }
    let unfinished = |completion: &Completion| completion.end == End::Unfinished;
    drawn.sort_by(|(a, _), (b, _)| {
        let by_score = || b.score.total_cmp(&a.score);
        unfinished(a).cmp(&unfinished(b)).then_with(by_score)
    });
    let path = drawn.first().map(|&(_, node)| node);
    let completions = drawn
        .into_iter()
        .map(|(completion, _)| completion)
        .collect();
    Ok(space.finish_with(completions, path, None, |_| Seen::default(), 0))
}

/// One number for each of `expected`, none of them NaN.
pub(crate) fn check_values(
    name: &'static str,
    values: &[f64],
    expected: usize,
) -> Result<(), SearchError> {
    if values.len() != expected {
        return Err(SearchError::Values {
            name,
            got: format!("{} values", values.len()),
            expected: format!("{expected}"),
        });
    }
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(SearchError::Values {
            name,
            got: format!("{} as value {at}", values[at]),
            expected: "a finite number".into(),
        }),
        None => Ok(()),
    }
}
