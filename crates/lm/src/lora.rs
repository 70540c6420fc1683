//! Adapters of low rank (`LoRA`), as PEFT defines and stores them.
//!
//! Hu et al., <https://arxiv.org/abs/2106.09685>: a layer `x W` becomes `x W + s (x A) B`, where
//! only `A`, `[inputs, rank]`, and `B`, `[rank, outputs]`, are trained. `B` begins at zero, so that
//! training begins at the model itself.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use crate::config::{Family, ModelConfig};
use crate::error::LmError;
use crate::model::{Collector, Transformer};
use crate::names::{self, LinearLayer};
use crate::weights::{HostTensor, WeightFiles, write_safetensors};

/// The file of an adapter's settings.
const CONFIG_FILE: &str = "adapter_config.json";
/// The file of its matrices.
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The target that names every linear layer of every block.
const ALL_LINEAR: &str = "all-linear";
/// Ranks that can be meant: few matrices have a side as long as the largest.
const RANKS: std::ops::RangeInclusive<usize> = 1..=1 << 16;
/// What PEFT puts before the names of the model's own modules.
const PREFIX: &str = "base_model.model.";

/// Which layers have adapters, and of what kind.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Columns of `A` and rows of `B`; PEFT's `r`.
    pub rank: usize,
    /// The change is scaled by `alpha / rank`; PEFT's `lora_alpha`.
    pub alpha: f64,
    /// Whether the scale is `alpha / √rank` instead (Kalajdzievski,
    /// <https://arxiv.org/abs/2312.03732>); PEFT's `use_rslora`.
    pub rank_stabilized: bool,
    /// Names of linear layers, such as `q_proj`, `layers.0.mlp.up_proj` or `c_attn`: a layer is
    /// meant if its name in transformers ends with one. `all-linear` means all but the head;
    /// PEFT's `target_modules`.
    pub targets: Vec<String>,
}

impl LoraConfig {
    /// What the change is multiplied by.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha
            / if self.rank_stabilized {
                rank.sqrt()
            } else {
                rank
            }
    }

    /// The number of parameters that the adapters of a model of this configuration have.
    ///
    /// # Errors
    ///
    /// See [`Transformer::with_lora`].
    pub fn n_parameters(&self, config: &ModelConfig) -> Result<usize, LmError> {
        let layers = self.layers(config)?;
        Ok(layers
            .iter()
            .map(|layer| self.rank * (layer.inputs + layer.outputs))
            .sum())
    }

    /// The layers that the targets mean.
    fn layers(&self, config: &ModelConfig) -> Result<Vec<LinearLayer>, LmError> {
        let refuse = |reason: String| Err(LmError::Request(format!("LoRA: {reason}")));
        if !RANKS.contains(&self.rank) {
            return refuse(format!(
                "expected a rank from {} to {}, got {}",
                RANKS.start(),
                RANKS.end(),
                self.rank
            ));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return refuse(format!("expected a positive alpha, got {}", self.alpha));
        }
        let all = names::linear_layers(config);
        if self.targets.is_empty() {
            return refuse("no target is named; `all-linear` names every linear layer".into());
        }
        for target in &self.targets {
            if !all.iter().any(|layer| is_meant(layer, target)) {
                let mut leaves: Vec<&str> = Vec::new();
                for layer in &all {
                    if !leaves.contains(&layer.leaf()) {
                        leaves.push(layer.leaf());
                    }
                }
                return refuse(format!(
                    "target `{target}` is no linear layer of a block of a {} model; there are: \
                     {}, and `{ALL_LINEAR}` for all of them",
                    config.family.model_type(),
                    leaves.join(", ")
                ));
            }
        }
        Ok(all
            .into_iter()
            .filter(|layer| self.targets.iter().any(|target| is_meant(layer, target)))
            .collect())
    }

    fn from_json(
        fields: &Map<String, Value>,
        path: &Path,
        family: Family,
    ) -> Result<Self, LmError> {
        let wrong = |field: &str, reason: String| LmError::config(path, field, reason);
        for (field, value) in fields {
            if !changes_nothing(field, value) {
                return Err(wrong(
                    field,
                    format!(
                        "{value} is not supported, and leaving it out would change the numbers"
                    ),
                ));
            }
        }
        let text = |field: &str, expected: &[&str]| match fields.get(field) {
            None | Some(Value::Null) => Ok(()),
            Some(Value::String(text)) if expected.contains(&&text[..]) => Ok(()),
            Some(other) => Err(wrong(
                field,
                format!(
                    "only `{}` is supported, got {other}",
                    expected.join("` or `")
                ),
            )),
        };
        if !fields.contains_key("peft_type") {
            return Err(wrong("peft_type", "missing; expected `LORA`".into()));
        }
        text("peft_type", &["LORA"])?;
        text("task_type", &["CAUSAL_LM"])?;
        text("bias", &["none"])?;
        match fields.get("init_lora_weights") {
            // Others, such as `pissa`, take a part out of the base model's own matrices.
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(Value::String(kind)) if kind == "gaussian" => {}
            Some(other) => {
                return Err(wrong(
                    "init_lora_weights",
                    format!("only true, false and `gaussian` are supported, got {other}"),
                ));
            }
        }
        let flag = |field: &str| match fields.get(field) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(wrong(field, format!("expected true or false, got {other}"))),
        };
        // PEFT itself sets this as the layers need; a file that says otherwise is of another model.
        if flag("fan_in_fan_out")? && family != Family::Gpt2 {
            return Err(wrong(
                "fan_in_fan_out",
                format!("true is for gpt2, not for {}", family.model_type()),
            ));
        }
        match fields.get("lora_dropout").map(Value::as_f64) {
            None => {}
            Some(Some(0.0)) => {}
            Some(Some(dropout)) if (0.0..1.0).contains(&dropout) => tracing::warn!(
                "{}: the adapter was trained with a dropout of {dropout}; further training here \
                 has none",
                path.display()
            ),
            Some(_) => return Err(wrong("lora_dropout", "expected a share in [0, 1)".into())),
        }
        let rank = fields.get("r").and_then(Value::as_u64);
        let rank = rank.and_then(|rank| usize::try_from(rank).ok());
        let Some(rank) = rank.filter(|rank| RANKS.contains(rank)) else {
            return Err(wrong(
                "r",
                format!(
                    "expected an integer from {} to {}",
                    RANKS.start(),
                    RANKS.end()
                ),
            ));
        };
        let alpha = fields.get("lora_alpha").and_then(Value::as_f64);
        let Some(alpha) = alpha.filter(|alpha| alpha.is_finite() && *alpha > 0.0) else {
            return Err(wrong("lora_alpha", "expected a positive number".into()));
        };
        let targets = match fields.get("target_modules") {
            Some(Value::String(all)) if all.eq_ignore_ascii_case(ALL_LINEAR) => {
                Some(vec![ALL_LINEAR.to_string()])
            }
            Some(Value::String(pattern)) => {
                return Err(wrong(
                    "target_modules",
                    format!("expected a list of names, got the pattern `{pattern}`"),
                ));
            }
            Some(Value::Array(names)) => names
                .iter()
                .map(|name| name.as_str().map(str::to_string))
                .collect(),
            _ => None,
        };
        let Some(targets) = targets else {
            return Err(wrong("target_modules", "expected a list of names".into()));
        };
        Ok(Self {
            rank,
            alpha,
            rank_stabilized: flag("use_rslora")?,
            targets,
        })
    }

    /// The settings as PEFT writes them.
    fn to_json(&self, config: &ModelConfig, base_model: Option<&str>) -> Result<Value, LmError> {
        let layers = self.layers(config)?;
        // The list that PEFT's shorthand stands for, by its shortest names.
        let mut targets: Vec<&str> = if self.targets.iter().any(|target| is_all(target)) {
            layers.iter().map(LinearLayer::leaf).collect()
        } else {
            self.targets.iter().map(String::as_str).collect()
        };
        targets.sort_unstable();
        targets.dedup();
        // PEFT's type for it is an integer.
        let alpha = if self.alpha.fract().abs() < f64::EPSILON && self.alpha < 1e15 {
            json!(self.alpha as u64)
        } else {
            json!(self.alpha)
        };
        Ok(json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": base_model,
            "bias": "none",
            "exclude_modules": null,
            "fan_in_fan_out": config.family == Family::Gpt2,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": alpha,
            "lora_bias": false,
            "lora_dropout": 0.0,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": {},
            "revision": null,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.rank_stabilized,
        }))
    }
}

fn is_all(target: &str) -> bool {
    target.eq_ignore_ascii_case(ALL_LINEAR)
}

fn is_meant(layer: &LinearLayer, target: &str) -> bool {
    is_all(target)
        || layer
            .name
            .strip_suffix(target)
            .is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Whether a setting is one that is read, one that says nothing of the numbers, or switched off.
fn changes_nothing(field: &str, value: &Value) -> bool {
    const READ: [&str; 10] = [
        "peft_type",
        "task_type",
        "bias",
        "init_lora_weights",
        "fan_in_fan_out",
        "lora_dropout",
        "r",
        "lora_alpha",
        "target_modules",
        "use_rslora",
    ];
    const SILENT: [&str; 9] = [
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    ];
    let is_off = match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    };
    is_off || READ.contains(&field) || SILENT.contains(&field)
}

/// The settings of an adapter's folder, for one who looks before reading the base model.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterFolder {
    /// `base_model_name_or_path`: the folder or the hub's name of the model that it adapts.
    pub base_model: Option<String>,
    fields: Map<String, Value>,
}

impl AdapterFolder {
    /// Whether a folder holds an adapter rather than a model.
    pub fn is_one(folder: &Path) -> bool {
        folder.join(CONFIG_FILE).is_file()
    }

    /// Opens the matrices of an adapter's folder.
    ///
    /// # Errors
    ///
    /// A file that is missing or malformed.
    pub fn open_weights(folder: &Path) -> Result<WeightFiles, LmError> {
        WeightFiles::open_file(&folder.join(WEIGHTS_FILE))
    }

    /// Reads the settings of an adapter's folder.
    ///
    /// # Errors
    ///
    /// A missing or malformed file.
    pub fn read(folder: &Path) -> Result<Self, LmError> {
        let path = folder.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).map_err(LmError::io(&path))?;
        let fields: Map<String, Value> =
            serde_json::from_str(&text).map_err(|source| LmError::Json {
                path: path.clone(),
                source,
            })?;
        let base_model = match fields.get("base_model_name_or_path") {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) => Some(name.clone()),
            Some(other) => {
                return Err(LmError::config(
                    &path,
                    "base_model_name_or_path",
                    format!("expected a string, got {other}"),
                ));
            }
        };
        Ok(Self { base_model, fields })
    }
}

/// The pair of matrices that changes a linear layer.
#[derive(Module, Debug)]
pub(crate) struct Adapter {
    /// `[inputs, rank]`
    a: Param<Tensor<2>>,
    /// `[rank, outputs]`
    b: Param<Tensor<2>>,
    #[module(skip)]
    scale: f64,
}

impl Adapter {
    fn new(a: HostTensor, b: HostTensor, scale: f64, device: &Device) -> Self {
        let upload = |host: HostTensor| {
            let data = TensorData::new(host.values, host.shape);
            Param::from_tensor(Tensor::from_data(data, device))
        };
        Self {
            a: upload(a),
            b: upload(b),
            scale,
        }
    }

    /// What the adapter adds to the layer's output on `x`, `[rows, inputs]`: `[rows, outputs]`, computed
    /// in what `x` is in.
    pub(crate) fn change(&self, x: Tensor<2>) -> Tensor<2> {
        let dtype = x.dtype();
        let inner = ops::linear(x, self.a.val().cast(dtype), None).mul_scalar(self.scale);
        ops::linear(inner, self.b.val().cast(dtype), None)
    }

    /// What the adapter adds to the layer's matrix, `[inputs, outputs]`.
    pub(crate) fn product(&self) -> Tensor<2> {
        ops::linear(self.a.val().mul_scalar(self.scale), self.b.val(), None)
    }
}

impl Transformer {
    /// The model with fresh adapters; nothing else is trained from here on.
    ///
    /// `A` is uniform within `±1/√inputs`, PEFT's Kaiming initialisation, from `seed`; `B` is zero.
    ///
    /// # Errors
    ///
    /// A rank or alpha out of range, a target that the model does not have, or a model that has
    /// adapters already.
    pub fn with_lora(self, lora: &LoraConfig, seed: u64) -> Result<Self, LmError> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        self.attach(lora, |layer| {
            let bound = 1.0 / (layer.inputs as f32).sqrt();
            let count = layer.inputs * lora.rank;
            let a = HostTensor {
                shape: vec![layer.inputs, lora.rank],
                values: (0..count)
                    .map(|_| rng.random_range(-bound..bound))
                    .collect(),
            };
            let b = HostTensor {
                shape: vec![lora.rank, layer.outputs],
                values: vec![0.0; lora.rank * layer.outputs],
            };
            Ok((a, b))
        })
    }

    fn attach(
        self,
        lora: &LoraConfig,
        mut pair: impl FnMut(&LinearLayer) -> Result<(HostTensor, HostTensor), LmError>,
    ) -> Result<Self, LmError> {
        if self.lora.is_some() {
            return Err(LmError::Request(
                "LoRA: the model has adapters already; merge them first".into(),
            ));
        }
        let layers = lora.layers(self.config())?;
        let device = self.device();
        let mut model = self.no_grad();
        for layer in &layers {
            let (a, b) = pair(layer)?;
            let adapter = Adapter::new(a, b, lora.scale(), &device);
            *model.blocks[layer.block].adapter_mut(layer.role) = Some(adapter);
        }
        model.lora = Some(lora.clone());
        Ok(model)
    }

    /// The adapters' settings, if the model has adapters.
    pub fn lora_config(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// The model with its adapters switched off: the model they were put on, whose matrices it
    /// shares. What was frozen for the adapters' sake remains so.
    #[must_use]
    pub fn without_adapter(&self) -> Self {
        let mut model = self.clone();
        for layer in names::linear_layers(self.config()) {
            *model.blocks[layer.block].adapter_mut(layer.role) = None;
        }
        model.lora = None;
        model
    }

    /// The plain model, on a device without a graph, whose matrices are `W + s A B`; all of it can
    /// be trained.
    ///
    /// A model without adapters comes back as it is, without its graph.
    #[must_use]
    pub fn merge(&self) -> Self {
        let mut model = self.valid();
        if model.lora.take().is_some() {
            let config = model.config().clone();
            for block in &mut model.blocks {
                block.merge(&config);
            }
            model = model.unfreeze();
        }
        model
    }

    /// Writes `adapter_model.safetensors` (f32) and `adapter_config.json` into `folder`, which
    /// must exist, as PEFT does; `base_model` is the name or folder of the model beneath.
    ///
    /// Each file is whole or absent; the settings come last.
    ///
    /// # Errors
    ///
    /// A model without adapters, or any error of the file system.
    ///
    /// # Panics
    ///
    /// If the device fails.
    pub fn write_adapter(&self, folder: &Path, base_model: Option<&str>) -> Result<(), LmError> {
        let Some(lora) = &self.lora else {
            return Err(LmError::Request("the model has no adapter to write".into()));
        };
        let mut collector = Collector::default();
        self.visit(&mut collector);
        let mut tensors = BTreeMap::new();
        for layer in lora.layers(self.config())? {
            let path = layer.adapter_path();
            for (leaf, [rows, columns], name) in pair_of(&layer, lora.rank) {
                let values = collector
                    .tensors
                    .remove(&format!("{path}.{leaf}"))
                    .expect("every layer that the settings name has its adapter");
                let ours = HostTensor {
                    shape: vec![rows, columns],
                    values,
                };
                tensors.insert(name, transposed(&ours));
            }
        }
        let metadata = [("format".to_string(), "pt".to_string())].into();
        write_safetensors(&folder.join(WEIGHTS_FILE), &tensors, &metadata)?;
        let path = folder.join(CONFIG_FILE);
        let settings = lora.to_json(self.config(), base_model)?;
        let text = serde_json::to_string_pretty(&settings).map_err(|source| LmError::Json {
            path: path.clone(),
            source,
        })?;
        crate::files::write_atomically(&path, |file| {
            std::io::Write::write_all(file, text.as_bytes())
        })
        .map_err(LmError::io(&path))
    }

    /// The model with the adapters of a folder that PEFT, or [`Transformer::write_adapter`],
    /// wrote; nothing but the adapters is trained from here on.
    ///
    /// # Errors
    ///
    /// A missing or damaged file; a setting that is not supported and changes the numbers, by its
    /// name; tensors that are not those that the settings name, or of other shapes; a model that
    /// has adapters already.
    pub fn read_adapter(self, folder: &Path) -> Result<Self, LmError> {
        let AdapterFolder { fields, .. } = AdapterFolder::read(folder)?;
        let path = folder.join(CONFIG_FILE);
        let lora = LoraConfig::from_json(&fields, &path, self.config().family)?;
        // The targets are the file's, so that a mistake in them is named with it.
        let layers = lora.layers(self.config()).map_err(|error| match error {
            LmError::Request(reason) => LmError::config(&path, "target_modules", reason),
            other => other,
        })?;
        let files = AdapterFolder::open_weights(folder)?;
        let expected: Vec<String> = layers
            .iter()
            .flat_map(|layer| pair_of(layer, lora.rank).map(|(_, _, name)| name))
            .collect();
        for name in files.names() {
            if !expected.iter().any(|expected| expected == name) {
                return Err(LmError::weights(
                    files.path(),
                    format!("tensor `{name}` is of no layer that `target_modules` names"),
                ));
            }
        }
        self.attach(&lora, |layer| {
            let read = |[rows, columns]: [usize; 2], name: &str| {
                Ok::<_, LmError>(transposed(&files.read(name, &[columns, rows])?))
            };
            let [(_, a_shape, a), (_, b_shape, b)] = pair_of(layer, lora.rank);
            Ok((read(a_shape, &a)?, read(b_shape, &b)?))
        })
    }
}

/// For `A` and `B`: the name in our module, the shape there, and the name on disk, where the
/// shape is the other way round.
fn pair_of(layer: &LinearLayer, rank: usize) -> [(&'static str, [usize; 2], String); 2] {
    let name = |leaf: &str| format!("{PREFIX}{}.lora_{leaf}.weight", layer.name);
    [
        ("a", [layer.inputs, rank], name("A")),
        ("b", [rank, layer.outputs], name("B")),
    ]
}

fn transposed(tensor: &HostTensor) -> HostTensor {
    let [rows, columns] = [tensor.shape[0], tensor.shape[1]];
    let values = (0..columns)
        .flat_map(|column| (0..rows).map(move |row| (row, column)))
        .map(|(row, column)| tensor.values[row * columns + column])
        .collect();
    HostTensor {
        shape: vec![columns, rows],
        values,
    }
}
