//! One transformer for every supported family.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::activation::{gelu, gelu_approximate};
use burn::tensor::{Bool, Device, FloatDType, Int, Tensor, TensorData};
use ops::{Heads, Spans, Turns};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::config::{Family, MlpKind, ModelConfig, Rope};
use crate::decode::device::Past;
use crate::error::LmError;
use crate::lora::{Adapter, LoraConfig};
use crate::names::{self, Parameter, Role};
use crate::precision::Precision;
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
    #[module(skip)]
    precision: Precision,
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
    #[module(skip)]
    precision: Precision,
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
            precision: Precision::F32,
        };
        debug_assert!(parts.tensors.is_empty(), "every parameter has its place");
        Ok(model)
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The model, computing in `precision` from here on; its parameters stay as they are.
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        for projection in self.blocks.iter_mut().flat_map(Block::projections_mut) {
            projection.precision = precision;
        }
        self
    }

    /// What the model computes in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The model with its matrices kept in what they are computed in: for many passes without an
    /// update between them, as in decoding. The numbers it gives are the same.
    ///
    /// Such a model is not for training or writing: what was rounded stays so.
    #[must_use]
    pub fn with_matrices_rounded(mut self) -> Self {
        if self.precision == Precision::F32 {
            return self;
        }
        let dtype = self.precision.dtype();
        let rounded = |matrix: &Param<Tensor<2>>| Param::from_tensor(matrix.val().cast(dtype));
        for projection in self.blocks.iter_mut().flat_map(Block::projections_mut) {
            projection.weight = rounded(&projection.weight);
        }
        let head = match &self.head {
            Some(head) => rounded(&head.weight),
            // The first block goes on to look exact numbers up.
            None => Param::from_tensor(self.embed.val().cast(dtype).transpose()),
        };
        self.head = Some(Projection {
            weight: head,
            bias: None,
            adapter: None,
            precision: self.precision,
        });
        self
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
            sight: Sight::Within(Spans::rows(batch, seq)),
        };
        self.run(ids, &layout, None, None)
    }

    /// Logits of the next token, `[rows, vocab]`, of hidden states `[rows, hidden]`.
    ///
    /// In f32, whatever the products are computed in.
    pub fn head(&self, hidden: Tensor<2>) -> Tensor<2> {
        let (hidden, weight, tied) = self.head_factors(hidden);
        let weight = if tied { weight.transpose() } else { weight };
        ops::linear(hidden, weight, None).cast(FloatDType::F32)
    }

    /// What the head multiplies, in the type that it does: hidden states `[rows, hidden]`, and its matrix
    /// as [`Transformer::head_weight`] gives it.
    pub(crate) fn head_factors(&self, hidden: Tensor<2>) -> (Tensor<2>, Tensor<2>, bool) {
        let (weight, tied) = self.head_weight();
        let dtype = self.precision.dtype();
        (hidden.cast(dtype), weight.cast(dtype), tied)
    }

    /// The head's matrix, `[hidden, vocab]`, or if it is tied the table of embeddings,
    /// `[vocab, hidden]`, and whether it is tied.
    pub(crate) fn head_weight(&self) -> (Tensor<2>, bool) {
        match &self.head {
            Some(head) => (head.weight.val(), false),
            None => (self.embed.val(), true),
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
        self.run(ids, layout, Some(cache), None)
    }

    /// Hidden states of tokens that lie as `layout` says, `[batch * seq, hidden]`; of `rows` of them
    /// alone, `[n, hidden]`, if they are given.
    pub(crate) fn run(
        &self,
        ids: Tensor<2, Int>,
        layout: &SeqLayout,
        mut cache: Option<&mut dyn Past>,
        rows: Option<&Tensor<1, Int>>,
    ) -> Tensor<2> {
        let turns = self.turns(layout);
        let mut x = self.embedded(ids, layout);
        for layer in 0..self.blocks.len() {
            // The cast shortens the borrow of the trait object to this turn of the loop.
            let cache = cache.as_mut().map(|cache| &mut **cache as &mut dyn Past);
            x = self.layer(layer, x, layout, turns.as_ref(), cache, rows);
        }
        if let Some(cache) = cache {
            cache.advance(layout.seq);
        }
        self.normalised(x)
    }

    /// What a layer makes of `x`, `[tokens, hidden]`; the last one, of `rows` of it alone.
    pub(crate) fn layer(
        &self,
        layer: usize,
        x: Tensor<2>,
        layout: &SeqLayout,
        turns: Option<&Turns>,
        cache: Option<&mut dyn Past>,
        rows: Option<&Tensor<1, Int>>,
    ) -> Tensor<2> {
        let rows = rows.filter(|_| layer + 1 == self.blocks.len());
        let cache = cache.map(|cache| (cache, layer));
        self.blocks[layer].forward(x, &self.config, layout, turns, cache, rows)
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
    pub(crate) fn turns(&self, layout: &SeqLayout) -> Option<Turns> {
        let Rope { dims, theta } = self.config.rope?;
        Some(Turns::new(dims, theta, &layout.positions, layout.seq))
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
            precision: Precision::F32,
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
    pub(crate) sight: Sight,
}

/// Which tokens see which.
#[derive(Clone, Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "one for each forward pass, beside tensors that are larger still; how large depends on the backends"
)]
pub(crate) enum Sight {
    /// Each other alone.
    Within(Spans),
    /// Those of a cache too. True where a query may not look: `[1 or batch, 1, seq, keys]`.
    Past(Option<Tensor<4, Bool>>),
}

impl Norm {
    /// Normalises the last dimension of `[rows, hidden]`.
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.bias {
            None => ops::rms_norm(x, self.weight.val(), self.eps),
            Some(bias) => {
                let centred = x.clone() - x.mean_dim(1);
                ops::rms_norm(centred, self.weight.val(), self.eps) + bias.val().unsqueeze()
            }
        }
    }
}

impl Projection {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let dtype = self.precision.dtype();
        let x = x.cast(dtype);
        let weight = self.weight.val().cast(dtype);
        let bias = self.bias.as_ref().map(|bias| bias.val().cast(dtype));
        match &self.adapter {
            None => ops::linear(x, weight, bias),
            Some(adapter) => {
                let change = adapter.change(x.clone());
                ops::linear(x, weight, bias) + change
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
        for projection in self.projections_mut() {
            projection.merge();
        }
    }

    fn projections_mut(&mut self) -> impl Iterator<Item = &mut Projection> {
        let always = [
            &mut self.query,
            &mut self.key,
            &mut self.value,
            &mut self.output,
            &mut self.up,
            &mut self.down,
        ];
        always.into_iter().chain(&mut self.gate)
    }

    /// What the block makes of `x`, `[tokens, hidden]`; of `rows` of it alone, if they are given: no
    /// token sees the output of another one's last block, so that only those that are read need it.
    fn forward(
        &self,
        x: Tensor<2>,
        config: &ModelConfig,
        layout: &SeqLayout,
        turns: Option<&Turns>,
        cache: Option<(&mut dyn Past, usize)>,
        rows: Option<&Tensor<1, Int>>,
    ) -> Tensor<2> {
        let of_rows = |x: Tensor<2>| match rows {
            Some(rows) => x.select(0, rows.clone()),
            None => x,
        };
        // Norms, and what blocks add up, are in f32 whatever the products are computed in.
        let normed = self.attn_norm.forward(x.clone());
        let mixed = self.attention(normed, config, layout, turns, cache);
        let attended = self.output.forward(of_rows(mixed)).cast(FloatDType::F32);
        let x = of_rows(x);
        let mlp = |x: Tensor<2>| {
            let fed = self.mlp(self.mlp_norm.forward(x), config.mlp);
            fed.cast(FloatDType::F32)
        };
        if config.parallel_residual {
            let fed = mlp(x.clone());
            x + attended + fed
        } else {
            let x = x + attended;
            let fed = mlp(x.clone());
            x + fed
        }
    }

    fn mlp(&self, x: Tensor<2>, kind: MlpKind) -> Tensor<2> {
        let inner = match (kind, &self.gate) {
            (MlpKind::SwiGlu, Some(gate)) => ops::swiglu(joined(x, [gate, &self.up])),
            (MlpKind::GeluTanh, _) => gelu_approximate(self.up.forward(x)),
            _ => gelu(self.up.forward(x)),
        };
        self.down.forward(inner)
    }

    fn attention(
        &self,
        x: Tensor<2>,
        config: &ModelConfig,
        layout: &SeqLayout,
        turns: Option<&Turns>,
        cache: Option<(&mut dyn Past, usize)>,
    ) -> Tensor<2> {
        let qkv = self.qkv(x, config);
        let heads = Heads {
            queries: config.n_heads,
            keys: config.n_kv_heads,
            width: config.head_dim,
        };
        match &layout.sight {
            Sight::Within(spans) => ops::attention(qkv, heads, spans, turns),
            Sight::Past(hidden) => {
                let (batch, seq, width) = (layout.batch, layout.seq, heads.width);
                let part = |first: usize, count: usize| {
                    let part = qkv.clone().narrow(1, first * width, count * width);
                    part.reshape([batch, seq, count, width])
                };
                let turned = |x: Tensor<4>| match turns {
                    Some(turns) => turns.apply(x),
                    None => x,
                };
                let query = turned(part(0, heads.queries));
                let key = turned(part(heads.queries, heads.keys)).swap_dims(1, 2);
                let value = part(heads.queries + heads.keys, heads.keys).swap_dims(1, 2);
                let (cache, layer) = cache.expect("a layout behind a past comes with its cache");
                let (key, value) = cache.append(layer, key, value);
                ops::attend(query, key, value, hidden.clone())
            }
        }
    }

    /// Queries, keys and values of each row of `x`, side by side.
    fn qkv(&self, x: Tensor<2>, config: &ModelConfig) -> Tensor<2> {
        let parts = [&self.query, &self.key, &self.value];
        if self.fused.is_none() && self.query_norm.is_none() {
            return joined(x, parts);
        }
        let mut projected = parts.map(|part| part.forward(x.clone()));
        if let Some(fused) = &self.fused {
            let change = fused.change(x.clone().cast(self.query.precision.dtype()));
            let mut part = 0..3;
            projected = projected.map(|projected| {
                let part = part.next().expect("three parts for three projections");
                projected + fused_part(change.clone(), part, config)
            });
        }
        let norms = [&self.query_norm, &self.key_norm, &None];
        let mut norms = norms.into_iter();
        let parts = projected.map(|x| match norms.next() {
            Some(Some(norm)) => {
                let [rows, columns] = x.dims();
                let heads = x.reshape([rows, columns / config.head_dim, config.head_dim]);
                let dtype = heads.dtype();
                let normal =
                    ops::rms_norm(heads.cast(FloatDType::F32), norm.val(), config.norm_eps);
                normal.cast(dtype).reshape([rows, columns])
            }
            _ => x,
        });
        Tensor::cat(parts.to_vec(), 1)
    }
}

/// The outputs of several linear layers side by side.
fn joined<const N: usize>(x: Tensor<2>, parts: [&Projection; N]) -> Tensor<2> {
    if parts.iter().any(|part| part.adapter.is_some()) {
        let outputs = parts.map(|part| part.forward(x.clone()));
        return Tensor::cat(outputs.to_vec(), 1);
    }
    let dtype = parts[0].precision.dtype();
    let weights = parts.map(|part| part.weight.val().cast(dtype));
    let out = ops::joined_linear(x.cast(dtype), &weights);
    let biases: Option<Vec<Tensor<1>>> = parts
        .iter()
        .map(|part| part.bias.as_ref().map(|bias| bias.val().cast(dtype)))
        .collect();
    match biases {
        Some(biases) => out + Tensor::cat(biases, 0).unsqueeze(),
        None => out,
    }
}
