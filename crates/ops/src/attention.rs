//! How tokens lie, how positions turn them, and attention between them.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use burn::tensor::{Bool, DType, Device, FloatDType, Tensor, TensorData};

#[cfg(feature = "flex")]
use crate::fused;
use crate::{masked_softmax, product};

/// Heads of attention, and their width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Heads of queries.
    pub queries: usize,
    /// Heads of keys and values, which groups of query heads share.
    pub keys: usize,
    /// Numbers in a head.
    pub width: usize,
}

impl Heads {
    /// Numbers of a token's queries, keys and values, side by side.
    pub fn joined(&self) -> usize {
        (self.queries + 2 * self.keys) * self.width
    }

    #[cfg(feature = "flex")]
    pub(crate) fn groups(&self) -> usize {
        self.queries / self.keys
    }
}

/// A prompt, and completions of it that do not see each other: ranges of tokens that follow one
/// another. A text of its own is a prompt without completions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    /// Tokens that each sees the ones before.
    pub prompt: Range<usize>,
    /// Tokens that each sees the prompt, and the ones before in its own range.
    pub completions: Vec<Range<usize>>,
}

impl Family {
    /// The place of all its tokens.
    pub fn tokens(&self) -> Range<usize> {
        let end = self.completions.last().map_or(self.prompt.end, |c| c.end);
        self.prompt.start..end
    }
}

/// Where in `[batch, seq]` tokens lie, and which see which. Places outside every family are padding:
/// they see nothing and nobody sees them. Clones share it.
#[derive(Clone, Debug)]
pub struct Spans(Arc<Parts>);

#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    /// By flat place, `row * seq + column`.
    pub(crate) families: Vec<Family>,
    /// Where a query may not look, `[batch, 1, seq, seq]`, on the device that first asked for it.
    mask: OnceLock<Tensor<4, Bool>>,
}

impl Spans {
    /// Families by flat place, `row * seq + column`; each stays within a row.
    ///
    /// # Panics
    ///
    /// If ranges of a family do not follow one another, families overlap or one leaves its row.
    pub fn new(batch: usize, seq: usize, families: Vec<Family>) -> Self {
        let mut taken = 0;
        for family in &families {
            let tokens = family.tokens();
            assert!(
                taken <= tokens.start && tokens.end <= batch * seq,
                "families follow one another"
            );
            assert!(
                tokens.is_empty() || tokens.start / seq == (tokens.end - 1) / seq,
                "a family stays within its row"
            );
            let mut next = family.prompt.end;
            for completion in &family.completions {
                assert_eq!(completion.start, next, "a family has no gaps");
                next = completion.end;
            }
            taken = tokens.end;
        }
        Self(Arc::new(Parts {
            batch,
            seq,
            families,
            mask: OnceLock::new(),
        }))
    }

    /// One text in each row of `[batch, seq]`, none of them padded.
    pub fn rows(batch: usize, seq: usize) -> Self {
        let row = |row| Family {
            prompt: row * seq..(row + 1) * seq,
            completions: Vec::new(),
        };
        Self::new(batch, seq, (0..batch).map(row).collect())
    }

    /// Rows and places in a row.
    pub fn dims(&self) -> [usize; 2] {
        [self.0.batch, self.0.seq]
    }

    /// The families, in their order.
    pub fn families(&self) -> &[Family] {
        &self.0.families
    }

    fn mask(&self, device: &Device) -> Tensor<4, Bool> {
        let parts = &*self.0;
        let make = || {
            let (batch, seq) = (parts.batch, parts.seq);
            let mut hidden = vec![true; batch * seq * seq];
            let mut see = |query: usize, keys: Range<usize>| {
                let row = query / seq * seq;
                hidden[query * seq..][keys.start - row..keys.end - row].fill(false);
            };
            for family in &parts.families {
                for query in family.prompt.clone() {
                    see(query, family.prompt.start..query + 1);
                }
                for completion in &family.completions {
                    for query in completion.clone() {
                        see(query, family.prompt.clone());
                        see(query, completion.start..query + 1);
                    }
                }
            }
            Tensor::from_data(TensorData::new(hidden, [batch, 1, seq, seq]), device)
        };
        let mask = parts.mask.get_or_init(make);
        if mask.device() == *device {
            mask.clone()
        } else {
            make()
        }
    }
}

/// Cosines and sines by which positions turn queries and keys: rotary embeddings, the first half of
/// the turned dimensions against the second. Clones share them.
#[derive(Clone, Debug)]
pub struct Turns(Arc<Tables>);

#[derive(Debug)]
pub(crate) struct Tables {
    /// Dimensions of a head that are turned, from its first.
    pub(crate) dims: usize,
    /// `[1 or batch, seq, dims / 2]`.
    shape: [usize; 3],
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    /// The same, `[1 or batch, seq, 1, dims / 2]`, on the device that first asked for them.
    tensors: OnceLock<[Tensor<4>; 2]>,
}

impl Turns {
    /// The turns of `positions`, `[seq]` for all rows or `[batch * seq]`, by angles
    /// `position · theta^(−2i / dims)`.
    pub fn new(dims: usize, theta: f64, positions: &[u32], seq: usize) -> Self {
        let half = dims / 2;
        // Frequencies and angles in f32, as the checkpoints' own code computes them.
        let frequencies: Vec<f32> = (0..half)
            .map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / dims as f32))
            .collect();
        let angles: Vec<f32> = positions
            .iter()
            .flat_map(|&position| frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        Self(Arc::new(Tables {
            dims,
            shape: [positions.len() / seq.max(1), seq, half],
            cos: angles.iter().map(|angle| angle.cos()).collect(),
            sin: angles.iter().map(|angle| angle.sin()).collect(),
            tensors: OnceLock::new(),
        }))
    }

    /// Cosines and sines of tokens that follow one another in a row, by the first one's flat place:
    /// `dims / 2` of each for a token.
    #[cfg(feature = "flex")]
    pub(crate) fn of(&self, first: usize, tokens: usize) -> (&[f32], &[f32]) {
        let [rows, seq, half] = self.0.shape;
        let first = if rows == 1 { first % seq } else { first };
        let at = first * half..(first + tokens) * half;
        (&self.0.cos[at.clone()], &self.0.sin[at])
    }

    /// Cosines and sines, `[1 or batch, seq, 1, dims / 2]`, where `x` is, in its type and as much in a
    /// graph as it.
    fn tables<const D: usize>(&self, x: &Tensor<D>) -> [Tensor<4>; 2] {
        let tables = &*self.0;
        let [rows, seq, half] = tables.shape;
        let device = x.device().inner();
        let make = || {
            [&tables.cos, &tables.sin].map(|table| {
                let data = TensorData::new(table.clone(), [rows, seq, 1, half]);
                Tensor::<4>::from_data(data, &device)
            })
        };
        let [cos, sin] = match tables.tensors.get_or_init(make) {
            [cos, sin] if cos.device() == device => [cos.clone(), sin.clone()],
            _ => make(),
        };
        [cos, sin].map(|table| like(table, x))
    }

    /// Turns each head of `x`, `[batch, seq, heads, width]`.
    pub fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let tables = &*self.0;
        let half = tables.dims / 2;
        let [cos, sin] = self.tables(&x);
        let [_, _, _, width] = x.dims();
        let first = x.clone().narrow(3, 0, half);
        let second = x.clone().narrow(3, half, half);
        let mut parts = vec![
            first.clone() * cos.clone() - second.clone() * sin.clone(),
            second * cos + first * sin,
        ];
        if tables.dims < width {
            parts.push(x.narrow(3, tables.dims, width - tables.dims));
        }
        Tensor::cat(parts, 3)
    }
}

/// A tensor without a graph, in the type of `x` and as much in a graph as it.
fn like<const D: usize>(tensor: Tensor<4>, x: &Tensor<D>) -> Tensor<4> {
    let tensor = tensor.cast(x.dtype());
    if x.is_autodiff() {
        tensor.autodiff()
    } else {
        tensor
    }
}

/// Causal attention of tokens that lie as `spans` says.
///
/// `qkv` is `[batch * seq, (heads + 2 key heads) · width]`: each token's queries, keys and values side
/// by side, by head. Queries and keys are turned by `turns`; scores are divided by `√width`. The
/// result is `[batch * seq, heads · width]`, 0 for padding.
///
/// On a CPU nothing of `[tokens, tokens]` is kept, not even for the gradient, and what a query may
/// not see costs nothing.
///
/// # Panics
///
/// If the shapes are others.
pub fn attention(qkv: Tensor<2>, heads: Heads, spans: &Spans, turns: Option<&Turns>) -> Tensor<2> {
    let [batch, seq] = spans.dims();
    assert_eq!(
        qkv.dims(),
        [batch * seq, heads.joined()],
        "a row of queries, keys and values for each place"
    );
    #[cfg(feature = "flex")]
    if fused(&qkv) {
        use crate::host::HostOps;
        use burn::backend::Dispatch;

        let out = Dispatch::attention(qkv.into_dispatch(), heads, spans.clone(), turns.cloned());
        return Tensor::from_dispatch(out);
    }
    let mask = spans.mask(&qkv.device().inner());
    let mask = if qkv.is_autodiff() {
        mask.autodiff()
    } else {
        mask
    };
    #[cfg(feature = "cube")]
    if crate::is_card(&qkv) {
        use crate::card::CardOps;
        use burn::backend::Dispatch;

        let (turned, [cos, sin]) = match turns {
            Some(turns) => (turns.0.dims, turns.tables(&qkv)),
            // Nothing reads it.
            None => (
                0,
                [(); 2].map(|()| like(Tensor::zeros([1; 4], &qkv.device().inner()), &qkv)),
            ),
        };
        let layout = crate::Layout {
            heads,
            batch,
            seq,
            turned,
        };
        let out = Dispatch::card_attention(
            qkv.into_dispatch(),
            cos.into_dispatch(),
            sin.into_dispatch(),
            mask.into_dispatch(),
            layout,
        );
        return Tensor::from_dispatch(out);
    }
    let part = |first: usize, count: usize| {
        let part = qkv
            .clone()
            .narrow(1, first * heads.width, count * heads.width);
        part.reshape([batch, seq, count, heads.width])
    };
    let turned = |x: Tensor<4>| match turns {
        Some(turns) => turns.apply(x),
        None => x,
    };
    let query = turned(part(0, heads.queries));
    let key = turned(part(heads.queries, heads.keys)).swap_dims(1, 2);
    let value = part(heads.queries + heads.keys, heads.keys).swap_dims(1, 2);
    attend(query, key, value, Some(mask))
}

/// Attention composed of tensor operations, over keys and values however they came.
///
/// `query` is `[batch, seq, heads, width]`; `key` and `value` are `[batch, key heads, keys, width]`;
/// `hidden`, `[1 or batch, 1, seq, keys]`, is true where a query may not look. The result is
/// `[batch * seq, heads · width]`.
pub fn attend(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    hidden: Option<Tensor<4, Bool>>,
) -> Tensor<2> {
    let [batch, seq, heads, width] = query.dims();
    let [_, key_heads, _, _] = key.dims();
    // The query heads of a group share their key head: they stack along the sequence.
    let query = query
        .swap_dims(1, 2)
        .reshape([batch, key_heads, heads / key_heads * seq, width])
        .mul_scalar(1.0 / (width as f64).sqrt());
    let dtype = value.dtype();
    // Sums of exponentials are in f32 where the products are in less.
    let scores = product(query, key.swap_dims(2, 3));
    let scores = match scores.dtype() {
        DType::BF16 | DType::F16 => scores.cast(FloatDType::F32),
        _ => scores,
    };
    // A padded query, which may look nowhere, weighs nothing and yields no NaN.
    let weights = match hidden {
        Some(hidden) => masked_softmax(scores, hidden),
        None => burn::tensor::activation::softmax(scores, 3),
    };
    product(weights.cast(dtype), value)
        .reshape([batch, heads, seq, width])
        .swap_dims(1, 2)
        .reshape([batch * seq, heads * width])
}
