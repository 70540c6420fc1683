//! A search's model: prefixes as a tree of tokens that share their keys and values.

mod side;

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use search::{NodeId, PrefixModel, PrefixTree, Rows, SearchError};

use self::side::{Logits, Side};
use crate::error::LmError;
use crate::host::log_sum_exp;
use crate::model::Transformer;

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
/// On a CPU attention reads keys and values where they lie; elsewhere those of a frontier's prefixes
/// are gathered from the pool layer by layer, so that no more than one layer's are ever there twice.
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

impl<'a> PrefixCache<'a> {
    /// The policy alone; on a CPU with a copy of its weights laid out for decoding, as
    /// [`Decoder`](crate::Decoder) has it.
    #[must_use]
    pub fn new(policy: &'a Transformer) -> Self {
        Self::of_side(Side::new(policy))
    }

    /// The policy alone, by the model's own tensors, on a CPU too.
    #[must_use]
    pub fn of_tensors(policy: &'a Transformer) -> Self {
        Self::of_side(Side::of_tensors(policy))
    }

    fn of_side(policy: Side<'a>) -> Self {
        Self {
            vocab: policy.model.config().vocab_size,
            sides: vec![policy],
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

    /// The same with the reference that log-ratios are taken to, computed as the policy is.
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
        let reference = if self.sides[0].is_host() {
            Side::new(reference)
        } else {
            Side::of_tensors(reference)
        };
        self.sides.push(reference);
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

    /// Reads the prompt; returns the logits behind it, `[1, vocab]` of each side.
    fn read_prompt(&mut self, prompt: &[u32]) -> Vec<Logits> {
        let logits = self.sides.iter_mut().map(|side| side.read_prompt(prompt));
        let logits = logits.collect();
        self.prompt_len = prompt.len();
        self.used = prompt.len();
        self.capacity = prompt.len();
        self.stats.steps += 1;
        self.note_peaks();
        logits
    }

    fn note_peaks(&mut self) {
        let held = self.prompt_len + self.held.len();
        self.stats.peak_tokens = self.stats.peak_tokens.max(held);
        self.stats.peak_capacity = self.stats.peak_capacity.max(self.capacity);
    }

    /// Appends each node's token to its parent, whose tokens are all held, and holds it too; returns
    /// the logits, `[nodes, vocab]` of each side.
    fn step(&mut self, prefixes: &PrefixTree, nodes: &[NodeId]) -> Vec<Logits> {
        self.make_room(nodes.len());
        let paths: Vec<Vec<u32>> = nodes.iter().map(|&n| self.path(prefixes, n)).collect();
        let ids = nodes
            .iter()
            .map(|&node| prefixes.token(node).unwrap_or_default());
        let ids: Vec<u32> = ids.collect();
        let first = self.used;
        let sides = self.sides.iter_mut();
        let logits = sides.map(|side| side.step(&ids, &paths, first)).collect();
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
    fn path(&self, prefixes: &PrefixTree, node: NodeId) -> Vec<u32> {
        let completion = prefixes
            .ancestors(node)
            .skip(1)
            .filter(|&above| above != NodeId::ROOT)
            .map(|above| self.held[&above].slot as u32);
        let mut path: Vec<u32> = completion.collect();
        path.extend((0..self.prompt_len as u32).rev());
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
        let mut kept: Vec<u32> = (0..self.prompt_len as u32).collect();
        for held in entries {
            let slot = kept.len();
            kept.push(held.slot as u32);
            held.slot = slot;
        }
        let live = kept.len();
        for side in &mut self.sides {
            side.rebuild(&kept, capacity);
        }
        self.used = live;
        self.capacity = capacity;
    }

    /// One batch of a frontier: recomputes what was forgotten above it, then steps.
    fn answer(&mut self, prefixes: &PrefixTree, nodes: &[NodeId]) -> Vec<Logits> {
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
        self.step(prefixes, nodes)
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
            side.clear();
            let checked = side.model.config().check_prompts(&[prompt], max_new_tokens);
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
            let logits = self.read_prompt(prefixes.prompt());
            if let Some((&NodeId::ROOT, behind)) = frontier.split_first() {
                rows.add(&side::to_host(logits).map_err(SearchError::model)?);
                rest = behind;
            }
        }
        for nodes in rest.chunks(self.max_rows) {
            let logits = side::to_host(self.answer(prefixes, nodes));
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
        let rows = |side: usize| {
            let rows = sides[side].chunks(self.vocab);
            rows.map(|logits| Row {
                logits,
                total: log_sum_exp(logits),
            })
        };
        let mut references = self.has_reference.then(|| rows(1));
        for policy in rows(0) {
            let reference = references.as_mut().and_then(Iterator::next);
            match self.top_k {
                None => {
                    self.full.extend(policy.logps());
                    self.reference.extend(reference.iter().flat_map(Row::logps));
                }
                Some(k) => {
                    let tokens = likeliest(policy.logits, k);
                    if let Some(reference) = reference {
                        let at = |&(token, _): &(u32, f32)| reference.logp(token);
                        self.reference.extend(tokens.iter().map(at));
                    }
                    let logp = |&(token, _): &(u32, f32)| (token, policy.logp(token));
                    self.top.push(tokens.iter().map(logp).collect());
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

/// Logits of one state's tokens.
struct Row<'a> {
    logits: &'a [f32],
    /// The log of the sum of their exponentials.
    total: f64,
}

impl Row<'_> {
    fn logp(&self, token: u32) -> f64 {
        f64::from(self.logits[token as usize]) - self.total
    }

    fn logps(&self) -> impl Iterator<Item = f64> {
        self.logits
            .iter()
            .map(|&logit| f64::from(logit) - self.total)
    }
}

/// The `k` tokens of the largest logits, in any order; the lower ids among equals.
fn likeliest(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let better = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0));
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(2 * k);
    if k == 0 {
        return best;
    }
    // Below or at it, `k` better ones are known.
    let mut bar = None;
    for (token, &logit) in logits.iter().enumerate() {
        if bar.is_some_and(|bar| logit <= bar) {
            continue;
        }
        best.push((token as u32, logit));
        if best.len() == 2 * k {
            let (_, &mut (_, least), _) = best.select_nth_unstable_by(k - 1, better);
            best.truncate(k);
            bar = Some(least);
        }
    }
    if best.len() > k {
        best.select_nth_unstable_by(k - 1, better);
        best.truncate(k);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_are_the_head_of_the_sorted_row() {
        for (count, k) in [(1, 1), (7, 3), (100, 99), (1000, 10), (1000, 1)] {
            // Few values, so that there are many equals.
            let logits: Vec<f32> = (0..count).map(|i| ((i * 7919) % 23) as f32).collect();
            let mut sorted: Vec<u32> = (0..count as u32).collect();
            sorted.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            let mut found = likeliest(&logits, k);
            found.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let found: Vec<u32> = found.into_iter().map(|(token, _)| token).collect();
            assert_eq!(found, sorted[..k]);
        }
    }
}
