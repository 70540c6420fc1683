//! The exact solution of the KL-regularised problem, in both forms.

use rayon::prelude::*;

use crate::math::{exp_nonpositive, log_softmax, log_sum_exp};
use crate::mdp::check_candidates;
use crate::tabular::{check_finite, reserve};
use crate::{ActionValue, Beta, MdpError, Node, TabularMdp, TabularPolicy, Tree};

/// Solves `max_π E[Σ r] - β KL(π ‖ π_ref)` exactly, by backward induction over the tree.
///
/// `V(s) = β log Σ_a π_ref(a|s) exp((r(s,a) + V(s')) / β)`, with `V = 0` once the episode ends
/// (equations 5 to 7 of <https://arxiv.org/abs/2404.12358>, in the KL form). Where the environment
/// moves, `V(s) = Σ_a p(a|s) (r(s,a) + V(s'))`.
///
/// The largest term of each sum is taken out first, in reward units and before the division by β,
/// so no reward can overflow it unless the return itself does, and no β whose inverse and whose
/// product with the reference's logps are finite. Levels larger than a few
/// thousand pairs are shared among the threads of the current rayon pool; the bits of the result do
/// not depend on how many there are.
///
/// # Errors
///
/// [`MdpError::Overflow`] if rewards sum past the largest float, [`MdpError::OutOfMemory`].
///
/// # Examples
///
/// ```
/// use mdp_core::{Beta, TabularMdp, TabularPolicy, Tree, solve};
///
/// // One choice between token 0, worth ln 3, and EOS, worth nothing; β = 1, uniform reference.
/// let tree = Tree::new(2, 1, 1)?;
/// let mdp = TabularMdp::new(TabularPolicy::uniform(tree), vec![3.0_f64.ln(), 0.0])?;
/// let solution = solve(&mdp, Beta::new(1.0)?)?;
/// // V = log(3/2 + 1/2), and token 0 is three times as likely as EOS.
/// assert!((solution.soft_values()[0] - 2.0_f64.ln()).abs() < 1e-15);
/// assert!((solution.optimal_policy().logps()[0] - 0.75_f64.ln()).abs() < 1e-15);
/// # Ok::<(), mdp_core::MdpError>(())
/// ```
pub fn solve(mdp: &TabularMdp, beta: Beta) -> Result<SoftSolution, MdpError> {
    let tree = mdp.tree();
    let mut soft_values = reserve(tree.n_states())?;
    soft_values.resize(tree.n_states(), 0.0);
    for depth in (0..tree.horizon()).rev() {
        let level = tree.level(depth);
        let (before, after) = soft_values.split_at_mut(level.end);
        let values = &mut before[level.start..];
        // The last level's children are all terminal.
        let next = (depth + 1 < tree.horizon()).then(|| &after[..tree.level(depth + 1).len()]);
        let pairs = level.start * tree.vocab()..level.end * tree.vocab();
        let level = Level {
            reference_logps: &mdp.reference().logps()[pairs.clone()],
            rewards: &mdp.rewards()[pairs],
            next,
            vocab: tree.vocab(),
            eos: tree.eos() as usize,
            beta: beta.get(),
        };
        level.solve(values);
        if mdp.has_environment() {
            for (i, value) in values.iter_mut().enumerate() {
                if mdp.is_environment(depth_start(tree, depth) + i) {
                    *value = level.expectation(i);
                }
            }
        }
    }
    if let Some(state) = soft_values.iter().position(|v| !v.is_finite()) {
        return Err(MdpError::Overflow {
            state: tree.tokens(state),
            value: soft_values[state],
        });
    }
    Ok(SoftSolution {
        mdp: mdp.clone(),
        beta,
        soft_values,
    })
}

fn depth_start(tree: &Tree, depth: usize) -> usize {
    tree.level(depth).start
}

/// The exact solution: soft values, and everything that follows from them.
///
/// It holds one number per state; action values, advantages and the optimal policy are one addition
/// per pair from there, so they are computed when asked for. They come in two forms that the paper
/// mixes and that this crate keeps apart by type:
///
/// | | [`KlForm`] | [`MaxEntForm`] |
/// |---|---|---|
/// | `Q(s,a)` | `r + V(s')` | `r + β log π_ref + V(s')` |
/// | `V(s)` | `β log Σ π_ref exp(Q/β)` | `β log Σ exp(Q/β)` |
/// | `π(a\|s)` | `π_ref exp((Q - V)/β)` | `exp((Q - V)/β)` |
/// | `Q - V` | `β log(π/π_ref)` | `β log π` |
///
/// `V` is the same number in both. The paper's equations 5 to 7 are the MaxEnt form; where its
/// section 4.2 calls `β log(π/π_ref)` the optimal advantage it means the KL form's.
#[derive(Clone, Debug)]
pub struct SoftSolution {
    mdp: TabularMdp,
    beta: Beta,
    soft_values: Vec<f64>,
}

impl SoftSolution {
    /// The process that was solved.
    #[must_use]
    pub fn mdp(&self) -> &TabularMdp {
        &self.mdp
    }

    /// The strength of the KL penalty.
    #[must_use]
    pub fn beta(&self) -> Beta {
        self.beta
    }

    /// `V(s)` by state number, `[states]`, in reward units.
    #[must_use]
    pub fn soft_values(&self) -> &[f64] {
        &self.soft_values
    }

    /// `V` at tokens after the prompt, in reward units; 0 for a complete completion.
    ///
    /// # Errors
    ///
    /// If the tokens are no state of the tree.
    pub fn soft_value_at(&self, tokens: &[u32]) -> Result<f64, MdpError> {
        Ok(match self.mdp.tree().find(tokens)? {
            Node::State(state) => self.soft_values[state],
            Node::Completion(_) => 0.0,
        })
    }

    /// `V` of the state that `pair` leads to, in reward units; 0 if it ends the completion.
    #[must_use]
    pub fn next_soft_value(&self, pair: usize) -> f64 {
        self.mdp
            .tree()
            .child(pair)
            .map_or(0.0, |state| self.soft_values[state])
    }

    /// Action values in the KL form, `Q = r + V(s')`.
    #[must_use]
    pub fn kl_form(&self) -> KlForm {
        let mut values = vec![0.0; self.mdp.tree().n_pairs()];
        self.for_each_row(&mut values, |_, _| ());
        KlForm(ActionValues::new(&self.mdp, self.beta, values))
    }

    /// Fills a table over pairs with `r + V(s')`, then hands each row to `finish`.
    fn for_each_row(&self, table: &mut [f64], finish: impl Fn(usize, &mut [f64]) + Sync) {
        let tree = self.mdp.tree();
        let eos = tree.eos() as usize;
        let rows = (TASK_PAIRS / tree.vocab()).max(1);
        table
            .par_chunks_mut(rows * tree.vocab())
            .enumerate()
            .for_each(|(task, chunk)| {
                let first = task * rows;
                for (i, row) in chunk.chunks_exact_mut(tree.vocab()).enumerate() {
                    let state = first + i;
                    row.copy_from_slice(&self.mdp.rewards()[tree.row(state)]);
                    let next = &self.soft_values[tree.children(state)];
                    // At the horizon there are no children, and both loops are empty.
                    let (before, after) = next.split_at(eos.min(next.len()));
                    for (q, v) in row.iter_mut().zip(before) {
                        *q += v;
                    }
                    for (q, v) in row[eos + 1..].iter_mut().zip(after) {
                        *q += v;
                    }
                    finish(state, row);
                }
            });
    }

    /// Action values in the MaxEnt form, `Q = r + β log π_ref + V(s')`.
    #[must_use]
    pub fn max_ent_form(&self) -> MaxEntForm {
        self.kl_form().to_max_ent_form()
    }

    /// The optimal policy `π*(a|s) = π_ref(a|s) exp((r + V(s') - V(s)) / β)`.
    ///
    /// Where the environment moves, its own distribution.
    #[must_use]
    pub fn optimal_policy(&self) -> TabularPolicy {
        let tree = self.mdp.tree();
        let per_beta = 1.0 / self.beta.get();
        let mut logps = vec![0.0; tree.n_pairs()];
        self.for_each_row(&mut logps, |state, row| {
            let reference = self.mdp.reference().row(state);
            if self.mdp.is_environment(state) {
                row.copy_from_slice(reference);
                return;
            }
            // By the best action that may be taken and the row's own sum, not by V: its rounding, divided
            // by a small β, would be no distribution's.
            let possible = row.iter().zip(reference);
            let possible = possible.filter(|(_, logp)| **logp > f64::NEG_INFINITY);
            let best = possible.map(|(&q, _)| q).fold(f64::NEG_INFINITY, f64::max);
            for (q, logp) in row.iter_mut().zip(reference) {
                *q = logp + (*q - best) * per_beta;
            }
            log_softmax(row);
        });
        TabularPolicy::from_checked(tree.clone(), logps)
    }
}

/// Action values and what they were computed under.
#[derive(Clone, Debug)]
struct ActionValues {
    mdp: TabularMdp,
    beta: Beta,
    /// `[pairs]`, in reward units.
    values: Vec<f64>,
}

impl ActionValues {
    fn new(mdp: &TabularMdp, beta: Beta, values: Vec<f64>) -> Self {
        Self {
            mdp: mdp.clone(),
            beta,
            values,
        }
    }

    fn tree(&self) -> &Tree {
        self.mdp.tree()
    }

    /// `β log π_ref(a|s)`, the difference of the two forms; 0 where the environment moves.
    fn reference_term(&self, pair: usize) -> f64 {
        if self.mdp.is_environment(pair / self.tree().vocab()) {
            0.0
        } else {
            self.beta.get() * self.mdp.reference().logps()[pair]
        }
    }

    /// The soft value of each state from its action values, `[states]`: `β log Σ_a weight exp(Q/β)`
    /// with weight `π_ref` in the KL form and 1 in the MaxEnt form.
    fn soft_values(&self, max_ent: bool) -> Vec<f64> {
        let beta = self.beta.get();
        let reference = self.mdp.reference();
        (0..self.tree().n_states())
            .map(|state| {
                let row = &self.values[self.tree().row(state)];
                if self.mdp.is_environment(state) {
                    return row
                        .iter()
                        .zip(reference.row(state))
                        .map(|(q, p)| q * p.exp())
                        .sum();
                }
                let terms: Vec<f64> = row
                    .iter()
                    .zip(reference.row(state))
                    .map(|(q, logp)| q / beta + if max_ent { 0.0 } else { *logp })
                    .collect();
                beta * log_sum_exp(&terms)
            })
            .collect()
    }

    fn advantages(&self, max_ent: bool) -> Vec<f64> {
        let soft_values = self.soft_values(max_ent);
        self.values
            .iter()
            .enumerate()
            .map(|(pair, q)| q - soft_values[pair / self.tree().vocab()])
            .collect()
    }

    fn candidate_values(
        &self,
        states: &[&[u32]],
        candidates: &[&[u32]],
    ) -> Result<Vec<f64>, MdpError> {
        check_candidates(states, candidates)?;
        let mut values = Vec::with_capacity(candidates.iter().map(|c| c.len()).sum());
        for (state, candidates) in states.iter().zip(candidates) {
            let Node::State(at) = self.tree().find_state(state)? else {
                return Err(MdpError::Terminal {
                    state: state.to_vec(),
                });
            };
            let row = &self.values[self.tree().row(at)];
            for &action in *candidates {
                let value = row
                    .get(action as usize)
                    .ok_or_else(|| MdpError::TokenOutside {
                        state: state.to_vec(),
                        token: action,
                        vocab: row.len(),
                    })?;
                values.push(*value);
            }
        }
        Ok(values)
    }
}

/// Action values in the KL form: `Q(s,a) = r(s,a) + V(s')`, all in reward units.
///
/// The reference enters the soft value, not Q: `V = β log Σ_a π_ref exp(Q/β)`. The advantage
/// `Q - V` is the implicit reward `β log(π/π_ref)`.
#[derive(Clone, Debug)]
pub struct KlForm(ActionValues);

/// Action values in the paper's form, equation 7: `Q(s,a) = r(s,a) + β log π_ref(a|s) + V(s')`, all
/// in reward units.
///
/// The reference enters Q: `V = β log Σ_a exp(Q/β)` (equation 6). The advantage `Q - V` is
/// `β log π` (equation 5). Logits of a language model, times β, are such a Q.
#[derive(Clone, Debug)]
pub struct MaxEntForm(ActionValues);

macro_rules! action_value_form {
    ($form:ident, $max_ent:literal, $q:literal, $v:literal, $advantage:literal, $inverse:literal) => {
        impl $form {
            #[doc = concat!("Takes a table of action values as ", $q, " under the reference, ")]
            /// environment and β given; the process's rewards are not looked at.
            ///
            /// # Errors
            ///
            /// [`MdpError::TableLength`], or [`MdpError::NotFinite`] with the state and token.
            pub fn new(mdp: &TabularMdp, beta: Beta, values: Vec<f64>) -> Result<Self, MdpError> {
                mdp.tree().check_pairs("action values", values.len())?;
                check_finite("action value", mdp.tree(), &values)?;
                Ok(Self(ActionValues::new(mdp, beta, values)))
            }

            #[doc = concat!($q, ", `[pairs]`, in reward units.")]
            #[must_use]
            pub fn action_values(&self) -> &[f64] {
                &self.0.values
            }

            #[doc = concat!($v, ", `[states]`, in reward units.")]
            #[must_use]
            pub fn soft_values(&self) -> Vec<f64> {
                self.0.soft_values($max_ent)
            }

            #[doc = concat!("`Q - V`, which is ", $advantage, ", `[pairs]`, in reward units.")]
            ///
            /// Where the environment moves, it is how much better its draw was than expected.
            #[must_use]
            pub fn advantages(&self) -> Vec<f64> {
                self.0.advantages($max_ent)
            }

            /// The one reward whose action values these are, `[pairs]`, in reward units (Lemma 1):
            #[doc = concat!($inverse, ", with `V = 0` once the episode ends.")]
            #[must_use]
            pub fn rewards(&self) -> Vec<f64> {
                let soft_values = self.soft_values();
                (0..self.0.values.len())
                    .map(|pair| {
                        let next = self.0.tree().child(pair).map_or(0.0, |s| soft_values[s]);
                        let reference = if $max_ent {
                            self.0.reference_term(pair)
                        } else {
                            0.0
                        };
                        self.0.values[pair] - reference - next
                    })
                    .collect()
            }
        }

        impl ActionValue for $form {
            fn action_values(
                &self,
                states: &[&[u32]],
                candidates: &[&[u32]],
            ) -> Result<Vec<f64>, MdpError> {
                self.0.candidate_values(states, candidates)
            }
        }
    };
}

action_value_form!(
    KlForm,
    false,
    "`Q = r + V(s')`",
    "`V = β log Σ_a π_ref exp(Q/β)`",
    "`β log(π/π_ref)`",
    "`r = Q - V(s')`"
);
action_value_form!(
    MaxEntForm,
    true,
    "`Q = r + β log π_ref + V(s')`",
    "`V = β log Σ_a exp(Q/β)`",
    "`β log π`",
    "`r = Q - β log π_ref - V(s')`"
);

impl KlForm {
    /// The same values in the other form: adds `β log π_ref`.
    #[must_use]
    pub fn to_max_ent_form(&self) -> MaxEntForm {
        let values = (0..self.0.values.len())
            .map(|pair| self.0.values[pair] + self.0.reference_term(pair))
            .collect();
        MaxEntForm(ActionValues::new(&self.0.mdp, self.0.beta, values))
    }
}

impl MaxEntForm {
    /// The same values in the other form: subtracts `β log π_ref`.
    #[must_use]
    pub fn to_kl_form(&self) -> KlForm {
        let values = (0..self.0.values.len())
            .map(|pair| self.0.values[pair] - self.0.reference_term(pair))
            .collect();
        KlForm(ActionValues::new(&self.0.mdp, self.0.beta, values))
    }
}

/// Pairs whose scaled action values are held at once: 8 KiB, a quarter of the smallest first-level
/// cache in use.
const BLOCK_PAIRS: usize = 1024;
/// Pairs per unit of parallel work: about a hundred microseconds.
const TASK_PAIRS: usize = 1 << 15;

/// One level of the tree, ready for a backup.
struct Level<'a> {
    /// `[pairs of the level]`, in nats.
    reference_logps: &'a [f64],
    /// `[pairs of the level]`, in reward units.
    rewards: &'a [f64],
    /// Soft values of the next level, `[states of the level * (vocab - 1)]`.
    next: Option<&'a [f64]>,
    vocab: usize,
    eos: usize,
    beta: f64,
}

impl Level<'_> {
    /// Writes the soft value of every state of the level.
    fn solve(&self, values: &mut [f64]) {
        let states_per_task = (TASK_PAIRS / self.vocab).max(1);
        if values.len() <= states_per_task {
            self.solve_states(0, values);
            return;
        }
        values
            .par_chunks_mut(states_per_task)
            .enumerate()
            .for_each(|(i, chunk)| self.solve_states(i * states_per_task, chunk));
    }

    /// Small rows are compiled for their length: a loop of four turns is mostly loop otherwise.
    fn solve_states(&self, first: usize, values: &mut [f64]) {
        match self.vocab {
            2 => self.solve_rows::<2>(first, values),
            3 => self.solve_rows::<3>(first, values),
            4 => self.solve_rows::<4>(first, values),
            8 => self.solve_rows::<8>(first, values),
            16 => self.solve_rows::<16>(first, values),
            32 => self.solve_rows::<32>(first, values),
            _ => self.solve_rows::<0>(first, values),
        }
    }

    /// `WIDTH` is the vocabulary, or 0 for one that is known at run time only. Both do the same
    /// additions in the same order.
    #[inline(always)]
    fn solve_rows<const WIDTH: usize>(&self, first: usize, values: &mut [f64]) {
        let vocab = if WIDTH == 0 { self.vocab } else { WIDTH };
        let rows = (BLOCK_PAIRS / vocab).max(1);
        let mut scratch = vec![0.0; rows * vocab];
        let per_beta = 1.0 / self.beta;
        let mut state = first;
        for values in values.chunks_mut(rows) {
            let pairs = state * vocab..(state + values.len()) * vocab;
            let q = &mut scratch[..values.len() * vocab];
            // Q in the MaxEnt form: r + β log π_ref + V(s').
            for ((q, logp), reward) in q
                .iter_mut()
                .zip(&self.reference_logps[pairs.clone()])
                .zip(&self.rewards[pairs])
            {
                *q = self.beta * logp + reward;
            }
            if let Some(next) = self.next {
                let next = &next[state * (vocab - 1)..(state + values.len()) * (vocab - 1)];
                for (q, next) in q.chunks_exact_mut(vocab).zip(next.chunks_exact(vocab - 1)) {
                    // EOS has no child, so the children after it sit one place to the left.
                    let (before, after) = next.split_at(self.eos);
                    for (q, v) in q[..self.eos].iter_mut().zip(before) {
                        *q += v;
                    }
                    for (q, v) in q[self.eos + 1..].iter_mut().zip(after) {
                        *q += v;
                    }
                }
            }
            for (q, value) in q.chunks_exact_mut(vocab).zip(&mut *values) {
                let max = row_max(q);
                for q in q {
                    *q -= max;
                }
                *value = max;
            }
            for q in &mut *q {
                *q = exp_nonpositive(*q * per_beta);
            }
            for (q, value) in q.chunks_exact(vocab).zip(&mut *values) {
                *value += self.beta * row_sum(q).ln();
            }
            state += values.len();
        }
    }

    /// `Σ_a p(a|s) (r(s,a) + V(s'))`, the value where the environment moves.
    fn expectation(&self, state: usize) -> f64 {
        (0..self.vocab)
            .map(|action| {
                let pair = state * self.vocab + action;
                let next = match self.next {
                    Some(next) if action != self.eos => {
                        let rank = action - usize::from(action > self.eos);
                        next[state * (self.vocab - 1) + rank]
                    }
                    _ => 0.0,
                };
                self.reference_logps[pair].exp() * (self.rewards[pair] + next)
            })
            .sum()
    }
}

/// Lanes of the two reductions below: independent chains, which the compiler may put side by side.
const LANES: usize = 4;

#[inline(always)]
fn row_max(row: &[f64]) -> f64 {
    let larger = |a: f64, b: f64| if b > a { b } else { a };
    let chunks = row.chunks_exact(LANES);
    let tail = chunks
        .remainder()
        .iter()
        .fold(f64::NEG_INFINITY, |a, &b| larger(a, b));
    let lanes = chunks.fold([f64::NEG_INFINITY; LANES], |lanes, chunk| {
        std::array::from_fn(|i| larger(lanes[i], chunk[i]))
    });
    lanes.into_iter().fold(tail, larger)
}

#[inline(always)]
fn row_sum(row: &[f64]) -> f64 {
    let chunks = row.chunks_exact(LANES);
    let tail: f64 = chunks.remainder().iter().sum();
    let lanes = chunks.fold([0.0; LANES], |lanes: [f64; LANES], chunk| {
        std::array::from_fn(|i| lanes[i] + chunk[i])
    });
    (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]) + tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RewardPlacement;

    fn beta(value: f64) -> Beta {
        Beta::new(value).unwrap()
    }

    /// Agreement of two f64 computations of one sum of at most 7 terms over at most 5 levels.
    const ROUNDING: f64 = 1e-12;

    #[test]
    fn every_width_and_eos_gives_the_values_of_the_plain_recursion() {
        for vocab in [2, 3, 4, 5, 7, 8, 16, 32, 33] {
            for eos in [0, 1, vocab as u32 - 1] {
                let horizon = if vocab > 8 { 3 } else { 5 };
                let tree = Tree::new(vocab, horizon, eos).unwrap();
                let mdp = TabularMdp::seeded(tree, RewardPlacement::Dense, 11).unwrap();
                let solution = solve(&mdp, beta(0.5)).unwrap();
                for state in 0..mdp.tree().n_states() {
                    let terms: Vec<f64> = mdp
                        .tree()
                        .row(state)
                        .map(|pair| {
                            let q = mdp.rewards()[pair] + solution.next_soft_value(pair);
                            mdp.reference().logps()[pair] + q / 0.5
                        })
                        .collect();
                    let expected = 0.5 * log_sum_exp(&terms);
                    assert!((solution.soft_values()[state] - expected).abs() < ROUNDING);
                }
            }
        }
    }

    #[test]
    fn the_optimal_policy_is_a_distribution_at_every_beta() {
        for strength in [1e-17, 1e-9, 1e-3, 1.0, 1e9] {
            // Values of some hundred, whose last bit is 1e-14, and then the rewards' difference.
            let tree = Tree::new(3, 2, 1).unwrap();
            let rewards = (0..tree.n_pairs()).map(|at| 100.0 + (at % 3) as f64 * 0.1);
            let reference = TabularPolicy::uniform(tree.clone());
            let mdp = TabularMdp::new(reference, rewards.collect()).unwrap();
            let policy = solve(&mdp, beta(strength)).unwrap().optimal_policy();
            for row in policy.logps().chunks_exact(3) {
                assert!(log_sum_exp(row).abs() < ROUNDING, "{strength}: {row:?}");
            }
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let tree = Tree::new(16, 5, 3).unwrap();
        let mdp = TabularMdp::seeded(tree, RewardPlacement::Dense, 5).unwrap();
        let with_threads = |n| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(n)
                .build()
                .unwrap();
            pool.install(|| solve(&mdp, beta(0.1)).unwrap())
        };
        let (one, three) = (with_threads(1), with_threads(3));
        assert_eq!(one.soft_values(), three.soft_values());
    }

    #[test]
    fn rewards_that_would_overflow_an_exponential_are_solved() {
        let tree = Tree::new(2, 3, 1).unwrap();
        let mdp = TabularMdp::new(TabularPolicy::uniform(tree.clone()), vec![1e6; 6]).unwrap();
        let value = solve(&mdp, beta(0.1)).unwrap().soft_values()[0];
        assert!((value - 3e6).abs() < 1.0, "{value}");
        // The optimum goes on for all three rewards, each halved in probability by the reference.
        let mdp = TabularMdp::new(TabularPolicy::uniform(tree), vec![-1e300; 6]).unwrap();
        assert!(solve(&mdp, beta(1e-3)).is_ok());
    }

    #[test]
    fn returns_past_the_largest_float_are_refused_with_the_state() {
        let tree = Tree::new(2, 3, 1).unwrap();
        let mdp = TabularMdp::new(TabularPolicy::uniform(tree), vec![1.5e308; 6]).unwrap();
        let message = solve(&mdp, beta(1.0)).unwrap_err().to_string();
        assert!(message.contains("overflow"), "{message}");
    }

    #[test]
    fn a_chain_of_ten_thousand_levels_is_solved_without_recursion() {
        let tree = Tree::new(2, 10_000, 1).unwrap();
        let mdp = TabularMdp::seeded(tree, RewardPlacement::Dense, 1).unwrap();
        assert!(solve(&mdp, beta(1.0)).unwrap().soft_values()[0].is_finite());
    }

    #[test]
    fn a_broken_table_of_action_values_is_refused() {
        let tree = Tree::new(2, 2, 1).unwrap();
        let mdp = TabularMdp::seeded(tree, RewardPlacement::Dense, 1).unwrap();
        assert!(KlForm::new(&mdp, beta(1.0), vec![0.0; 3]).is_err());
        let error = MaxEntForm::new(&mdp, beta(1.0), vec![f64::NAN; 4]).unwrap_err();
        assert!(error.to_string().contains("token 0"), "{error}");
    }

    #[test]
    fn action_values_answer_candidates_flat_and_in_order() {
        let tree = Tree::new(3, 2, 2).unwrap().with_prompt([5]);
        let mdp = TabularMdp::seeded(tree, RewardPlacement::Dense, 1).unwrap();
        let form = solve(&mdp, beta(1.0)).unwrap().kl_form();
        let values = ActionValue::action_values(&form, &[&[5, 1], &[5]], &[&[2, 0], &[1]]).unwrap();
        let table = form.action_values();
        assert_eq!(values, [table[8], table[6], table[1]]);
        assert!(ActionValue::action_values(&form, &[&[5, 2]], &[&[0]]).is_err());
        assert!(ActionValue::action_values(&form, &[&[5]], &[&[3]]).is_err());
        assert!(ActionValue::action_values(&form, &[&[5]], &[]).is_err());
    }
}
