//! Operations that cards have of their own.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops as Step, OpsKind, unary};
use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::backend::{AutodiffBackend, Backend, backend_extension};

use crate::attention::Heads;
use crate::cube::{self, Card};

/// Operations on a card, in a graph or without. The functions of this crate check shapes; these trust
/// them.
#[backend_extension(Autodiff, Cube)]
pub trait CardOps: Backend {
    /// [`attention`](crate::attention), with the cosines and sines of its turns, `[1 or batch, seq, 1,
    /// turned / 2]`, and where a query may not look, `[1 or batch, 1, seq, seq]`.
    fn card_attention(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        hidden: BoolTensor<Self>,
        layout: Layout,
    ) -> FloatTensor<Self>;

    /// [`head_logps`](crate::head_logps): logps, and statistics by row.
    fn card_head(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        tied: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// How `qkv` lies, `[batch * seq, heads.joined()]`, and how much of each head is turned.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Heads of a token.
    pub heads: Heads,
    /// Rows.
    pub batch: usize,
    /// Places in a row.
    pub seq: usize,
    /// Dimensions of a head that are turned, from its first; 0 for none.
    pub turned: usize,
}

impl CardOps for Card {
    fn card_attention(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        hidden: BoolTensor<Self>,
        layout: Layout,
    ) -> FloatTensor<Self> {
        cube::attention(qkv, &[cos, sin], hidden, layout).0
    }

    fn card_head(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        tied: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (logps, stats, _) = cube::head(hidden, weight, tied, targets);
        (logps, stats)
    }
}

#[derive(Debug)]
struct Attention;

/// What attention was computed from.
#[derive(Clone, Debug)]
struct AttentionState {
    kept: cube::Kept,
    tables: [FloatTensor<Card>; 2],
    layout: Layout,
}

impl Backward<Card, 1> for Attention {
    type State = AttentionState;

    fn backward(self, step: Step<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let state = step.state;
        unary::<Card, _>(step.parents, step.node, grads, |grad| {
            cube::attention_backward(state.kept, &state.tables, grad, state.layout)
        });
    }
}

#[derive(Debug)]
struct Head;

/// What logps were computed from.
#[derive(Clone, Debug)]
struct HeadState {
    hidden: FloatTensor<Card>,
    weight: FloatTensor<Card>,
    targets: IntTensor<Card>,
    tied: bool,
    kept: cube::Logits,
}

impl Backward<Card, 2> for Head {
    type State = HeadState;

    fn backward(self, step: Step<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<Card>(&step.node);
        let HeadState {
            hidden,
            weight,
            targets,
            tied,
            kept,
        } = step.state;
        let [for_hidden, for_weight] = step.parents;
        let wanted = (for_hidden.is_some(), for_weight.is_some());
        let (hidden, weight) =
            cube::head_backward(hidden, weight, tied, targets, kept, grad, wanted);
        for (parent, grad) in [(for_hidden, hidden), (for_weight, weight)] {
            if let (Some(parent), Some(grad)) = (parent, grad) {
                grads.register::<Card>(parent.id, grad);
            }
        }
    }
}

impl<C: CheckpointStrategy> CardOps for Autodiff<Card, C> {
    fn card_attention(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        hidden: BoolTensor<Self>,
        layout: Layout,
    ) -> FloatTensor<Self> {
        let step = Attention.prepare::<C>([qkv.node()]).compute_bound();
        let tables = [cos, sin].map(|table: FloatTensor<Self>| table.into_primitive());
        let (out, kept) = cube::attention(qkv.into_primitive(), &tables, hidden, layout);
        match step.stateful() {
            OpsKind::Tracked(step) => {
                let state = AttentionState {
                    kept,
                    tables,
                    layout,
                };
                step.finish(state, out)
            }
            OpsKind::UnTracked(step) => step.finish(out),
        }
    }

    fn card_head(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        tied: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let step = Head
            .prepare::<C>([hidden.node(), weight.node()])
            .compute_bound();
        let (hidden, weight) = (hidden.into_primitive(), weight.into_primitive());
        let (logps, stats, kept) =
            cube::head(hidden.clone(), weight.clone(), tied, targets.clone());
        let stats = Self::from_inner(stats);
        match step.stateful() {
            OpsKind::Tracked(step) => {
                let state = HeadState {
                    hidden,
                    weight,
                    targets,
                    tied,
                    kept,
                };
                (step.finish(state, logps), stats)
            }
            OpsKind::UnTracked(step) => (step.finish(logps), stats),
        }
    }
}
