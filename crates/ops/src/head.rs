//! Logps of tokens straight from hidden states.

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Int, Tensor};

/// Statistics of a row of logits.
#[cfg(any(feature = "flex", feature = "cube"))]
pub(crate) const STATS: usize = 3;

/// What a model's head says of some tokens, without graph but for the logps; each `[n]`.
#[derive(Clone, Debug)]
pub struct HeadOutput {
    /// `log π(a|s)` of each target, nats.
    pub logps: Tensor<1>,
    /// Entropy of the distribution, nats.
    pub entropy: Tensor<1>,
    /// Mean of the logits over the vocabulary.
    pub mean_logit: Tensor<1>,
    /// 1 where the target is the likeliest token, the first of equal ones; else 0.
    pub top1: Tensor<1>,
}

/// The logps of `targets`, `[n]`, behind hidden states, `[n, width]`, with statistics of each
/// distribution; `None` where no fused version is at hand, and logits are to be made.
///
/// `weight` is the head's, `[width, vocab]`, or if `tied` the table of embeddings, `[vocab, width]`.
/// On the processor logits live for some rows at a time: the memory does not grow with the vocabulary,
/// and a gradient recomputes them where they were not few enough to keep. On a card there is one table
/// of them, in the type of `hidden`, which its gradient takes the place of; logps and statistics are in
/// f32 either way.
///
/// # Panics
///
/// If the shapes do not fit, the types differ, or a target is not in the vocabulary.
pub fn head_logps(
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    tied: bool,
    targets: &Tensor<1, Int>,
) -> Option<HeadOutput> {
    let [n, width] = hidden.dims();
    let inner = weight.dims()[usize::from(tied)];
    assert_eq!(width, inner, "a weight for each number of a hidden state");
    assert_eq!(targets.dims(), [n], "a target for each hidden state");
    assert_eq!(hidden.dtype(), weight.dtype(), "{}", crate::ONE_TYPE);
    let parts = parts(hidden, weight, targets, tied);
    parts.map(|(logps, stats)| {
        let stats: Tensor<2> = Tensor::from_dispatch(stats);
        let stats = if stats.is_autodiff() {
            stats.inner()
        } else {
            stats
        };
        let stat = |at: usize| stats.clone().narrow(0, at, 1).reshape([n]);
        HeadOutput {
            logps: Tensor::from_dispatch(logps),
            entropy: stat(0),
            mean_logit: stat(1),
            top1: stat(2),
        }
    })
}

/// Logps and statistics, where a fused version is at hand.
#[cfg_attr(
    not(any(feature = "flex", feature = "cube")),
    expect(unused_variables, reason = "nothing is at hand")
)]
fn parts(
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &Tensor<1, Int>,
    tied: bool,
) -> Option<(FloatTensor<Dispatch>, FloatTensor<Dispatch>)> {
    #[cfg(any(feature = "flex", feature = "cube"))]
    let inputs = || {
        let (hidden, weight) = (
            hidden.clone().into_dispatch(),
            weight.clone().into_dispatch(),
        );
        (hidden, weight, targets.clone().into_dispatch())
    };
    #[cfg(feature = "flex")]
    if crate::fused(hidden) {
        let (hidden, weight, targets) = inputs();
        return Some(<Dispatch as crate::HostOps>::head(
            hidden, weight, targets, tied,
        ));
    }
    #[cfg(feature = "cube")]
    if crate::is_card(hidden) {
        let (hidden, weight, targets) = inputs();
        return Some(<Dispatch as crate::CardOps>::card_head(
            hidden, weight, targets, tied,
        ));
    }
    None
}
