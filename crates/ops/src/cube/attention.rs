//! Attention: two products and a softmax between, with queries, keys and values laid out for them, and
//! turned, in one pass each way.

use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::Shape;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::product::product;
use super::rows::{masked_softmax, softmax_backward};
use super::{Card, elem, fresh, units};
use crate::card::Layout;

/// What the way back of attention needs: heads that share keys are stacked, `[key heads * batch, 1,
/// groups * seq, ..]`.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    /// Turned and divided by `√width`, `[.., groups * seq, width]`.
    queries: CubeTensor,
    /// Turned, `[.., seq, width]`.
    keys: CubeTensor,
    /// `[.., seq, width]`.
    values: CubeTensor,
    /// `[.., groups * seq, seq]`.
    weights: CubeTensor,
}

/// Sizes that kernels share.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Sizes {
    batch: u32,
    seq: u32,
    queries: u32,
    keys: u32,
    width: u32,
    turned: u32,
    /// Rows of the tables of turns: 1, or as many as of the batch.
    tables: u32,
}

/// The place of number `at` of a token's queries, keys and values in the three tensors, and which of
/// them it is.
#[cube]
fn place(token: u32, at: u32, sizes: &Sizes) -> (u32, u32) {
    let groups = sizes.queries / sizes.keys;
    let head = at / sizes.width;
    let dim = at % sizes.width;
    let row = token / sizes.seq;
    let column = token % sizes.seq;
    let mut which = 0u32.runtime();
    let mut key_head = head / groups;
    let mut stacked = groups;
    let mut group = head % groups;
    if head >= sizes.queries {
        which = 1u32.runtime();
        key_head = head - sizes.queries;
        stacked = 1u32.runtime();
        group = 0u32.runtime();
        if key_head >= sizes.keys {
            which = 2u32.runtime();
            key_head -= sizes.keys;
        }
    }
    let row = (key_head * sizes.batch + row) * stacked + group;
    ((row * sizes.seq + column) * sizes.width + dim, which)
}

/// Which number of a head turns with number `dim`, where their cosine and sine stand, and whether the
/// two are the first and the second of their pair.
#[cube]
fn partner(token: u32, dim: u32, sizes: &Sizes) -> (u32, u32, bool) {
    let half = sizes.turned / 2;
    let first = dim < half;
    let mut other = dim + half;
    let mut pair = dim;
    if !first {
        other = dim - half;
        pair = other;
    }
    let mut row = token;
    if sizes.tables == 1 {
        row = token % sizes.seq;
    }
    (other, row * half + pair, first)
}

/// A number for each of `qkv`: laid out by heads, turned, queries scaled.
#[cube(launch)]
fn by_heads_kernel<F: Float>(
    qkv: &Tensor<F>,
    cos: &Tensor<F>,
    sin: &Tensor<F>,
    queries: &mut Tensor<F>,
    keys: &mut Tensor<F>,
    values: &mut Tensor<F>,
    sizes: Sizes,
    scale: f32,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= qkv.len() {
        terminate!();
    }
    let joined = (sizes.queries + 2 * sizes.keys) * sizes.width;
    let token = ABSOLUTE_POS as u32 / joined;
    let at = ABSOLUTE_POS as u32 % joined;
    let (to, which) = place(token, at, &sizes);
    let mut x = f32::cast_from(qkv[ABSOLUTE_POS]);
    let dim = at % sizes.width;
    if which < 2 && dim < sizes.turned {
        let (other, pair, first) = partner(token, dim, &sizes);
        let y = f32::cast_from(qkv[(token * joined + at - dim + other) as usize]);
        let cos = f32::cast_from(cos[pair as usize]);
        let sin = f32::cast_from(sin[pair as usize]);
        if first {
            x = x * cos - y * sin;
        } else {
            x = x * cos + y * sin;
        }
    }
    if which == 0 {
        queries[to as usize] = F::cast_from(x * scale);
    } else if which == 1 {
        keys[to as usize] = F::cast_from(x);
    } else {
        values[to as usize] = F::cast_from(x);
    }
}

/// A number of the tensor that `which` names.
#[cube]
fn number<F: Float>(
    queries: &Tensor<F>,
    keys: &Tensor<F>,
    values: &Tensor<F>,
    at: u32,
    which: u32,
) -> f32 {
    if which == 0 {
        f32::cast_from(queries[at as usize])
    } else if which == 1 {
        f32::cast_from(keys[at as usize])
    } else {
        f32::cast_from(values[at as usize])
    }
}

/// Gradients by heads, turned back to where `qkv` has its numbers.
#[cube(launch)]
fn from_heads_kernel<F: Float>(
    queries: &Tensor<F>,
    keys: &Tensor<F>,
    values: &Tensor<F>,
    cos: &Tensor<F>,
    sin: &Tensor<F>,
    out: &mut Tensor<F>,
    sizes: Sizes,
    scale: f32,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let joined = (sizes.queries + 2 * sizes.keys) * sizes.width;
    let token = ABSOLUTE_POS as u32 / joined;
    let at = ABSOLUTE_POS as u32 % joined;
    let (from, which) = place(token, at, &sizes);
    let mut x = number::<F>(queries, keys, values, from, which);
    let dim = at % sizes.width;
    if which < 2 && dim < sizes.turned {
        let (other, pair, first) = partner(token, dim, &sizes);
        let y = number::<F>(queries, keys, values, from - dim + other, which);
        let cos = f32::cast_from(cos[pair as usize]);
        let sin = f32::cast_from(sin[pair as usize]);
        if first {
            x = x * cos + y * sin;
        } else {
            x = x * cos - y * sin;
        }
    }
    if which == 0 {
        x *= scale;
    }
    out[ABSOLUTE_POS] = F::cast_from(x);
}

/// What comes out, `[batch * seq, heads · width]`, and what the way back needs.
pub(crate) fn attention(
    qkv: CubeTensor,
    tables: &[CubeTensor; 2],
    hidden: CubeTensor,
    layout: Layout,
) -> (CubeTensor, Kept) {
    let qkv = into_contiguous(qkv);
    let groups = layout.heads.queries / layout.heads.keys;
    let [queries, keys, values] =
        [groups, 1, 1].map(|stacked| fresh(&qkv, layout.stacked(stacked), qkv.dtype));
    let [cos, sin] = tables.clone().map(into_contiguous);
    let (count, dim) = units(&qkv);
    let dtype = elem(&qkv);
    by_heads_kernel::launch(
        &queries.client,
        count,
        dim,
        qkv.into_tensor_arg(),
        cos.into_tensor_arg(),
        sin.into_tensor_arg(),
        queries.clone().into_tensor_arg(),
        keys.clone().into_tensor_arg(),
        values.clone().into_tensor_arg(),
        layout.sizes(&tables[0]),
        layout.scale(),
        dtype,
    );
    let scores = product(queries.clone(), turned_over(&keys));
    let weights = masked_softmax(scores, hidden);
    let out = product(weights.clone(), values.clone());
    let kept = Kept {
        queries,
        keys,
        values,
        weights,
    };
    (layout.by_tokens(out), kept)
}

/// The gradient with respect to `qkv`, from that with respect to what came out.
pub(crate) fn attention_backward(
    kept: Kept,
    tables: &[CubeTensor; 2],
    grad: CubeTensor,
    layout: Layout,
) -> CubeTensor {
    let grad = layout.by_heads(grad);
    let for_values = product(turned_over(&kept.weights), grad.clone());
    let for_weights = product(grad, turned_over(&kept.values));
    let for_scores = softmax_backward(kept.weights, for_weights);
    let for_keys = product(turned_over(&for_scores), kept.queries);
    let for_queries = product(for_scores, kept.keys);
    let (heads, tokens) = (layout.heads, layout.batch * layout.seq);
    let shape = Shape::new([tokens, heads.joined()]);
    let out = fresh(&for_keys, shape, for_keys.dtype);
    let [cos, sin] = tables.clone().map(into_contiguous);
    let (count, dim) = units(&out);
    from_heads_kernel::launch(
        &out.client,
        count,
        dim,
        for_queries.into_tensor_arg(),
        for_keys.into_tensor_arg(),
        for_values.into_tensor_arg(),
        cos.into_tensor_arg(),
        sin.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        layout.sizes(&tables[0]),
        layout.scale(),
        elem(&out),
    );
    out
}

fn turned_over(x: &CubeTensor) -> CubeTensor {
    Card::float_swap_dims(x.clone(), 2, 3)
}

impl Layout {
    fn scale(&self) -> f32 {
        1.0 / (self.heads.width as f32).sqrt()
    }

    fn sizes(&self, table: &CubeTensor) -> SizesLaunch {
        let heads = self.heads;
        SizesLaunch::new(
            self.batch as u32,
            self.seq as u32,
            heads.queries as u32,
            heads.keys as u32,
            heads.width as u32,
            self.turned as u32,
            table.shape()[0] as u32,
        )
    }

    /// Heads of keys by rows of the batch, with so many heads on each other.
    fn stacked(&self, heads: usize) -> Shape {
        let groups = self.heads.keys * self.batch;
        Shape::new([groups, 1, heads * self.seq, self.heads.width])
    }

    /// `[batch * seq, heads · width]` of what is stacked by heads.
    fn by_tokens(&self, x: CubeTensor) -> CubeTensor {
        let heads = self.heads;
        let groups = heads.queries / heads.keys;
        let split = [heads.keys, self.batch, groups, self.seq, heads.width];
        let x = Card::float_permute(Card::float_reshape(x, Shape::new(split)), &[1, 3, 0, 2, 4]);
        let (tokens, width) = (self.batch * self.seq, heads.queries * heads.width);
        Card::float_reshape(x, Shape::new([tokens, width]))
    }

    /// The other way.
    fn by_heads(&self, x: CubeTensor) -> CubeTensor {
        let heads = self.heads;
        let groups = heads.queries / heads.keys;
        let split = [self.batch, self.seq, heads.keys, groups, heads.width];
        let x = Card::float_permute(Card::float_reshape(x, Shape::new(split)), &[2, 0, 3, 1, 4]);
        Card::float_reshape(x, self.stacked(groups))
    }
}
