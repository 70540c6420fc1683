//! Completions of prompts, as rows that rewards and judges read.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use dpo_loss::Beta;
use judge::Sample;
use lm::chat::{ChatTemplate, Message, RenderOptions};
use lm::tokenizer::Tokenizer;
use lm::weights::WeightFiles;
use lm::{AdapterFolder, Decoding, Generate, LmError, ModelConfig, Sampling, Transformer};
use memo_task::{MemoConfig, MemoTask, Split};
use serde::Deserialize;
use serde_json::Value;

use crate::error::TrainError;
use crate::evaluate::sample_completions;
use crate::recipe::{PreferenceRecipe, Recipe};
use crate::run::names;
use crate::workers::Workers;

/// A model that can be asked, with its tokenizer.
#[derive(Debug)]
pub struct Policy {
    /// The model, its adapter switched on if the folder holds one.
    pub model: Transformer,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Where it came from.
    pub folder: PathBuf,
}

impl Policy {
    /// Reads a Hugging Face folder, or a PEFT folder whose base model is a folder here.
    ///
    /// # Errors
    ///
    /// What is wrong with either.
    pub fn read(folder: &Path, device: &Device) -> Result<Self, TrainError> {
        let base = base_of_adapter(folder)?;
        let model = match &base {
            Some(base) => Transformer::read(base, device)?.read_adapter(folder)?,
            None => Transformer::read(folder, device)?,
        };
        Ok(Self {
            model,
            tokenizer: tokenizer_of(folder, base.as_deref())?,
            folder: folder.to_path_buf(),
        })
    }
}

/// The tokenizer of a policy's folder; that of the model below, where adapters come without one.
fn tokenizer_of(folder: &Path, base: Option<&Path>) -> Result<Tokenizer, TrainError> {
    let own = folder.join("tokenizer.json").exists();
    let holder = base.filter(|_| !own).unwrap_or(folder);
    Ok(Tokenizer::from_folder(holder)?)
}

/// What a policy's folder says of the model and its tokenizer; its weights are not read, but their
/// files are opened.
///
/// # Errors
///
/// A file that is missing or malformed. Weights that do not fit the model are left to
/// [`Policy::read`].
pub fn policy_shape(folder: &Path) -> Result<(ModelConfig, Tokenizer), TrainError> {
    let base = base_of_adapter(folder)?;
    let model = base.as_deref().unwrap_or(folder);
    let config = ModelConfig::read(model)?;
    WeightFiles::open(model)?;
    if base.is_some() {
        AdapterFolder::open_weights(folder)?;
    }
    Ok((config, tokenizer_of(folder, base.as_deref())?))
}

/// β of the run that a policy's folder, or a checkpoint's, lies in; training's default where it lies
/// in none.
///
/// # Errors
///
/// A recipe beside it that cannot be read.
pub fn beta_of_run(folder: &Path) -> Result<Beta, TrainError> {
    let whole = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_path_buf());
    let beside = whole.parent();
    let is_checkpoint = beside.is_some_and(|folder| folder.ends_with(names::CHECKPOINTS));
    let run = beside.and_then(|folder| {
        if is_checkpoint {
            folder.parent()
        } else {
            Some(folder)
        }
    });
    match run.map(|run| run.join(names::RECIPE)) {
        Some(recipe) if recipe.exists() => Ok(Recipe::read(&recipe)?.preference.beta),
        _ => Ok(PreferenceRecipe::default().beta),
    }
}

/// The folder of the model that a PEFT folder adapts; none for a model's own folder.
///
/// # Errors
///
/// Settings that cannot be read, or that name no folder here.
pub fn base_of_adapter(folder: &Path) -> Result<Option<PathBuf>, TrainError> {
    if !AdapterFolder::is_one(folder) {
        return Ok(None);
    }
    let named = AdapterFolder::read(folder)?.base_model;
    match named.as_ref().map(PathBuf::from) {
        Some(base) if base.is_dir() => Ok(Some(base)),
        _ => Err(TrainError::Policy {
            path: folder.to_path_buf(),
            reason: format!(
                "`base_model_name_or_path` of its adapter_config.json: expected a folder here, got {}",
                named.map_or("none".into(), |name| format!("{name:?}"))
            ),
        }),
    }
}

/// Prompts with their texts and tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompts {
    /// Each prompt as the policy sees it.
    pub texts: Vec<String>,
    /// Its tokens.
    pub ids: Vec<Vec<u32>>,
}

/// Where prompts come from.
#[derive(Clone, Debug, PartialEq)]
pub enum PromptSource {
    /// The embedded task's held-out memos: how many, and the seed that draws them.
    Memo {
        /// How many.
        n: usize,
        /// The seed.
        seed: u64,
    },
    /// JSON lines with a column `prompt`: a string, or a list of messages.
    File(PathBuf),
}

/// A line of a file of prompts; other columns are left alone.
#[derive(Deserialize)]
struct PromptRow {
    prompt: Value,
}

impl PromptSource {
    /// The prompts in the tokens of a policy.
    ///
    /// # Errors
    ///
    /// A file or line that cannot be read, or messages for a model without a chat template.
    pub fn read(&self, tokenizer: &Tokenizer) -> Result<Prompts, TrainError> {
        let mut prompts = Prompts {
            texts: Vec::new(),
            ids: Vec::new(),
        };
        match self {
            Self::Memo { n, seed } => {
                let task = MemoTask::new(MemoConfig::default())?;
                for example in task.examples(Split::Prompts, *n, *seed) {
                    prompts.texts.push(task.decode(&example.prompt_ids));
                    prompts.ids.push(example.prompt_ids);
                }
            }
            Self::File(path) => {
                let template = ChatTemplate::from_tokenizer(tokenizer)?;
                let file = std::fs::File::open(path).map_err(TrainError::io(path))?;
                let name = path.display().to_string();
                let rows: Vec<PromptRow> = judge::read_jsonl(std::io::BufReader::new(file), &name)?;
                for (row, prompt) in rows.into_iter().enumerate() {
                    let (text, ids) = encoded(&prompt.prompt, tokenizer, template.as_ref())
                        .map_err(|reason| TrainError::Prompt {
                            path: path.clone(),
                            row,
                            reason,
                        })?;
                    prompts.texts.push(text);
                    prompts.ids.push(ids);
                }
            }
        }
        if prompts.texts.is_empty() {
            return Err(TrainError::Policy {
                path: match self {
                    Self::File(path) => path.clone(),
                    Self::Memo { .. } => PathBuf::from("the memo task"),
                },
                reason: "expected at least one prompt, got none".into(),
            });
        }
        Ok(prompts)
    }
}

/// A prompt's text as the policy sees it, and its tokens.
fn encoded(
    prompt: &Value,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<(String, Vec<u32>), String> {
    match prompt {
        Value::String(text) => {
            let ids = tokenizer.encode(text).map_err(|error| error.to_string())?;
            Ok((text.clone(), ids))
        }
        Value::Array(_) => {
            let template =
                template.ok_or("messages need a chat template, and the model has none")?;
            let messages: Vec<Message> =
                serde_json::from_value(prompt.clone()).map_err(|error| error.to_string())?;
            let options = RenderOptions {
                add_generation_prompt: true,
                ..RenderOptions::default()
            };
            let text = template
                .render(&messages, &options)
                .map_err(|error| error.to_string())?;
            let ids = tokenizer
                .encode_plain(&text)
                .map_err(|error| error.to_string())?;
            Ok((text, ids))
        }
        other => Err(format!(
            "column `prompt`: expected a string or a list of messages, got {other}"
        )),
    }
}

/// How to sample.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleOptions {
    /// Completions of each prompt.
    pub n: usize,
    /// The most tokens of one.
    pub max_new_tokens: usize,
    /// Temperature and truncation.
    pub sampling: Sampling,
    /// The seed.
    pub seed: u64,
}

/// `n` completions of each prompt, those of one prompt side by side.
///
/// Each row holds `finished`, `n_tokens` and `completion_ids` beside its text. The work is done by `on`,
/// with a bar that bears a label; where `stop` becomes true, it ends at the batches at hand, and the
/// first prompts come back with all their completions.
///
/// # Errors
///
/// A prompt that with `max_new_tokens` exceeds the model's longest sequence, or logits from which
/// nothing can be drawn.
pub fn sample_prompts(
    policy: &Policy,
    prompts: &Prompts,
    options: &SampleOptions,
    on: (&Workers, &str),
    stop: Option<&AtomicBool>,
) -> Result<Vec<Sample>, TrainError> {
    // Of all prompts before the first is drawn from, so that nothing drawn is lost.
    policy
        .model
        .config()
        .check_prompts(&prompts.ids, options.max_new_tokens)?;
    let repeated: Vec<&[u32]> = prompts
        .ids
        .iter()
        .flat_map(|ids| std::iter::repeat_n(&ids[..], options.n))
        .collect();
    let generate = Generate {
        max_new_tokens: options.max_new_tokens,
        eos_ids: policy.tokenizer.eos_ids().to_vec(),
        decoding: Decoding::Sample(options.sampling),
        seed: options.seed,
    };
    let mut drawn =
        sample_completions(&policy.model, &repeated, &generate, on, stop).map_err(|error| {
            match error {
                TrainError::Model(LmError::Logits { .. }) => TrainError::Policy {
                    path: policy.folder.clone(),
                    reason: error.to_string(),
                },
                other => other,
            }
        })?;
    drawn.truncate(drawn.len() / options.n.max(1) * options.n);
    drawn
        .into_iter()
        .enumerate()
        .map(|(row, completion)| {
            let text = policy.tokenizer.decode(&completion.ids, true)?;
            Ok(Sample::new(&prompts.texts[row / options.n], text)
                .with("finished", completion.ended)
                .with("n_tokens", completion.ids.len())
                .with("completion_ids", completion.ids))
        })
        .collect()
}
