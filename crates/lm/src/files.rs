//! Whole files or none: write aside, flush to disk, rename into place.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Writes a file so that a reader, or a crash, sees the old content or the new, never a part.
///
/// The content goes to a temporary file in the same folder, is flushed to disk, and is renamed
/// over `path`; then the folder itself is flushed, so that the rename survives a power cut.
///
/// # Errors
///
/// Any error of the file system, a full disk among them; `path` is then unchanged.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&mut File>) -> io::Result<()>,
) -> io::Result<()> {
    let folder = parent(path);
    let mut file = tempfile::Builder::new()
        .prefix(".tmp-")
        .tempfile_in(&folder)?;
    let mut writer = BufWriter::with_capacity(1 << 20, file.as_file_mut());
    write(&mut writer)?;
    writer.flush()?;
    drop(writer);
    file.as_file().sync_all()?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are private to their owner; what users keep is an ordinary file.
        let permissions = fs::Permissions::from_mode(0o644);
        file.as_file().set_permissions(permissions)?;
    }
    file.persist(path).map_err(|error| error.error)?;
    sync_folder(&folder)
}

/// Fills a new folder aside and renames it into place, so that `path` is whole or absent.
///
/// An older folder at `path` is replaced: it is moved aside first and removed last.
///
/// # Errors
///
/// Any error of the file system or of `fill`; `path` is then as it was.
pub fn write_folder_atomically<E: From<io::Error>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let parent = parent(path);
    fs::create_dir_all(&parent)?;
    let aside = tempfile::Builder::new()
        .prefix(".tmp-")
        .tempdir_in(&parent)?;
    let inner = aside.path().join("new");
    fs::create_dir(&inner)?;
    fill(&inner)?;
    sync_folder(&inner)?;
    if path.exists() {
        fs::rename(path, aside.path().join("old"))?;
    }
    fs::rename(&inner, path)?;
    sync_folder(&parent)?;
    Ok(())
}

/// Whether a file or folder could be made at `path`, where there is none yet, with the folders above
/// it that are missing. Leaves nothing behind.
///
/// # Errors
///
/// What keeps the nearest folder that is there from being written.
pub fn check_writable(path: &Path) -> io::Result<()> {
    let mut folder = parent(path);
    // A link to nothing is there, and nothing can be made below it.
    while folder.symlink_metadata().is_err() {
        let above = parent(&folder);
        if above == folder {
            break;
        }
        folder = above;
    }
    tempfile::tempfile_in(&folder).map(drop)
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    // Windows cannot open a folder as a file, and needs no such flush.
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_atomically(&path, |file| file.write_all(b"old")).unwrap();
        let failed = write_atomically(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("disk full"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_known_before_the_work() {
        let folder = tempfile::tempdir().unwrap();
        check_writable(&folder.path().join("a/b/c.json")).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        fs::write(folder.path().join("file"), "").unwrap();
        assert!(check_writable(&folder.path().join("file/c.json")).is_err());
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("step-1");
        let failed = write_folder_atomically(&path, |inner| {
            fs::write(inner.join("half"), "x")?;
            Err(io::Error::other("killed"))
        });
        assert!(failed.is_err() && !path.exists());
        for text in ["first", "second"] {
            write_folder_atomically(&path, |inner| fs::write(inner.join("whole"), text)).unwrap();
            assert_eq!(fs::read_to_string(path.join("whole")).unwrap(), text);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
