//! Weights on disk: safetensors, in one file or sharded by an index; f32, f16 and bf16.
//!
//! Files come from strangers, so every number in a header is checked before it is used.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;

use crate::error::LmError;
use crate::files::write_atomically;

/// The file that holds all weights of a small model.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The file that says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Largest header that is read, in bytes; the format's own limit.
const LARGEST_HEADER: u64 = 100_000_000;

/// A tensor on the host, in f32 and row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Values, as many as the product of the sizes.
    pub values: Vec<f32>,
}

/// An open set of safetensors files, read tensor by tensor.
#[derive(Debug)]
pub struct WeightFiles {
    /// What errors name: the single file or the index.
    path: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name to shard.
    tensors: HashMap<String, usize>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    start: u64,
}

impl WeightFiles {
    /// Opens `model.safetensors` or the shards that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    ///
    /// A missing, truncated or lying file; an index that points outside its folder.
    pub fn open(folder: &Path) -> Result<Self, LmError> {
        let index = folder.join(INDEX_FILE);
        if index.is_file() {
            Self::open_index(folder, index)
        } else {
            let path = folder.join(SINGLE_FILE);
            let shard = Shard::open(path.clone())?;
            let tensors = shard.names().map(|name| (name, 0)).collect();
            Ok(Self {
                path,
                shards: vec![shard],
                tensors,
            })
        }
    }

    /// Opens one safetensors file by its path.
    ///
    /// # Errors
    ///
    /// A missing, truncated or lying file.
    pub fn open_file(path: &Path) -> Result<Self, LmError> {
        let shard = Shard::open(path.to_path_buf())?;
        let tensors = shard.names().map(|name| (name, 0)).collect();
        Ok(Self {
            path: path.to_path_buf(),
            shards: vec![shard],
            tensors,
        })
    }

    fn open_index(folder: &Path, index: PathBuf) -> Result<Self, LmError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = std::fs::read_to_string(&index).map_err(LmError::io(&index))?;
        let parsed: Index = serde_json::from_str(&text).map_err(|source| LmError::Json {
            path: index.clone(),
            source,
        })?;
        let mut shards: Vec<Shard> = Vec::new();
        let mut by_file: HashMap<String, usize> = HashMap::new();
        let mut tensors = HashMap::new();
        for (name, file) in parsed.weight_map {
            let shard = match by_file.get(&file) {
                Some(&shard) => shard,
                None => {
                    let inside = Path::new(&file)
                        .components()
                        .all(|part| matches!(part, Component::Normal(_)));
                    if !inside || file.is_empty() {
                        return Err(LmError::weights(
                            &index,
                            format!(
                                "tensor `{name}` is said to be in `{file}`, outside the folder"
                            ),
                        ));
                    }
                    shards.push(Shard::open(folder.join(&file))?);
                    by_file.insert(file.clone(), shards.len() - 1);
                    shards.len() - 1
                }
            };
            if shards[shard].metadata.info(&name).is_none() {
                return Err(LmError::weights(
                    &index,
                    format!("tensor `{name}` is not in `{file}`, where the index says it is"),
                ));
            }
            tensors.insert(name, shard);
        }
        Ok(Self {
            path: index,
            shards,
            tensors,
        })
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// The file to name in an error about the set as a whole.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads one tensor, widened to f32.
    ///
    /// # Errors
    ///
    /// A name that is not there, a shape other than `shape`, a type that is not a float, or a value
    /// that is NaN or infinite.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<HostTensor, LmError> {
        let Some(&shard) = self.tensors.get(name) else {
            return Err(LmError::weights(
                &self.path,
                format!("tensor `{name}` is missing"),
            ));
        };
        let shard = &self.shards[shard];
        let info = shard
            .metadata
            .info(name)
            .ok_or_else(|| LmError::weights(&shard.path, format!("tensor `{name}` is missing")))?;
        if info.shape != shape {
            return Err(LmError::weights(
                &shard.path,
                format!(
                    "tensor `{name}` has shape {:?}, expected {shape:?}",
                    info.shape
                ),
            ));
        }
        let bytes = shard.bytes(info)?;
        let values = widen(info.dtype, &bytes).ok_or_else(|| {
            LmError::weights(
                &shard.path,
                format!(
                    "tensor `{name}` has type {:?}, expected F32, F16 or BF16",
                    info.dtype
                ),
            )
        })?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(LmError::weights(
                &shard.path,
                format!(
                    "tensor `{name}` holds {} as value {at}, expected finite numbers",
                    values[at]
                ),
            ));
        }
        Ok(HostTensor {
            shape: shape.to_vec(),
            values,
        })
    }

    /// Reads one tensor with whatever shape it has.
    ///
    /// # Errors
    ///
    /// See [`WeightFiles::read`].
    pub fn read_any(&self, name: &str) -> Result<HostTensor, LmError> {
        let shape = self
            .shape(name)
            .ok_or_else(|| LmError::weights(&self.path, format!("tensor `{name}` is missing")))?;
        self.read(name, &shape)
    }

    /// The shape of a tensor, if it is there.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let shard = *self.tensors.get(name)?;
        Some(self.shards[shard].metadata.info(name)?.shape.clone())
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, LmError> {
        let mut file = File::open(&path).map_err(LmError::io(&path))?;
        let length = file.metadata().map_err(LmError::io(&path))?.len();
        let mut size = [0; 8];
        let bad = |reason: String| LmError::weights(&path, reason);
        if length < 8 {
            return Err(bad(format!(
                "truncated: {length} bytes are too few for a safetensors header"
            )));
        }
        file.read_exact(&mut size).map_err(LmError::io(&path))?;
        let header = u64::from_le_bytes(size);
        if header > LARGEST_HEADER || header > length - 8 {
            return Err(bad(format!(
                "the header claims {header} bytes, but the file holds {} after its length",
                length - 8
            )));
        }
        let mut text = vec![0; header as usize];
        file.read_exact(&mut text).map_err(LmError::io(&path))?;
        // Checks that names are unique, and that offsets are ordered, without gaps, and agree
        // with shapes and types.
        let metadata: Metadata = serde_json::from_slice(&text)
            .map_err(|error| bad(format!("the safetensors header is damaged: {error}")))?;
        let start = 8 + header;
        let expected = metadata.data_len() as u64;
        if length - start != expected {
            return Err(bad(format!(
                "truncated or overlong: the header describes {expected} bytes of tensors, \
                 the file holds {}",
                length - start
            )));
        }
        Ok(Self {
            path,
            file,
            metadata,
            start,
        })
    }

    fn names(&self) -> impl Iterator<Item = String> {
        self.metadata.tensors().into_keys()
    }

    fn bytes(&self, info: &TensorInfo) -> Result<Vec<u8>, LmError> {
        let (from, to) = info.data_offsets;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.start + from as u64))
            .map_err(LmError::io(&self.path))?;
        let mut bytes = vec![0; to - from];
        file.read_exact(&mut bytes)
            .map_err(LmError::io(&self.path))?;
        Ok(bytes)
    }
}

fn widen(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect(),
        Dtype::F16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| f16::from_le_bytes(bytes).to_f32())
            .collect(),
        Dtype::BF16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| bf16::from_le_bytes(bytes).to_f32())
            .collect(),
        _ => return None,
    })
}

/// Writes tensors as f32 into one safetensors file, whole or not at all.
///
/// # Errors
///
/// Any error of the file system; an older file at `path` is then unchanged.
pub fn write_safetensors(
    path: &Path,
    tensors: &BTreeMap<String, HostTensor>,
    metadata: &HashMap<String, String>,
) -> Result<(), LmError> {
    // The format wants tensors of one type in the order of their offsets; a map is sorted by name.
    let mut offset = 0;
    let infos = tensors
        .iter()
        .map(|(name, tensor)| {
            let bytes = 4 * tensor.values.len();
            let info = TensorInfo {
                dtype: Dtype::F32,
                shape: tensor.shape.clone(),
                data_offsets: (offset, offset + bytes),
            };
            offset += bytes;
            (name.clone(), info)
        })
        .collect();
    let header = Metadata::new(Some(metadata.clone()), infos)
        .map_err(|error| LmError::weights(path, error.to_string()))?;
    let mut header = serde_json::to_vec(&header).map_err(|source| LmError::Json {
        path: path.to_path_buf(),
        source,
    })?;
    // Tensors start at a multiple of eight bytes, so that readers may map them.
    header.resize(header.len().next_multiple_of(8), b' ');
    write_atomically(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for tensor in tensors.values() {
            for values in tensor.values.chunks(4096) {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                file.write_all(&bytes)?;
            }
        }
        Ok(())
    })
    .map_err(LmError::io(path))
}
