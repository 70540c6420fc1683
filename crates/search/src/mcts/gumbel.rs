//! The root of Gumbel `AlphaZero`.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::tree::Mcts;
use crate::{NodeId, PrefixModel, SearchError};

/// The scale of Gumbel `AlphaZero`'s `σ(Q) = (50 + most visits) * 0.1 * Q`, Q in [0, 1]: the values of
/// its authors' code (Mctx).
const GUMBEL_VISITS: f64 = 50.0;
const GUMBEL_SCALE: f64 = 0.1;

impl<M: PrefixModel + ?Sized> Mcts<'_, '_, M> {
    /// Sequential halving among tokens drawn without replacement.
    pub(super) fn gumbel(
        &mut self,
        root: NodeId,
        considered: usize,
        seed: u64,
    ) -> Result<Option<NodeId>, SearchError> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(self.space.tree.depth(root) as u64);
        let mut drawn: Vec<(f64, NodeId)> = Vec::new();
        for child in self.node(root).children() {
            let uniform: f64 = rng.random();
            // A draw of exactly 0 would be minus infinity twice over.
            let gumbel = -(-uniform.max(f64::MIN_POSITIVE).ln()).ln();
            drawn.push((gumbel + self.nodes[child].logp, NodeId(child as u32)));
        }
        // Largest first: the k largest of logits plus Gumbel noise are k draws without replacement.
        drawn.sort_by(|a, b| b.0.total_cmp(&a.0));
        drawn.truncate(considered);
        let phases = drawn.len().next_power_of_two().trailing_zeros().max(1) as usize;
        let mut left = self.config.simulations;
        for phase in 0..phases {
            let share = (left / ((phases - phase) * drawn.len())).max(1);
            for &(_, child) in &drawn {
                let n = share.min(left);
                if n > 0 && !self.simulate(root, n, Some(child))? {
                    return Ok(None);
                }
                left -= n;
            }
            let ranked = |(draw, child): (f64, NodeId)| match self.node(child).dead {
                true => f64::NEG_INFINITY,
                false => draw + self.sigma(root, child),
            };
            drawn.sort_by(|&a, &b| ranked(b).total_cmp(&ranked(a)));
            drawn.truncate(drawn.len().div_ceil(2));
        }
        let winner = drawn.first().map(|&(_, child)| child);
        Ok(winner
            .filter(|&child| !self.node(child).dead)
            .or_else(|| self.decide(root)))
    }

    /// Gumbel `AlphaZero`'s monotone transform of a token's Q.
    fn sigma(&self, root: NodeId, child: NodeId) -> f64 {
        let visits = self.node(root).children().map(|at| self.nodes[at].visits);
        let most = f64::from(visits.max().unwrap_or(0));
        let q = if self.node(child).evaluated {
            self.node(child).q()
        } else {
            self.node(root).value
        };
        (GUMBEL_VISITS + most) * GUMBEL_SCALE * self.scaled(q)
    }
}
