//! One model of a search and its pool of keys and values.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::decode::device::{self, Past, layout};
use crate::decode::on_cpu;
use crate::error::LmError;
use crate::host::{HostModel, NewToken, Pool, Scratch};
use crate::model::Transformer;

/// Bytes of one key or value: f32.
const ELEMENT_BYTES: usize = 4;

/// A model and where it keeps what it has read.
#[derive(Debug)]
pub(super) struct Side<'a> {
    pub(super) model: &'a Transformer,
    store: Store,
}

#[derive(Debug)]
enum Store {
    /// Keys and values of each layer on the model's device, `[capacity, kv_heads * head_dim]`.
    Tensors(Vec<(Tensor<2>, Tensor<2>)>),
    /// On the processor, with the weights laid out for it.
    Host(Box<Host>),
}

#[derive(Debug)]
struct Host {
    model: HostModel,
    pool: Pool,
    scratch: Scratch,
}

/// Logits, `[rows, vocab]`, where they came to be.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "there is one for each side of a step; how large depends on the backends"
)]
pub(super) enum Logits {
    Tensor(Tensor<2>),
    Host(Vec<f32>),
}

impl<'a> Side<'a> {
    pub(super) fn new(model: &'a Transformer) -> Self {
        if !on_cpu(model) {
            return Self::of_tensors(model);
        }
        let host = HostModel::new(model);
        let host = Host {
            pool: Pool::new(host.config()),
            scratch: Scratch::default(),
            model: host,
        };
        Self {
            model,
            store: Store::Host(Box::new(host)),
        }
    }

    pub(super) fn of_tensors(model: &'a Transformer) -> Self {
        Self {
            model,
            store: Store::Tensors(Vec::new()),
        }
    }

    pub(super) fn is_host(&self) -> bool {
        matches!(self.store, Store::Host(_))
    }

    /// Bytes of a token's keys and values.
    pub(super) fn bytes_per_token(&self) -> usize {
        let config = self.model.config();
        2 * config.n_layers * config.n_kv_heads * config.head_dim * ELEMENT_BYTES
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        match &mut self.store {
            Store::Tensors(layers) => layers.clear(),
            Store::Host(host) => host.pool.keep(&[]),
        }
    }

    /// Reads a prompt into the first slots; the logits behind it.
    pub(super) fn read_prompt(&mut self, prompt: &[u32]) -> Logits {
        match &mut self.store {
            Store::Tensors(layers) => {
                let (cache, next) = device::prefill(self.model, &[prompt], prompt.len(), 0);
                let slots = |(key, value)| (to_slots(key), to_slots(value));
                *layers = cache.into_layers().into_iter().map(slots).collect();
                Logits::Tensor(next)
            }
            Store::Host(host) => {
                let Host {
                    model,
                    pool,
                    scratch,
                } = &mut **host;
                Logits::Host(model.read_prompts(&[prompt], pool, scratch))
            }
        }
    }

    /// Appends a token to each path and puts its keys and values in the slots from `first` on.
    pub(super) fn step(&mut self, ids: &[u32], paths: &[Vec<u32>], first: usize) -> Logits {
        match &mut self.store {
            Store::Tensors(layers) => {
                Logits::Tensor(step_tensors(self.model, layers, ids, paths, first))
            }
            Store::Host(host) => {
                let Host {
                    model,
                    pool,
                    scratch,
                } = &mut **host;
                let mut slots = Vec::new();
                let tokens = ids.iter().zip(paths).enumerate().map(|(row, (&id, path))| {
                    let from = slots.len();
                    slots.extend_from_slice(path);
                    slots.push((first + row) as u32);
                    let path = from..slots.len();
                    NewToken { id, path }
                });
                let tokens: Vec<NewToken> = tokens.collect();
                model.read(&tokens, &slots, pool, scratch);
                Logits::Host(model.logits(scratch))
            }
        }
    }

    /// Moves the slots `kept`, which ascend, to the front of a pool of `capacity` slots.
    pub(super) fn rebuild(&mut self, kept: &[u32], capacity: usize) {
        match &mut self.store {
            Store::Tensors(layers) => {
                let device = self.model.device();
                let live = kept.len();
                let kept: Vec<i64> = kept.iter().map(|&slot| i64::from(slot)).collect();
                let kept = Tensor::<1, Int>::from_data(TensorData::new(kept, [live]), &device);
                for (keys, values) in layers {
                    for pool in [keys, values] {
                        pool.inplace(|pool| {
                            let [_, width] = pool.dims();
                            let free = Tensor::zeros([capacity - live, width], &device);
                            Tensor::cat(vec![pool.select(0, kept.clone()), free], 0)
                        });
                    }
                }
            }
            Store::Host(host) => {
                host.pool.keep(kept);
                host.pool.reserve(capacity);
            }
        }
    }
}

/// The logits of all sides, in one read if they are on a device: `[sides][rows * vocab]`.
pub(super) fn to_host(logits: Vec<Logits>) -> Result<Vec<Vec<f32>>, LmError> {
    let mut host = Vec::new();
    let mut tensors = Vec::new();
    for logits in logits {
        match logits {
            Logits::Tensor(tensor) => tensors.push(tensor),
            Logits::Host(rows) => host.push(rows),
        }
    }
    let Some(first) = tensors.first() else {
        return Ok(host);
    };
    let size: usize = first.dims().iter().product();
    let all = Tensor::cat(tensors, 0)
        .try_into_vec_as::<f32>()
        .map_err(|error| LmError::Request(format!("logits could not be read: {error:?}")))?;
    Ok(all.chunks(size).map(<[f32]>::to_vec).collect())
}

fn step_tensors(
    model: &Transformer,
    layers: &mut [(Tensor<2>, Tensor<2>)],
    ids: &[u32],
    paths: &[Vec<u32>],
    first: usize,
) -> Tensor<2> {
    let longest = paths.iter().map(Vec::len).max().unwrap_or(0);
    let starts: Vec<usize> = paths.iter().map(|path| longest - path.len()).collect();
    let device: Device = model.device();
    let integers = |values: Vec<i64>| {
        let count = values.len();
        Tensor::<1, Int>::from_data(TensorData::new(values, [count]), &device)
    };
    // Padding is masked, so that any slot does.
    let slots = paths.iter().zip(&starts).flat_map(|(path, &start)| {
        let path = path.iter().map(|&slot| i64::from(slot));
        std::iter::repeat_n(0, start).chain(path)
    });
    let mut past = Gathered {
        layers,
        slots: integers(slots.collect()),
        rows: ids.len(),
        first,
    };
    let layout = layout(&starts, longest, 1, &device);
    let tokens = integers(ids.iter().map(|&id| i64::from(id)).collect());
    let tokens = tokens.reshape([ids.len(), 1]);
    model.head(model.hidden_cached(tokens, &layout, &mut past))
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
