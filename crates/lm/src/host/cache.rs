//! Batches of prefixes on the processor.

use std::sync::Arc;

use super::{HostModel, NewToken, Pool, Scratch};

/// Tokens that are read at once: enough to use the weights well, and few enough that what is
/// between the layers stays small.
const READ_AT_ONCE: usize = 256;

/// Keys and values of a batch of prefixes, each the list of its tokens' slots.
#[derive(Debug)]
pub(crate) struct HostCache {
    /// Shared between clones until one appends.
    pool: Arc<Pool>,
    rows: Vec<Vec<u32>>,
    /// Slots given out.
    used: usize,
    /// Tokens that can still be appended to each row.
    room: usize,
    scratch: Scratch,
}

impl Clone for HostCache {
    fn clone(&self) -> Self {
        Self::of(self, self.rows.clone())
    }
}

impl HostCache {
    fn of(other: &Self, rows: Vec<Vec<u32>>) -> Self {
        Self {
            pool: Arc::clone(&other.pool),
            rows,
            used: other.used,
            room: other.room,
            scratch: Scratch::default(),
        }
    }

    /// Reads prompts with room for `n_new` further tokens each; also the logits behind them,
    /// `[rows, vocab]`.
    pub(crate) fn prefill<P: AsRef<[u32]>>(
        model: &HostModel,
        prompts: &[P],
        n_new: usize,
    ) -> (Self, Vec<f32>) {
        let mut pool = Pool::new(model.config());
        let count: usize = prompts.iter().map(|prompt| prompt.as_ref().len()).sum();
        pool.reserve(count + prompts.len() * n_new);
        let mut scratch = Scratch::default();
        let logits = model.read_prompts(prompts, &mut pool, &mut scratch);
        let mut used = 0;
        let rows = prompts.iter().map(|prompt| {
            let first = used;
            used += prompt.as_ref().len();
            (first as u32..used as u32).collect()
        });
        let rows = rows.collect();
        let cache = Self {
            pool: Arc::new(pool),
            rows,
            used,
            room: n_new,
            scratch,
        };
        (cache, logits)
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows.len()
    }

    pub(crate) fn lengths(&self) -> Vec<usize> {
        self.rows.iter().map(Vec::len).collect()
    }

    pub(crate) fn room(&self) -> usize {
        self.room
    }

    pub(crate) fn select(&self, rows: &[usize]) -> Self {
        Self::of(
            self,
            rows.iter().map(|&row| self.rows[row].clone()).collect(),
        )
    }

    /// Appends a token to every row; the logits of the next, `[rows, vocab]`.
    pub(crate) fn step(&mut self, model: &HostModel, tokens: &[u32]) -> Vec<f32> {
        let mut paths = Vec::with_capacity(self.rows.iter().map(Vec::len).sum::<usize>());
        let mut new = Vec::with_capacity(tokens.len());
        for (row, &id) in self.rows.iter_mut().zip(tokens) {
            row.push(self.used as u32);
            self.used += 1;
            let first = paths.len();
            paths.extend_from_slice(row);
            let path = first..paths.len();
            new.push(NewToken { id, path });
        }
        self.room -= 1;
        model.read(
            &new,
            &paths,
            Arc::make_mut(&mut self.pool),
            &mut self.scratch,
        );
        model.logits(&mut self.scratch)
    }
}

impl HostModel {
    /// Reads prompts into the slots from 0 on, one after the other; the logits behind each,
    /// `[prompts, vocab]`.
    pub(crate) fn read_prompts<P: AsRef<[u32]>>(
        &self,
        prompts: &[P],
        pool: &mut Pool,
        scratch: &mut Scratch,
    ) -> Vec<f32> {
        let count: usize = prompts.iter().map(|prompt| prompt.as_ref().len()).sum();
        // Every prompt's slots follow each other, so that the prefix of a token is a range of this.
        let paths: Vec<u32> = (0..count as u32).collect();
        let mut tokens = Vec::with_capacity(count);
        let mut last = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let first = tokens.len();
            tokens.extend(
                prompt
                    .as_ref()
                    .iter()
                    .enumerate()
                    .map(|(index, &id)| NewToken {
                        id,
                        path: first..first + index + 1,
                    }),
            );
            last.push(tokens.len() - 1);
        }
        let mut hidden = Vec::with_capacity(prompts.len() * self.config().hidden_size);
        let mut last = last.into_iter().peekable();
        for (part, tokens) in tokens.chunks(READ_AT_ONCE).enumerate() {
            self.read(tokens, &paths, pool, scratch);
            let first = part * READ_AT_ONCE;
            while let Some(row) = last.next_if(|&row| row < first + tokens.len()) {
                hidden.extend_from_slice(self.hidden(row - first, scratch));
            }
        }
        self.head(&hidden, scratch)
    }
}
