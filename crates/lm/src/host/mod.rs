//! A model on the processor's own terms: weights laid out for decoding, no tensors between.
//!
//! Decoding reads every weight once for a few rows, and a tensor library spends more on getting
//! there (an allocation, a copy and a thread's wake-up an operation) than on the numbers. Here a
//! step reads the weights front to back, keys and values stay where they were written, and nothing
//! is allocated from token to token. The results are those of [`Transformer`] up to the order of
//! summation.

mod attention;
mod cache;
mod log_sum_exp;
mod matrix;
mod pool;

use burn::tensor::Tensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use self::attention::Heads;
pub(crate) use self::cache::HostCache;
pub(crate) use self::log_sum_exp::log_sum_exp;
use self::matrix::{Matrix, Workspace};
pub(crate) use self::pool::Pool;
use crate::config::{MlpKind, ModelConfig, Rope};
use crate::model::{Block, Norm, Projection, Transformer};
use ops::exp;

/// Elements of an activation beyond which the cores share the work.
const WORTH_SHARING: usize = 1 << 12;

/// A copy of a model's weights, laid out for decoding.
#[derive(Debug)]
pub(crate) struct HostModel {
    config: ModelConfig,
    /// `[vocab, hidden]`.
    embed: Vec<f32>,
    /// `[positions, hidden]`.
    positions: Option<Vec<f32>>,
    blocks: Vec<HostBlock>,
    norm: HostNorm,
    head: Matrix,
}

#[derive(Debug)]
struct HostBlock {
    attn_norm: HostNorm,
    /// Query, key and value side by side.
    qkv: HostLinear,
    query_norm: Option<Vec<f32>>,
    key_norm: Option<Vec<f32>>,
    output: HostLinear,
    mlp_norm: HostNorm,
    /// Gate, where there is one, and up side by side.
    up: HostLinear,
    down: HostLinear,
}

#[derive(Debug)]
struct HostLinear {
    weight: Matrix,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
struct HostNorm {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    eps: f32,
}

/// A token to read.
#[derive(Clone, Debug)]
pub(crate) struct NewToken {
    pub(crate) id: u32,
    /// Its slots: those of the tokens before it, then its own. A range of the paths.
    pub(crate) path: std::ops::Range<usize>,
}

/// Buffers of a step, reused from one to the next.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    work: Workspace,
    x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    mixed: Vec<f32>,
    inner: Vec<f32>,
    out: Vec<f32>,
    turns: Vec<(f32, f32)>,
}

impl HostModel {
    /// Copies the weights of `model`; an adapter is merged into them.
    pub(crate) fn new(model: &Transformer) -> Self {
        if model.lora.is_some() {
            return Self::new(&model.merge());
        }
        let config = model.config().clone();
        let embed = read(model.embed.val());
        let head = match &model.head {
            Some(head) => HostLinear::new(config.hidden_size, &[head]).weight,
            None => Matrix::from_rows(config.hidden_size, &embed),
        };
        Self {
            positions: model.positions.as_ref().map(|table| read(table.val())),
            blocks: model
                .blocks
                .iter()
                .map(|block| HostBlock::new(block, &config))
                .collect(),
            norm: HostNorm::new(&model.norm),
            embed,
            head,
            config,
        }
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of the weights that a step reads, however many tokens it takes: all but tables that
    /// are looked up.
    pub(crate) fn bytes(&self) -> usize {
        let blocks = self.blocks.iter().map(HostBlock::bytes);
        blocks.sum::<usize>() + self.norm.bytes() + self.head.bytes()
    }

    /// Runs `work` on `rows` rows by a thread of rayon's pool, if there is something to share.
    ///
    /// From outside, every shared product would hand itself to the pool and sleep until it is done,
    /// some thirty times a step.
    fn in_pool<T: Send>(&self, rows: usize, work: impl FnOnce() -> T + Send) -> T {
        let weights = self.config.hidden_size * self.config.intermediate_size;
        if rows * weights <= matrix::WORTH_SHARING {
            work()
        } else {
            rayon::scope(|_| work())
        }
    }

    /// Reads new tokens, whose keys and values go to the last slots of their paths; leaves their
    /// hidden states in `scratch`.
    pub(crate) fn read(
        &self,
        tokens: &[NewToken],
        paths: &[u32],
        pool: &mut Pool,
        scratch: &mut Scratch,
    ) {
        self.in_pool(tokens.len(), || self.blocks(tokens, paths, pool, scratch));
    }

    fn blocks(&self, tokens: &[NewToken], paths: &[u32], pool: &mut Pool, scratch: &mut Scratch) {
        let config = &self.config;
        let heads = Heads {
            n_kv: config.n_kv_heads,
            groups: config.n_heads / config.n_kv_heads,
            width: config.head_dim,
        };
        let path = |row: usize| &paths[tokens[row].path.clone()];
        let slots = (0..tokens.len()).map(|row| path(row)[path(row).len() - 1] as usize);
        let slots: Vec<usize> = slots.collect();
        pool.cover(slots.iter().max().map_or(0, |slot| slot + 1));
        let hidden = config.hidden_size;
        let Scratch {
            work,
            x,
            normed,
            qkv,
            mixed,
            inner,
            out,
            turns,
        } = scratch;
        self.embed(tokens, x);
        if let Some(rope) = config.rope {
            turns.clear();
            turns.extend(tokens.iter().flat_map(|t| angles(rope, t.path.len() - 1)));
        }
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let (queries, width) = (config.n_heads * config.head_dim, pool.width());
        let stride = queries + 2 * width;
        let arch = Arch::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            block.attn_norm.apply(x, normed);
            block.qkv.apply(normed, qkv, work);
            let layer = pool.layer(layer);
            for (row, qkv) in qkv.chunks_exact_mut(stride).enumerate() {
                arch.dispatch(
                    #[inline(always)]
                    || {
                        let (query, rest) = qkv.split_at_mut(queries);
                        let (key, value) = rest.split_at_mut(width);
                        if let (Some(query_norm), Some(key_norm)) =
                            (&block.query_norm, &block.key_norm)
                        {
                            let eps = config.norm_eps as f32;
                            rms_norm_heads(query, query_norm, eps);
                            rms_norm_heads(key, key_norm, eps);
                        }
                        if let Some(rope) = config.rope {
                            let half = rope.dims / 2;
                            let turns = &turns[row * half..][..half];
                            turn(query, turns, config.head_dim);
                            turn(key, turns, config.head_dim);
                        }
                        for query in query {
                            *query *= scale;
                        }
                        let place = slots[row] * width..(slots[row] + 1) * width;
                        layer.keys[place.clone()].copy_from_slice(key);
                        layer.values[place].copy_from_slice(value);
                    },
                );
            }
            mixed.resize(tokens.len() * queries, 0.0);
            attention::attend(qkv, stride, heads, layer, path, mixed);
            block.output.apply(mixed, out, work);
            if config.parallel_residual {
                block.mlp_norm.apply(x, normed);
                add(x, out);
            } else {
                add(x, out);
                block.mlp_norm.apply(x, normed);
            }
            block.up.apply(normed, inner, work);
            activate(inner, config);
            block.down.apply(inner, out, work);
            add(x, out);
        }
        debug_assert_eq!(x.len(), tokens.len() * hidden);
    }

    /// The last block's output for one of the tokens read last, `[hidden]`.
    pub(crate) fn hidden<'s>(&self, row: usize, scratch: &'s Scratch) -> &'s [f32] {
        let hidden = self.config.hidden_size;
        &scratch.x[row * hidden..][..hidden]
    }

    /// Logits behind all the tokens read last, `[tokens, vocab]`.
    pub(crate) fn logits(&self, scratch: &mut Scratch) -> Vec<f32> {
        let x = std::mem::take(&mut scratch.x);
        let logits = self.head(&x, scratch);
        scratch.x = x;
        logits
    }

    /// Logits, `[rows, vocab]`, behind outputs of the last block, `[rows, hidden]`.
    pub(crate) fn head(&self, hidden: &[f32], scratch: &mut Scratch) -> Vec<f32> {
        let Scratch { work, normed, .. } = scratch;
        self.in_pool(hidden.len() / self.config.hidden_size, || {
            self.norm.apply(hidden, normed);
            let mut logits = Vec::new();
            self.head.multiply(normed, &mut logits, work);
            logits
        })
    }

    fn embed(&self, tokens: &[NewToken], x: &mut Vec<f32>) {
        let hidden = self.config.hidden_size;
        x.clear();
        for token in tokens {
            let from = token.id as usize * hidden;
            x.extend_from_slice(&self.embed[from..from + hidden]);
        }
        if let Some(positions) = &self.positions {
            for (x, token) in x.chunks_exact_mut(hidden).zip(tokens) {
                add(x, &positions[(token.path.len() - 1) * hidden..][..hidden]);
            }
        }
    }
}

impl HostBlock {
    fn new(block: &Block, config: &ModelConfig) -> Self {
        let hidden = config.hidden_size;
        let optional = |weight: &Option<burn::module::Param<Tensor<1>>>| {
            weight.as_ref().map(|weight| read(weight.val()))
        };
        let up: Vec<&Projection> = block.gate.iter().chain([&block.up]).collect();
        Self {
            attn_norm: HostNorm::new(&block.attn_norm),
            qkv: HostLinear::new(hidden, &[&block.query, &block.key, &block.value]),
            query_norm: optional(&block.query_norm),
            key_norm: optional(&block.key_norm),
            output: HostLinear::new(config.n_heads * config.head_dim, &[&block.output]),
            mlp_norm: HostNorm::new(&block.mlp_norm),
            up: HostLinear::new(hidden, &up),
            down: HostLinear::new(config.intermediate_size, &[&block.down]),
        }
    }

    fn bytes(&self) -> usize {
        let products = [&self.qkv, &self.output, &self.up, &self.down];
        let norms = [&self.attn_norm, &self.mlp_norm];
        products.iter().map(|linear| linear.bytes()).sum::<usize>()
            + norms.iter().map(|norm| norm.bytes()).sum::<usize>()
    }
}

impl HostLinear {
    fn new(inputs: usize, parts: &[&Projection]) -> Self {
        let weights: Vec<Vec<f32>> = parts.iter().map(|part| read(part.weight.val())).collect();
        let bias = parts.iter().any(|part| part.bias.is_some()).then(|| {
            let parts = parts.iter().zip(&weights);
            parts
                .flat_map(|(part, weight)| match &part.bias {
                    Some(bias) => read(bias.val()),
                    None => vec![0.0; weight.len() / inputs],
                })
                .collect()
        });
        Self {
            weight: Matrix::from_columns(inputs, &weights),
            bias,
        }
    }

    fn bytes(&self) -> usize {
        self.weight.bytes() + self.bias.as_deref().map_or(0, size_of_val)
    }

    fn apply(&self, x: &[f32], out: &mut Vec<f32>, work: &mut Workspace) {
        self.weight.multiply(x, out, work);
        if let Some(bias) = &self.bias {
            for out in out.chunks_exact_mut(bias.len()) {
                add(out, bias);
            }
        }
    }
}

impl HostNorm {
    fn new(norm: &Norm) -> Self {
        Self {
            weight: read(norm.weight.val()),
            bias: norm.bias.as_ref().map(|bias| read(bias.val())),
            eps: norm.eps as f32,
        }
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.weight[..]) + self.bias.as_deref().map_or(0, size_of_val)
    }

    /// Normalises the rows of `x`.
    fn apply(&self, x: &[f32], out: &mut Vec<f32>) {
        let width = self.weight.len();
        out.clear();
        out.extend_from_slice(x);
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for row in out.chunks_exact_mut(width) {
                    if let Some(bias) = &self.bias {
                        let mean = sum(row) / width as f32;
                        for x in row.iter_mut() {
                            *x -= mean;
                        }
                        rms_norm_heads(row, &self.weight, self.eps);
                        add(row, bias);
                    } else {
                        rms_norm_heads(row, &self.weight, self.eps);
                    }
                }
            },
        );
    }
}

/// The sum of a row, in a few sums side by side.
#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let mut sums = [0.0; 16];
    let chunks = x.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Normalises every stretch of `x` that is as long as `weight` by its root mean square.
#[inline(always)]
fn rms_norm_heads(x: &mut [f32], weight: &[f32], eps: f32) {
    for x in x.chunks_exact_mut(weight.len()) {
        let mut squares = [0.0_f32; 16];
        let chunks = x.chunks_exact(16);
        let rest: f32 = chunks.remainder().iter().map(|x| x * x).sum();
        for chunk in chunks {
            for (square, x) in squares.iter_mut().zip(chunk) {
                *square += x * x;
            }
        }
        let mean = (squares.iter().sum::<f32>() + rest) / x.len() as f32;
        let root = (mean + eps).sqrt();
        for (x, weight) in x.iter_mut().zip(weight) {
            *x = *x / root * weight;
        }
    }
}

#[inline(always)]
fn add(x: &mut [f32], change: &[f32]) {
    for (x, change) in x.iter_mut().zip(change) {
        *x += change;
    }
}

/// Cosines and sines of a position, in f32 as the checkpoints' own code computes them.
fn angles(rope: Rope, position: usize) -> impl Iterator<Item = (f32, f32)> {
    (0..rope.dims / 2).map(move |i| {
        let frequency = 1.0 / (rope.theta as f32).powf((2 * i) as f32 / rope.dims as f32);
        let angle = position as f32 * frequency;
        (angle.cos(), angle.sin())
    })
}

/// Turns the first dimensions of each head: the first half of them against the second.
#[inline(always)]
fn turn(x: &mut [f32], turns: &[(f32, f32)], head_dim: usize) {
    let half = turns.len();
    for head in x.chunks_exact_mut(head_dim) {
        let (first, second) = head.split_at_mut(half);
        for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(turns) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

/// The feed-forward part's nonlinearity, `[rows, intermediate]` in the end.
fn activate(inner: &mut Vec<f32>, config: &ModelConfig) {
    let width = config.intermediate_size;
    let arch = Arch::new();
    let share = |inner: &mut [f32], row: usize, one: &(dyn Fn(&mut [f32]) + Sync)| {
        if inner.len() <= WORTH_SHARING {
            inner.chunks_exact_mut(row).for_each(one);
        } else {
            inner.par_chunks_exact_mut(row).for_each(one);
        }
    };
    match config.mlp {
        MlpKind::SwiGlu => {
            share(inner, 2 * width, &|row| {
                let (gate, up) = row.split_at_mut(width);
                arch.dispatch(SwiGlu { gate, up });
            });
            // The gated rows close up.
            let rows = inner.len() / (2 * width);
            for row in 1..rows {
                inner.copy_within(2 * row * width..(2 * row + 1) * width, row * width);
            }
            inner.truncate(rows * width);
        }
        MlpKind::GeluTanh => share(inner, width, &|row| arch.dispatch(GeluTanh(row))),
        MlpKind::Gelu => share(inner, width, &|row| {
            for x in row {
                *x = 0.5 * *x * (1.0 + libm::erff(*x * std::f32::consts::FRAC_1_SQRT_2));
            }
        }),
    }
}

/// `silu(gate) * up` in the place of `gate`.
struct SwiGlu<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl WithSimd for SwiGlu<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        for (gate, up) in self.gate.iter_mut().zip(self.up) {
            *gate = *gate / (1.0 + exp(-*gate)) * *up;
        }
    }
}

/// GELU as GPT-2 has it.
struct GeluTanh<'a>(&'a mut [f32]);

impl WithSimd for GeluTanh<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        // `(1 + tanh(z)) / 2 = 1 / (1 + exp(-2z))`
        let root = std::f32::consts::FRAC_2_PI.sqrt();
        for x in self.0 {
            let z = root * (*x + 0.044_715 * *x * *x * *x);
            *x /= 1.0 + exp(-2.0 * z);
        }
    }
}

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor
        .try_into_vec_as()
        .expect("parameters of a model on a working device can be read")
}
