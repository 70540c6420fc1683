//! The operations in a graph.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::NodeId;
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

impl<B: Ops> Backward<B, 1> for SwiGlu {
    /// Gate and other factor.
    type State = FloatTensor<B>;

    fn backward(self, step: Step<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let joined = step.state;
        unary::<B, _>(step.parents, step.node, grads, |grad| {
            B::swiglu_backward(joined, grad)
        });
    }
}

#[derive(Debug)]
struct Product;

impl<B: Ops> Backward<B, 2> for Product {
    /// Both factors.
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, step: Step<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&step.node);
        let [for_a, for_b] = step.parents;
        let (a, b) = step.state;
        if let Some(node) = for_a {
            let for_a = B::product(grad.clone(), B::float_swap_dims(b, 2, 3));
            grads.register::<B>(node.id, for_a);
        }
        if let Some(node) = for_b {
            let for_b = B::product(B::float_swap_dims(a, 2, 3), grad);
            grads.register::<B>(node.id, for_b);
        }
    }
}

#[derive(Debug)]
struct Linear;

impl<B: Ops> Backward<B, 2> for Linear {
    /// Input and weight.
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, step: Step<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&step.node);
        let [x, weight] = step.parents.map(|parent| parent.map(|parent| parent.id));
        linear_backward::<B>(grads, [x, weight, None], step.state, grad);
    }
}

#[derive(Debug)]
struct LinearWithBias;

impl<B: Ops> Backward<B, 3> for LinearWithBias {
    /// Input and weight.
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, step: Step<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&step.node);
        let parents = step.parents.map(|parent| parent.map(|parent| parent.id));
        linear_backward::<B>(grads, parents, step.state, grad);
    }
}

/// A frozen weight, as under an adapter, costs nothing here.
fn linear_backward<B: Ops>(
    grads: &mut Gradients,
    [for_x, for_weight, for_bias]: [Option<NodeId>; 3],
    (x, weight): (FloatTensor<B>, FloatTensor<B>),
    grad: FloatTensor<B>,
) {
    if let Some(node) = for_bias {
        grads.register::<B>(node, B::project_backward_bias(grad.clone()));
    }
    if let Some(node) = for_weight {
        grads.register::<B>(node, B::project_backward_weight(x, grad.clone()));
    }
    if let Some(node) = for_x {
        grads.register::<B>(node, B::project_backward_input(grad, weight));
    }
}

#[derive(Debug)]
struct RmsNorm;

impl<B: Ops> Backward<B, 2> for RmsNorm {
    /// Input, weight and epsilon.
    type State = (FloatTensor<B>, FloatTensor<B>, f64);

    fn backward(self, step: Step<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (x, weight, eps) = step.state;
        let grad = grads.consume::<B>(&step.node);
        let (for_x, for_weight) = B::rms_norm_backward(x, weight, eps, grad);
        for (parent, grad) in step.parents.into_iter().zip([for_x, for_weight]) {
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

    fn swiglu(joined: FloatTensor<Self>) -> FloatTensor<Self> {
        let step = SwiGlu.prepare::<C>([joined.node()]).compute_bound();
        let joined = joined.into_primitive();
        match step.stateful() {
            OpsKind::Tracked(step) => step.finish(joined.clone(), B::swiglu(joined)),
            OpsKind::UnTracked(step) => step.finish(B::swiglu(joined)),
        }
    }

    fn product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        let step = Product.prepare::<C>([a.node(), b.node()]).compute_bound();
        let (a, b) = (a.into_primitive(), b.into_primitive());
        match step.stateful() {
            OpsKind::Tracked(step) => {
                let out = B::product(a.clone(), b.clone());
                step.finish((a, b), out)
            }
            OpsKind::UnTracked(step) => step.finish(B::product(a, b)),
        }
    }

    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let step = Linear
            .prepare::<C>([x.node(), weight.node()])
            .compute_bound();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        match step.stateful() {
            OpsKind::Tracked(step) => {
                let out = B::project(x.clone(), weight.clone());
                step.finish((x, weight), out)
            }
            OpsKind::UnTracked(step) => step.finish(B::project(x, weight)),
        }
    }

    fn project_with_bias(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let step = LinearWithBias
            .prepare::<C>([x.node(), weight.node(), bias.node()])
            .compute_bound();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        let bias = bias.into_primitive();
        match step.stateful() {
            OpsKind::Tracked(step) => {
                let out = B::project_with_bias(x.clone(), weight.clone(), bias);
                step.finish((x, weight), out)
            }
            OpsKind::UnTracked(step) => step.finish(B::project_with_bias(x, weight, bias)),
        }
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let step = RmsNorm
            .prepare::<C>([x.node(), weight.node()])
            .compute_bound();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        match step.stateful() {
            OpsKind::Tracked(step) => {
                let out = B::rms_norm(x.clone(), weight.clone(), eps);
                step.finish((x, weight, eps), out)
            }
            OpsKind::UnTracked(step) => step.finish(B::rms_norm(x, weight, eps)),
        }
    }
}
