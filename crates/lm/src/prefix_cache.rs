//! A search's model: prefixes as a tree of tokens that share their keys and values.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use burn::tensor::{Device, Int, Tensor, TensorData};
use mdp_core::log_sum_exp;
use search::{NodeId, PrefixModel, PrefixTree, Rows, SearchError};

use crate::decode::{Past, layout};
use crate::error::LmError;
use crate::model::Transformer;

/// Bytes of one key or value: f32.
const ELEMENT_BYTES: usize = 4;
/// A pool that is full grows to what it must hold and one in this many more.
const SLACK: usize = 8;
/// Rows of one step, unless told otherwise.
const MAX_ROWS: usize = 64;

/// A policy, and perhaps its reference, as the model of a search.
///
/// Every token that a search has expanded has one slot in a pool of keys and values, and a prefix is
/// the list of the slots of its tokens. So prefixes that begin alike hold their beginning once, a
/// fork costs nothing, and what is held is as many tokens as the tree has. A frontier, of prefixes of
/// any lengths, is one step of the policy, one of the reference, and one read of both their logits.
/// The keys and values of its prefixes are gathered from the pool layer by layer, so that no more
/// than one layer's are ever there twice.
///
/// With [`limit_bytes`](Self::limit_bytes) prefixes that no search is about to continue are forgotten,
/// longest unused first, and computed again when they are needed after all.
///
/// # Examples
///
/// ```
/// use lm::{LlamaShape, ModelConfig, PrefixCache, Transformer};
/// use search::{BeamConfig, Request, beam_search};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let config = ModelConfig::llama(&LlamaShape {
/// #     vocab_size: 32, hidden_size: 16, intermediate_size: 40, n_layers: 2, n_heads: 4,
/// #     n_kv_heads: 2, max_positions: 64, tied: true, eos_id: 1, pad_id: 0,
/// # })?;
/// let policy = Transformer::init(config, 7, &burn::tensor::Device::default())?;
/// let mut model = PrefixCache::new(&policy);
/// let beam = BeamConfig { width: 3, ..BeamConfig::default() };
/// let output = beam_search(&mut model, &Request::new([5, 6, 7], [1], 8), &beam)?;
/// assert!(output.completions[0].tokens.len() <= 8);
/// // Three prefixes of at most 8 tokens, and the prompt once.
/// assert!(model.stats().peak_tokens <= 3 + 3 * 8);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct PrefixCache<'a> {
    /// The policy, then the reference if there is one.
    sides: Vec<Side<'a>>,
    vocab: usize,
    limit_bytes: Option<usize>,
    max_rows: usize,
    /// Tokens of the prompt, which hold the first slots; 0 before they were read.
    prompt_len: usize,
    /// Where each expanded prefix keeps its last token, and when it was last used.
    held: HashMap<NodeId, Held>,
    /// Slots given out, those since forgotten among them.
    used: usize,
    capacity: usize,
    clock: u64,
    stats: PrefixCacheStats,
}

/// What a [`PrefixCache`] held and computed in its last search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixCacheStats {
    /// Bytes of keys and values of a token, over all layers, policy and reference together.
    pub bytes_per_token: usize,
    /// Tokens held now, the prompt's among them.
    pub held_tokens: usize,
    /// The most tokens held at once.
    pub peak_tokens: usize,
    /// The most slots there were at once, used or not: the size of the pool, in tokens.
    pub peak_capacity: usize,
    /// Tokens that were forgotten and computed again.
    pub recomputed: usize,
    /// Steps of the policy, those that recompute among them.
    pub steps: usize,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    slot: usize,
    used: u64,
}

/// A model and its pool: keys and values of each layer, `[capacity, kv_heads * head_dim]`.
#[derive(Debug)]
struct Side<'a> {
    model: &'a Transformer,
    layers: Vec<(Tensor<2>, Tensor<2>)>,
}

impl<'a> PrefixCache<'a> {
    /// The policy alone.
    #[must_use]
    pub fn new(policy: &'a Transformer) -> Self {
        Self {
            vocab: policy.config().vocab_size,
            sides: vec![Side::new(policy)],
            limit_bytes: None,
            max_rows: MAX_ROWS,
            prompt_len: 0,
            held: HashMap::new(),
            used: 0,
            capacity: 0,
            clock: 0,
            stats: PrefixCacheStats::default(),
        }
    }

    /// The same with the reference that log-ratios are taken to.
    ///
    /// # Errors
    ///
    /// If its vocabulary is not the policy's.
    pub fn with_reference(mut self, reference: &'a Transformer) -> Result<Self, LmError> {
        let vocab = reference.config().vocab_size;
        if vocab != self.vocab {
            return Err(LmError::Request(format!(
                "the reference has a vocabulary of {vocab}, the policy one of {}",
                self.vocab
            )));
        }
        self.sides.truncate(1);
        self.sides.push(Side::new(reference));
        Ok(self)
    }

    /// The same, holding at most this many bytes of keys and values.
    ///
    /// What the frontier at hand needs is held even beyond them.
    #[must_use]
    pub fn limit_bytes(self, bytes: usize) -> Self {
        Self {
            limit_bytes: Some(bytes),
            ..self
        }
    }

    /// The same with at most this many rows in a step (64 unless set); a larger frontier takes several.
    ///
    /// # Panics
    ///
    /// If there are to be none.
    #[must_use]
    pub fn max_rows(self, rows: usize) -> Self {
        assert!(rows > 0, "a step has at least one row");
        Self {
            max_rows: rows,
            ..self
        }
    }

    /// What the last search held and computed.
    #[must_use]
    pub fn stats(&self) -> PrefixCacheStats {
        PrefixCacheStats {
            bytes_per_token: self.sides.iter().map(Side::bytes_per_token).sum(),
            held_tokens: self.prompt_len + self.held.len(),
            ..self.stats
        }
    }

    fn device(&self) -> Device {
        self.sides[0].model.device()
    }

    /// Reads the prompt; returns the logits behind it, `[1, vocab]` of each side.
    fn read_prompt(&mut self, prompt: &[u32]) -> Result<Vec<Tensor<2>>, LmError> {
        let mut logits = Vec::with_capacity(self.sides.len());
        for side in &mut self.sides {
            let (cache, next) = side.model.prefill(&[prompt], 0)?;
            side.layers = cache
                .into_layers()
                .into_iter()
                .map(|(key, value)| (to_slots(key), to_slots(value)))
                .collect();
            logits.push(next);
        }
        self.prompt_len = prompt.len();
        self.used = prompt.len();
        self.capacity = prompt.len();
        self.stats.steps += 1;
        self.note_peaks();
        Ok(logits)
    }

    fn note_peaks(&mut self) {
        let held = self.prompt_len + self.held.len();
        self.stats.peak_tokens = self.stats.peak_tokens.max(held);
        self.stats.peak_capacity = self.stats.peak_capacity.max(self.capacity);
    }

    /// Appends each node's token to its parent, whose tokens are all held, and holds it too; returns
    /// the logits, `[nodes, vocab]` of each side.
    fn step(&mut self, prefixes: &PrefixTree, nodes: &[NodeId]) -> Vec<Tensor<2>> {
        self.make_room(nodes.len());
        let paths: Vec<Vec<i64>> = nodes.iter().map(|&n| self.path(prefixes, n)).collect();
        let longest = paths.iter().map(Vec::len).max().unwrap_or(0);
        let starts: Vec<usize> = paths.iter().map(|path| longest - path.len()).collect();
        let device = self.device();
        // Padding is masked, so that any slot does.
        let slots: Vec<i64> = paths
            .iter()
            .zip(&starts)
            .flat_map(|(path, &start)| std::iter::repeat_n(0, start).chain(path.iter().copied()))
            .collect();
        let count = slots.len();
        let slots = Tensor::<1, Int>::from_data(TensorData::new(slots, [count]), &device);
        let ids: Vec<i64> = nodes
            .iter()
            .map(|&node| i64::from(prefixes.token(node).unwrap_or_default()))
            .collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [nodes.len(), 1]), &device);
        let layout = layout(&starts, longest, 1, &device);
        let first = self.used;
        let logits = self
            .sides
            .iter_mut()
            .map(|side| {
                let mut past = Gathered {
                    layers: &mut side.layers,
                    slots: slots.clone(),
                    rows: nodes.len(),
                    first,
                };
                let model = side.model;
                model.head(model.hidden_cached(ids.clone(), &layout, &mut past))
            })
            .collect();
        for (row, &node) in nodes.iter().enumerate() {
            let slot = first + row;
            let used = self.clock;
            self.held.insert(node, Held { slot, used });
        }
        self.used += nodes.len();
        self.stats.steps += 1;
        self.note_peaks();
        logits
    }

    /// The slots of a prefix without its last token.
    fn path(&self, prefixes: &PrefixTree, node: NodeId) -> Vec<i64> {
        let completion = prefixes
            .ancestors(node)
            .skip(1)
            .filter(|&above| above != NodeId::ROOT)
            .map(|above| self.held[&above].slot as i64);
        let mut path: Vec<i64> = completion.collect();
        path.extend((0..self.prompt_len as i64).rev());
        path.reverse();
        path
    }

    /// The topmost prefix above `node` that is not held.
    fn missing(&self, prefixes: &PrefixTree, node: NodeId) -> Option<NodeId> {
        let above = prefixes.ancestors(node).skip(1);
        above
            .filter(|above| *above != NodeId::ROOT && !self.held.contains_key(above))
            .last()
    }

    /// Makes `rows` free slots at the end, forgetting prefixes of an earlier clock if the limit asks.
    fn make_room(&mut self, rows: usize) {
        let bytes_per_token: usize = self.sides.iter().map(Side::bytes_per_token).sum();
        let limit = self.limit_bytes.map(|bytes| bytes / bytes_per_token.max(1));
        if let Some(limit) = limit.filter(|&limit| self.prompt_len + self.held.len() + rows > limit)
        {
            // Children are numbered after their parents, so the deepest of a branch go first.
            let mut idle: Vec<(u64, Reverse<NodeId>)> = self
                .held
                .iter()
                .filter(|(_, held)| held.used < self.clock)
                .map(|(&node, held)| (held.used, Reverse(node)))
                .collect();
            idle.sort_unstable();
            // A quarter more than needed, so that not every step has to look again.
            let excess = self.prompt_len + self.held.len() + rows - (limit - limit / 4);
            for (_, Reverse(node)) in idle.into_iter().take(excess) {
                self.held.remove(&node);
            }
        }
        if self.used + rows <= self.capacity {
            return;
        }
        let needed = self.prompt_len + self.held.len() + rows;
        let grown = needed + needed / SLACK;
        let capacity = match limit {
            Some(limit) => grown.min(limit.max(needed)),
            None => grown,
        };
        self.rebuild(capacity);
    }

    /// Moves what is held into a pool of `capacity` slots.
    fn rebuild(&mut self, capacity: usize) {
        let mut entries: Vec<&mut Held> = self.held.values_mut().collect();
        entries.sort_unstable_by_key(|held| held.slot);
        let mut kept: Vec<i64> = (0..self.prompt_len as i64).collect();
        for held in entries {
            let slot = kept.len();
            kept.push(held.slot as i64);
            held.slot = slot;
        }
        let live = kept.len();
        let device = self.sides[0].model.device();
        let kept = Tensor::<1, Int>::from_data(TensorData::new(kept, [live]), &device);
        for side in &mut self.sides {
            for (keys, values) in &mut side.layers {
                for pool in [keys, values] {
                    pool.inplace(|pool| {
                        let [_, width] = pool.dims();
                        let free = Tensor::zeros([capacity - live, width], &device);
                        Tensor::cat(vec![pool.select(0, kept.clone()), free], 0)
                    });
                }
            }
        }
        self.used = live;
        self.capacity = capacity;
    }

    /// One batch of a frontier: recomputes what was forgotten above it, then steps.
    fn answer(
        &mut self,
        prefixes: &PrefixTree,
        nodes: &[NodeId],
    ) -> Result<Vec<Tensor<2>>, LmError> {
        self.clock += 1;
        for &node in nodes {
            for above in prefixes.ancestors(node).skip(1) {
                if let Some(held) = self.held.get_mut(&above) {
                    held.used = self.clock;
                }
            }
        }
        loop {
            let mut missing: Vec<NodeId> = nodes
                .iter()
                .filter_map(|&node| self.missing(prefixes, node))
                .collect();
            missing.sort_unstable();
            missing.dedup();
            if missing.is_empty() {
                break;
            }
            self.step(prefixes, &missing);
            self.stats.recomputed += missing.len();
        }
        Ok(self.step(prefixes, nodes))
    }

    /// The logits of all sides in one read: `[sides][rows * vocab]`.
    fn read(&self, logits: Vec<Tensor<2>>) -> Result<Vec<Vec<f32>>, LmError> {
        let size: usize = logits[0].dims().iter().product();
        let all = Tensor::cat(logits, 0)
            .try_into_vec_as::<f32>()
            .map_err(|error| LmError::Request(format!("logits could not be read: {error:?}")))?;
        Ok(all.chunks(size).map(<[f32]>::to_vec).collect())
    }
}

impl PrefixModel for PrefixCache<'_> {
    fn vocab(&self) -> usize {
        self.vocab
    }

    fn has_reference(&self) -> bool {
        self.sides.len() > 1
    }

    fn begin(&mut self, prompt: &[u32], max_new_tokens: usize) -> Result<(), SearchError> {
        self.held.clear();
        self.prompt_len = 0;
        self.used = 0;
        self.capacity = 0;
        self.stats = PrefixCacheStats::default();
        for side in &mut self.sides {
            side.layers.clear();
            let checked = side.model.check(&[prompt], max_new_tokens);
            checked.map_err(SearchError::model)?;
        }
        Ok(())
    }

    fn expand(
        &mut self,
        prefixes: &PrefixTree,
        frontier: &[NodeId],
        top_k: Option<usize>,
    ) -> Result<Rows, SearchError> {
        let mut rows = Answers::new(self.vocab, top_k, self.has_reference());
        let mut rest = frontier;
        if self.prompt_len == 0 || frontier.first() == Some(&NodeId::ROOT) {
            let read = self.read_prompt(prefixes.prompt());
            let logits = read.map_err(SearchError::model)?;
            if let Some((&NodeId::ROOT, behind)) = frontier.split_first() {
                rows.add(&self.read(logits).map_err(SearchError::model)?);
                rest = behind;
            }
        }
        for nodes in rest.chunks(self.max_rows) {
            let logits = self.answer(prefixes, nodes);
            let logits = logits.and_then(|logits| self.read(logits));
            rows.add(&logits.map_err(SearchError::model)?);
        }
        rows.finish()
    }

    fn retain(&mut self, prefixes: &PrefixTree, live: &[NodeId]) {
        let alive: HashSet<NodeId> = live.iter().copied().collect();
        let mut above: HashSet<NodeId> = HashSet::new();
        for &node in live {
            for node in prefixes.ancestors(node) {
                if !above.insert(node) {
                    break;
                }
            }
        }
        self.held.retain(|node, _| {
            above.contains(node) || prefixes.ancestors(*node).any(|node| alive.contains(&node))
        });
    }
}

impl<'a> Side<'a> {
    fn new(model: &'a Transformer) -> Self {
        Self {
            model,
            layers: Vec::new(),
        }
    }

    fn bytes_per_token(&self) -> usize {
        let config = self.model.config();
        2 * config.n_layers * config.n_kv_heads * config.head_dim * ELEMENT_BYTES
    }
}

/// Keys or values `[1, kv_heads, seq, head_dim]` as slots, `[seq, kv_heads * head_dim]`.
fn to_slots(x: Tensor<4>) -> Tensor<2> {
    let [_, heads, seq, width] = x.dims();
    x.swap_dims(1, 2).reshape([seq, heads * width])
}

/// The pasts of some rows, gathered from a pool as each layer asks.
struct Gathered<'p> {
    layers: &'p mut [(Tensor<2>, Tensor<2>)],
    /// Slots of all rows, padded on the left, `[rows * seq]`.
    slots: Tensor<1, Int>,
    rows: usize,
    /// Where the new tokens go.
    first: usize,
}

impl Past for Gathered<'_> {
    fn append(&mut self, layer: usize, key: Tensor<4>, value: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let (slots, rows, first) = (&self.slots, self.rows, self.first);
        let (keys, values) = &mut self.layers[layer];
        let grow = |pool: &mut Tensor<2>, new: Tensor<4>| {
            let [_, heads, _, width] = new.dims();
            let [count] = slots.dims();
            let past = pool.clone().select(0, slots.clone());
            let past = past.reshape([rows, count / rows, heads, width]);
            let flat = new.clone().reshape([rows, heads * width]);
            let place = [first..first + rows, 0..heads * width];
            pool.inplace(|pool| pool.slice_assign(place, flat));
            Tensor::cat(vec![past.swap_dims(1, 2), new], 2)
        };
        (grow(keys, key), grow(values, value))
    }

    fn advance(&mut self, _seq: usize) {}
}

/// Rows of logits becoming what a search wants of them.
struct Answers {
    vocab: usize,
    top_k: Option<usize>,
    has_reference: bool,
    full: Vec<f64>,
    top: Vec<Vec<(u32, f64)>>,
    reference: Vec<f64>,
}

impl Answers {
    fn new(vocab: usize, top_k: Option<usize>, has_reference: bool) -> Self {
        Self {
            vocab,
            top_k: top_k.filter(|&k| k < vocab),
            has_reference,
            full: Vec::new(),
            top: Vec::new(),
            reference: Vec::new(),
        }
    }

    fn add(&mut self, sides: &[Vec<f32>]) {
        let rows = |side: usize| sides[side].chunks(self.vocab).map(logps);
        let mut references = self.has_reference.then(|| rows(1));
        for policy in rows(0) {
            let reference = references.as_mut().and_then(Iterator::next);
            match self.top_k {
                None => {
                    self.full.extend(policy);
                    self.reference.extend(reference.into_iter().flatten());
                }
                Some(k) => {
                    let mut order: Vec<(u32, f64)> = policy
                        .iter()
                        .enumerate()
                        .map(|(i, &l)| (i as u32, l))
                        .collect();
                    let likelier = |a: &(u32, f64), b: &(u32, f64)| {
                        b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0))
                    };
                    order.select_nth_unstable_by(k, likelier);
                    order.truncate(k);
                    if let Some(reference) = reference {
                        let at = |&(token, _): &(u32, f64)| reference[token as usize];
                        self.reference.extend(order.iter().map(at));
                    }
                    self.top.push(order);
                }
            }
        }
    }

    fn finish(self) -> Result<Rows, SearchError> {
        let rows = match self.top_k {
            None => Rows::full(mdp_core::LogpRows::new(self.vocab, self.full)?),
            Some(_) => Rows::top(&self.top),
        };
        if self.has_reference {
            rows.with_reference(self.reference)
        } else {
            Ok(rows)
        }
    }
}

/// The log-softmax of a row, in double.
fn logps(logits: &[f32]) -> Vec<f64> {
    let mut row: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    let total = log_sum_exp(&row);
    for logp in &mut row {
        *logp -= total;
    }
    row
}
