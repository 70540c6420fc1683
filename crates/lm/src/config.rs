//! What a model is: `config.json`, read strictly and in both of transformers' styles.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::LmError;

/// A table of a configuration file, with its field's name.
type NamedTable<'a> = (&'static str, &'a Map<String, Value>);

/// The families of causal language models that are supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama and what shares its layout, such as SmolLM2.
    Llama,
    /// Mistral without a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3 (dense).
    Qwen3,
    /// GPT-NeoX, such as Pythia.
    GptNeox,
    /// GPT-2.
    Gpt2,
}

impl Family {
    /// The `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::GptNeox => "gpt_neox",
            Self::Gpt2 => "gpt2",
        }
    }

    const ALL: [Self; 6] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::GptNeox,
        Self::Gpt2,
    ];
}

/// The normalisation in front of attention, feed-forward and head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square, a weight and no bias.
    Rms,
    /// Mean and variance, a weight and a bias.
    Layer,
}

/// The feed-forward part of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(silu(gate(x)) * up(x))`.
    SwiGlu,
    /// `down(gelu(up(x)))` with the error function.
    Gelu,
    /// `down(gelu(up(x)))` with the tanh approximation.
    GeluTanh,
}

/// Rotary position embedding: the first `dims` of each head turn, halves against halves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How many of a head's dimensions turn; even.
    pub dims: usize,
}

/// The shape of a causal language model, whatever its family.
///
/// One transformer serves every family; this says which parts it has.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family, which decides the names of the weights on disk.
    pub family: Family,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Longest sequence, in tokens.
    pub max_positions: usize,
    /// Kind of normalisation.
    pub norm: NormKind,
    /// Added under the root of a normalisation.
    pub norm_eps: f64,
    /// Kind of feed-forward part.
    pub mlp: MlpKind,
    /// Rotary positions; `None` means a learned table (GPT-2).
    pub rope: Option<Rope>,
    /// Whether query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub out_bias: bool,
    /// Whether the feed-forward projections have a bias.
    pub mlp_bias: bool,
    /// Whether queries and keys are normalised by head (Qwen3).
    pub qk_norm: bool,
    /// Whether attention and feed-forward both read the block's input (GPT-NeoX).
    pub parallel_residual: bool,
    /// Whether the output head is the embedding table.
    pub tied: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Ids that end a text; empty if the model names none.
    pub eos_ids: Vec<u32>,
    /// Id that begins a text.
    pub bos_id: Option<u32>,
    /// Id that fills short rows.
    pub pad_id: Option<u32>,
    /// The file as it was read, so that what is not understood here is written back.
    raw: Map<String, Value>,
}

/// The fields that size a small Llama; everything else takes Llama's defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaShape {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key and value heads.
    pub n_kv_heads: usize,
    /// Longest sequence, in tokens.
    pub max_positions: usize,
    /// Whether the output head is the embedding table.
    pub tied: bool,
    /// Id that ends a text.
    pub eos_id: u32,
    /// Id that fills short rows.
    pub pad_id: u32,
}

impl ModelConfig {
    /// The configuration of a new Llama model of the given shape.
    ///
    /// # Errors
    ///
    /// A size that is zero, or does not divide as it must.
    pub fn llama(shape: &LlamaShape) -> Result<Self, LmError> {
        let raw = serde_json::json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": null,
            "eos_token_id": shape.eos_id,
            "pad_token_id": shape.pad_id,
            "hidden_act": "silu",
            "hidden_size": shape.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": shape.intermediate_size,
            "max_position_embeddings": shape.max_positions,
            "mlp_bias": false,
            "num_attention_heads": shape.n_heads,
            "num_hidden_layers": shape.n_layers,
            "num_key_value_heads": shape.n_kv_heads,
            "head_dim": shape.hidden_size / shape.n_heads.max(1),
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": null,
            "tie_word_embeddings": shape.tied,
            "torch_dtype": "float32",
            "use_cache": true,
            "vocab_size": shape.vocab_size,
        });
        let Value::Object(raw) = raw else {
            unreachable!("the literal above is an object")
        };
        Self::from_json(raw, Path::new("config.json"))
    }

    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    ///
    /// A missing or malformed file, an unknown architecture, or a feature that is not supported;
    /// the message names the field.
    pub fn read(folder: &Path) -> Result<Self, LmError> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(LmError::io(&path))?;
        let raw = serde_json::from_str(&text).map_err(|source| LmError::Json {
            path: path.clone(),
            source,
        })?;
        Self::from_json(raw, &path)
    }

    /// Interprets a parsed `config.json`; `path` is named in errors.
    ///
    /// # Errors
    ///
    /// See [`ModelConfig::read`].
    pub fn from_json(raw: Map<String, Value>, path: &Path) -> Result<Self, LmError> {
        let fields = Fields { raw: &raw, path };
        let model_type = fields.text("model_type", None)?;
        let family = Family::ALL
            .into_iter()
            .find(|family| family.model_type() == model_type)
            .ok_or_else(|| {
                let known: Vec<_> = Family::ALL.iter().map(|f| f.model_type()).collect();
                fields.error(
                    "model_type",
                    format!(
                        "architecture `{model_type}` is not supported; expected one of {}",
                        known.join(", ")
                    ),
                )
            })?;
        fields.refuse_unsupported()?;
        let mut config = match family {
            Family::Gpt2 => Self::read_gpt2(&fields)?,
            Family::GptNeox => Self::read_gpt_neox(&fields)?,
            _ => Self::read_llama_like(&fields, family)?,
        };
        config.check(&fields)?;
        config.raw = raw;
        Ok(config)
    }

    fn read_llama_like(fields: &Fields<'_>, family: Family) -> Result<Self, LmError> {
        let hidden_size = fields.size("hidden_size", None)?;
        let n_heads = fields.size("num_attention_heads", None)?;
        let default_head = match family {
            Family::Qwen3 => 128,
            _ => hidden_size / n_heads,
        };
        let head_dim = fields.size("head_dim", Some(default_head))?;
        let max_positions = fields.size("max_position_embeddings", Some(2048))?;
        fields.refuse_sliding_window(family, max_positions)?;
        let attention_bias = match family {
            Family::Qwen2 => true,
            _ => fields.flag("attention_bias", false)?,
        };
        let act = fields.text("hidden_act", Some("silu"))?;
        if act != "silu" {
            return Err(fields.error("hidden_act", format!("expected `silu`, got `{act}`")));
        }
        Ok(Self {
            family,
            vocab_size: fields.size("vocab_size", None)?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", None)?,
            n_layers: fields.layers("num_hidden_layers", None)?,
            n_heads,
            n_kv_heads: fields.size("num_key_value_heads", Some(n_heads))?,
            head_dim,
            max_positions,
            norm: NormKind::Rms,
            norm_eps: fields.number("rms_norm_eps", Some(1e-6))?,
            mlp: MlpKind::SwiGlu,
            rope: Some(Rope {
                theta: fields.rope_theta("rope_theta", 10_000.0)?,
                dims: fields.rope_dims("partial_rotary_factor", head_dim, 1.0)?,
            }),
            qkv_bias: attention_bias,
            out_bias: attention_bias && family != Family::Qwen2,
            mlp_bias: family == Family::Llama && fields.flag("mlp_bias", false)?,
            qk_norm: family == Family::Qwen3,
            parallel_residual: false,
            tied: fields.flag("tie_word_embeddings", false)?,
            ..fields.common()?
        })
    }

    fn read_gpt_neox(fields: &Fields<'_>) -> Result<Self, LmError> {
        let hidden_size = fields.size("hidden_size", None)?;
        let n_heads = fields.size("num_attention_heads", None)?;
        let head_dim = hidden_size / n_heads;
        let bias = fields.flag("attention_bias", true)?;
        Ok(Self {
            family: Family::GptNeox,
            vocab_size: fields.size("vocab_size", None)?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", None)?,
            n_layers: fields.layers("num_hidden_layers", None)?,
            n_heads,
            n_kv_heads: n_heads,
            head_dim,
            max_positions: fields.size("max_position_embeddings", Some(2048))?,
            norm: NormKind::Layer,
            norm_eps: fields.number("layer_norm_eps", Some(1e-5))?,
            mlp: fields.gelu("hidden_act", "gelu")?,
            rope: Some(Rope {
                theta: fields.rope_theta("rotary_emb_base", 10_000.0)?,
                dims: fields.rope_dims("rotary_pct", head_dim, 0.25)?,
            }),
            qkv_bias: bias,
            out_bias: bias,
            mlp_bias: true,
            qk_norm: false,
            parallel_residual: fields.flag("use_parallel_residual", true)?,
            tied: fields.flag("tie_word_embeddings", false)?,
            ..fields.common()?
        })
    }

    fn read_gpt2(fields: &Fields<'_>) -> Result<Self, LmError> {
        for (field, required) in [
            ("scale_attn_weights", true),
            ("scale_attn_by_inverse_layer_idx", false),
            ("add_cross_attention", false),
        ] {
            if fields.flag(field, required)? != required {
                return Err(fields.error(field, format!("only `{required}` is supported")));
            }
        }
        let hidden_size = fields.size("n_embd", Some(768))?;
        let n_heads = fields.size("n_head", Some(12))?;
        Ok(Self {
            family: Family::Gpt2,
            vocab_size: fields.size("vocab_size", Some(50_257))?,
            hidden_size,
            intermediate_size: fields.size("n_inner", Some(4 * hidden_size))?,
            n_layers: fields.layers("n_layer", Some(12))?,
            n_heads,
            n_kv_heads: n_heads,
            head_dim: hidden_size / n_heads,
            max_positions: fields.size("n_positions", Some(1024))?,
            norm: NormKind::Layer,
            norm_eps: fields.number("layer_norm_epsilon", Some(1e-5))?,
            mlp: fields.gelu("activation_function", "gelu_new")?,
            rope: None,
            qkv_bias: true,
            out_bias: true,
            mlp_bias: true,
            qk_norm: false,
            parallel_residual: false,
            tied: fields.flag("tie_word_embeddings", true)?,
            ..fields.common()?
        })
    }

    fn check(&self, fields: &Fields<'_>) -> Result<(), LmError> {
        let hidden_field = match self.family {
            Family::Gpt2 => "n_embd",
            _ => "hidden_size",
        };
        let needs_division = match self.family {
            Family::Gpt2 | Family::GptNeox => true,
            // Its heads have 128 dimensions unless it says otherwise.
            Family::Qwen3 => false,
            _ => fields.get("head_dim").is_none(),
        };
        if needs_division && !self.hidden_size.is_multiple_of(self.n_heads) {
            return Err(fields.error(
                hidden_field,
                format!(
                    "{} is not a multiple of {} heads",
                    self.hidden_size, self.n_heads
                ),
            ));
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return Err(fields.error(
                "num_key_value_heads",
                format!("{} does not divide {} heads", self.n_kv_heads, self.n_heads),
            ));
        }
        if let Some(rope) = self.rope
            && (rope.dims == 0 || rope.dims % 2 != 0 || rope.dims > self.head_dim)
        {
            return Err(fields.error(
                "head_dim",
                format!(
                    "rotary positions turn an even number of dimensions above 0, got {} of {}",
                    rope.dims, self.head_dim
                ),
            ));
        }
        for (name, id) in [("bos_token_id", self.bos_id), ("pad_token_id", self.pad_id)]
            .into_iter()
            .chain(self.eos_ids.iter().map(|&id| ("eos_token_id", Some(id))))
        {
            if let Some(id) = id
                && id as usize >= self.vocab_size
            {
                return Err(fields.error(
                    name,
                    format!("{id} is outside the vocabulary of {}", self.vocab_size),
                ));
            }
        }
        Ok(())
    }

    /// The `config.json` to write beside weights stored as `float32`.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut raw = self.raw.clone();
        for key in ["dtype", "torch_dtype"] {
            if raw.contains_key(key) {
                raw.insert(key.into(), Value::from("float32"));
            }
        }
        raw
    }

    /// Number of parameters, counting a tied head once.
    pub fn n_parameters(&self) -> usize {
        crate::names::parameters(self)
            .iter()
            .map(|parameter| parameter.shape.iter().product::<usize>())
            .sum()
    }

    /// The longest of the prompts, in tokens, if a model of this shape can read them and `n_new` further tokens.
    ///
    /// # Errors
    ///
    /// No prompt, one that is empty or holds an id outside the vocabulary, or one that is too long;
    /// by its index.
    pub fn check_prompts<P: AsRef<[u32]>>(
        &self,
        prompts: &[P],
        n_new: usize,
    ) -> Result<usize, LmError> {
        if prompts.is_empty() {
            return Err(LmError::Request("no prompt to decode from".into()));
        }
        let mut longest = 0;
        for (row, prompt) in prompts.iter().enumerate() {
            let prompt = prompt.as_ref();
            if prompt.is_empty() {
                return Err(LmError::Request(format!("prompt {row} is empty")));
            }
            if let Some(id) = prompt.iter().find(|&&id| id as usize >= self.vocab_size) {
                return Err(LmError::Request(format!(
                    "prompt {row} holds token id {id}, outside the vocabulary of {}",
                    self.vocab_size
                )));
            }
            if prompt.len().saturating_add(n_new) > self.max_positions {
                return Err(LmError::Request(format!(
                    "prompt {row} has {} tokens; with {n_new} new ones it exceeds the model's {}",
                    prompt.len(),
                    self.max_positions
                )));
            }
            longest = longest.max(prompt.len());
        }
        Ok(longest)
    }

    /// Floating-point operations of one token's forward pass through the blocks and the head,
    /// attention scores left out: two for each weight of each matrix.
    pub fn matmul_flops_per_token(&self) -> (usize, usize) {
        let blocks: usize = crate::names::parameters(self)
            .iter()
            .filter(|parameter| parameter.shape.len() == 2 && parameter.path.starts_with("blocks"))
            .map(|parameter| parameter.shape.iter().product::<usize>())
            .sum();
        (2 * blocks, 2 * self.hidden_size * self.vocab_size)
    }
}

/// Typed access to a configuration's fields, with errors that name them.
struct Fields<'a> {
    raw: &'a Map<String, Value>,
    path: &'a Path,
}

impl Fields<'_> {
    fn error(&self, field: &str, reason: impl Into<String>) -> LmError {
        LmError::config(self.path, field, reason)
    }

    fn get(&self, field: &str) -> Option<&Value> {
        self.raw.get(field).filter(|value| !value.is_null())
    }

    fn missing(&self, field: &str, expected: &str) -> LmError {
        self.error(field, format!("missing; expected {expected}"))
    }

    fn size(&self, field: &str, default: Option<usize>) -> Result<usize, LmError> {
        // Larger sizes than this cannot be meant, and would overflow products of sizes.
        self.size_up_to(1 << 31, field, default)
    }

    /// A number of blocks. Each one's parameters are listed before the weights are looked at.
    fn layers(&self, field: &str, default: Option<usize>) -> Result<usize, LmError> {
        self.size_up_to(1 << 16, field, default)
    }

    fn size_up_to(
        &self,
        largest: u64,
        field: &str,
        default: Option<usize>,
    ) -> Result<usize, LmError> {
        let expected = format!("an integer from 1 to {largest}");
        let Some(value) = self.get(field) else {
            return default.ok_or_else(|| self.missing(field, &expected));
        };
        value
            .as_u64()
            .filter(|size| (1..=largest).contains(size))
            .map(|size| size as usize)
            .ok_or_else(|| self.error(field, format!("expected {expected}, got {value}")))
    }

    fn number(&self, field: &str, default: Option<f64>) -> Result<f64, LmError> {
        let expected = "a number that is not below 0";
        let Some(value) = self.get(field) else {
            return default.ok_or_else(|| self.missing(field, expected));
        };
        value
            .as_f64()
            .filter(|number| number.is_finite() && *number >= 0.0)
            .ok_or_else(|| self.error(field, format!("expected {expected}, got {value}")))
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, LmError> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(self.error(field, format!("expected true or false, got {value}"))),
        }
    }

    fn text(&self, field: &str, default: Option<&'static str>) -> Result<&str, LmError> {
        match self.get(field) {
            None => default.ok_or_else(|| self.missing(field, "a string")),
            Some(Value::String(text)) => Ok(text),
            Some(value) => Err(self.error(field, format!("expected a string, got {value}"))),
        }
    }

    fn gelu(&self, field: &str, default: &'static str) -> Result<MlpKind, LmError> {
        match self.text(field, Some(default))? {
            "gelu" => Ok(MlpKind::Gelu),
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Ok(MlpKind::GeluTanh),
            other => Err(self.error(
                field,
                format!("expected gelu, gelu_new, gelu_fast or gelu_pytorch_tanh, got `{other}`"),
            )),
        }
    }

    fn ids(&self, field: &str) -> Result<Vec<u32>, LmError> {
        let one = |value: &Value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| self.error(field, format!("expected a token id, got {value}")))
        };
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(one).collect(),
            // Some older files write -1 for "none".
            Some(Value::Number(number)) if number.as_i64() == Some(-1) => Ok(Vec::new()),
            Some(value) => Ok(vec![one(value)?]),
        }
    }

    /// The newer style's `rope_parameters`, or the older style's `rope_scaling`.
    fn rope_table(&self) -> Result<Option<NamedTable<'_>>, LmError> {
        for field in ["rope_parameters", "rope_scaling"] {
            match self.get(field) {
                None => {}
                Some(Value::Object(table)) => return Ok(Some((field, table))),
                Some(value) => {
                    return Err(self.error(field, format!("expected a table, got {value}")));
                }
            }
        }
        Ok(None)
    }

    fn rope_theta(&self, older: &str, default: f64) -> Result<f64, LmError> {
        let table = self.rope_table()?;
        if let Some((name, table)) = table
            && let Some(value) = table.get("rope_theta").filter(|value| !value.is_null())
        {
            return self.positive(&format!("{name}.rope_theta"), value);
        }
        let field = match self.get(older) {
            Some(_) => older,
            None => "rope_theta",
        };
        match self.get(field) {
            Some(value) => self.positive(field, value),
            None => Ok(default),
        }
    }

    fn positive(&self, field: &str, value: &Value) -> Result<f64, LmError> {
        value
            .as_f64()
            .filter(|number| number.is_finite() && *number > 0.0)
            .ok_or_else(|| self.error(field, format!("expected a positive number, got {value}")))
    }

    fn rope_dims(&self, older: &str, head_dim: usize, default: f64) -> Result<usize, LmError> {
        let in_table = match self.rope_table()? {
            Some((_, table)) => table.get("partial_rotary_factor").and_then(Value::as_f64),
            None => None,
        };
        let factor = match in_table {
            Some(factor) => factor,
            None => self.number(older, Some(default))?,
        };
        if !(factor > 0.0 && factor <= 1.0) {
            return Err(self.error(older, format!("expected a share in (0, 1], got {factor}")));
        }
        Ok((head_dim as f64 * factor) as usize)
    }

    /// Refuses, by name, what would change the numbers if it were ignored.
    fn refuse_unsupported(&self) -> Result<(), LmError> {
        if let Some((name, table)) = self.rope_table()? {
            let kind = table
                .get("rope_type")
                .or_else(|| table.get("type"))
                .and_then(Value::as_str)
                .unwrap_or("default");
            if kind != "default" {
                return Err(self.error(name, format!("rope scaling `{kind}` is not supported")));
            }
        }
        if let Some(Value::Array(layers)) = self.get("layer_types")
            && let Some(other) = layers.iter().find(|kind| *kind != "full_attention")
        {
            return Err(self.error(
                "layer_types",
                format!("only `full_attention` is supported, got {other}"),
            ));
        }
        if self.get("quantization_config").is_some() {
            return Err(self.error(
                "quantization_config",
                "quantised weights are not supported; export them as float16 or float32",
            ));
        }
        Ok(())
    }

    fn refuse_sliding_window(&self, family: Family, max_positions: usize) -> Result<(), LmError> {
        let used = match family {
            Family::Mistral => true,
            Family::Qwen2 | Family::Qwen3 => self.flag("use_sliding_window", false)?,
            _ => false,
        };
        if used
            && let Some(window) = self.get("sliding_window").and_then(Value::as_u64)
            && (window as usize) < max_positions
        {
            return Err(self.error(
                "sliding_window",
                format!(
                    "a window of {window} within {max_positions} positions is not supported; \
                     set it to null, or lower max_position_embeddings to the window"
                ),
            ));
        }
        Ok(())
    }

    /// What every family shares; the sizes are placeholders that each family overwrites.
    fn common(&self) -> Result<ModelConfig, LmError> {
        Ok(ModelConfig {
            family: Family::Llama,
            vocab_size: 0,
            hidden_size: 0,
            intermediate_size: 0,
            n_layers: 0,
            n_heads: 1,
            n_kv_heads: 1,
            head_dim: 0,
            max_positions: 0,
            norm: NormKind::Rms,
            norm_eps: 0.0,
            mlp: MlpKind::SwiGlu,
            rope: None,
            qkv_bias: false,
            out_bias: false,
            mlp_bias: false,
            qk_norm: false,
            parallel_residual: false,
            tied: false,
            initializer_range: self.number("initializer_range", Some(0.02))?,
            eos_ids: self.ids("eos_token_id")?,
            bos_id: self.ids("bos_token_id")?.first().copied(),
            pad_id: self.ids("pad_token_id")?.first().copied(),
            raw: Map::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama(edits: &[(&str, Value)]) -> Result<ModelConfig, LmError> {
        let shape = LlamaShape {
            vocab_size: 64,
            hidden_size: 32,
            intermediate_size: 48,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            max_positions: 128,
            tied: false,
            eos_id: 1,
            pad_id: 0,
        };
        let mut raw = ModelConfig::llama(&shape).unwrap().raw;
        for (field, value) in edits {
            if value.is_null() {
                raw.remove(*field);
            } else {
                raw.insert((*field).into(), value.clone());
            }
        }
        ModelConfig::from_json(raw, Path::new("folder/config.json"))
    }

    #[test]
    fn what_no_model_can_be_is_refused_by_its_field() {
        let sizes = "expected an integer from 1 to 2147483648, got";
        let cases = [
            ("hidden_size", json!(0), format!("{sizes} 0")),
            ("hidden_size", json!(-32), format!("{sizes} -32")),
            (
                "vocab_size",
                json!(4_000_000_000_u64),
                format!("{sizes} 4000000000"),
            ),
            ("vocab_size", json!("64"), format!("{sizes} \"64\"")),
            ("vocab_size", Value::Null, "missing".into()),
            ("intermediate_size", json!(1.5), format!("{sizes} 1.5")),
            ("max_position_embeddings", json!(0), format!("{sizes} 0")),
            // Nothing is made for each of them.
            (
                "num_hidden_layers",
                json!(2_000_000_000),
                "an integer from 1 to 65536".into(),
            ),
            (
                "num_key_value_heads",
                json!(3),
                "3 does not divide 4 heads".into(),
            ),
            (
                "rms_norm_eps",
                json!(-1),
                "expected a number that is not below 0, got -1".into(),
            ),
            (
                "rope_theta",
                json!(0),
                "expected a positive number, got 0".into(),
            ),
            (
                "head_dim",
                json!(15),
                "an even number of dimensions above 0, got 15 of 15".into(),
            ),
            (
                "quantization_config",
                json!({"bits": 4}),
                "not supported".into(),
            ),
            ("model_type", json!("mamba"), "mamba".into()),
        ];
        for (field, value, expected) in cases {
            let said = llama(&[(field, value.clone())]).unwrap_err().to_string();
            let named = said.contains("folder/config.json") && said.contains(field);
            assert!(named && said.contains(&expected), "{field} {value}: {said}");
        }
        let wider = llama(&[("vocab_size", json!(96))]).unwrap();
        assert_eq!(wider.vocab_size, 96);
        // Where the heads' size is not said, they share the hidden size.
        let shared = [("head_dim", Value::Null), ("num_attention_heads", json!(6))];
        let said = llama(&shared).unwrap_err().to_string();
        assert!(
            said.contains("`hidden_size`: 32 is not a multiple of 6 heads"),
            "{said}"
        );
    }
}
