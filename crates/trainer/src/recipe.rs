//! What a run is: one TOML file, every key checked, every default written out.

use std::path::{Path, PathBuf};

use dpo_loss::{Beta, Objectives, UnpairedObjective};
use lm::data::{Boundary, EmptyCompletions, Treatment};
use lm::{FreezeSpec, LoraConfig, Precision, Transformer};
use memo_task::MemoConfig;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::evaluate::DIVERGENCE_METRICS;
use crate::learner::PREFERENCE_METRICS;
use crate::unpaired::UNPAIRED_METRICS;

/// A run: a model, data, and up to two stages of training.
///
/// Read from TOML; unknown keys are refused by name. The resolved recipe, defaults included, is
/// written into the run's folder, and reading it back gives the same run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the run, and of its folder under `runs/`.
    pub name: String,
    /// Seed of weights, data and their order.
    #[serde(default = "defaults::seed")]
    pub seed: u64,
    /// Micro-batches, and batches of scoring, that are computed side by side, each on one thread.
    /// With 1, one batch at a time uses all threads. More is faster for small models on a CPU and
    /// takes as many times the memory; the numbers are the same.
    #[serde(default = "defaults::workers")]
    pub workers: usize,
    /// Keep no activations of a block for the backward pass but compute them again: less memory,
    /// about a third more time.
    #[serde(default)]
    pub gradient_checkpointing: bool,
    /// What matrix products are computed in; weights and all that follows the logits are in f32.
    #[serde(default)]
    pub precision: Precision,
    /// The model to begin with.
    #[serde(default)]
    pub model: ModelRecipe,
    /// Low-rank adapters to train in the preference stage instead of the weights themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraRecipe>,
    /// Preference files; absent for the embedded task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataRecipe>,
    /// The embedded memo task; absent for files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskRecipe>,
    /// Supervised fine-tuning before the preference stage, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sft: Option<SftRecipe>,
    /// The preference stage.
    #[serde(default)]
    pub preference: PreferenceRecipe,
    /// How often to save.
    #[serde(default)]
    pub checkpoints: CheckpointRecipe,
}

/// The model to begin with: a folder, or a fresh Llama of a given shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelRecipe {
    /// A Hugging Face folder; the sizes below are then ignored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads.
    pub kv_heads: usize,
    /// Whether the output head is the embedding table.
    pub tied: bool,
    /// Parameters that stay as they are, by patterns over their Hugging Face names, such as
    /// `model.embed_tokens.*`.
    pub frozen: Vec<String>,
}

impl ModelRecipe {
    /// Checks the sizes of a fresh model.
    fn check(&self, wrong: &Wrong<'_>) -> Result<(), TrainError> {
        /// The most parameters of a fresh model: a slip of the hand would fill the memory unsaid.
        const MOST_PARAMETERS: u128 = 4_000_000_000;
        if self.path.is_some() {
            return Ok(());
        }
        let sizes = [
            ("model.hidden_size", self.hidden_size),
            ("model.intermediate_size", self.intermediate_size),
            ("model.layers", self.layers),
            ("model.heads", self.heads),
            ("model.kv_heads", self.kv_heads),
        ];
        for (key, size) in sizes {
            if size == 0 {
                return Err(wrong(key, "at least 1", &size));
            }
        }
        // Positions turn pairs of a head's dimensions.
        if !self.hidden_size.is_multiple_of(2 * self.heads) {
            let expected = format!(
                "a number of heads that divides `model.hidden_size` {} into even parts",
                self.hidden_size
            );
            return Err(wrong("model.heads", &expected, &self.heads));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of `model.heads` {}", self.heads);
            return Err(wrong("model.kv_heads", &expected, &self.kv_heads));
        }
        let [hidden, inner, layers] =
            [self.hidden_size, self.intermediate_size, self.layers].map(|size| size as u128);
        // Two square matrices at the least, queries and outputs, and the three of the inner part.
        let parameters = layers
            .saturating_mul(hidden)
            .saturating_mul(2 * hidden + 3 * inner);
        if parameters > MOST_PARAMETERS {
            let expected = format!("a fresh model of at most {MOST_PARAMETERS} parameters");
            return Err(wrong("model", &expected, &parameters));
        }
        Ok(())
    }
}

/// Low-rank adapters, as in PEFT: `W + (alpha / rank) A B` in place of `W`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraRecipe {
    /// Rank of each adapter.
    pub rank: usize,
    /// The adapters' outputs are multiplied by `alpha / rank`.
    pub alpha: f64,
    /// Whether they are multiplied by `alpha / sqrt(rank)` instead: rsLoRA, arXiv 2312.03732.
    pub rank_stabilized: bool,
    /// The matrices that get one, by the last part of their Hugging Face names, or `all-linear`.
    pub targets: Vec<String>,
}

/// Preference files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecipe {
    /// The pairs to train on: JSON lines, a JSON array, or Parquet. A path, or a list of
    /// `{ path, weight }`.
    pub train: Sources,
    /// What fine-tuning learns, for `[sft]`: texts, conversations, or prompts with completions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sft: Option<PathBuf>,
    /// The pairs to evaluate on; none means that nothing is evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval: Option<PathBuf>,
    /// Prompt and completion together are cut to this many tokens.
    #[serde(default = "defaults::max_length")]
    pub max_length: usize,
    /// How prompt and completion meet in tokens.
    #[serde(default)]
    pub boundary: Boundary,
    /// Rows that are not preferences (a wrong type, a missing column): an error, or left out.
    #[serde(default = "defaults::malformed_rows")]
    pub malformed_rows: Treatment,
    /// Rows with an empty completion: an error, left out, or kept with its end of text alone.
    #[serde(default)]
    pub empty_completions: EmptyCompletions,
}

/// Files of pairs, and how often an epoch shows those of each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Sources {
    /// One file, each pair once an epoch.
    One(PathBuf),
    /// Several files, mixed.
    Many(Vec<SourceRecipe>),
}

/// One of several files of pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceRecipe {
    /// The file.
    pub path: PathBuf,
    /// How often an epoch shows each of its pairs: 1 once, 0.5 a fresh half each epoch, 2 twice.
    #[serde(default = "defaults::weight")]
    pub weight: f64,
}

impl Sources {
    /// Each file with its weight.
    pub fn list(&self) -> Vec<SourceRecipe> {
        match self {
            Self::One(path) => vec![SourceRecipe {
                path: path.clone(),
                weight: defaults::weight(),
            }],
            Self::Many(sources) => sources.clone(),
        }
    }
}

/// The embedded task: how many memos of each kind, and its own numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TaskRecipe {
    /// Prompts with a completion, for supervised fine-tuning.
    pub sft_examples: usize,
    /// Labelled pairs for the preference stage.
    pub train_pairs: usize,
    /// Held-out labelled pairs.
    pub eval_pairs: usize,
    /// Held-out prompts on which policies are sampled and judged by the true reward.
    pub eval_prompts: usize,
    /// The most tokens of a sampled completion.
    pub max_new_tokens: usize,
    /// The memos' own numbers.
    pub memo: MemoConfig,
}

/// Supervised fine-tuning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SftRecipe {
    /// Passes over the examples.
    pub epochs: f64,
    /// Examples in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in a step.
    pub accumulation: usize,
    /// Let examples of like length share a step, so that less of it is padding.
    pub group_by_length: bool,
    /// The optimizer.
    pub optimizer: OptimizerRecipe,
}

/// The preference stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PreferenceRecipe {
    /// Strength of the KL penalty, in reward units per nat.
    pub beta: Beta,
    /// The loss, by TRL's names: one or several with weights, and their parameters.
    pub objective: Objectives,
    /// A loss of completions that are labelled one by one, in place of `objective`: KTO. The data
    /// then have columns `prompt`, `completion` and `label`, and each row counts as a pair.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unpaired: Option<UnpairedObjective>,
    /// Passes over the pairs.
    pub epochs: f64,
    /// The most steps; 0 sets no limit.
    pub max_steps: usize,
    /// Pairs in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in a step.
    pub accumulation: usize,
    /// Pairs in a batch of evaluation or of reference logps.
    pub eval_batch_size: usize,
    /// Steps between evaluations; 0 evaluates at the start and the end alone.
    pub eval_every: usize,
    /// Let pairs of like length share a step, so that less of it is padding.
    pub group_by_length: bool,
    /// `KL(p_chosen ‖ reference)` of whole completions, nats, where it is known: the report then
    /// draws the bound that it sets to the chosen reward.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen_kl: Option<f64>,
    /// Let the reference follow the policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sync_reference: Option<SyncRecipe>,
    /// Keep the weights of the best evaluation, and stop when evaluations get no better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<BestRecipe>,
    /// Weights of tokens from two models, for the loss `token_weighted`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contrast: Option<ContrastRecipe>,
    /// The optimizer.
    pub optimizer: OptimizerRecipe,
}

/// A reference that follows the policy: TR-DPO, Gorbatovski et al. (2024), arXiv 2404.09656.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SyncRecipe {
    /// Share of the policy in the new reference: `(1 − alpha) reference + alpha policy`.
    pub alpha: f64,
    /// Steps between two changes.
    pub every: usize,
}

/// Which weights are the best, and how long to wait for better ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BestRecipe {
    /// Name of an evaluation's metric, such as `eval_loss` or `eval_rewards/accuracies`.
    pub metric: String,
    /// Whether more of it is better; by default, unless its name ends in `loss`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub greater_is_better: Option<bool>,
    /// Evaluations without a better one before the stage is left; 0 never leaves it.
    pub patience: usize,
    /// A better evaluation is better by more than this.
    pub min_delta: f64,
}

impl BestRecipe {
    /// Whether more of the metric is better.
    pub fn is_better_when_greater(&self) -> bool {
        self.greater_is_better
            .unwrap_or(!self.metric.ends_with("loss"))
    }
}

/// Weights of tokens from a model of good completions and one of bad ones: TIS-DPO, Liu et al.
/// (2024), arXiv 2410.04350.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContrastRecipe {
    /// Folder of the model of good completions.
    pub positive: PathBuf,
    /// Folder of the model of bad completions.
    pub negative: PathBuf,
    /// Exponent of their ratio for chosen completions; that of rejected ones is its negative.
    #[serde(default = "defaults::contrast_scale")]
    pub scale: f64,
    /// Least log-ratio that is told apart, nats.
    #[serde(default = "defaults::contrast_low")]
    pub low: f64,
    /// Largest log-ratio that is told apart, nats.
    #[serde(default = "defaults::contrast_high")]
    pub high: f64,
}

/// AdamW, its learning rate over time, and clipping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerRecipe {
    /// The learning rate at its height.
    pub learning_rate: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the squared mean.
    pub epsilon: f64,
    /// Decoupled weight decay, on matrices alone: never on biases and norms.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0 clips nothing.
    pub max_grad_norm: f64,
    /// The shape of the learning rate after warmup.
    pub schedule: Schedule,
    /// Steps over which the learning rate rises from 0.
    pub warmup_steps: usize,
}

/// The shape of the learning rate after warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays at its height.
    Constant,
    /// Falls to 0 along a line.
    Linear,
    /// Falls to 0 along half a cosine.
    Cosine,
}

/// How often to save, and how much to keep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointRecipe {
    /// Steps between checkpoints; 0 saves at the end of each stage alone.
    pub every: usize,
    /// How many of the newest to keep.
    pub keep: usize,
}

impl Default for ModelRecipe {
    fn default() -> Self {
        Self {
            path: None,
            hidden_size: 128,
            intermediate_size: 256,
            layers: 2,
            heads: 4,
            kv_heads: 4,
            tied: true,
            frozen: Vec::new(),
        }
    }
}

impl Default for LoraRecipe {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            rank_stabilized: false,
            targets: vec!["all-linear".into()],
        }
    }
}

impl From<&LoraRecipe> for LoraConfig {
    fn from(recipe: &LoraRecipe) -> Self {
        Self {
            rank: recipe.rank,
            alpha: recipe.alpha,
            rank_stabilized: recipe.rank_stabilized,
            targets: recipe.targets.clone(),
        }
    }
}

impl Default for SyncRecipe {
    fn default() -> Self {
        Self {
            alpha: 0.6,
            every: 512,
        }
    }
}

impl Default for BestRecipe {
    fn default() -> Self {
        Self {
            metric: "eval_loss".into(),
            greater_is_better: None,
            patience: 0,
            min_delta: 0.0,
        }
    }
}

impl Default for TaskRecipe {
    fn default() -> Self {
        Self {
            sft_examples: 12_000,
            train_pairs: 2_000,
            eval_pairs: 512,
            eval_prompts: 320,
            max_new_tokens: 48,
            memo: MemoConfig::default(),
        }
    }
}

impl Default for SftRecipe {
    fn default() -> Self {
        Self {
            epochs: 1.0,
            batch_size: 32,
            accumulation: 1,
            group_by_length: false,
            optimizer: OptimizerRecipe {
                learning_rate: 3e-3,
                beta2: 0.98,
                schedule: Schedule::Cosine,
                warmup_steps: 20,
                ..OptimizerRecipe::default()
            },
        }
    }
}

impl PreferenceRecipe {
    /// What was set and changes nothing, in sentences.
    pub fn warnings(&self) -> Vec<String> {
        match self.unpaired {
            None => self.objective.warnings(),
            Some(_) => Vec::new(),
        }
    }
}

impl Default for PreferenceRecipe {
    fn default() -> Self {
        Self {
            beta: Beta::new(0.1).expect("a tenth is a valid strength"),
            objective: Objectives::default(),
            unpaired: None,
            epochs: 1.0,
            max_steps: 0,
            batch_size: 8,
            accumulation: 1,
            eval_batch_size: 16,
            eval_every: 0,
            group_by_length: false,
            chosen_kl: None,
            sync_reference: None,
            best: None,
            contrast: None,
            optimizer: OptimizerRecipe::default(),
        }
    }
}

impl Default for OptimizerRecipe {
    fn default() -> Self {
        Self {
            learning_rate: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            schedule: Schedule::Linear,
            warmup_steps: 0,
        }
    }
}

impl Default for CheckpointRecipe {
    fn default() -> Self {
        Self { every: 0, keep: 2 }
    }
}

mod defaults {
    pub(super) fn malformed_rows() -> lm::data::Treatment {
        lm::data::Treatment::Refuse
    }

    pub(super) fn seed() -> u64 {
        1
    }

    pub(super) fn workers() -> usize {
        1
    }

    pub(super) fn max_length() -> usize {
        1024
    }

    pub(super) fn weight() -> f64 {
        1.0
    }

    pub(super) fn contrast_scale() -> f64 {
        1.0
    }

    pub(super) fn contrast_low() -> f64 {
        -0.5
    }

    pub(super) fn contrast_high() -> f64 {
        1.5
    }
}

impl Recipe {
    /// The main job: the embedded task, from nothing to a preference-trained policy.
    #[expect(
        clippy::missing_panics_doc,
        reason = "the recipe is part of the source"
    )]
    pub fn memo() -> Self {
        Self::parse(
            include_str!("../../../recipes/memo.toml"),
            "recipes/memo.toml",
        )
        .expect("the recipe in the source is valid, as its test shows")
    }

    /// A preference stage on a model and a file, with TRL's settings but a larger learning rate.
    pub fn files(name: &str, model: PathBuf, data: DataRecipe) -> Self {
        Self {
            name: name.to_string(),
            seed: defaults::seed(),
            workers: defaults::workers(),
            gradient_checkpointing: false,
            precision: Precision::F32,
            lora: None,
            model: ModelRecipe {
                path: Some(model),
                ..ModelRecipe::default()
            },
            data: Some(data),
            task: None,
            sft: None,
            preference: PreferenceRecipe {
                optimizer: OptimizerRecipe {
                    warmup_steps: 10,
                    learning_rate: 1e-4,
                    ..OptimizerRecipe::default()
                },
                eval_every: 25,
                ..PreferenceRecipe::default()
            },
            checkpoints: CheckpointRecipe {
                every: 50,
                ..CheckpointRecipe::default()
            },
        }
    }

    /// Reads a recipe file.
    ///
    /// # Errors
    ///
    /// A missing file, bad TOML, an unknown key, or a value out of its range.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let text = std::fs::read_to_string(path).map_err(TrainError::io(path))?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Reads a recipe from text; `name` stands for the file in errors.
    ///
    /// # Errors
    ///
    /// Bad TOML, an unknown key, or a value out of its range.
    pub fn parse(text: &str, name: &str) -> Result<Self, TrainError> {
        let recipe: Self = toml::from_str(text).map_err(|error| TrainError::Recipe {
            file: name.to_string(),
            reason: error.to_string().trim_end().to_string(),
        })?;
        recipe.check(name)?;
        Ok(recipe)
    }

    /// The recipe as TOML, with every default.
    ///
    /// # Errors
    ///
    /// Never in practice: every field has a form in TOML.
    pub fn to_toml(&self) -> Result<String, TrainError> {
        toml::to_string_pretty(self).map_err(|error| TrainError::Recipe {
            file: self.name.clone(),
            reason: error.to_string(),
        })
    }

    /// Checks what types cannot: ranges, and that the parts fit together.
    ///
    /// # Errors
    ///
    /// The first key whose value is out of its range.
    pub fn check(&self, file: &str) -> Result<(), TrainError> {
        let wrong = |key: &str, expected: &str, got: &dyn std::fmt::Display| TrainError::Recipe {
            file: file.to_string(),
            reason: format!("key `{key}`: expected {expected}, got {got}"),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty() || self.name.starts_with('.') || !self.name.chars().all(plain) {
            let expected = "letters, digits, `-`, `_` and `.`, not starting with `.`";
            return Err(wrong("name", expected, &format!("`{}`", self.name)));
        }
        if self.workers == 0 {
            return Err(wrong("workers", "at least 1", &0));
        }
        match (&self.task, &self.data) {
            (Some(_), Some(_)) => {
                return Err(wrong("data", "either [task] or [data]", &"both"));
            }
            (None, None) => return Err(wrong("data", "[task] or [data]", &"neither")),
            (None, Some(data)) => {
                if self.model.path.is_none() {
                    return Err(wrong(
                        "model.path",
                        "a folder, since [data] is given",
                        &"none",
                    ));
                }
                if data.sft.is_some() && self.sft.is_none() {
                    return Err(wrong("data.sft", "[sft] beside it", &"none"));
                }
                if data.max_length < 2 {
                    return Err(wrong("data.max_length", "at least 2", &data.max_length));
                }
                let sources = data.train.list();
                if sources.is_empty() {
                    return Err(wrong("data.train", "at least one file", &"none"));
                }
                for source in &sources {
                    if !(source.weight.is_finite() && source.weight > 0.0) {
                        let key = format!("data.train `{}` weight", source.path.display());
                        return Err(wrong(&key, "a number above 0", &source.weight));
                    }
                }
            }
            (Some(task), None) => {
                for (key, value) in [
                    ("task.train_pairs", task.train_pairs),
                    ("task.eval_pairs", task.eval_pairs),
                    ("task.eval_prompts", task.eval_prompts),
                    ("task.max_new_tokens", task.max_new_tokens),
                ] {
                    if !(1..=MOST_EXAMPLES).contains(&value) {
                        return Err(wrong(key, &format!("from 1 to {MOST_EXAMPLES}"), &value));
                    }
                }
            }
        }
        self.model.check(&wrong)?;
        if let Some(sft) = &self.sft {
            if self.data.as_ref().is_some_and(|data| data.sft.is_none()) {
                return Err(wrong("data.sft", "a file, since there is [sft]", &"none"));
            }
            if let Some(task) = &self.task
                && !(1..=MOST_EXAMPLES).contains(&task.sft_examples)
            {
                let expected = format!("from 1 to {MOST_EXAMPLES}");
                return Err(wrong("task.sft_examples", &expected, &task.sft_examples));
            }
            check_stage("sft", sft.epochs, sft.batch_size, sft.accumulation, &wrong)?;
            sft.optimizer.check("sft.optimizer", &wrong)?;
        }
        let stage = &self.preference;
        let (epochs, batch) = (stage.epochs, stage.batch_size);
        check_stage("preference", epochs, batch, stage.accumulation, &wrong)?;
        if stage.eval_batch_size == 0 {
            return Err(wrong("preference.eval_batch_size", "at least 1", &0));
        }
        self.check_objective(&wrong)?;
        if let Some(sync) = &stage.sync_reference {
            if !(sync.alpha > 0.0 && sync.alpha <= 1.0) {
                let key = "preference.sync_reference.alpha";
                return Err(wrong(key, "above 0 and at most 1", &sync.alpha));
            }
            if sync.every == 0 {
                return Err(wrong("preference.sync_reference.every", "at least 1", &0));
            }
            if self.lora.is_some() {
                let (key, expected) = ("preference.sync_reference", "none beside [lora]");
                return Err(wrong(key, expected, &"both"));
            }
        }
        if let Some(best) = &stage.best {
            if self.data.as_ref().is_some_and(|data| data.eval.is_none()) {
                let expected = "`data.eval` beside it, since it reads evaluations";
                return Err(wrong("preference.best", expected, &"none"));
            }
            if !(best.min_delta.is_finite() && best.min_delta >= 0.0) {
                let key = "preference.best.min_delta";
                return Err(wrong(key, "at least 0", &best.min_delta));
            }
            let known = self.evaluation_metrics();
            if !known.contains(&best.metric) {
                let expected = format!("one of {}", known.join(", "));
                return Err(wrong("preference.best.metric", &expected, &best.metric));
            }
        }
        if let Some(kl) = stage.chosen_kl
            && !(kl.is_finite() && kl >= 0.0)
        {
            return Err(wrong("preference.chosen_kl", "at least 0", &kl));
        }
        if let Some(lora) = &self.lora {
            if lora.rank == 0 {
                return Err(wrong("lora.rank", "at least 1", &0));
            }
            if !lora.alpha.is_finite() {
                return Err(wrong("lora.alpha", "a number", &lora.alpha));
            }
            if lora.targets.is_empty() {
                return Err(wrong("lora.targets", "at least one name", &"none"));
            }
            if !self.model.frozen.is_empty() {
                let expected = "none beside [lora], which freezes all weights";
                return Err(wrong("model.frozen", expected, &"both"));
            }
        }
        if self.checkpoints.keep == 0 {
            return Err(wrong("checkpoints.keep", "at least 1", &0));
        }
        stage.optimizer.check("preference.optimizer", &wrong)
    }
}

impl Recipe {
    /// The model with what the recipe freezes frozen.
    ///
    /// # Errors
    ///
    /// A pattern that names no parameter of the model, or one that leaves nothing to train.
    pub fn trainable(&self, model: Transformer) -> Result<Transformer, TrainError> {
        if self.model.frozen.is_empty() {
            return Ok(model);
        }
        let freeze = FreezeSpec {
            first_blocks: 0,
            names: self.model.frozen.clone(),
        };
        Ok(model.with_frozen(&freeze)?)
    }

    /// The numbers of an evaluation of the preference stage, by name; some depend on the objective.
    fn evaluation_metrics(&self) -> Vec<String> {
        let (metrics, compared): (&[&str], &[&str]) = match self.preference.unpaired {
            Some(_) => (&UNPAIRED_METRICS, &[]),
            None => (&PREFERENCE_METRICS, &DIVERGENCE_METRICS),
        };
        // Gradients are of training.
        let read = metrics.iter().filter(|name| !name.starts_with("grad_"));
        let names = std::iter::once(&"loss").chain(read).chain(compared);
        names.map(|name| format!("eval_{name}")).collect()
    }

    /// Whether the data hold a weight for each token.
    pub(crate) fn weighs_tokens_by_data(&self) -> bool {
        let stage = &self.preference;
        stage.objective.needs().token_weights && stage.contrast.is_none()
    }

    /// Checks that the trainer has what the losses need.
    fn check_objective(&self, wrong: &Wrong<'_>) -> Result<(), TrainError> {
        let stage = &self.preference;
        let needs = stage.objective.needs();
        let key = "preference.objective";
        if let Some(unpaired) = &stage.unpaired {
            let key = "preference.unpaired";
            if let Err(error) = unpaired.check() {
                return Err(wrong(key, "weights in range", &error));
            }
            if stage.objective != Objectives::default() {
                return Err(wrong(key, "no `objective` beside it", &"both"));
            }
            if stage.sync_reference.is_some() {
                return Err(wrong(key, "no `sync_reference` beside it", &"both"));
            }
        }
        if needs.step_mask {
            let expected = "losses over whole completions";
            let got = "`step`; write the shared steps into the prompt, and `sigmoid` is that loss";
            return Err(wrong(key, expected, &got));
        }
        match (&stage.contrast, needs.token_weights) {
            (None, true) if self.data.is_none() => {
                let expected = "[preference.contrast] beside `token_weighted`";
                return Err(wrong(key, expected, &"none"));
            }
            (Some(_), false) => {
                let expected = "the loss `token_weighted`, which reads it";
                return Err(wrong("preference.contrast", expected, &"none"));
            }
            _ => {}
        }
        if let Some(contrast) = &stage.contrast {
            let numbers = [contrast.scale, contrast.low, contrast.high];
            if !(numbers.iter().all(|x| x.is_finite()) && contrast.low <= contrast.high) {
                let expected = "finite numbers with `low` at most `high`";
                let got = format!("{numbers:?}");
                return Err(wrong("preference.contrast", expected, &got));
            }
        }
        Ok(())
    }
}

type Wrong<'a> = dyn Fn(&str, &str, &dyn std::fmt::Display) -> TrainError + 'a;

fn check_stage(
    stage: &str,
    epochs: f64,
    batch_size: usize,
    accumulation: usize,
    wrong: &Wrong<'_>,
) -> Result<(), TrainError> {
    if !(epochs.is_finite() && epochs > 0.0) {
        return Err(wrong(
            &format!("{stage}.epochs"),
            "a number above 0",
            &epochs,
        ));
    }
    for (key, value) in [("batch_size", batch_size), ("accumulation", accumulation)] {
        if value == 0 {
            return Err(wrong(&format!("{stage}.{key}"), "at least 1", &value));
        }
    }
    Ok(())
}

/// The most examples that the embedded task makes: all are held in memory, 1 KB each about.
const MOST_EXAMPLES: usize = 10_000_000;

impl OptimizerRecipe {
    fn check(&self, table: &str, wrong: &Wrong<'_>) -> Result<(), TrainError> {
        let at_least_zero = |value: f64| value.is_finite() && value >= 0.0;
        for (key, value, fits, expected) in [
            (
                "learning_rate",
                self.learning_rate,
                at_least_zero(self.learning_rate),
                "a finite number of at least 0",
            ),
            (
                "beta1",
                self.beta1,
                (0.0..1.0).contains(&self.beta1),
                "in [0, 1)",
            ),
            (
                "beta2",
                self.beta2,
                (0.0..1.0).contains(&self.beta2),
                "in [0, 1)",
            ),
            (
                // At 0 a gradient of exactly 0 would be divided by 0.
                "epsilon",
                self.epsilon,
                self.epsilon.is_finite() && self.epsilon > 0.0,
                "above 0",
            ),
            (
                "weight_decay",
                self.weight_decay,
                at_least_zero(self.weight_decay),
                "at least 0",
            ),
            (
                "max_grad_norm",
                self.max_grad_norm,
                at_least_zero(self.max_grad_norm),
                "at least 0",
            ),
        ] {
            if !fits {
                return Err(wrong(&format!("{table}.{key}"), expected, &value));
            }
        }
        Ok(())
    }

    /// The learning rate of step `step` (from 0) of `n_steps`.
    ///
    /// As in transformers: warmup rises as `step / warmup_steps`, so that the first warm step
    /// learns nothing; then the schedule falls towards 0 at `n_steps`.
    pub fn learning_rate_at(&self, step: usize, n_steps: usize) -> f64 {
        let warmup = self.warmup_steps;
        if step < warmup {
            return self.learning_rate * step as f64 / warmup as f64;
        }
        let left = n_steps.saturating_sub(warmup).max(1) as f64;
        let done = ((step - warmup) as f64 / left).min(1.0);
        self.learning_rate
            * match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => 1.0 - done,
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_in_the_repository_is_valid_and_survives_a_round_trip() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
        let mut seen = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|kind| kind == "toml") {
                let recipe = Recipe::read(&path).unwrap();
                let text = recipe.to_toml().unwrap();
                assert_eq!(Recipe::parse(&text, "resolved").unwrap(), recipe);
                seen += 1;
            }
        }
        assert!(seen > 0);
        assert_eq!(Recipe::memo().name, "memo");
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let text = "name = \"x\"\n[task]\n[preference]\nlearning_rat = 1\n";
        let error = Recipe::parse(text, "x.toml").unwrap_err().to_string();
        assert!(
            error.contains("x.toml") && error.contains("learning_rat"),
            "{error}"
        );
        assert!(error.contains("line 4"), "{error}");
    }

    #[test]
    fn values_out_of_range_are_refused_by_key() {
        for (text, key) in [
            ("name = \"../x\"\n[task]", "`name`"),
            ("name = \"x\"", "`data`"),
            (
                "name = \"x\"\n[task]\n[preference]\nbatch_size = 0",
                "`preference.batch_size`",
            ),
            (
                "name = \"x\"\n[task]\n[preference]\nepochs = -1.0",
                "`preference.epochs`",
            ),
            (
                "name = \"x\"\n[task]\n[preference.optimizer]\nbeta1 = 1.0",
                "beta1",
            ),
            ("name = \"x\"\n[task]\n[preference]\nbeta = 0.0", "beta"),
            ("name = \"x\"\n[data]\ntrain = \"a\"", "`model.path`"),
        ] {
            let error = Recipe::parse(text, "x.toml").unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }

    #[test]
    fn schedules_rise_and_fall_as_in_transformers() {
        let recipe = |schedule| OptimizerRecipe {
            learning_rate: 1.0,
            schedule,
            warmup_steps: 2,
            ..OptimizerRecipe::default()
        };
        let rates = |schedule| -> Vec<f64> {
            (0..7)
                .map(|step| recipe(schedule).learning_rate_at(step, 6))
                .collect()
        };
        assert_eq!(
            rates(Schedule::Constant),
            [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
        );
        assert_eq!(
            rates(Schedule::Linear),
            [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
        );
        let cosine = rates(Schedule::Cosine);
        assert!((cosine[4] - 0.5).abs() < 1e-15 && cosine[6].abs() < 1e-15);
    }
}
