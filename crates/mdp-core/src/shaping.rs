//! Potential-based shaping: the whole freedom that preferences leave in a reward.

use rand::Rng;

use crate::tabular::{check_finite, normal};
use crate::{MdpError, TabularMdp, Tree};

/// A potential Φ over states, with one constant on every terminal state.
///
/// The paper's Definition 1 leaves out that last condition, and without it shaping changes which
/// completion is preferred: `Σ r' = Σ r + Φ(s_T) - Φ(s_0)`, and the two ends may differ in it. So it is
/// checked here. The constant is 0 unless [`with_terminals`](Self::with_terminals) says otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct Potential {
    tree: Tree,
    /// `[states]`, in reward units.
    values: Vec<f64>,
    terminal: f64,
}

impl Potential {
    /// The potential with these values, `[states]`, in reward units, and 0 on terminal states.
    ///
    /// # Errors
    ///
    /// [`MdpError::TableLength`], or [`MdpError::NotFinite`] with the last token of the state.
    pub fn new(tree: Tree, values: Vec<f64>) -> Result<Self, MdpError> {
        if values.len() != tree.n_states() {
            return Err(MdpError::TableLength {
                table: "potential",
                expected: tree.n_states(),
                got: values.len(),
            });
        }
        if let Some(state) = values.iter().position(|x| !x.is_finite()) {
            let tokens = tree.tokens(state);
            return Err(MdpError::NotFinite {
                table: "potential",
                action: tokens.last().copied().unwrap_or(tree.eos()),
                state: tokens,
                value: values[state],
            });
        }
        Ok(Self {
            tree,
            values,
            terminal: 0.0,
        })
    }

    /// As [`new`](Self::new), with the potential of every completion's end, in the order of
    /// [`Tree::completions`].
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and [`MdpError::TerminalPotential`] if the ends are not all equal.
    pub fn with_terminals(
        tree: Tree,
        values: Vec<f64>,
        terminals: &[f64],
    ) -> Result<Self, MdpError> {
        let mut potential = Self::new(tree, values)?;
        let tree = &potential.tree;
        if terminals.len() != tree.n_completions() {
            return Err(MdpError::TableLength {
                table: "terminal potential",
                expected: tree.n_completions(),
                got: terminals.len(),
            });
        }
        let first = terminals[0];
        // Written so that NaN is refused too.
        #[expect(clippy::float_cmp, reason = "one constant, copied, not computed")]
        let bad = terminals
            .iter()
            .position(|&v| !(v == first && v.is_finite()));
        if let Some(i) = bad {
            let pair = tree.completions().nth(i).unwrap_or_default();
            return Err(MdpError::TerminalPotential {
                completion: tree.pair_tokens(pair),
                value: terminals[i],
                first,
            });
        }
        potential.terminal = first;
        Ok(potential)
    }

    /// Independent normal values of standard deviation 1, and 0 on terminal states.
    #[must_use]
    pub fn random(tree: Tree, rng: &mut impl Rng) -> Self {
        let values = (0..tree.n_states()).map(|_| normal(rng)).collect();
        Self {
            tree,
            values,
            terminal: 0.0,
        }
    }

    /// Φ by state number, `[states]`, in reward units.
    #[must_use]
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// Φ of every terminal state, in reward units.
    #[must_use]
    pub fn terminal(&self) -> f64 {
        self.terminal
    }
}

/// The process with rewards `r'(s,a) = r(s,a) + Φ(s') - Φ(s)`, Definition 1.
///
/// Its optimal policy and its preferences are those of `mdp`; its soft values are `V - Φ`, plus the
/// terminal constant. A terminal-only reward and any redistribution of it over tokens differ by such
/// a potential, so preferences over complete completions cannot tell them apart.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`], or [`MdpError::NotFinite`] if a sum overflows.
///
/// # Examples
///
/// ```
/// use mdp_core::{Potential, RewardPlacement, TabularMdp, Tree, shape};
///
/// let mdp = TabularMdp::seeded(Tree::new(3, 2, 2)?, RewardPlacement::TerminalOnly, 0)?;
/// let potential = Potential::new(mdp.tree().clone(), vec![0.0, 1.0, -1.0])?;
/// let shaped = shape(&mdp, &potential)?;
/// // Credit moves between the two tokens of a completion; its return stays.
/// assert_eq!(shaped.rewards()[0], mdp.rewards()[0] + 1.0);
/// assert!((shaped.returns()[3] - mdp.returns()[3]).abs() < 1e-12);
/// # Ok::<(), mdp_core::MdpError>(())
/// ```
pub fn shape(mdp: &TabularMdp, potential: &Potential) -> Result<TabularMdp, MdpError> {
    let tree = mdp.tree();
    tree.check_same("potential", &potential.tree)?;
    let rewards: Vec<f64> = (0..tree.n_pairs())
        .map(|pair| {
            let next = tree
                .child(pair)
                .map_or(potential.terminal, |s| potential.values[s]);
            mdp.rewards()[pair] + next - potential.values[pair / tree.vocab()]
        })
        .collect();
    check_finite("shaped reward", tree, &rewards)?;
    mdp.with_rewards(rewards)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RewardPlacement;

    #[test]
    fn a_potential_that_differs_between_ends_is_refused_with_the_completion() {
        let tree = Tree::new(3, 2, 2).unwrap();
        let mut ends = vec![0.5; tree.n_completions()];
        assert!(Potential::with_terminals(tree.clone(), vec![0.0; 3], &ends).is_ok());
        ends[1] = 0.25;
        let message = Potential::with_terminals(tree, vec![0.0; 3], &ends)
            .unwrap_err()
            .to_string();
        assert!(message.contains("completion [0, 0]"), "{message}");
        assert!(message.contains("0.25"), "{message}");
    }

    #[test]
    fn broken_potentials_are_refused() {
        let tree = Tree::new(3, 2, 2).unwrap();
        assert!(Potential::new(tree.clone(), vec![0.0; 2]).is_err());
        assert!(Potential::new(tree.clone(), vec![0.0, f64::NAN, 0.0]).is_err());
        assert!(Potential::with_terminals(tree.clone(), vec![0.0; 3], &[f64::NAN; 7]).is_err());
        assert!(Potential::with_terminals(tree.clone(), vec![0.0; 3], &[0.0; 6]).is_err());
        let other = Tree::new(3, 3, 2).unwrap();
        let mdp = TabularMdp::seeded(other, RewardPlacement::Dense, 0).unwrap();
        let potential = Potential::new(tree, vec![0.0; 3]).unwrap();
        assert!(shape(&mdp, &potential).is_err());
    }
}
