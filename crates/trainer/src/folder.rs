//! Folders of results: what may be in them before, and one process at a time.

use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::Path;

use crate::error::TrainError;

/// Names of what a folder holds; none where there is no folder.
///
/// What a killed process was writing does not count, nor the `.DS_Store` of macOS.
pub(crate) fn names(folder: &Path) -> Result<Vec<String>, TrainError> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(TrainError::io(folder)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(TrainError::io(folder))?.file_name();
        if !is_temporary(&name) && name != ".DS_Store" {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// Refuses a folder that holds something already; `advice` says what else to do.
///
/// What a killed process was writing does not count, nor the `.DS_Store` of macOS.
///
/// # Errors
///
/// Such a folder, one that cannot be read, or a file in its place.
pub fn check_empty(folder: &Path, advice: &str) -> Result<(), TrainError> {
    if names(folder)?.is_empty() {
        return Ok(());
    }
    Err(TrainError::RunFolder {
        path: folder.to_path_buf(),
        reason: format!("not empty; {advice}"),
    })
}

/// Makes a folder, keeps other processes out of it for as long as what is returned lives, and
/// removes what a killed one was writing.
///
/// The system lets go of the lock when the process ends, however it ends. Where folders cannot be
/// locked, nothing keeps others out.
///
/// # Errors
///
/// Another process at work in the folder, or any error of the file system.
pub fn enter(folder: &Path) -> Result<Option<File>, TrainError> {
    let lock = lock(folder)?;
    clean(folder)?;
    Ok(lock)
}

/// [`enter`], but removes nothing.
pub(crate) fn lock(folder: &Path) -> Result<Option<File>, TrainError> {
    std::fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
    // Windows opens no folder as a file.
    let lock = File::open(folder).ok();
    if let Some(file) = &lock {
        check_alone(folder, file)?;
    }
    Ok(lock)
}

/// Locks a file of a folder, or the folder itself, against other processes.
pub(crate) fn check_alone(folder: &Path, file: &File) -> Result<(), TrainError> {
    // Where a file system has no locks, work goes on without.
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        return Err(TrainError::RunFolder {
            path: folder.to_path_buf(),
            reason: "another process is at work in it".into(),
        });
    }
    Ok(())
}

/// Removes what a killed process was writing: entries of a folder that begin with `.tmp-`.
///
/// No other process may be at work in the folder.
///
/// # Errors
///
/// Any error of the file system but a missing folder.
pub(crate) fn clean(folder: &Path) -> Result<(), TrainError> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in std::fs::read_dir(folder).map_err(TrainError::io(folder))? {
        let path = entry.map_err(TrainError::io(folder))?.path();
        if path.file_name().is_some_and(is_temporary) {
            let removed = if path.is_dir() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            removed.map_err(TrainError::io(&path))?;
        }
    }
    Ok(())
}

/// Whether a name is one under which files and folders are filled before they are renamed.
fn is_temporary(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with(".tmp-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_at_a_time_and_what_another_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("scores");
        let is_empty = |folder: &Path| names(folder).map(|names| names.is_empty());
        assert!(is_empty(&folder).unwrap());
        let lock = enter(&folder).unwrap();
        for (name, left) in [(".tmp-1", false), (".DS_Store", true)] {
            std::fs::write(folder.join(name), "").unwrap();
            assert!(is_empty(&folder).unwrap());
            if lock.is_some() {
                let error = enter(&folder).unwrap_err().to_string();
                assert!(error.contains("another process"), "{error}");
                assert!(folder.join(name).exists());
            }
            clean(&folder).unwrap();
            assert_eq!(folder.join(name).exists(), left);
        }
        drop(lock);
        enter(&folder).unwrap();
        std::fs::write(folder.join(".kept"), "").unwrap();
        assert!(!is_empty(&folder).unwrap());
        assert!(is_empty(&folder.join(".kept")).is_err());
    }
}
