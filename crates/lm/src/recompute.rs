//! Gradient checkpointing: blocks keep their inputs alone, and run again on the way back.
//!
//! Chen et al., <https://arxiv.org/abs/1604.06174>, with a checkpoint before each block. A step
//! takes one more forward pass, and holds the graph of one block at a time instead of all: for a
//! Llama of 6 million parameters on 4 rows of 512 tokens a peak of 258 MB instead of 1317, in a
//! tenth to a third more time (`examples/training_memory.rs`).
//!
//! Burn's own checkpointing, `Device::gradient_checkpointing`, recomputes elementwise operations
//! alone. It gives the same gradients and takes 1166 MB there, so that it is not used.

use burn::module::Module;
use burn::tensor::{Gradients, Int, Tensor};

use crate::batch::CompletionBatch;
use crate::model::{SeqLayout, Transformer};
use crate::trainable::trained_from;

/// A batch that has run through a model's blocks without a graph.
///
/// ```
/// # use burn::{module::Module, tensor::Device};
/// # use lm::{CompletionBatch, LlamaShape, ModelConfig, Transformer};
/// # let shape = LlamaShape { vocab_size: 32, hidden_size: 16, intermediate_size: 40, n_layers: 2,
/// #     n_heads: 4, n_kv_heads: 2, max_positions: 64, tied: true, eos_id: 1, pad_id: 0 };
/// # let config = ModelConfig::llama(&shape).unwrap();
/// let model = Transformer::init(config, 7, &Device::default()).unwrap().train();
/// let batch = CompletionBatch::new(&[(&[3, 4], &[5, 6, 1])], &model.device());
/// let checkpointed = model.checkpointed(&batch);
/// let scored = model.score_hidden(&batch, checkpointed.hidden(), false);
/// let loss = -scored.flat.mean();
/// let mut parts = 0;
/// checkpointed.backward(&model, &loss, |_gradients| parts += 1);
/// // The head, two blocks and the embedding: the table, tied here, has a gradient in two of them.
/// assert_eq!(parts, 4);
/// ```
#[derive(Debug)]
pub struct Checkpointed {
    ids: Tensor<2, Int>,
    layout: SeqLayout,
    /// The tokens whose hidden states are read of the last block.
    sources: Tensor<1, Int>,
    /// The first block that a gradient must reach.
    first: usize,
    /// Whether one must reach the embedding.
    embedding: bool,
    /// What each block from there on read: leaves.
    inputs: Vec<Tensor<2>>,
    /// What the last block gave: a leaf.
    top: Tensor<2>,
    hidden: Tensor<2>,
}

impl Transformer {
    /// Runs a batch through the blocks and keeps only what each of them read.
    ///
    /// On [`Checkpointed::hidden`] goes the rest of the loss; [`Checkpointed::backward`] is then
    /// called instead of the loss's own `backward`.
    pub fn checkpointed(&self, batch: &CompletionBatch) -> Checkpointed {
        let (ids, layout, sources) = batch.laid_out();
        // On the same device, so that the operations are those that run on the way back, to the
        // bit; a device without a graph has others for some.
        let plain = self.clone().no_grad();
        let turns = plain.turns(&layout);
        let (first, embedding) = trained_from(&self.parameter_list(), self.config().n_layers);
        let mut x = plain.embedded(ids.clone(), &layout);
        let mut inputs = Vec::new();
        for layer in 0..plain.blocks.len() {
            if layer >= first {
                inputs.push(x.clone());
            }
            x = plain.layer(layer, x, &layout, turns.as_ref(), None, Some(&sources));
        }
        let top = x.detach().require_grad();
        let hidden = self.normalised(top.clone());
        Checkpointed {
            ids,
            layout,
            sources,
            first,
            embedding,
            inputs,
            top,
            hidden,
        }
    }
}

impl Checkpointed {
    /// The hidden states that predict each completion token, `[n_tokens, hidden]`, as
    /// [`Transformer::completion_hidden`] gives them.
    pub fn hidden(&self) -> Tensor<2> {
        self.hidden.clone()
    }

    /// Takes `loss`, made of [`Checkpointed::hidden`], back through the whole model.
    ///
    /// `each` is called with the gradients of the head and of what follows it, then of each block
    /// from the last to the first, then of the embedding; frozen parts are left out. A parameter
    /// that stands in two of them, a tied table, has the sum of the two as its gradient.
    ///
    /// # Panics
    ///
    /// If `model` is not the one that ran, or the loss has been taken back already.
    pub fn backward(self, model: &Transformer, loss: &Tensor<1>, mut each: impl FnMut(Gradients)) {
        let mut gradients = loss.backward();
        drop(self.hidden);
        let mut signal = self.top.grad_remove(&mut gradients);
        each(gradients);
        drop(self.top);
        let turns = model.turns(&self.layout);
        for (index, input) in self.inputs.into_iter().enumerate().rev() {
            let Some(above) = signal.take() else { return };
            let mut x = input;
            // Below the first trained part no gradient is needed.
            let goes_on = index > 0 || self.embedding;
            if goes_on {
                x = x.require_grad();
            }
            let (layer, rows) = (self.first + index, Some(&self.sources));
            let y = model.layer(layer, x.clone(), &self.layout, turns.as_ref(), None, rows);
            let mut gradients = (y * Tensor::from_inner(above)).sum().backward();
            signal = x.grad_remove(&mut gradients);
            each(gradients);
        }
        if let (true, Some(above)) = (self.embedding, signal) {
            let x = model.embedded(self.ids, &self.layout);
            each((x * Tensor::from_inner(above)).sum().backward());
        }
    }
}
