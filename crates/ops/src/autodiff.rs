//! The operations in a graph.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops as Step, OpsKind, unary};
use burn::backend::tensor::{BoolTensor, FloatTensor};

use crate::backend::Ops;

#[derive(Debug)]
struct MaskedSoftmax;

impl<B: Ops> Backward<B, 1> for MaskedSoftmax {
    /// The weights. What is hidden has none, hence no gradient: the mask is not needed again.
    type State = FloatTensor<B>;

    fn backward(self, step: Step<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let weights = step.state;
        unary::<B, _>(step.parents, step.node, grads, |grad| {
            B::softmax_backward(weights, grad)
        });
    }
}

#[derive(Debug)]
struct SwiGlu;

impl<B: Ops> Backward<B, 2> for SwiGlu {
    /// The gate and the other factor.
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, step: Step<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (gate, up) = step.state;
        let grad = grads.consume::<B>(&step.node);
        let (for_gate, for_up) = B::swiglu_backward(gate, up, grad);
        for (parent, grad) in step.parents.into_iter().zip([for_gate, for_up]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

impl<B: Ops, C: CheckpointStrategy> Ops for Autodiff<B, C> {
    fn masked_softmax(scores: FloatTensor<Self>, hidden: BoolTensor<Self>) -> FloatTensor<Self> {
        let step = MaskedSoftmax.prepare::<C>([scores.node()]).compute_bound();
        match step.stateful() {
            OpsKind::Tracked(step) => {
                let weights = B::masked_softmax(scores.into_primitive(), hidden);
                step.finish(weights.clone(), weights)
            }
            OpsKind::UnTracked(step) => {
                step.finish(B::masked_softmax(scores.into_primitive(), hidden))
            }
        }
    }

    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let step = SwiGlu
            .prepare::<C>([gate.node(), up.node()])
            .compute_bound();
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        match step.stateful() {
            OpsKind::Tracked(step) => step.finish((gate.clone(), up.clone()), B::swiglu(gate, up)),
            OpsKind::UnTracked(step) => step.finish(B::swiglu(gate, up)),
        }
    }
}
