//! Checkpoints: whole or not there, and checked before they are believed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use lm::files::{write_atomically, write_folder_atomically};
use lm::tokenizer::{Tokenizer, TokenizerError};
use lm::weights::{HostTensor, SINGLE_FILE, WeightFiles, write_safetensors};
use lm::{AdapterFolder, Transformer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::TrainError;
use crate::learner::Learner;
use crate::optimizer::AdamW;

/// Where a run stood.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// The stage.
    pub stage: String,
    /// Steps done.
    pub step: usize,
    /// Tokens seen in the stage.
    pub n_tokens: u64,
    /// Seconds of training so far, in all sessions.
    pub seconds: f64,
    /// Updates that the optimizer has made.
    pub optimizer_steps: usize,
    /// Digest of recipe, data and model, so that a checkpoint of another run is not taken for this one's.
    pub recipe: String,
    /// The best evaluation so far, where the recipe asks for the best weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
}

/// The best evaluation of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Step after which it was made.
    pub step: usize,
    /// Value of the metric.
    pub value: f64,
    /// Evaluations since that were no better.
    pub stale: usize,
}

const MANIFEST: &str = "manifest.json";
const POSITION: &str = "position.json";
const OPTIMIZER: &str = "optimizer.safetensors";
/// Weights of a reference that follows the policy.
const REFERENCE: &str = "reference.safetensors";

/// What stands beside a checkpoint's weights, so that it is a model or PEFT folder that can be read.
#[derive(Clone, Copy, Debug)]
pub struct Beside<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Folder of the model beneath the adapters, if the model has any.
    pub base: Option<&'a str>,
}

/// Saves a checkpoint under `folder` and deletes the oldest of the stage beyond `keep`.
///
/// The folder is filled aside, flushed and renamed; its manifest holds a digest of every file.
///
/// # Errors
///
/// Any error of the file system; older checkpoints are then still there.
pub fn save(
    folder: &Path,
    keep: usize,
    learner: &Learner,
    position: &Position,
    beside: Beside<'_>,
) -> Result<PathBuf, TrainError> {
    let path = folder.join(format!("{}-{:06}", position.stage, position.step));
    write(&path, learner, position, beside)?;
    prune(folder, &position.stage, keep)?;
    Ok(path)
}

/// Deletes the oldest checkpoints of a stage beyond `keep`.
pub(crate) fn prune(folder: &Path, stage: &str, keep: usize) -> Result<(), TrainError> {
    let mut older = list(folder, stage)?;
    older.truncate(older.len().saturating_sub(keep));
    for (_, old) in older {
        std::fs::remove_dir_all(&old).map_err(TrainError::io(&old))?;
    }
    Ok(())
}

/// Saves the best weights of a stage so far, in place of the ones before.
///
/// # Errors
///
/// Any error of the file system; the ones before are then still there.
pub fn save_best(
    folder: &Path,
    learner: &Learner,
    position: &Position,
    beside: Beside<'_>,
) -> Result<PathBuf, TrainError> {
    let path = best_path(folder, &position.stage);
    write(&path, learner, position, beside)?;
    Ok(path)
}

/// Where [`save_best`] puts the best weights of a stage.
pub fn best_path(folder: &Path, stage: &str) -> PathBuf {
    folder.join(format!("{stage}-best"))
}

fn write(
    path: &Path,
    learner: &Learner,
    position: &Position,
    beside: Beside<'_>,
) -> Result<(), TrainError> {
    write_whole(path, |inner| {
        beside.tokenizer.save(inner)?;
        write_weights(&learner.snapshot(), inner, beside.base)?;
        write_safetensors(
            &inner.join(OPTIMIZER),
            &learner.optimizer.to_host(),
            &Default::default(),
        )?;
        if let Some(reference) = &learner.reference {
            let tensors = reference.to_host();
            write_safetensors(&inner.join(REFERENCE), &tensors, &Default::default())?;
        }
        write_json(&inner.join(POSITION), position)?;
        write_manifest(inner)?;
        Ok(())
    })
}

/// Writes a folder of a model, whole or not at all.
pub(crate) fn write_whole(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), FolderError>,
) -> Result<(), TrainError> {
    write_folder_atomically(path, fill).map_err(|error| match error {
        // The name under which it was being filled would tell nobody anything.
        FolderError::Io(source)
        | FolderError::Model(lm::LmError::Io { source, .. })
        | FolderError::Tokenizer(TokenizerError::Io { source, .. }) => TrainError::io(path)(source),
        FolderError::Model(error) => error.into(),
        FolderError::Tokenizer(error) => error.into(),
    })
}

/// What [`newest`] found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Newest {
    /// The newest whole checkpoint, if there is one, and where the run stood.
    pub whole: Option<(PathBuf, Position)>,
    /// A line about each newer one that is damaged.
    pub damaged: Vec<String>,
}

/// The newest whole checkpoint of a stage, and the damaged ones that were passed over.
///
/// # Errors
///
/// A checkpoint of another recipe, or any error of the file system.
pub fn newest(folder: &Path, stage: &str, recipe: &str) -> Result<Newest, TrainError> {
    let mut newest = Newest::default();
    for (_, path) in list(folder, stage)?.into_iter().rev() {
        match verify(&path) {
            Ok(position) if position.recipe == recipe => {
                newest.whole = Some((path, position));
                break;
            }
            Ok(_) => {
                return Err(TrainError::checkpoint(
                    &path,
                    "made with another recipe, data or model; give --out another folder, or the old ones",
                ));
            }
            Err(error) => newest.damaged.push(error.to_string()),
        }
    }
    Ok(newest)
}

/// Writes a model's weights into a folder: its adapters, if it has any, and else all of it.
pub(crate) fn write_weights(
    model: &Transformer,
    folder: &Path,
    base: Option<&str>,
) -> Result<(), lm::LmError> {
    match model.lora_config() {
        Some(_) => model.write_adapter(folder, base),
        None => model.write(folder),
    }
}

/// The model of a checkpoint that [`newest`] has found whole; `base` lies beneath its adapters, if
/// it holds adapters.
///
/// # Errors
///
/// Any error of the file system, or a checkpoint of another kind of model.
pub fn read_weights(path: &Path, base: &Transformer) -> Result<Transformer, TrainError> {
    Ok(if AdapterFolder::is_one(path) {
        base.clone().read_adapter(path)?
    } else {
        Transformer::read(path, &base.device())?.with_precision(base.precision())
    })
}

/// Goes on with a checkpoint that [`newest`] has found whole; `model` is that of
/// [`read_weights`].
///
/// # Errors
///
/// Any error of the file system.
pub fn load(
    path: &Path,
    position: &Position,
    model: Transformer,
    mut optimizer: AdamW,
) -> Result<Learner, TrainError> {
    let device = model.device();
    let files = WeightFiles::open_file(&path.join(OPTIMIZER))?;
    let tensors = files
        .names()
        .into_iter()
        .map(|name| Ok((name.to_string(), files.read_any(name)?)))
        .collect::<Result<BTreeMap<String, HostTensor>, lm::LmError>>()?;
    optimizer.restore(position.optimizer_steps, tensors, &device);
    let (config, precision) = (model.config().clone(), model.precision());
    let mut learner = Learner::new(model, optimizer);
    let reference = path.join(REFERENCE);
    if reference.is_file() {
        let files = WeightFiles::open_file(&reference)?;
        let reference = Transformer::from_files(config, &files, &device)?;
        learner.reference = Some(reference.with_precision(precision));
    }
    Ok(learner)
}

/// Writes digests of all files of a folder, so that [`verify_files`] can tell damage.
///
/// # Errors
///
/// Any error of the file system.
pub fn write_manifest(folder: &Path) -> std::io::Result<()> {
    let mut digests = BTreeMap::new();
    for name in files_of(folder)? {
        if name != MANIFEST {
            let digest = digest(&folder.join(&name))?;
            digests.insert(name, digest);
        }
    }
    write_json(&folder.join(MANIFEST), &digests)
}

/// All files of a folder and of those in it, such as a tokenizer's further templates.
fn files_of(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            let below = files_of(&entry.path())?;
            names.extend(below.into_iter().map(|below| format!("{name}/{below}")));
        } else {
            names.push(name);
        }
    }
    Ok(names)
}

/// Checks every file of a folder against its manifest.
///
/// # Errors
///
/// A missing manifest or file, or one whose content has changed.
pub fn verify_files(folder: &Path) -> Result<(), TrainError> {
    let damaged = |reason: String| TrainError::checkpoint(folder, reason);
    let manifest = folder.join(MANIFEST);
    let text =
        std::fs::read(&manifest).map_err(|e| damaged(format!("damaged: {MANIFEST}: {e}")))?;
    let digests: BTreeMap<String, String> = serde_json::from_slice(&text)
        .map_err(|error| damaged(format!("damaged: {MANIFEST}: {error}")))?;
    let stray = files_of(folder)
        .map_err(TrainError::io(folder))?
        .into_iter()
        .find(|name| name != MANIFEST && !digests.contains_key(name));
    if let Some(name) = stray {
        return Err(damaged(format!("damaged: {name} is not in {MANIFEST}")));
    }
    for (name, expected) in &digests {
        let found =
            digest(&folder.join(name)).map_err(|e| damaged(format!("damaged: {name}: {e}")))?;
        if found != *expected {
            return Err(damaged(format!(
                "damaged: {name} does not have the content it was written with"
            )));
        }
    }
    Ok(())
}

/// Removes every checkpoint of a stage.
///
/// # Errors
///
/// Any error of the file system.
pub fn forget(folder: &Path, stage: &str) -> Result<(), TrainError> {
    let best = best_path(folder, stage);
    let best = best.exists().then_some((0, best));
    for (_, path) in list(folder, stage)?.into_iter().chain(best) {
        std::fs::remove_dir_all(&path).map_err(TrainError::io(&path))?;
    }
    Ok(())
}

fn verify(path: &Path) -> Result<Position, TrainError> {
    verify_files(path)?;
    // A manifest that lists too little would vouch for nothing.
    let model = if path.join("adapter_config.json").is_file() {
        ["adapter_config.json", "adapter_model.safetensors"]
    } else {
        ["config.json", SINGLE_FILE]
    };
    for name in [POSITION, OPTIMIZER].into_iter().chain(model) {
        if !path.join(name).is_file() {
            return Err(TrainError::checkpoint(path, format!("damaged: no {name}")));
        }
    }
    let text = std::fs::read(path.join(POSITION)).map_err(TrainError::io(path))?;
    serde_json::from_slice(&text)
        .map_err(|error| TrainError::checkpoint(path, format!("damaged: {POSITION}: {error}")))
}

/// The checkpoints of a stage, oldest first. Folders that were being written are not among them.
fn list(folder: &Path, stage: &str) -> Result<Vec<(usize, PathBuf)>, TrainError> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(TrainError::io(folder))? {
        let path = entry.map_err(TrainError::io(folder))?.path();
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let step = name
            .as_deref()
            .and_then(|name| name.strip_prefix(stage)?.strip_prefix('-')?.parse().ok());
        if let Some(step) = step {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

fn write_json(path: &Path, value: &impl Serialize) -> std::io::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    write_atomically(path, |file| file.write_all(text.as_bytes()))
}

/// The SHA-256 digest of a file, in hexadecimal.
pub(crate) fn digest(path: &Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut File::open(path)?, &mut HashWriter(&mut hasher))?;
    Ok(hex(&hasher.finalize()))
}

/// The SHA-256 digest of some bytes, in hexadecimal.
pub fn digest_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Why [`write_whole`] could not fill a folder.
pub(crate) enum FolderError {
    Io(std::io::Error),
    Model(lm::LmError),
    Tokenizer(TokenizerError),
}

impl From<std::io::Error> for FolderError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<lm::LmError> for FolderError {
    fn from(error: lm::LmError) -> Self {
        Self::Model(error)
    }
}

impl From<TokenizerError> for FolderError {
    fn from(error: TokenizerError) -> Self {
        Self::Tokenizer(error)
    }
}
