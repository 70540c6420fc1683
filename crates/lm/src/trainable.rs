//! What of a model is trained, and what that needs in memory.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use crate::config::{MlpKind, ModelConfig};
use crate::error::LmError;
use crate::model::Transformer;
use crate::names;

/// Parameters that stay as they are while the others are trained.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FreezeSpec {
    /// This many blocks, the first ones.
    pub first_blocks: usize,
    /// Names of parameters in transformers, in which `*` stands for any text: `model.embed_tokens.*`,
    /// `*norm*`, `model.layers.0.mlp.*`.
    pub names: Vec<String>,
}

/// A parameter of a model, or of its adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterInfo {
    /// Path in the module tree, by which optimizers know it: `blocks.0.query.weight`.
    pub path: String,
    /// Name in transformers, or in PEFT: `model.layers.0.self_attn.q_proj.weight`. Parts of one
    /// stored tensor share its name.
    pub name: String,
    /// Shape in the module tree.
    pub shape: Vec<usize>,
    /// Whether training changes it.
    pub trainable: bool,
}

impl ParameterInfo {
    /// How many numbers it holds.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Bytes that training needs at its peak: an estimate, from sizes alone.
///
/// What the allocator, the device's workspace and the data take is not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainingMemory {
    /// All weights, frozen ones and adapters included.
    pub weights: u64,
    /// Gradients of what is trained.
    pub gradients: u64,
    /// Adam's two moments of what is trained.
    pub optimizer: u64,
    /// What the blocks keep for the backward pass, for each token of a batch, padding included.
    pub activations_per_token: u64,
    /// The same where blocks are recomputed ([`Transformer::checkpointed`]).
    pub checkpoints_per_token: u64,
    /// The activations of one block, for each token: what recomputation holds beside them.
    pub block_per_token: u64,
    /// What the head and the loss keep for each completion token that is predicted.
    pub logits_per_token: u64,
}

impl TrainingMemory {
    /// Bytes at the peak of a step on `n_tokens` with padding, `n_predicted` of them predicted.
    pub fn total(&self, n_tokens: usize, n_predicted: usize, recompute: bool) -> u64 {
        let per_token = if recompute {
            self.checkpoints_per_token + self.block_per_token
        } else {
            self.activations_per_token
        };
        self.weights
            + self.gradients
            + self.optimizer
            + n_tokens as u64 * per_token
            + n_predicted as u64 * self.logits_per_token
    }
}

impl Transformer {
    /// The model with some of its parameters frozen: they get no gradient, and none is computed.
    ///
    /// # Errors
    ///
    /// A name that is no parameter's, more blocks than there are, nothing left to train, or a
    /// model with adapters, beneath which everything is frozen already.
    pub fn with_frozen(self, freeze: &FreezeSpec) -> Result<Self, LmError> {
        let refuse = |reason: String| Err(LmError::Request(format!("freeze: {reason}")));
        if self.lora.is_some() {
            return refuse("beneath LoRA adapters every parameter is frozen already".into());
        }
        let config = self.config();
        if freeze.first_blocks > config.n_layers {
            return refuse(format!(
                "{} blocks of a model that has {}",
                freeze.first_blocks, config.n_layers
            ));
        }
        let parameters = names::parameters(config);
        let mut frozen: BTreeSet<String> = BTreeSet::new();
        for pattern in &freeze.names {
            let mut any = false;
            for parameter in &parameters {
                if matches(pattern, parameter.source.name()) {
                    frozen.insert(parameter.path.clone());
                    any = true;
                }
            }
            if !any {
                let table = parameters[0].source.name();
                let hint = if config.tied && matches(pattern, names::head_name(config.family)) {
                    format!("the head of this model is its table `{table}`")
                } else {
                    format!("they are named like `{table}`")
                };
                return refuse(format!("`{pattern}` names no parameter; {hint}"));
            }
        }
        for parameter in &parameters {
            if block_of(&parameter.path).is_some_and(|block| block < freeze.first_blocks) {
                frozen.insert(parameter.path.clone());
            }
        }
        if frozen.len() == parameters.len() {
            return refuse("nothing is left to train".into());
        }
        let mut freezer = Freezer {
            path: Vec::new(),
            frozen,
        };
        Ok(self.map(&mut freezer))
    }

    /// Every parameter, those of adapters included, in the order of the module tree.
    pub fn parameter_list(&self) -> Vec<ParameterInfo> {
        let mut names: BTreeMap<String, String> = names::parameters(self.config())
            .into_iter()
            .map(|parameter| (parameter.path, parameter.source.name().to_string()))
            .collect();
        for layer in names::linear_layers(self.config()) {
            let path = layer.adapter_path();
            names.insert(format!("{path}.a"), format!("{}.lora_A.weight", layer.name));
            names.insert(format!("{path}.b"), format!("{}.lora_B.weight", layer.name));
        }
        let mut lister = Lister {
            path: Vec::new(),
            names,
            list: Vec::new(),
        };
        // On a device without a graph nothing requires a gradient yet; what will is asked of a
        // copy, which shares the numbers.
        self.clone().train().visit(&mut lister);
        lister.list
    }

    /// How many numbers training changes.
    pub fn n_trainable_parameters(&self) -> usize {
        let list = self.parameter_list();
        let trainable = list.iter().filter(|parameter| parameter.trainable);
        trainable.map(ParameterInfo::count).sum()
    }

    /// What training this model on rows of `row_tokens` tokens needs in memory.
    pub fn training_memory(&self, row_tokens: usize) -> TrainingMemory {
        let list = self.parameter_list();
        let count = |trainable: bool| -> u64 {
            let counted = list.iter().filter(|p| p.trainable || !trainable);
            counted.map(|parameter| parameter.count() as u64).sum()
        };
        let config = self.config();
        // Below the first block with something to train nothing is kept.
        let (first, _) = trained_from(&list, config.n_layers);
        let blocks = (config.n_layers - first) as u64;
        let block = activations_of_a_block(config, row_tokens);
        TrainingMemory {
            weights: FLOAT * count(false),
            gradients: FLOAT * count(true),
            optimizer: 2 * FLOAT * count(true),
            activations_per_token: blocks * block,
            checkpoints_per_token: FLOAT * blocks * config.hidden_size as u64,
            block_per_token: block,
            logits_per_token: FLOAT * LOGIT_COPIES * config.vocab_size as u64,
        }
    }
}

/// The first block that a gradient must reach, the number of blocks if none, and whether one must
/// reach the embedding, beneath all of them.
pub(crate) fn trained_from(list: &[ParameterInfo], n_layers: usize) -> (usize, bool) {
    let trained = || list.iter().filter(|parameter| parameter.trainable);
    if trained().any(|parameter| ["embed", "positions"].contains(&&parameter.path[..])) {
        return (0, true);
    }
    let blocks = trained().filter_map(|parameter| block_of(&parameter.path));
    (blocks.min().unwrap_or(n_layers), false)
}

/// Bytes of an f32.
const FLOAT: u64 = 4;
/// Rows of the vocabulary's size that a predicted token has at the peak, where logits are made whole.
const LOGIT_COPIES: u64 = 4;

/// Bytes that a block keeps for each token, in rows of `row_tokens`.
///
/// Measured peaks of a Llama of 6 million parameters lay within a tenth of what this gives
/// (`examples/training_memory.rs`) where attention is composed of tensor operations, as on a GPU. On a
/// CPU, which keeps neither scores nor masks, it is more than is needed.
fn activations_of_a_block(config: &ModelConfig, row_tokens: usize) -> u64 {
    let hidden = config.hidden_size;
    let query = config.n_heads * config.head_dim;
    let key = config.n_kv_heads * config.head_dim;
    // The input of each norm, the normalised values, and what the matrices read.
    let norms = 2 * 3 * hidden;
    // Turned queries and keys, values, and the mixture.
    let attention = 2 * query + 2 * key;
    let scores = config.n_heads * row_tokens;
    let mlp = match config.mlp {
        // Gate, its sigmoid, their product, up, and the product with it.
        MlpKind::SwiGlu => 5,
        MlpKind::Gelu | MlpKind::GeluTanh => 4,
    } * config.intermediate_size;
    // Masked scores, their exponentials, the probabilities; and the mask, a byte each.
    FLOAT * (norms + attention + 3 * scores + mlp) as u64 + scores as u64
}

/// The block that a parameter belongs to.
fn block_of(path: &str) -> Option<usize> {
    let rest = path.strip_prefix("blocks.")?;
    rest.split('.').next()?.parse().ok()
}

/// Whether a name is what a pattern, in which `*` stands for any text, says.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(mut name) = name.strip_prefix(first) else {
        return false;
    };
    // The parts between stars are found from the left, which leaves the most for the last.
    let mut parts = rest.split('*').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return name.ends_with(part);
        }
        let Some(at) = name.find(part) else {
            return false;
        };
        name = &name[at + part.len()..];
    }
    true
}

struct Freezer {
    path: Vec<String>,
    frozen: BTreeSet<String>,
}

impl ModuleMapper for Freezer {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.frozen.contains(&self.path.join(".")) {
            param.set_require_grad(false)
        } else {
            param
        }
    }
}

struct Lister {
    path: Vec<String>,
    names: BTreeMap<String, String>,
    list: Vec<ParameterInfo>,
}

impl ModuleVisitor for Lister {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        self.list.push(ParameterInfo {
            name: self.names.get(&path).cloned().unwrap_or_default(),
            shape: param.val().dims().to_vec(),
            trainable: param.val().is_require_grad(),
            path,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, name, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("*", "a.b", true),
            ("a.*", "a.b.c", true),
            ("*norm*", "model.layers.0.input_layernorm.weight", true),
            ("*norm", "model.norm.weight", false),
            ("*.0.*.weight", "model.layers.0.mlp.up_proj.weight", true),
            ("*.0.*.weight", "model.layers.10.mlp.up_proj.weight", false),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("*ab*b", "abcab", true),
            ("*ab*b", "cab", false),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
