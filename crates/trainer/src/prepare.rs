//! From a recipe to a model, a tokenizer and tokens.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use lm::chat::ChatTemplate;
use lm::data::{
    DataError, DataReport, LabelledExample, PreferencePair, PreferenceRow, SftExample,
    TokenizeOptions, Tokenized, Treatment, load_rows, read_labelled, read_preferences, read_sft,
    tokenize_labelled, tokenize_pairs_observed, tokenize_sft,
};
use lm::tokenizer::Tokenizer;
use lm::{LlamaShape, LoraConfig, ModelConfig, Transformer};
use memo_task::{Memo, MemoTask, Split};
use serde_json::Value;

use crate::error::TrainError;
use crate::order::Source;
use crate::progress::Progress;
use crate::recipe::{DataRecipe, Recipe, TaskRecipe};
use crate::reference::ReferenceLogps;
use crate::unpaired::with_strangers;

/// All that training needs, in tokens.
#[derive(Debug)]
pub struct Prepared {
    /// The model to begin with, on a plain device.
    pub model: Transformer,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Examples of the fine-tuning stage; none without one.
    pub sft: Vec<SftExample>,
    /// Pairs of the preference stage.
    pub train: Vec<PreferencePair>,
    /// Where they come from, and how often an epoch shows them.
    pub sources: Vec<Source>,
    /// The file of each source; none for the embedded task.
    pub files: Vec<PathBuf>,
    /// Held-out pairs; may be none.
    pub eval: Vec<PreferencePair>,
    /// Labels of the pairs' first completions, training and held-out, where they are labelled one
    /// by one; their second ones are then those of other prompts.
    pub desirable: Option<[Vec<bool>; 2]>,
    /// A weight for each token of each pair, training and held-out, where the recipe asks for them
    /// and the data hold them.
    pub token_weights: Option<[ReferenceLogps; 2]>,
    /// The embedded task and its held-out prompts, if it is the data.
    pub task: Option<PreparedTask>,
    /// What was read, dropped and cut, by file.
    pub reports: Vec<(String, DataReport)>,
}

impl Prepared {
    /// The row of the data that a training pair was made of, with its file where there are several.
    pub fn row(&self, pair: usize) -> String {
        let row = self.train[pair].row;
        let source = self.sources.iter().position(|s| s.examples.contains(&pair));
        match source.and_then(|source| self.files.get(source)) {
            Some(file) if self.files.len() > 1 => format!("{} {row}", file.display()),
            _ => row.to_string(),
        }
    }
}

/// The embedded task, ready to judge.
#[derive(Debug)]
pub struct PreparedTask {
    /// The task.
    pub task: MemoTask,
    /// Held-out memos to sample completions for, with their prompts' tokens.
    pub prompts: Vec<(Memo, Vec<u32>)>,
    /// The best accuracy that the labels of the held-out pairs allow.
    pub ceiling: f64,
}

const TOKENIZER: &str = "tokenizer.json";

/// Whether every id means the same to both tokenizers, those of `owner` and another model.
///
/// # Errors
///
/// The first id that does not, in words.
pub fn same_tokens(owner: &str, expected: &Tokenizer, found: &Tokenizer) -> Result<(), String> {
    if expected.file(TOKENIZER) == found.file(TOKENIZER) {
        return Ok(());
    }
    let n = expected.vocab_size().max(found.vocab_size()) as u32;
    let shown = |token: Option<String>| token.map_or("none".to_string(), |t| format!("{t:?}"));
    match (0..n).find(|&id| expected.token(id) != found.token(id)) {
        None => Ok(()),
        Some(id) => Err(format!(
            "expected {owner}'s tokenizer; token id {id} is {} here and {} there",
            shown(found.token(id)),
            shown(expected.token(id))
        )),
    }
}

/// Longest sequence of a model made for the embedded task, in tokens.
const TASK_POSITIONS: usize = 256;

/// Reads or makes everything that a recipe names.
///
/// # Errors
///
/// Anything wrong with the model, the tokenizer or the data, by file and place.
pub fn prepare(recipe: &Recipe, device: &Device) -> Result<Prepared, TrainError> {
    let mut prepared = match (&recipe.task, &recipe.data) {
        (Some(task), _) => prepare_task(recipe, task, device),
        (None, Some(data)) => prepare_files(recipe, data, device),
        (None, None) => unreachable!("a checked recipe has a task or data"),
    }?;
    if !recipe.precision.is_supported(device) {
        return Err(TrainError::Recipe {
            file: recipe.name.clone(),
            reason:
                "key `precision`: expected `f32`, got `bf16`, which this device does not compute \
                     in"
                .into(),
        });
    }
    // Names of parameters and layers are checked here, before anything is written.
    prepared.model = recipe
        .trainable(prepared.model)?
        .with_precision(recipe.precision);
    if let Some(lora) = &recipe.lora {
        LoraConfig::from(lora).n_parameters(prepared.model.config())?;
    }
    if let Some(contrast) = &recipe.preference.contrast {
        for (side, folder) in [
            ("positive", &contrast.positive),
            ("negative", &contrast.negative),
        ] {
            check_contrast(&prepared, folder)?.map_err(|reason| TrainError::Recipe {
                file: recipe.name.clone(),
                reason: format!(
                    "key `preference.contrast.{side}`: {}: {reason}",
                    folder.display()
                ),
            })?;
        }
    }
    Ok(prepared)
}

/// Whether a model can say something of the pairs' tokens; why not, if it cannot.
fn check_contrast(prepared: &Prepared, folder: &Path) -> Result<Result<(), String>, TrainError> {
    let found = ModelConfig::read(folder)?;
    if folder.join(TOKENIZER).exists() {
        let theirs = Tokenizer::from_folder(folder)?;
        if let Err(reason) = same_tokens("the model", &prepared.tokenizer, &theirs) {
            return Ok(Err(reason));
        }
        // Either may be padded, beyond what the tokenizer gives.
        let (expected, got) = (prepared.tokenizer.vocab_size(), found.vocab_size);
        if got < expected {
            return Ok(Err(format!(
                "expected a model of its tokenizer's {expected} tokens, got {got}"
            )));
        }
    } else {
        let expected = prepared.model.config().vocab_size;
        if found.vocab_size != expected {
            let got = found.vocab_size;
            return Ok(Err(format!(
                "expected a model of {expected} tokens, got {got}"
            )));
        }
    }
    let length = |pair: &PreferencePair| {
        pair.prompt_ids.len() + pair.chosen_ids.len().max(pair.rejected_ids.len())
    };
    let pairs = prepared.train.iter().chain(&prepared.eval);
    let longest = pairs.map(length).max().unwrap_or(0);
    if longest > found.max_positions {
        let most = found.max_positions;
        return Ok(Err(format!(
            "expected a model of the pairs' longest sequence, {longest} tokens; it reads {most}"
        )));
    }
    Ok(Ok(()))
}

fn prepare_task(
    recipe: &Recipe,
    numbers: &TaskRecipe,
    device: &Device,
) -> Result<Prepared, TrainError> {
    let task = MemoTask::new(numbers.memo)?;
    let tokenizer = Tokenizer::from_json(
        "the memo task's tokenizer",
        &task.tokenizer_json(),
        &task.tokenizer_config_json(),
    )?;
    let model = match &recipe.model.path {
        Some(path) => {
            let differs = |reason: String| TrainError::Policy {
                path: path.clone(),
                reason,
            };
            // A folder may hold no tokenizer.
            if path.join(TOKENIZER).exists() {
                let theirs = Tokenizer::from_folder(path)?;
                same_tokens("the memo task", &tokenizer, &theirs).map_err(differs)?;
            }
            let (found, expected) = (ModelConfig::read(path)?.vocab_size, task.vocab_size());
            // A vocabulary may be padded; one without a tokenizer has its size alone to be known by.
            let fits = match path.join(TOKENIZER).exists() {
                true => found >= expected,
                false => found == expected,
            };
            if !fits {
                return Err(differs(format!(
                    "expected the memo task's vocabulary of {expected} tokens, got {found}"
                )));
            }
            Transformer::read(path, device)?
        }
        None => {
            let shape = LlamaShape {
                vocab_size: task.vocab_size(),
                hidden_size: recipe.model.hidden_size,
                intermediate_size: recipe.model.intermediate_size,
                n_layers: recipe.model.layers,
                n_heads: recipe.model.heads,
                n_kv_heads: recipe.model.kv_heads,
                max_positions: TASK_POSITIONS,
                tied: recipe.model.tied,
                eos_id: task.eos_id(),
                pad_id: task.pad_id(),
            };
            Transformer::init(ModelConfig::llama(&shape)?, recipe.seed, device)?
        }
    };
    let n_sft = recipe.sft.as_ref().map_or(0, |_| numbers.sft_examples);
    let sft = || {
        let examples = task.each_example(Split::Sft, n_sft, recipe.seed);
        let sft = examples.enumerate().map(|(row, example)| SftExample {
            prompt_ids: example.prompt_ids,
            completion_ids: example.completion.ids,
            row,
        });
        sft.collect()
    };
    let tokens = |row: usize, pair: &memo_task::Pair| PreferencePair {
        prompt_ids: pair.prompt_ids.clone(),
        chosen_ids: pair.chosen.ids.clone(),
        rejected_ids: pair.rejected.ids.clone(),
        row,
    };
    // Texts are not kept: their memory serves the next ones.
    let train = || -> Vec<PreferencePair> {
        let pairs = task.each_pair(Split::Train, numbers.train_pairs, recipe.seed);
        pairs
            .enumerate()
            .map(|(row, pair)| tokens(row, &pair))
            .collect()
    };
    // A second of waiting before the first step, were they drawn one after the other; each split has
    // random numbers of its own.
    let (sft, mut train) = rayon::join(sft, train);
    let held_out = task.pairs(Split::Eval, numbers.eval_pairs, recipe.seed);
    let mut eval: Vec<PreferencePair> = (0..)
        .zip(&held_out)
        .map(|(row, pair)| tokens(row, pair))
        .collect();
    let mut desirable = None;
    if recipe.preference.unpaired.is_some() {
        let size = recipe.preference.batch_size;
        let most = model.config().max_positions;
        let (labelled, train_labels) = with_strangers(apart(&train), size, most);
        let (held_out, eval_labels) = with_strangers(apart(&eval), size, most);
        (train, eval) = (labelled, held_out);
        desirable = Some([train_labels, eval_labels]);
    }
    let sources = vec![Source {
        examples: 0..train.len(),
        weight: 1.0,
    }];
    let prompts: Vec<(Memo, Vec<u32>)> = task
        .examples(Split::Prompts, numbers.eval_prompts, recipe.seed)
        .into_iter()
        .map(|example| (example.memo, example.prompt_ids))
        .collect();
    // They are sampled from when all is trained.
    let ids: Vec<&[u32]> = prompts.iter().map(|(_, ids)| &ids[..]).collect();
    model
        .config()
        .check_prompts(&ids, numbers.max_new_tokens)
        .map_err(|error| TrainError::Recipe {
            file: recipe.name.clone(),
            reason: format!("key `task.max_new_tokens`: {error}"),
        })?;
    Ok(Prepared {
        model,
        tokenizer,
        sft,
        train,
        sources,
        files: Vec::new(),
        eval,
        desirable,
        token_weights: None,
        reports: Vec::new(),
        task: Some(PreparedTask {
            ceiling: memo_task::ceiling(&held_out),
            prompts,
            task,
        }),
    })
}

fn prepare_files(
    recipe: &Recipe,
    data: &DataRecipe,
    device: &Device,
) -> Result<Prepared, TrainError> {
    let folder = recipe
        .model
        .path
        .as_deref()
        .expect("a checked recipe with data names a model");
    // The cheap things first: a wrong path should not cost the reading of a model.
    let config = ModelConfig::read(folder)?;
    let tokenizer = Tokenizer::from_folder(folder)?;
    let template = ChatTemplate::from_tokenizer(&tokenizer)?;
    let max_length = data.max_length.min(config.max_positions);
    let options = TokenizeOptions {
        max_length: Some(max_length),
        window: Some(config.max_positions),
        boundary: data.boundary,
        empty_completions: data.empty_completions,
        ..TokenizeOptions::new(config.vocab_size)
    };
    let mut reports = Vec::new();
    let reader = Reader {
        tokenizer: &tokenizer,
        template: template.as_ref(),
        options: &options,
        malformed: data.malformed_rows,
    };
    let sft = match &data.sft {
        Some(path) => reader.read(
            path,
            "fine-tuning data",
            &mut reports,
            read_sft,
            tokenize_sft,
        )?,
        None => Vec::new(),
    };
    let labelled = recipe.preference.unpaired.is_some();
    let size = recipe.preference.batch_size;
    let weighted = recipe.weighs_tokens_by_data();
    let mut read = |path: &Path, label: &str| -> Result<_, TrainError> {
        if labelled {
            let examples =
                reader.read(path, label, &mut reports, read_labelled, tokenize_labelled)?;
            let (pairs, labels) = with_strangers(examples, size, max_length);
            Ok((pairs, labels, Vec::new()))
        } else {
            let (pairs, weights) = reader.read_pairs(path, label, weighted, &mut reports)?;
            Ok((pairs, Vec::new(), weights))
        }
    };
    let (mut train, mut train_labels, mut train_weights) = (Vec::new(), Vec::new(), Vec::new());
    let (mut sources, mut files) = (Vec::new(), Vec::new());
    for source in data.train.list() {
        let from = train.len();
        let (pairs, labels, weights) = read(&source.path, "training data")?;
        train.extend(pairs);
        train_labels.extend(labels);
        train_weights.extend(weights);
        let shown = Source {
            examples: from..train.len(),
            weight: source.weight,
        };
        if shown.per_epoch() == 0 {
            return Err(TrainError::Recipe {
                file: recipe.name.clone(),
                reason: format!(
                    "key `data.train`: a weight of {} shows none of the {} rows of {} in an epoch; \
                     expected at least half a row's",
                    source.weight,
                    shown.examples.len(),
                    source.path.display()
                ),
            });
        }
        sources.push(shown);
        files.push(source.path);
    }
    let (eval, eval_labels, eval_weights) = match &data.eval {
        Some(path) => read(path, "evaluation data")?,
        None => (Vec::new(), Vec::new(), Vec::new()),
    };
    let model = Transformer::read(folder, device)?;
    Ok(Prepared {
        model,
        tokenizer,
        sft,
        sources,
        files,
        token_weights: weighted.then(|| {
            [
                ReferenceLogps::of_tokens(&train, &train_weights),
                ReferenceLogps::of_tokens(&eval, &eval_weights),
            ]
        }),
        train,
        eval,
        desirable: labelled.then_some([train_labels, eval_labels]),
        task: None,
        reports,
    })
}

/// Both completions of each pair, labelled.
fn apart(pairs: &[PreferencePair]) -> Vec<LabelledExample> {
    let sides = pairs.iter().flat_map(|pair| {
        [(&pair.chosen_ids, true), (&pair.rejected_ids, false)]
            .map(|(completion_ids, desirable)| (pair, completion_ids, desirable))
    });
    sides
        .map(|(pair, completion_ids, desirable)| LabelledExample {
            prompt_ids: pair.prompt_ids.clone(),
            completion_ids: completion_ids.clone(),
            desirable,
            row: pair.row,
        })
        .collect()
}

/// What reads files into tokens.
struct Reader<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    options: &'a TokenizeOptions,
    malformed: Treatment,
}

type Reports = Vec<(String, DataReport)>;

/// Weights of the tokens of a chosen and of a rejected completion.
type PairWeights = [Vec<f32>; 2];

impl Reader<'_> {
    fn read_pairs(
        &self,
        path: &Path,
        label: &str,
        weighted: bool,
        reports: &mut Reports,
    ) -> Result<(Vec<PreferencePair>, Vec<PairWeights>), TrainError> {
        let (rows, malformed) = load_rows(read_preferences(path)?, self.malformed)?;
        let progress = Progress::new(&format!("tokenize {label}"), "rows", rows.len(), 0);
        let progress = std::sync::Mutex::new(progress);
        let observe = || {
            if let Ok(mut progress) = progress.lock() {
                progress.advance(1, "");
            }
        };
        let tokenized =
            tokenize_pairs_observed(&rows, self.tokenizer, self.template, self.options, &observe);
        let tokenized = tokenized.map_err(|error| of_file(path, error))?;
        if let Ok(progress) = progress.into_inner() {
            progress.finish();
        }
        let pairs = kept(path, tokenized, &malformed, reports);
        let mut weights = Vec::new();
        if weighted {
            // Rows that were malformed are not among them.
            let rows: HashMap<usize, &PreferenceRow> =
                rows.iter().map(|row| (row.location.row, row)).collect();
            for pair in &pairs {
                let row = rows[&pair.row];
                let of = |column, ids: &[u32]| {
                    let most = self.options.max_length.unwrap_or(usize::MAX);
                    let cut = pair.prompt_ids.len() + ids.len() >= most;
                    weights_of(row, column, ids.len(), cut).map_err(|reason| TrainError::Prompt {
                        path: path.to_path_buf(),
                        row: pair.row,
                        reason,
                    })
                };
                weights.push([
                    of("chosen_token_weights", &pair.chosen_ids)?,
                    of("rejected_token_weights", &pair.rejected_ids)?,
                ]);
            }
        }
        Ok((pairs, weights))
    }

    fn read<R, T, I: Iterator<Item = Result<R, DataError>>>(
        &self,
        path: &Path,
        label: &str,
        reports: &mut Reports,
        open: impl FnOnce(&Path) -> Result<I, DataError>,
        tokenize: impl FnOnce(
            &[R],
            &Tokenizer,
            Option<&ChatTemplate>,
            &TokenizeOptions,
        ) -> Result<Tokenized<T>, DataError>,
    ) -> Result<Vec<T>, TrainError> {
        let (rows, malformed) = load_rows(open(path)?, self.malformed)?;
        let progress = Progress::new(&format!("tokenize {label}"), "rows", rows.len(), 0);
        let tokenized = tokenize(&rows, self.tokenizer, self.template, self.options);
        let tokenized = tokenized.map_err(|error| of_file(path, error))?;
        progress.finish();
        Ok(kept(path, tokenized, &malformed, reports))
    }
}

/// The weights of a completion's tokens: one for each, but that of an end of sequence that was
/// added may be missing and is then 1, and those of tokens that were cut are left out.
fn weights_of(
    row: &PreferenceRow,
    column: &str,
    n_tokens: usize,
    cut: bool,
) -> Result<Vec<f32>, String> {
    let expected = format!("column `{column}`: expected a list of {n_tokens} finite numbers");
    let list = row.extra.get(column).and_then(Value::as_array);
    let list = list.ok_or_else(|| format!("{expected}, got none"))?;
    let mut weights: Vec<f32> = list
        .iter()
        .filter_map(|weight| weight.as_f64().map(|weight| weight as f32))
        .filter(|weight| weight.is_finite())
        .collect();
    let fits = weights.len() == n_tokens
        || weights.len() + 1 == n_tokens
        || (cut && weights.len() > n_tokens);
    if weights.len() != list.len() || !fits {
        return Err(format!(
            "{expected}, got {} of {}",
            weights.len(),
            list.len()
        ));
    }
    weights.resize(n_tokens, 1.0);
    Ok(weights)
}

/// The one error about rows that does not say where they are, with its file.
fn of_file(path: &Path, error: DataError) -> TrainError {
    match error {
        DataError::AllDropped { .. } => TrainError::DataFile {
            path: path.to_path_buf(),
            source: Box::new(error),
        },
        error => error.into(),
    }
}

/// The examples, after what became of the rows is said and kept.
fn kept<T>(
    path: &Path,
    mut tokenized: Tokenized<T>,
    malformed: &DataReport,
    reports: &mut Reports,
) -> Vec<T> {
    tokenized.report += malformed;
    eprintln!("{}", tokenized.report);
    reports.push((path.display().to_string(), tokenized.report));
    tokenized.examples
}
