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

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use lm::files::write_atomically;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::folder;

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
    let names = folder::names(out)?;
    if names.is_empty() || names.iter().any(|name| seed_of(name).is_some()) {
        return Ok(());
    }
    Err(TrainError::RunFolder {
        path: out.to_path_buf(),
        reason: "holds something else than an experiment; give --out another folder".into(),
    })
}

/// The seed whose folder has this name.
fn seed_of(name: &str) -> Option<u64> {
    let seed = name.strip_prefix("seed-")?.parse().ok()?;
    (name == name_of(seed)).then_some(seed)
}

fn name_of(seed: u64) -> String {
    format!("seed-{seed}")
}

fn folder_of(out: &Path, seed: u64) -> PathBuf {
    out.join(name_of(seed))
}

/// Name of a seed's result in its folder.
const RESULT: &str = "result.json";
/// What it depends on, written before it is begun.
const SETTINGS: &str = "settings.txt";

/// The result of each seed: what its folder in `out` holds, or else what `make` gives for the seed,
/// its settings and its folder, which is then written there. A line about each, by `say`.
///
/// # Errors
///
/// A folder of any seed that was made or begun under other settings or by another experiment, whether
/// it is asked for or not: nothing is made then, and nothing is written over. Those of `settings` and
/// `make`.
fn of_seeds<T: OfSeed>(
    out: &Path,
    seeds: &[u64],
    settings: impl Fn(u64) -> Result<String, TrainError>,
    make: impl Fn(u64, String, &Path) -> Result<T, TrainError>,
    say: impl Fn(&T) -> String,
) -> Result<Vec<T>, TrainError> {
    // All of them first: hours of work should not end at a folder that they do not fit.
    let mut done = BTreeMap::new();
    let names = folder::names(out)?;
    let there: BTreeSet<u64> = names.iter().filter_map(|name| seed_of(name)).collect();
    for seed in there {
        if let Some(found) = found::<T>(&folder_of(out, seed), &settings(seed)?)? {
            done.insert(seed, found);
        }
    }
    let mut results = Vec::new();
    for &seed in seeds {
        let folder = folder_of(out, seed);
        let path = folder.join(RESULT);
        let result = match done.remove(&seed) {
            Some(found) => {
                eprintln!("seed {seed}: taken from {}", path.display());
                found
            }
            None => {
                std::fs::create_dir_all(&folder).map_err(TrainError::io(&folder))?;
                let settings = settings(seed)?;
                let begun = folder.join(SETTINGS);
                write_atomically(&begun, |file| file.write_all(settings.as_bytes()))
                    .map_err(TrainError::io(&begun))?;
                let made = make(seed, settings, &folder)?;
                write_json(&path, &made)?;
                made
            }
        };
        eprintln!("seed {seed}: {}", say(&result));
        results.push(result);
    }
    Ok(results)
}

/// The result in a seed's folder, if there is one.
fn found<T: OfSeed>(folder: &Path, settings: &str) -> Result<Option<T>, TrainError> {
    let refuse = |path: &Path, reason: String| {
        let path = path.to_path_buf();
        Err(TrainError::RunFolder { path, reason })
    };
    let read = |path: &Path| match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TrainError::io(path)(error)),
    };
    let others = "under other settings; give --out another folder, or the old ones";
    let path = folder.join(RESULT);
    let Some(bytes) = read(&path)? else {
        let begun = folder.join(SETTINGS);
        let other = read(&begun)?.is_some_and(|old| old != settings.as_bytes());
        // Data alone are made anew; only what was computed lies in folders.
        let names = folder::names(folder)?;
        if other && names.iter().any(|name| folder.join(name).is_dir()) {
            return refuse(&begun, format!("was begun {others}"));
        }
        return Ok(None);
    };
    match serde_json::from_slice::<T>(&bytes) {
        Ok(found) if found.settings() == settings => Ok(Some(found)),
        Ok(_) => refuse(&path, format!("was made {others}")),
        Err(error) => refuse(
            &path,
            format!(
                "is no result of this experiment as it is now ({error}); give --out another \
                 folder, or remove that file"
            ),
        ),
    }
}

/// Writes results, whole or not at all.
fn write_json(path: &Path, value: &impl Serialize) -> Result<(), TrainError> {
    write_atomically(path, |file| {
        serde_json::to_writer_pretty(file, value).map_err(std::io::Error::from)
    })
    .map_err(TrainError::io(path))
}
