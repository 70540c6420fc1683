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

use std::io::ErrorKind;
use std::path::Path;

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
    let is_seed = |name: &String| {
        let number = name.strip_prefix("seed-");
        number.is_some_and(|number| number.parse::<u64>().is_ok())
    };
    let names = folder::names(out)?;
    if names.is_empty() || names.iter().any(is_seed) {
        return Ok(());
    }
    Err(TrainError::RunFolder {
        path: out.to_path_buf(),
        reason: "holds something else than an experiment; give --out another folder".into(),
    })
}

/// The result of each seed: what its folder in `out` holds, or else what `make` gives for the seed,
/// its settings and its folder, which is then written there. A line about each, by `say`.
///
/// # Errors
///
/// A result of any seed that was made under other settings or by another experiment: nothing is made
/// then, and it is not written over. Those of `settings` and `make`.
fn of_seeds<T: OfSeed>(
    out: &Path,
    seeds: &[u64],
    settings: impl Fn(u64) -> Result<String, TrainError>,
    make: impl Fn(u64, String, &Path) -> Result<T, TrainError>,
    say: impl Fn(&T) -> String,
) -> Result<Vec<T>, TrainError> {
    let _lock = folder::enter(out)?;
    let folder = |seed: u64| out.join(format!("seed-{seed}"));
    let done = |&seed: &u64| {
        let settings = settings(seed)?;
        let found = done(&folder(seed).join(RESULT), &settings)?;
        Ok((seed, settings, found))
    };
    // Those of all seeds first: hours of work should not end at a folder that they do not fit.
    let seeds: Vec<(u64, String, Option<T>)> =
        seeds.iter().map(done).collect::<Result<_, TrainError>>()?;
    let result = |(seed, settings, done)| {
        let folder = folder(seed);
        let path = folder.join(RESULT);
        let result = match done {
            Some(done) => {
                eprintln!("seed {seed}: taken from {}", path.display());
                done
            }
            None => {
                std::fs::create_dir_all(&folder).map_err(TrainError::io(&folder))?;
                let made = make(seed, settings, &folder)?;
                write_json(&path, &made)?;
                made
            }
        };
        eprintln!("seed {seed}: {}", say(&result));
        Ok(result)
    };
    seeds.into_iter().map(result).collect()
}

/// Name of a seed's result in its folder.
const RESULT: &str = "result.json";

/// The result in a file, if there is one.
fn done<T: OfSeed>(path: &Path, settings: &str) -> Result<Option<T>, TrainError> {
    let refuse = |what: String| TrainError::RunFolder {
        path: path.to_path_buf(),
        reason: format!("{what}; give --out another folder"),
    };
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(TrainError::io(path)(error)),
    };
    let done: T = serde_json::from_slice(&bytes)
        .map_err(|error| refuse(format!("is no result of this experiment ({error})")))?;
    if done.settings() != settings {
        return Err(refuse("was made under other settings".into()));
    }
    Ok(Some(done))
}

/// Writes results, whole or not at all.
fn write_json(path: &Path, value: &impl Serialize) -> Result<(), TrainError> {
    write_atomically(path, |file| {
        serde_json::to_writer_pretty(file, value).map_err(std::io::Error::from)
    })
    .map_err(TrainError::io(path))
}
