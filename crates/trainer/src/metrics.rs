//! `metrics.jsonl`: one JSON line a step; and the same numbers for TensorBoard.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use lm::files::write_atomically;
use serde_json::{Map, Value};

use crate::error::TrainError;
use crate::tensorboard::EventFile;

/// Folder of the event file, beside the log.
const EVENTS: &str = "tensorboard";

/// The open log of a run.
#[derive(Debug)]
pub(crate) struct MetricsLog {
    path: PathBuf,
    file: File,
    events: EventFile,
}

impl MetricsLog {
    /// Opens the log, keeping the lines for which `keep(stage, step)` holds.
    ///
    /// A line that a crash cut short is dropped.
    ///
    /// # Errors
    ///
    /// Any error of the file system.
    pub(crate) fn open(
        path: &Path,
        keep: impl Fn(&str, usize) -> bool,
    ) -> Result<Self, TrainError> {
        let kept: Vec<Map<String, Value>> = read(path)?
            .into_iter()
            .filter(|line| {
                let stage = line.get("stage").and_then(Value::as_str);
                let step = line.get("step").and_then(Value::as_u64);
                stage
                    .zip(step)
                    .is_some_and(|(stage, step)| keep(stage, step as usize))
            })
            .collect();
        write_atomically(path, |file| {
            kept.iter().try_for_each(|line| {
                let text = serde_json::to_string(line)?;
                writeln!(file, "{text}")
            })
        })
        .map_err(TrainError::io(path))?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(TrainError::io(path))?;
        let folder = path.with_file_name(EVENTS);
        Ok(Self {
            path: path.to_path_buf(),
            file,
            events: EventFile::create(&folder, &kept)?,
        })
    }

    /// Flushes the lines to disk, so that a checkpoint never knows of steps that the log lost.
    ///
    /// # Errors
    ///
    /// Any error of the file system, a full disk among them.
    pub(crate) fn sync(&self) -> Result<(), TrainError> {
        self.file.sync_data().map_err(TrainError::io(&self.path))
    }

    /// Appends a line.
    ///
    /// # Errors
    ///
    /// Any error of the file system, a full disk among them.
    pub(crate) fn write(&mut self, line: Map<String, Value>) -> Result<(), TrainError> {
        self.events.write(&line)?;
        // One call, so that a line is never interleaved with another process's.
        let text = format!("{}\n", Value::Object(line));
        self.file
            .write_all(text.as_bytes())
            .map_err(TrainError::io(&self.path))
    }
}

/// The whole lines of a log; none if there is no file.
///
/// # Errors
///
/// Any error of the file system but a missing file.
pub(crate) fn read(path: &Path) -> Result<Vec<Map<String, Value>>, TrainError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(TrainError::io(path)(error)),
    };
    Ok(text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reopening_keeps_what_is_asked_for_and_drops_a_cut_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let lines =
            "{\"stage\":\"sft\",\"step\":1}\n{\"stage\":\"sft\",\"step\":2}\n{\"stage\":\"sf";
        std::fs::write(&path, lines).unwrap();
        let mut log = MetricsLog::open(&path, |_, step| step <= 1).unwrap();
        log.write(
            [("stage".into(), "sft".into()), ("step".into(), 2.into())]
                .into_iter()
                .collect(),
        )
        .unwrap();
        let steps: Vec<_> = read(&path)
            .unwrap()
            .iter()
            .map(|line| line["step"].clone())
            .collect();
        assert_eq!(steps, [1, 2]);
    }
}
