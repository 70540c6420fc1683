//! Keys and values as tensors on the model's device.

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::model::{SeqLayout, Sight, Transformer};

/// Keys and values of a batch of prefixes.
///
/// Rows of unequal length are padded on the left, so that every row appends at the same slot.
#[derive(Clone, Debug)]
pub(crate) struct TensorCache {
    /// `[batch, kv_heads, capacity, head_dim]`, keys then values.
    layers: Vec<(Tensor<4>, Tensor<4>)>,
    /// How many slots of each row are padding.
    starts: Vec<usize>,
    /// Slots in use.
    len: usize,
    capacity: usize,
}

impl TensorCache {
    pub(super) fn new(
        model: &Transformer,
        starts: Vec<usize>,
        capacity: usize,
        device: &Device,
    ) -> Self {
        let config = model.config();
        let shape = [starts.len(), config.n_kv_heads, capacity, config.head_dim];
        let layers = (0..config.n_layers)
            .map(|_| (Tensor::zeros(shape, device), Tensor::zeros(shape, device)))
            .collect();
        Self {
            layers,
            starts,
            len: 0,
            capacity,
        }
    }

    /// Number of rows.
    pub(super) fn rows(&self) -> usize {
        self.starts.len()
    }

    /// Tokens held by each row.
    pub(super) fn lengths(&self) -> Vec<usize> {
        self.starts.iter().map(|start| self.len - start).collect()
    }

    /// Tokens that can still be appended.
    pub(super) fn room(&self) -> usize {
        self.capacity - self.len
    }

    /// A cache of the given rows, in the given order; a row may be named more than once.
    ///
    /// # Panics
    ///
    /// If a row is not there.
    pub(super) fn select(&self, rows: &[usize]) -> Self {
        let device = self.layers[0].0.device();
        let indices: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let indices = Tensor::<1, Int>::from_data(TensorData::new(indices, [rows.len()]), &device);
        let pick = |x: &Tensor<4>| x.clone().select(0, indices.clone());
        Self {
            layers: self
                .layers
                .iter()
                .map(|(k, v)| (pick(k), pick(v)))
                .collect(),
            starts: rows.iter().map(|&row| self.starts[row]).collect(),
            len: self.len,
            capacity: self.capacity,
        }
    }

    /// Keys and values of each layer, `[batch, kv_heads, capacity, head_dim]`.
    pub(crate) fn into_layers(self) -> Vec<(Tensor<4>, Tensor<4>)> {
        self.layers
    }

    pub(super) fn layout(&self, seq: usize, device: &Device) -> SeqLayout {
        layout(&self.starts, self.len, seq, device)
    }
}

/// Earlier tokens' keys and values, as the blocks of a model see them.
pub(crate) trait Past {
    /// Takes a layer's new keys and values, `[batch, kv_heads, seq, head_dim]`, and returns them
    /// behind the old ones.
    fn append(&mut self, layer: usize, key: Tensor<4>, value: Tensor<4>) -> (Tensor<4>, Tensor<4>);

    /// Counts the new tokens, once, after the last layer.
    fn advance(&mut self, seq: usize);
}

impl Past for TensorCache {
    fn append(&mut self, layer: usize, key: Tensor<4>, value: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let [batch, heads, seq, width] = key.dims();
        let end = self.len + seq;
        let slot = [0..batch, 0..heads, self.len..end, 0..width];
        let (keys, values) = &mut self.layers[layer];
        // `inplace` hands over the only reference, so that storage nobody else holds is reused. The
        // first keys say what all are in.
        let dtype = key.dtype();
        keys.inplace(|keys| keys.cast(dtype).slice_assign(slot.clone(), key));
        values.inplace(|values| values.cast(dtype).slice_assign(slot, value));
        (
            keys.clone().narrow(2, 0, end),
            values.clone().narrow(2, 0, end),
        )
    }

    fn advance(&mut self, seq: usize) {
        self.len += seq;
    }
}

/// How `seq` new tokens lie behind `len` slots of which each row's first `starts` are padding.
pub(crate) fn layout(starts: &[usize], len: usize, seq: usize, device: &Device) -> SeqLayout {
    let (batch, keys) = (starts.len(), len + seq);
    let padded = starts.iter().any(|&start| start > 0);
    let positions = starts
        .iter()
        .take(if padded { batch } else { 1 })
        .flat_map(|&start| (len..keys).map(move |slot| slot.saturating_sub(start) as u32))
        .collect();
    let mask = (padded || seq > 1).then(|| {
        let rows = if padded { batch } else { 1 };
        let mut mask = Vec::with_capacity(rows * seq * keys);
        for &start in &starts[..rows] {
            for query in len..keys {
                mask.extend((0..keys).map(|key| key < start || key > query));
            }
        }
        Tensor::<4, Bool>::from_data(TensorData::new(mask, [rows, 1, seq, keys]), device)
    });
    SeqLayout {
        batch,
        seq,
        positions,
        sight: Sight::Past(mask),
    }
}

/// Reads prompts, the longest of `longest` tokens, into a fresh cache; also the logits behind them,
/// `[batch, vocab]`.
pub(crate) fn prefill<P: AsRef<[u32]>>(
    model: &Transformer,
    prompts: &[P],
    longest: usize,
    n_new: usize,
) -> (TensorCache, Tensor<2>) {
    let device = model.device();
    let starts: Vec<usize> = prompts
        .iter()
        .map(|prompt| longest - prompt.as_ref().len())
        .collect();
    let batch = prompts.len();
    let mut cache = TensorCache::new(model, starts, longest + n_new, &device);
    let mut ids = Vec::with_capacity(batch * longest);
    for prompt in prompts {
        let prompt = prompt.as_ref();
        // Padding is masked, so that any valid id does; the row's own first token is one.
        ids.extend(std::iter::repeat_n(
            i64::from(prompt[0]),
            longest - prompt.len(),
        ));
        ids.extend(prompt.iter().map(|&id| i64::from(id)));
    }
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, longest]), &device);
    let layout = cache.layout(longest, &device);
    let hidden = model.hidden_cached(ids, &layout, &mut cache);
    let [_, width] = hidden.dims();
    let last = hidden
        .reshape([batch, longest, width])
        .narrow(1, longest - 1, 1)
        .reshape([batch, width]);
    (cache, model.head(last))
}

/// Appends one token to every row; the logits of the next, `[batch, vocab]`.
pub(super) fn step(model: &Transformer, tokens: &[u32], cache: &mut TensorCache) -> Tensor<2> {
    let device = model.device();
    let ids: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
    let ids = Tensor::from_data(TensorData::new(ids, [tokens.len(), 1]), &device);
    let layout = cache.layout(1, &device);
    model.head(model.hidden_cached(ids, &layout, cache))
}
