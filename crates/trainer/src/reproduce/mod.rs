//! Experiments that test what the paper claims: `r2q reproduce`.
//!
//! Each runs over several seeds, writes `results.json` and a page, and says of every target
//! whether it was reached.

pub mod beam;
pub mod credit;
pub mod curves;
pub mod first_error;
mod fit;
pub mod identification;
mod page;
pub mod statistics;

use std::path::Path;

use lm::files::write_atomically;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// A claim with a number, and whether the data bear it out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// The claim.
    pub claim: String,
    /// What was measured.
    pub measured: String,
    /// Whether it held; none where there are too few seeds to tell.
    pub held: Option<bool>,
}

/// What came of a seed.
trait OfSeed: Serialize + DeserializeOwned {
    /// What it depends on.
    fn settings(&self) -> &str;
}

/// Refuses a value that is there twice: its results would count as two.
fn check_distinct<T: PartialEq + std::fmt::Display>(
    experiment: &str,
    flag: &str,
    values: &[T],
) -> Result<(), TrainError> {
    for (index, value) in values.iter().enumerate() {
        if values[..index].contains(value) {
            return Err(TrainError::Recipe {
                file: format!("reproduce {experiment}"),
                reason: format!("{flag}: expected each value once, got {value} twice"),
            });
        }
    }
    Ok(())
}

/// Refuses a folder of something else than an experiment's seeds.
fn check_out(out: &Path) -> Result<(), TrainError> {
    let entries = match std::fs::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(TrainError::io(out)(error)),
    };
    let mut empty = true;
    for entry in entries {
        let name = entry.map_err(TrainError::io(out))?.file_name();
        if name.to_string_lossy().starts_with("seed-") {
            return Ok(());
        }
        empty = false;
    }
    if empty {
        return Ok(());
    }
    Err(TrainError::RunFolder {
        path: out.to_path_buf(),
        reason: "holds something else than an experiment; give --out another folder".into(),
    })
}

/// The result of a seed: what its folder in `out` holds, or else what `make` gives for the folder,
/// which is then written there.
///
/// # Errors
///
/// A result that was made under other settings, which is not written over; those of `make`.
fn of_seed<T: OfSeed>(
    out: &Path,
    seed: u64,
    settings: &str,
    make: impl FnOnce(&Path) -> Result<T, TrainError>,
) -> Result<T, TrainError> {
    let folder = out.join(format!("seed-{seed}"));
    std::fs::create_dir_all(&folder).map_err(TrainError::io(&folder))?;
    let path = folder.join("result.json");
    let done = std::fs::read(&path).ok();
    let done = done.and_then(|bytes| serde_json::from_slice::<T>(&bytes).ok());
    if let Some(done) = done {
        if done.settings() != settings {
            return Err(TrainError::RunFolder {
                path,
                reason: "was made under other settings; give --out another folder, or the old ones"
                    .into(),
            });
        }
        eprintln!("seed {seed}: taken from {}", path.display());
        return Ok(done);
    }
    let made = make(&folder)?;
    write_json(&path, &made)?;
    Ok(made)
}

/// Writes results, whole or not at all.
fn write_json(path: &Path, value: &impl Serialize) -> Result<(), TrainError> {
    write_atomically(path, |file| {
        serde_json::to_writer_pretty(file, value).map_err(std::io::Error::from)
    })
    .map_err(TrainError::io(path))
}
