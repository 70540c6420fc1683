//! Keys and values of tokens, each in a slot of its own.

use crate::config::ModelConfig;

/// Keys and values of every layer, `[slots, kv_heads * head_dim]`.
///
/// A prefix is a list of slots, so prefixes that begin alike share their beginning, and a fork
/// copies nothing.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    layers: Vec<Layer>,
    width: usize,
}

/// Keys and values of one layer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layer {
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

impl Pool {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        Self {
            layers: vec![Layer::default(); config.n_layers],
            width: config.n_kv_heads * config.head_dim,
        }
    }

    /// Floats of a token's keys in one layer.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn layer(&mut self, layer: usize) -> &mut Layer {
        &mut self.layers[layer]
    }

    /// Makes room for `slots` slots in all, and for no more.
    pub(crate) fn reserve(&mut self, slots: usize) {
        let size = slots * self.width;
        for side in self.sides() {
            side.reserve_exact(size.saturating_sub(side.len()));
        }
    }

    /// Has at least `slots` slots.
    pub(crate) fn cover(&mut self, slots: usize) {
        let size = slots * self.width;
        for side in self.sides() {
            if side.len() < size {
                side.resize(size, 0.0);
            }
        }
    }

    /// Moves the slots `kept`, which ascend, to the front, and forgets the others.
    pub(crate) fn keep(&mut self, kept: &[u32]) {
        let width = self.width;
        for side in self.sides() {
            for (to, &from) in kept.iter().enumerate() {
                let from = from as usize * width;
                side.copy_within(from..from + width, to * width);
            }
            side.truncate(kept.len() * width);
        }
    }

    fn sides(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        self.layers
            .iter_mut()
            .flat_map(|layer| [&mut layer.keys, &mut layer.values])
    }
}
