//! Reference logps kept from one run to the next, by model and data.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use lm::data::PreferencePair;
use sha2::{Digest, Sha256};

use crate::checkpoint::{digest, hex};
use crate::error::TrainError;
use crate::reference::ReferenceLogps;

/// A folder of reference logps, one file for each model and data.
///
/// A file's name is a digest of all that its numbers depend on, and it holds a digest of its
/// values; a file that is damaged is passed over.
#[derive(Clone, Debug)]
pub struct ReferenceCache {
    folder: PathBuf,
}

/// What the cache may hold, bytes; files longest unused go first.
const LARGEST: u64 = 4 << 30;

impl ReferenceCache {
    /// A cache in this folder, which need not exist.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The user's own: `R2Q_CACHE_DIR`, or `r2q` in `XDG_CACHE_HOME` or `~/.cache`.
    ///
    /// None where these are empty.
    pub fn of_the_user() -> Option<Self> {
        let named = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let folder = named("R2Q_CACHE_DIR").or_else(|| {
            let caches = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")));
            Some(caches?.join("r2q"))
        })?;
        (!folder.as_os_str().is_empty()).then(|| Self::new(folder))
    }

    /// The key of some pairs under a model: its files' digest, every token, and what else moves
    /// the last digits.
    pub fn key(model: &str, pairs: &[PreferencePair], batch_size: usize, device: &str) -> String {
        let mut hasher = Sha256::new();
        let version = env!("CARGO_PKG_VERSION");
        hasher.update(format!("{version} {model} {batch_size} {device}"));
        for pair in pairs {
            for ids in [&pair.prompt_ids, &pair.chosen_ids, &pair.rejected_ids] {
                hasher.update((ids.len() as u64).to_le_bytes());
                for id in ids {
                    hasher.update(id.to_le_bytes());
                }
            }
        }
        hex(&hasher.finalize())
    }

    /// Where the logps of a key are.
    pub fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("reference-{key}.safetensors"))
    }

    /// The logps of a key, if they are there and whole.
    pub fn get(&self, key: &str, pairs: &[PreferencePair]) -> Option<ReferenceLogps> {
        let path = self.path(key);
        let logps = ReferenceLogps::read(&path, key, pairs)?;
        // Used now: the last to be removed. A folder that cannot be written to still serves.
        let used = std::fs::File::options().append(true).open(&path);
        let _ = used.and_then(|file| file.set_modified(SystemTime::now()));
        Some(logps)
    }

    /// Keeps logps for later runs, and removes those longest unused where there are too many.
    ///
    /// # Errors
    ///
    /// Any error of the file system; a run can do without.
    pub fn put(&self, key: &str, logps: &ReferenceLogps) -> Result<(), TrainError> {
        std::fs::create_dir_all(&self.folder).map_err(TrainError::io(&self.folder))?;
        logps.write(&self.path(key), key)?;
        self.shrink(LARGEST)
    }

    fn shrink(&self, largest: u64) -> Result<(), TrainError> {
        let entries = std::fs::read_dir(&self.folder).map_err(TrainError::io(&self.folder))?;
        let mut files: Vec<(SystemTime, u64, PathBuf)> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let about = entry.metadata().ok()?;
                let ours = name.starts_with("reference-") && name.ends_with(".safetensors");
                ours.then(|| Some((about.modified().ok()?, about.len(), entry.path())))?
            })
            .collect();
        files.sort();
        let mut total: u64 = files.iter().map(|(_, size, _)| size).sum();
        // The newest, just written, stays whatever its size.
        let older = files.len().saturating_sub(1);
        for (_, size, path) in &files[..older] {
            if total <= largest {
                break;
            }
            std::fs::remove_file(path).map_err(TrainError::io(path))?;
            total -= size;
        }
        Ok(())
    }
}

/// A digest of a model's folder: its configuration and weights.
pub(crate) fn model_digest(folder: &Path) -> Result<String, TrainError> {
    let entries = std::fs::read_dir(folder).map_err(TrainError::io(folder))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name == "config.json" || name.ends_with(".safetensors")
        })
        .collect();
    files.sort();
    let mut digests = String::new();
    for path in files {
        digests += &digest(&path).map_err(TrainError::io(&path))?;
    }
    Ok(digests)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use lm::{LlamaShape, ModelConfig, Transformer};

    use super::*;
    use crate::workers::Workers;

    fn pairs() -> Vec<PreferencePair> {
        let pair = |row: usize, chosen: &[u32]| PreferencePair {
            prompt_ids: vec![3, 4],
            chosen_ids: chosen.to_vec(),
            rejected_ids: vec![7, 1],
            row,
        };
        vec![pair(0, &[5, 6, 1]), pair(1, &[9, 1])]
    }

    fn logps() -> ReferenceLogps {
        let config = ModelConfig::llama(&LlamaShape {
            vocab_size: 16,
            hidden_size: 8,
            intermediate_size: 8,
            n_layers: 1,
            n_heads: 2,
            n_kv_heads: 2,
            max_positions: 16,
            tied: true,
            eos_id: 1,
            pad_id: 0,
        });
        let model = Transformer::init(config.unwrap(), 1, &Device::default()).unwrap();
        ReferenceLogps::compute(&model, &pairs(), 2, &Workers::new(1), "test")
    }

    #[test]
    fn a_changed_model_row_or_batch_size_has_another_key() {
        let key = ReferenceCache::key("model", &pairs(), 8, "cpu");
        assert_eq!(key, ReferenceCache::key("model", &pairs(), 8, "cpu"));
        let mut changed = pairs();
        changed[1].rejected_ids[0] += 1;
        for other in [
            ReferenceCache::key("model", &changed, 8, "cpu"),
            ReferenceCache::key("model", &pairs()[..1], 8, "cpu"),
            ReferenceCache::key("other", &pairs(), 8, "cpu"),
            ReferenceCache::key("model", &pairs(), 4, "cpu"),
            ReferenceCache::key("model", &pairs(), 8, "wgpu"),
        ] {
            assert_ne!(other, key);
        }
    }

    #[test]
    fn what_was_put_is_got_and_damage_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ReferenceCache::new(folder.path().join("new"));
        let (pairs, logps) = (pairs(), logps());
        assert_eq!(cache.get("key", &pairs), None);
        cache.put("key", &logps).unwrap();
        assert_eq!(cache.get("key", &pairs).as_ref(), Some(&logps));
        let path = cache.path("key");
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(cache.get("key", &pairs), None);
    }

    #[test]
    fn files_longest_unused_are_removed_first() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ReferenceCache::new(folder.path().to_path_buf());
        let (pairs, logps) = (pairs(), logps());
        let at = |key: &str, seconds: u64| {
            let file = std::fs::File::options().append(true).open(cache.path(key));
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            file.unwrap().set_modified(time).unwrap();
        };
        for (key, seconds) in [("a", 1), ("b", 2), ("c", 3)] {
            cache.put(key, &logps).unwrap();
            at(key, seconds);
        }
        // Used again: now the newest.
        assert!(cache.get("a", &pairs).is_some());
        let size = std::fs::metadata(cache.path("a")).unwrap().len();
        cache.shrink(2 * size).unwrap();
        let there = ["a", "b", "c"].map(|key| cache.path(key).exists());
        assert_eq!(there, [true, false, true]);
    }
}
