//! Operations that only the processor has of its own. Elsewhere they are composed of tensor
//! operations, whose gradients Burn knows.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops as Step, OpsKind, unary};
use burn::backend::autodiff::{Autodiff, NodeId};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{AutodiffBackend, Backend, Flex, backend_extension};

use crate::attention::{Heads, Spans, Turns};
use crate::flex;

/// Operations on tensors of f32 on the processor, in a graph or without. The functions of this crate
/// check shapes and types; these trust them.
#[backend_extension(Autodiff, Flex)]
pub trait HostOps: Backend {
    /// [`attention`](crate::attention).
    fn attention(
        qkv: FloatTensor<Self>,
        heads: Heads,
        spans: Spans,
        turns: Option<Turns>,
    ) -> FloatTensor<Self>;

    /// [`head_logps`](crate::head_logps): logps, and statistics by row.
    fn head(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        tied: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// [`joined_linear`](crate::joined_linear) of two weights.
    fn project_two(
        x: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// [`joined_linear`](crate::joined_linear) of three weights.
    fn project_three(
        x: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        third: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

impl HostOps for Flex {
    fn attention(
        qkv: FloatTensor<Self>,
        heads: Heads,
        spans: Spans,
        turns: Option<Turns>,
    ) -> FloatTensor<Self> {
        flex::attention(&qkv, heads, &spans, turns.as_ref())
    }

    fn head(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        tied: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (logps, stats, _) = flex::head(&hidden, &weight, tied, &targets, false);
        (logps, stats)
    }

    fn project_two(
        x: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        flex::joined(&x, &[first, second])
    }

    fn project_three(
        x: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        third: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        flex::joined(&x, &[first, second, third])
    }
}

#[derive(Debug)]
struct Attention;

/// What attention is computed from.
#[derive(Clone, Debug)]
struct AttentionState {
    qkv: FloatTensor<Flex>,
    heads: Heads,
    spans: Spans,
    turns: Option<Turns>,
}

impl Backward<Flex, 1> for Attention {
    type State = AttentionState;

    fn backward(self, step: Step<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let state = step.state;
        unary::<Flex, _>(step.parents, step.node, grads, |grad| {
            let turns = state.turns.as_ref();
            flex::attention_backward(&state.qkv, &grad, state.heads, &state.spans, turns)
        });
    }
}

#[derive(Debug)]
struct Head;

#[derive(Clone, Debug)]
struct HeadState {
    hidden: FloatTensor<Flex>,
    weight: FloatTensor<Flex>,
    targets: IntTensor<Flex>,
    tied: bool,
    kept: flex::Kept,
}

impl Backward<Flex, 2> for Head {
    type State = HeadState;

    fn backward(self, step: Step<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&step.node);
        let [hidden, weight] = step.parents;
        let HeadState {
            hidden: states,
            weight: matrix,
            targets,
            tied,
            kept,
        } = step.state;
        let wanted = (hidden.is_some(), weight.is_some());
        let (for_hidden, for_weight) =
            flex::head_backward(&states, &matrix, tied, &targets, kept, &grad, wanted);
        for (parent, grad) in [(hidden, for_hidden), (weight, for_weight)] {
            if let (Some(parent), Some(grad)) = (parent, grad) {
                grads.register::<Flex>(parent.id, grad);
            }
        }
    }
}

#[derive(Debug)]
struct Joined;

/// Input and weights.
type JoinedState<const N: usize> = (FloatTensor<Flex>, [FloatTensor<Flex>; N]);

impl Backward<Flex, 3> for Joined {
    type State = JoinedState<2>;

    fn backward(self, step: Step<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&step.node);
        let [x, parents @ ..] = step.parents.map(|parent| parent.map(|parent| parent.id));
        joined_backward(grads, x, parents, &step.state, &grad);
    }
}

impl Backward<Flex, 4> for Joined {
    type State = JoinedState<3>;

    fn backward(self, step: Step<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&step.node);
        let [x, parents @ ..] = step.parents.map(|parent| parent.map(|parent| parent.id));
        joined_backward(grads, x, parents, &step.state, &grad);
    }
}

fn joined_backward<const N: usize>(
    grads: &mut Gradients,
    for_x: Option<NodeId>,
    for_weights: [Option<NodeId>; N],
    (x, weights): &JoinedState<N>,
    grad: &FloatTensor<Flex>,
) {
    for (index, node) in for_weights.into_iter().enumerate() {
        if let Some(node) = node {
            let grad = flex::joined_backward_weight(x, grad, weights, index);
            grads.register::<Flex>(node, grad);
        }
    }
    if let Some(node) = for_x {
        grads.register::<Flex>(node, flex::joined_backward_input(grad, weights));
    }
}

impl<C: CheckpointStrategy> HostOps for Autodiff<Flex, C> {
    fn attention(
        qkv: FloatTensor<Self>,
        heads: Heads,
        spans: Spans,
        turns: Option<Turns>,
    ) -> FloatTensor<Self> {
        let step = Attention.prepare::<C>([qkv.node()]).compute_bound();
        let qkv = qkv.into_primitive();
        match step.stateful() {
            OpsKind::Tracked(step) => {
                let out = flex::attention(&qkv, heads, &spans, turns.as_ref());
                let state = AttentionState {
                    qkv,
                    heads,
                    spans,
                    turns,
                };
                step.finish(state, out)
            }
            OpsKind::UnTracked(step) => {
                step.finish(flex::attention(&qkv, heads, &spans, turns.as_ref()))
            }
        }
    }

    fn head(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        tied: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let step = Head
            .prepare::<C>([hidden.node(), weight.node()])
            .compute_bound();
        let (hidden, weight) = (hidden.into_primitive(), weight.into_primitive());
        match step.stateful() {
            OpsKind::Tracked(step) => {
                let (logps, stats, kept) = flex::head(&hidden, &weight, tied, &targets, true);
                let state = HeadState {
                    hidden,
                    weight,
                    targets,
                    tied,
                    kept,
                };
                (step.finish(state, logps), Self::from_inner(stats))
            }
            OpsKind::UnTracked(step) => {
                let (logps, stats, _) = flex::head(&hidden, &weight, tied, &targets, false);
                (step.finish(logps), Self::from_inner(stats))
            }
        }
    }

    fn project_two(
        x: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let step = Joined
            .prepare::<C>([x.node(), first.node(), second.node()])
            .compute_bound();
        let x = x.into_primitive();
        let weights = [first, second].map(|weight: FloatTensor<Self>| weight.into_primitive());
        let out = flex::joined(&x, &weights);
        match step.stateful() {
            OpsKind::Tracked(step) => step.finish((x, weights), out),
            OpsKind::UnTracked(step) => step.finish(out),
        }
    }

    fn project_three(
        x: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        third: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let step = Joined
            .prepare::<C>([x.node(), first.node(), second.node(), third.node()])
            .compute_bound();
        let x = x.into_primitive();
        let weights =
            [first, second, third].map(|weight: FloatTensor<Self>| weight.into_primitive());
        let out = flex::joined(&x, &weights);
        match step.stateful() {
            OpsKind::Tracked(step) => step.finish((x, weights), out),
            OpsKind::UnTracked(step) => step.finish(out),
        }
    }
}
