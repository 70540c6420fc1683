//! One transformer for every supported family.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::activation::{gelu, gelu_approximate, softmax};
use burn::tensor::module::linear;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::config::{Family, MlpKind, ModelConfig, Rope};
use crate::decode::device::Past;
use crate::error::LmError;
use crate::lora::{Adapter, LoraConfig};
use crate::names::{self, Parameter, Role};
use crate::weights::{HostTensor, SINGLE_FILE, WeightFiles, write_safetensors};

/// A causal language model: token ids in, logits of the next token out.
///
/// Matrices are kept as `[inputs, outputs]`. Rows of a batch are padded on the right, which a
/// causal model never sees; [`Transformer::hidden`] and [`Transformer::head`] are apart, so that
/// only the positions that are needed pay for the vocabulary.
#[derive(Module, Debug)]
pub struct Transformer {
    pub(crate) embed: Param<Tensor<2>>,
    pub(crate) positions: Option<Param<Tensor<2>>>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Norm,
    pub(crate) head: Option<Projection>,
    #[module(skip)]
    config: ModelConfig,
    #[module(skip)]
    pub(crate) lora: Option<LoraConfig>,
}

#[derive(Module, Debug)]
pub(crate) struct Block {
    pub(crate) attn_norm: Norm,
    pub(crate) query: Projection,
    pub(crate) key: Projection,
    pub(crate) value: Projection,
    /// The adapter of query, key and value together, where the family stores them as one matrix.
    fused: Option<Adapter>,
    pub(crate) output: Projection,
    pub(crate) query_norm: Option<Param<Tensor<1>>>,
    pub(crate) key_norm: Option<Param<Tensor<1>>>,
    pub(crate) mlp_norm: Norm,
    pub(crate) gate: Option<Projection>,
    pub(crate) up: Projection,
    pub(crate) down: Projection,
}

/// A matrix `[inputs, outputs]`, its bias, and its adapter if it has one.
#[derive(Module, Debug)]
pub(crate) struct Projection {
    pub(crate) weight: Param<Tensor<2>>,
    pub(crate) bias: Option<Param<Tensor<1>>>,
    adapter: Option<Adapter>,
}

#[derive(Module, Debug)]
pub(crate) struct Norm {
    pub(crate) weight: Param<Tensor<1>>,
    pub(crate) bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    pub(crate) eps: f64,
}

impl Transformer {
    /// Reads a Hugging Face folder: `config.json` and safetensors weights.
    ///
    /// # Errors
    ///
    /// What is wrong with either, naming the file and the field or tensor.
    pub fn read(folder: &Path, device: &Device) -> Result<Self, LmError> {
        let config = ModelConfig::read(folder)?;
        let files = WeightFiles::open(folder)?;
        Self::from_files(config, &files, device)
    }

    /// Builds the model of `config` from opened weights.
    ///
    /// # Errors
    ///
    /// A missing tensor, or one of another shape or type than the configuration says.
    pub fn from_files(
        config: ModelConfig,
        files: &WeightFiles,
        device: &Device,
    ) -> Result<Self, LmError> {
        let head = names::head_name(config.family);
        let (tied, head_dim) = (config.tied, config.head_dim);
        let mut used: Vec<String> = Vec::new();
        let model = Self::build(config, device, |parameter| {
            let mut name = parameter.source.name().to_string();
            // Some exports of tied models keep the table under the head's name alone.
            if tied && parameter.path == "embed" && files.shape(&name).is_none() {
                name = head.to_string();
            }
            let stored = files.read(&name, &parameter.source.stored_shape(&parameter.shape))?;
            used.push(name);
            Ok(import(parameter, head_dim, &stored))
        })?;
        for name in files.names() {
            let known = used.iter().any(|used| used == name)
                || names::is_buffer(name)
                || (tied && name == head);
            if !known {
                return Err(LmError::weights(
                    files.path(),
                    format!("tensor `{name}` has no place in this architecture"),
                ));
            }
        }
        Ok(model)
    }

    /// A fresh model: matrices normal with `initializer_range`, norms one, biases zero.
    ///
    /// # Errors
    ///
    /// Never in practice; the signature is shared with reading.
    pub fn init(config: ModelConfig, seed: u64, device: &Device) -> Result<Self, LmError> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let deviation = config.initializer_range;
        Self::build(config, device, |parameter| {
            let count = parameter.shape.iter().product();
            let values = if parameter.shape.len() == 2 {
                (0..count)
                    .map(|_| (deviation * crate::sample::standard_normal(&mut rng)) as f32)
                    .collect()
            } else if parameter.path.ends_with("bias") {
                vec![0.0; count]
            } else {
                vec![1.0; count]
            };
            Ok(HostTensor {
                shape: parameter.shape.clone(),
                values,
            })
        })
    }

    fn build(
        config: ModelConfig,
        device: &Device,
        mut get: impl FnMut(&Parameter) -> Result<HostTensor, LmError>,
    ) -> Result<Self, LmError> {
        let mut tensors = BTreeMap::new();
        for parameter in names::parameters(&config) {
            let host = get(&parameter)?;
            tensors.insert(parameter.path, host);
        }
        let mut parts = Parts { tensors, device };
        let blocks = (0..config.n_layers)
            .map(|layer| {
                let at = |leaf: &str| format!("blocks.{layer}.{leaf}");
                Block {
                    attn_norm: parts.norm(&at("attn_norm"), config.norm_eps),
                    query: parts.linear(&at("query")),
                    key: parts.linear(&at("key")),
                    value: parts.linear(&at("value")),
                    fused: None,
                    output: parts.linear(&at("output")),
                    query_norm: parts.optional(&at("query_norm")),
                    key_norm: parts.optional(&at("key_norm")),
                    mlp_norm: parts.norm(&at("mlp_norm"), config.norm_eps),
                    gate: (config.mlp == MlpKind::SwiGlu).then(|| parts.linear(&at("gate"))),
                    up: parts.linear(&at("up")),
                    down: parts.linear(&at("down")),
                }
            })
            .collect();
        let model = Self {
            embed: parts.required("embed"),
            positions: parts.optional("positions"),
            blocks,
            norm: parts.norm("norm", config.norm_eps),
            head: (!config.tied).then(|| parts.linear("head")),
            config,
            lora: None,
        };
        debug_assert!(parts.tensors.is_empty(), "every parameter has its place");
        Ok(model)
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device that holds the model.
    pub fn device(&self) -> Device {
        self.embed.val().device()
    }

    /// Normalised hidden states of the last block.
    ///
    /// `ids` is `[batch, seq]`; the result is `[batch * seq, hidden]`, row by row. Rows may be
    /// padded on the right with any valid id: earlier positions do not see it.
    pub fn hidden(&self, ids: Tensor<2, Int>) -> Tensor<2> {
        let [batch, seq] = ids.dims();
        let layout = SeqLayout {
            batch,
            seq,
            positions: (0..seq as u32).collect(),
            mask: (seq > 1).then(|| causal_mask(seq, &ids.device())),
        };
        self.run(ids, &layout, None)
    }

    /// Hidden states, `[batch * seq, hidden]`, of tokens that lie as `layout` says.
    pub(crate) fn hidden_laid_out(&self, ids: Tensor<2, Int>, layout: &SeqLayout) -> Tensor<2> {
        self.run(ids, layout, None)
    }

    /// Logits of the next token, `[rows, vocab]`, of hidden states `[rows, hidden]`.
    pub fn head(&self, hidden: Tensor<2>) -> Tensor<2> {
        match &self.head {
            Some(head) => hidden.matmul(head.weight.val()),
            None => hidden.matmul(self.embed.val().transpose()),
        }
    }

    /// Logits of every position, `[batch, seq, vocab]`, of token ids `[batch, seq]`.
    pub fn logits(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, seq] = ids.dims();
        let logits = self.head(self.hidden(ids));
        logits.reshape([batch, seq, self.config.vocab_size])
    }

    /// Hidden states of new tokens `[batch, seq]` behind what `cache` holds, which grows by them.
    pub(crate) fn hidden_cached(
        &self,
        ids: Tensor<2, Int>,
        layout: &SeqLayout,
        cache: &mut dyn Past,
    ) -> Tensor<2> {
        self.run(ids, layout, Some(cache))
    }

    fn run(
        &self,
        ids: Tensor<2, Int>,
        layout: &SeqLayout,
        mut cache: Option<&mut dyn Past>,
    ) -> Tensor<2> {
        let turn = self.rotation(layout, &ids.device());
        let mut x = self.embedded(ids, layout);
        for (layer, block) in self.blocks.iter().enumerate() {
            // The cast shortens the borrow of the trait object to this turn of the loop.
            let cache = cache
                .as_mut()
                .map(|cache| (&mut **cache as &mut dyn Past, layer));
            x = block.forward(x, &self.config, layout, turn.as_ref(), cache);
        }
        if let Some(cache) = cache {
            cache.advance(layout.seq);
        }
        self.normalised(x)
    }

    /// What the first block reads, `[batch * seq, hidden]`.
    pub(crate) fn embedded(&self, ids: Tensor<2, Int>, layout: &SeqLayout) -> Tensor<2> {
        let rows = layout.batch * layout.seq;
        let device = ids.device();
        let x = self.embed.val().select(0, ids.reshape([rows]));
        let Some(table) = &self.positions else {
            return x;
        };
        let [_, hidden] = table.val().dims();
        let positions: Vec<i64> = layout.positions.iter().map(|&p| i64::from(p)).collect();
        let count = positions.len();
        let positions = Tensor::<1, Int>::from_data(TensorData::new(positions, [count]), &device);
        let learned = table.val().select(0, positions);
        x.reshape([layout.batch, layout.seq, hidden])
            .add(learned.reshape([count / layout.seq, layout.seq, hidden]))
            .reshape([rows, hidden])
    }

    /// The turns of queries and keys, where positions turn them.
    pub(crate) fn rotation(&self, layout: &SeqLayout, device: &Device) -> Option<Rotation> {
        let rope = self.config.rope?;
        Some(Rotation::new(rope, layout, device))
    }

    /// Hidden states of what the last block gave.
    pub(crate) fn normalised(&self, x: Tensor<2>) -> Tensor<2> {
        self.norm.forward(x)
    }

    /// The parameters of the model on the host, by their names on disk; those of an adapter are
    /// not among them ([`Transformer::write_adapter`]).
    ///
    /// # Panics
    ///
    /// If the device fails.
    pub fn to_host(&self) -> BTreeMap<String, HostTensor> {
        let mut visitor = Collector::default();
        self.visit(&mut visitor);
        let mut stored: BTreeMap<String, HostTensor> = BTreeMap::new();
        for parameter in names::parameters(&self.config) {
            let values = visitor
                .tensors
                .remove(&parameter.path)
                .expect("the module tree holds every parameter of its configuration");
            let shape = parameter.source.stored_shape(&parameter.shape);
            let tensor = stored
                .entry(parameter.source.name().to_string())
                .or_insert_with(|| HostTensor {
                    values: vec![0.0; shape.iter().product()],
                    shape,
                });
            parameter.source.for_each_element(
                &parameter.shape,
                self.config.head_dim,
                |ours, theirs| {
                    tensor.values[theirs] = values[ours];
                },
            );
        }
        stored
    }

    /// Writes `config.json` and `model.safetensors` (f32) into `folder`, which must exist.
    ///
    /// Each file is whole or absent; the weights come first, so that a folder with a
    /// configuration is complete.
    ///
    /// # Errors
    ///
    /// Any error of the file system; a model with an adapter, which a plain folder cannot hold.
    pub fn write(&self, folder: &Path) -> Result<(), LmError> {
        if self.lora.is_some() {
            return Err(LmError::Request(
                "a model with a LoRA adapter cannot be written as a plain folder: merge it, or \
                 write the adapter"
                    .into(),
            ));
        }
        let metadata = [("format".to_string(), "pt".to_string())].into();
        write_safetensors(&folder.join(SINGLE_FILE), &self.to_host(), &metadata)?;
        let path = folder.join("config.json");
        let text = serde_json::to_string_pretty(&self.config.to_json()).map_err(|source| {
            LmError::Json {
                path: path.clone(),
                source,
            }
        })?;
        crate::files::write_atomically(&path, |file| {
            std::io::Write::write_all(file, text.as_bytes())
        })
        .map_err(LmError::io(&path))
    }
}

/// Rearranges a stored tensor into the parameter's own shape.
fn import(parameter: &Parameter, head_dim: usize, stored: &HostTensor) -> HostTensor {
    let mut values = vec![0.0; parameter.shape.iter().product()];
    parameter
        .source
        .for_each_element(&parameter.shape, head_dim, |ours, theirs| {
            values[ours] = stored.values[theirs];
        });
    HostTensor {
        shape: parameter.shape.clone(),
        values,
    }
}

/// Takes parameters out of a map by path.
struct Parts<'a> {
    tensors: BTreeMap<String, HostTensor>,
    device: &'a Device,
}

impl Parts<'_> {
    fn optional<const D: usize>(&mut self, path: &str) -> Option<Param<Tensor<D>>> {
        let host = self.tensors.remove(path)?;
        let data = TensorData::new(host.values, host.shape);
        Some(Param::from_tensor(Tensor::from_data(data, self.device)))
    }

    fn required<const D: usize>(&mut self, path: &str) -> Param<Tensor<D>> {
        self.optional(path)
            .expect("the list of parameters holds every part of the configuration")
    }

    fn linear(&mut self, path: &str) -> Projection {
        Projection {
            weight: self.required(&format!("{path}.weight")),
            bias: self.optional(&format!("{path}.bias")),
            adapter: None,
        }
    }

    fn norm(&mut self, path: &str, eps: f64) -> Norm {
        Norm {
            weight: self.required(&format!("{path}.weight")),
            bias: self.optional(&format!("{path}.bias")),
            eps,
        }
    }
}

/// Parameters on the host, by their paths in the module tree.
#[derive(Default)]
pub(crate) struct Collector {
    path: Vec<String>,
    pub(crate) tensors: BTreeMap<String, Vec<f32>>,
}

impl ModuleVisitor for Collector {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let values = param
            .val()
            .try_into_vec_as::<f32>()
            .expect("parameters of a model on a working device can be read");
        self.tensors.insert(self.path.join("."), values);
    }
}

/// How the tokens of one forward pass lie.
#[derive(Clone, Debug)]
pub(crate) struct SeqLayout {
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    /// Positions, `[seq]` when all rows agree, else `[batch * seq]`.
    pub(crate) positions: Vec<u32>,
    /// True where a query may not look: `[1 or batch, 1, seq, keys]`.
    pub(crate) mask: Option<Tensor<4, Bool>>,
}

pub(crate) fn causal_mask(seq: usize, device: &Device) -> Tensor<4, Bool> {
    let mask: Vec<bool> = (0..seq * seq).map(|i| i % seq > i / seq).collect();
    Tensor::from_data(TensorData::new(mask, [1, 1, seq, seq]), device)
}

/// Cosines and sines of every position, `[1 or batch, seq, 1, dims / 2]`.
pub(crate) struct Rotation {
    dims: usize,
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl Rotation {
    fn new(rope: Rope, layout: &SeqLayout, device: &Device) -> Self {
        let half = rope.dims / 2;
        // Frequencies and angles in f32, as the checkpoints' own code computes them.
        let frequencies: Vec<f32> = (0..half)
            .map(|i| 1.0 / (rope.theta as f32).powf((2 * i) as f32 / rope.dims as f32))
            .collect();
        let angles: Vec<f32> = layout
            .positions
            .iter()
            .flat_map(|&position| frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        let shape = [layout.positions.len() / layout.seq, layout.seq, 1, half];
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&angle| f(angle)).collect();
            Tensor::from_data(TensorData::new(values, shape), device)
        };
        Self {
            dims: rope.dims,
            cos: table(f32::cos),
            sin: table(f32::sin),
        }
    }

    /// Turns the first `dims` of each head of `x`, `[batch, seq, heads, head_dim]`: the first
    /// half of them against the second.
    fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, _, _, head_dim] = x.dims();
        let half = self.dims / 2;
        let first = x.clone().narrow(3, 0, half);
        let second = x.clone().narrow(3, half, half);
        let mut parts = vec![
            first.clone() * self.cos.clone() - second.clone() * self.sin.clone(),
            second * self.cos.clone() + first * self.sin.clone(),
        ];
        if self.dims < head_dim {
            parts.push(x.narrow(3, self.dims, head_dim - self.dims));
        }
        Tensor::cat(parts, 3)
    }
}

impl Norm {
    /// Normalises the last dimension of `[rows, hidden]`.
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.bias {
            None => rms_norm(x, self.weight.val(), self.eps),
            Some(bias) => {
                let centred = x.clone() - x.mean_dim(1);
                rms_norm(centred, self.weight.val(), self.eps) + bias.val().unsqueeze()
            }
        }
    }
}

fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let scale = x.clone().square().mean_dim(D - 1).add_scalar(eps).sqrt();
    x / scale * weight.unsqueeze()
}

impl Projection {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        match &self.adapter {
            None => linear(x, self.weight.val(), bias),
            Some(adapter) => {
                let change = adapter.change(x.clone());
                linear(x, self.weight.val(), bias) + change
            }
        }
    }

    /// Adds a change to the matrix.
    fn add(&mut self, change: Tensor<2>) {
        self.weight = Param::from_tensor(self.weight.val() + change);
    }

    fn merge(&mut self) {
        if let Some(adapter) = self.adapter.take() {
            self.add(adapter.product());
        }
    }
}

/// Query's, key's or value's part of `x`, `[rows, 3 * outputs]`, whose columns lie as the family
/// stores its one matrix for the three.
fn fused_part(x: Tensor<2>, part: usize, config: &ModelConfig) -> Tensor<2> {
    let [rows, columns] = x.dims();
    let outputs = columns / 3;
    match config.family {
        Family::GptNeox => x
            .reshape([rows, config.n_heads, 3, config.head_dim])
            .narrow(2, part, 1)
            .reshape([rows, outputs]),
        _ => x.narrow(1, part * outputs, outputs),
    }
}

impl Block {
    /// Where the adapter of a linear layer stands.
    pub(crate) fn adapter_mut(&mut self, role: Role) -> &mut Option<Adapter> {
        let projection = match role {
            Role::Fused => return &mut self.fused,
            Role::Query => &mut self.query,
            Role::Key => &mut self.key,
            Role::Value => &mut self.value,
            Role::Output => &mut self.output,
            Role::Gate => self
                .gate
                .as_mut()
                .expect("a model whose list of parameters has a gate has one"),
            Role::Up => &mut self.up,
            Role::Down => &mut self.down,
        };
        &mut projection.adapter
    }

    /// Adds the adapters to their matrices.
    pub(crate) fn merge(&mut self, config: &ModelConfig) {
        if let Some(fused) = self.fused.take() {
            let change = fused.product();
            for (part, projection) in [&mut self.query, &mut self.key, &mut self.value]
                .into_iter()
                .enumerate()
            {
                projection.add(fused_part(change.clone(), part, config));
            }
        }
        let always = [
            &mut self.query,
            &mut self.key,
            &mut self.value,
            &mut self.output,
            &mut self.up,
            &mut self.down,
        ];
        for projection in always.into_iter().chain(&mut self.gate) {
            projection.merge();
        }
    }

    pub(crate) fn forward(
        &self,
        x: Tensor<2>,
        config: &ModelConfig,
        layout: &SeqLayout,
        turn: Option<&Rotation>,
        cache: Option<(&mut dyn Past, usize)>,
    ) -> Tensor<2> {
        let attended = self.attention(
            self.attn_norm.forward(x.clone()),
            config,
            layout,
            turn,
            cache,
        );
        if config.parallel_residual {
            let fed = self.mlp(self.mlp_norm.forward(x.clone()), config.mlp);
            x + attended + fed
        } else {
            let x = x + attended;
            let fed = self.mlp(self.mlp_norm.forward(x.clone()), config.mlp);
            x + fed
        }
    }

    fn mlp(&self, x: Tensor<2>, kind: MlpKind) -> Tensor<2> {
        let up = self.up.forward(x.clone());
        let inner = match (kind, &self.gate) {
            (MlpKind::SwiGlu, Some(gate)) => ops::swiglu(gate.forward(x), up),
            (MlpKind::GeluTanh, _) => gelu_approximate(up),
            _ => gelu(up),
        };
        self.down.forward(inner)
    }

    fn attention(
        &self,
        x: Tensor<2>,
        config: &ModelConfig,
        layout: &SeqLayout,
        turn: Option<&Rotation>,
        cache: Option<(&mut dyn Past, usize)>,
    ) -> Tensor<2> {
        let (batch, seq, width) = (layout.batch, layout.seq, config.head_dim);
        let (heads, groups) = (config.n_kv_heads, config.n_heads / config.n_kv_heads);
        let split = |x: Tensor<2>, heads: usize| x.reshape([batch, seq, heads, width]);
        let mut projected = [&self.query, &self.key, &self.value].map(|p| p.forward(x.clone()));
        if let Some(fused) = &self.fused {
            let change = fused.change(x.clone());
            let mut part = 0..3;
            projected = projected.map(|projected| {
                let part = part.next().expect("three parts for three projections");
                projected + fused_part(change.clone(), part, config)
            });
        }
        let [query, key, value] = projected;
        let mut query = split(query, config.n_heads);
        let mut key = split(key, heads);
        let value = split(value, heads).swap_dims(1, 2);
        if let (Some(query_norm), Some(key_norm)) = (&self.query_norm, &self.key_norm) {
            query = rms_norm(query, query_norm.val(), config.norm_eps);
            key = rms_norm(key, key_norm.val(), config.norm_eps);
        }
        if let Some(turn) = turn {
            query = turn.apply(query);
            key = turn.apply(key);
        }
        let key = key.swap_dims(1, 2);
        let (key, value) = match cache {
            Some((cache, layer)) => cache.append(layer, key, value),
            None => (key, value),
        };
        // The query heads of a group share their key head: they stack along the sequence.
        let query = query
            .swap_dims(1, 2)
            .reshape([batch, heads, groups * seq, width])
            .mul_scalar(1.0 / (width as f64).sqrt());
        let scores = query.matmul(key.swap_dims(2, 3));
        // A padded query, which may look nowhere, weighs nothing and yields no NaN.
        let weights = match &layout.mask {
            Some(mask) => ops::masked_softmax(scores, mask.clone()),
            None => softmax(scores, 3),
        };
        let mixed = weights
            .matmul(value)
            .reshape([batch, config.n_heads, seq, width])
            .swap_dims(1, 2)
            .reshape([batch * seq, config.n_heads * width]);
        self.output.forward(mixed)
    }
}
