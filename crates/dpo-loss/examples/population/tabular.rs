//! Any loss on all pairs of a small process, minimised over tabular policies.

#![allow(
    dead_code,
    reason = "the program and the tests each use a part of this"
)]

use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation::log_softmax};
use dpo_loss::{
    Beta, LossError, Objectives, PairBatch, PairInputs, PairTable, PairTokens, TokenLogps,
    UnpairedBatch, UnpairedObjective, kl_estimate,
};
use mdp_core::{
    MdpError, TabularMdp, TabularPolicy, Tree, WeightedPair, completion_logps, sigmoid,
};

/// Pairs of a process and how to score them, as tables.
pub(crate) struct Population<'a> {
    mdp: &'a TabularMdp,
    beta: Beta,
    pairs: Vec<WeightedPair>,
    device: Device,
}

/// How far a policy is from the solution.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Distance {
    /// Total variation between the two distributions of completions, from 0 to 1.
    pub(crate) total_variation: f64,
    /// Largest error of a difference of implicit returns, reward units.
    pub(crate) margin: f64,
}

const STEP_SIZE: f64 = 0.1;

impl<'a> Population<'a> {
    /// These comparisons of completions, each named by its last pair in the tree.
    pub(crate) fn new(mdp: &'a TabularMdp, beta: Beta, pairs: Vec<WeightedPair>) -> Self {
        Self {
            mdp,
            beta,
            pairs,
            device: Device::default().autodiff(),
        }
    }

    /// Comparisons of single actions, labelled by the Bradley-Terry model of their values.
    ///
    /// `values` is `[pairs]`, reward units; the completions compared are the shortest through each
    /// action.
    pub(crate) fn of_actions(mdp: &'a TabularMdp, beta: Beta, values: &[f64]) -> Self {
        let tree = mdp.tree();
        let end = |mut pair: usize| {
            while let Some(state) = tree.child(pair) {
                pair = tree.row(state).start + tree.eos() as usize;
            }
            pair
        };
        let mut pairs = Vec::new();
        for state in 0..tree.n_states() {
            for a in tree.row(state) {
                for b in tree.row(state).filter(|&b| b != a) {
                    pairs.push(WeightedPair {
                        chosen: end(a),
                        rejected: end(b),
                        weight: sigmoid(values[a] - values[b]),
                    });
                }
            }
        }
        Self::new(mdp, beta, pairs)
    }

    /// About `n` pairs that stand for all of them with equal weights, for losses that mix a batch.
    pub(crate) fn replicated(&self, n: usize) -> Self {
        let total: f64 = self.pairs.iter().map(|pair| pair.weight).sum();
        let copies = |pair: &WeightedPair| (pair.weight / total * n as f64).round() as usize;
        let pairs = self.pairs.iter().flat_map(|pair| {
            std::iter::repeat_n(
                WeightedPair {
                    weight: 1.0,
                    ..*pair
                },
                copies(pair),
            )
        });
        Self::new(self.mdp, self.beta, pairs.collect())
    }

    /// The policy at which a loss of pairs rests, from the reference on.
    pub(crate) fn settle(
        &self,
        objectives: &Objectives,
        steps: usize,
    ) -> Result<TabularPolicy, Failure> {
        let tree = self.mdp.tree();
        let horizon = tree.horizon();
        let paths: Vec<Vec<usize>> = self.sides().map(|pair| tree.path(pair)).collect();
        let pad = |rows: &dyn Fn(usize, usize) -> f64| {
            let cells = paths.iter().enumerate().flat_map(|(row, path)| {
                (0..horizon).map(move |t| if t < path.len() { rows(row, t) } else { 0.0 })
            });
            let data = TensorData::new(cells.collect::<Vec<f64>>(), [paths.len(), horizon]);
            Tensor::<2>::from_data(data, (&self.device, DType::F64))
        };
        let mask = pad(&|_, _| 1.0);
        let weights = pad(&|_, t| 1.0 / (1 + t) as f64);
        let n = self.pairs.len();
        // The first token in which the two differ; one of them may end before.
        let parting = |row: usize| {
            let (a, b) = (&paths[row % n], &paths[row % n + n]);
            a.iter().zip(b).take_while(|(a, b)| a == b).count()
        };
        let steps_mask = pad(&|row, t| f64::from(u8::from(t == parting(row))));
        let cells: Vec<i64> = paths
            .iter()
            .flat_map(|path| (0..horizon).map(|t| path.get(t).map_or(0, |&pair| pair as i64)))
            .collect();
        let states: Vec<i64> = cells
            .iter()
            .map(|pair| pair / tree.vocab() as i64)
            .collect();
        let (cells, states) = (self.indices(&cells), self.indices(&states));
        let look_up = |table: Tensor<1>, cells: &Tensor<1, Int>| {
            table
                .select(0, cells.clone())
                .reshape([paths.len(), horizon])
                * mask.clone()
        };
        let tokens = |values| {
            PairTokens::from_halves(TokenLogps {
                values,
                mask: mask.clone(),
            })
        };
        let reference_logps = self.column(self.mdp.reference().logps());
        let reference = tokens(look_up(reference_logps.clone(), &cells));
        let shares: Vec<f64> = self.pairs.iter().map(|pair| pair.weight).collect();
        let shares = self.column(&shares);
        let [n_states, vocab] = [tree.n_states(), tree.vocab()];
        self.minimise(steps, |logps| {
            let rows = logps.clone().reshape([n_states, vocab]);
            let theirs = reference_logps.clone().reshape([n_states, vocab]);
            let kls = (theirs.clone().exp() * (theirs - rows.clone()))
                .sum_dim(1)
                .reshape([n_states]);
            let squares = rows
                .detach()
                .mul_scalar(2.0)
                .exp()
                .sum_dim(1)
                .log()
                .reshape([n_states]);
            let batch = PairBatch {
                policy: tokens(look_up(logps, &cells)),
                reference: reference.clone().into(),
                inputs: PairInputs {
                    log_sum_sq_probs: Some(PairTable::from_halves(look_up(squares, &states))),
                    position_kls: Some(PairTable::from_halves(look_up(kls, &states))),
                    token_weights: Some(PairTable::from_halves(weights.clone())),
                    step_mask: Some(PairTable::from_halves(steps_mask.clone())),
                },
            };
            let losses = objectives.pair_losses(&batch, self.beta)?;
            Ok((losses * shares.clone()).sum() / shares.clone().sum())
        })
    }

    /// The policy at which a loss of single completions rests, with the exact KL.
    pub(crate) fn settle_unpaired(
        &self,
        objective: UnpairedObjective,
        steps: usize,
    ) -> Result<TabularPolicy, Failure> {
        let tree = self.mdp.tree();
        let completions: Vec<usize> = tree.completions().collect();
        let mut shares = vec![0.0; 2 * completions.len()];
        for pair in &self.pairs {
            for (side, offset) in [(pair.chosen, 0), (pair.rejected, completions.len())] {
                let place = completions
                    .iter()
                    .position(|&c| c == side)
                    .unwrap_or_default();
                shares[offset + place] += pair.weight;
            }
        }
        let shares = self.column(&shares);
        // Row of a completion, column of a pair: one where the completion passes it.
        let mut passes = vec![0.0; completions.len() * tree.n_pairs()];
        for (row, &completion) in completions.iter().enumerate() {
            for pair in tree.path(completion) {
                passes[row * tree.n_pairs() + pair] = 1.0;
            }
        }
        let data = TensorData::new(passes, [completions.len(), tree.n_pairs()]);
        let passes = Tensor::<2>::from_data(data, (&self.device, DType::F64));
        let sums = |logps: Tensor<1>| {
            let column = logps.reshape([tree.n_pairs(), 1]);
            passes.clone().matmul(column).reshape([completions.len()])
        };
        let reference = sums(self.column(self.mdp.reference().logps()));
        self.minimise(steps, |logps| {
            let policy = sums(logps);
            let ratios = policy.clone() - reference.clone();
            let kl = (policy.clone().exp() * ratios).sum().detach();
            let twice = |sums: &Tensor<1>| Tensor::cat(vec![sums.clone(), sums.clone()], 0);
            let labels = vec![reference.ones_like(), reference.zeros_like()];
            let batch = UnpairedBatch {
                policy: twice(&policy),
                reference: twice(&reference),
                desirable: Tensor::cat(labels, 0),
            };
            let kl = kl_estimate(kl.clone(), kl.zeros_like());
            let losses = objective.losses(&batch, kl, self.beta)?;
            Ok((losses * shares.clone()).sum() / shares.clone().sum())
        })
    }

    /// The distance of a policy from another, as these pairs see it.
    pub(crate) fn distance(
        &self,
        policy: &TabularPolicy,
        to: &TabularPolicy,
    ) -> Result<Distance, Failure> {
        let ours = completion_logps(self.mdp, policy)?;
        let theirs = completion_logps(self.mdp, to)?;
        let gaps: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a - b).collect();
        let most = gaps.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let least = gaps.iter().copied().fold(f64::INFINITY, f64::min);
        let total: f64 = ours
            .iter()
            .zip(&theirs)
            .map(|(a, b)| (a.exp() - b.exp()).abs())
            .sum();
        Ok(Distance {
            total_variation: 0.5 * total,
            margin: self.beta.get() * (most - least),
        })
    }

    /// Chosen completions of all pairs, then rejected ones.
    fn sides(&self) -> impl Iterator<Item = usize> + '_ {
        let chosen = self.pairs.iter().map(|pair| pair.chosen);
        chosen.chain(self.pairs.iter().map(|pair| pair.rejected))
    }

    fn column(&self, numbers: &[f64]) -> Tensor<1> {
        let data = TensorData::new(numbers.to_vec(), [numbers.len()]);
        Tensor::from_data(data, (&self.device, DType::F64))
    }

    fn indices(&self, numbers: &[i64]) -> Tensor<1, Int> {
        let data = TensorData::new(numbers.to_vec(), [numbers.len()]);
        Tensor::from_data(data, &self.device)
    }

    /// Full-batch Adam on tabular logits, its steps falling to 0 along half a cosine. `loss` reads
    /// `log π`, `[pairs of the tree]`.
    fn minimise(
        &self,
        steps: usize,
        loss: impl Fn(Tensor<1>) -> Result<Tensor<1>, LossError>,
    ) -> Result<TabularPolicy, Failure> {
        let tree: &Tree = self.mdp.tree();
        let mut logits = self.mdp.reference().logps().to_vec();
        let mut mean = vec![0.0; logits.len()];
        let mut square = vec![0.0; logits.len()];
        for step in 0..steps {
            let leaf = self.column(&logits).require_grad();
            let rows = leaf.clone().reshape([tree.n_states(), tree.vocab()]);
            let logps = log_softmax(rows, 1).reshape([tree.n_pairs()]);
            let gradients = loss(logps)?.backward();
            let gradient: Vec<f64> = leaf
                .grad(&gradients)
                .ok_or("a loss without a gradient")?
                .try_into_vec_as()
                .map_err(|error| format!("reading a gradient: {error:?}"))?;
            let done = step as f64 / steps as f64;
            let size = STEP_SIZE * 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
            let left = |decay: f64| 1.0 - decay.powi(step as i32 + 1);
            for i in 0..logits.len() {
                mean[i] = 0.9 * mean[i] + 0.1 * gradient[i];
                square[i] = 0.99 * square[i] + 0.01 * gradient[i].powi(2);
                let scale = (square[i] / left(0.99)).sqrt() + 1e-12;
                logits[i] -= size * mean[i] / left(0.9) / scale;
            }
        }
        Ok(TabularPolicy::from_logits(tree.clone(), logits)?)
    }
}

/// Anything that can go wrong.
pub(crate) type Failure = Box<dyn std::error::Error>;

/// A process whose preferences are nowhere surer than seven in eight, so that robust losses of one
/// turned label in ten have a minimum.
pub(crate) fn mild_process(tree: Tree, seed: u64) -> Result<TabularMdp, MdpError> {
    const LARGEST_DIFFERENCE: f64 = 1.9;
    let mdp = TabularMdp::seeded(tree, mdp_core::RewardPlacement::Dense, seed)?;
    let returns = mdp.returns();
    let most = returns.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let least = returns.iter().copied().fold(f64::INFINITY, f64::min);
    let scale = LARGEST_DIFFERENCE / (most - least);
    mdp.with_rewards(mdp.rewards().iter().map(|reward| reward * scale).collect())
}
