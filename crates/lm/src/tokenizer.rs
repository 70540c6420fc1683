//! Tokenizers in Hugging Face folders.
//!
//! [`Tokenizer`] reads `tokenizer.json` and the small files beside it, encodes as
//! `tokenizer(text)` does in transformers, and writes every file back byte for byte.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use tokenizers::DecoderWrapper;

/// The files of a tokenizer that [`Tokenizer::save`] carries along, as they were.
const KEPT_FILES: [&str; 12] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// The folder in which transformers keeps named chat templates beside the default one.
const NAMED_TEMPLATES: &str = "additional_chat_templates";

/// The special tokens that have a name of their own in `tokenizer_config.json`.
const NAMED_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// What can be wrong with a tokenizer folder or a text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not JSON, or not of the expected shape.
    #[error("{}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was expected and what came.
        message: String,
    },
    /// A special token is named, but the vocabulary has no such token.
    #[error("{}: {name} is `{token}`, which the vocabulary does not have", path.display())]
    UnknownSpecialToken {
        /// The tokenizer's folder or file.
        path: PathBuf,
        /// Such as `eos_token`.
        name: String,
        /// Its text.
        token: String,
    },
    /// The tokenizer names no end-of-sequence token, and one is needed.
    #[error("{}: no eos_token is named in tokenizer_config.json, special_tokens_map.json, generation_config.json or config.json", path.display())]
    NoEos {
        /// The tokenizer's folder or file.
        path: PathBuf,
    },
    /// The library refused a text or a list of ids.
    #[error("{}: cannot {action}: {message}", path.display())]
    Refused {
        /// The tokenizer's folder or file.
        path: PathBuf,
        /// `encode` or `decode`.
        action: &'static str,
        /// What the library said.
        message: String,
    },
}

/// Which normaliser, pre-tokenizer and decoder a tokenizer uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pipeline {
    /// What transformers 5 uses: for `GPT2Tokenizer`, `LlamaTokenizer`, `Qwen2Tokenizer` and
    /// `GPTNeoXTokenizer` it takes only vocabulary, merges, added tokens and post-processor from
    /// `tokenizer.json` and the rest from the class; for every other class the file.
    #[default]
    Transformers,
    /// What `tokenizer.json` describes, as transformers 4 and other programs read it.
    File,
}

/// A tokenizer with its special tokens; cheap to clone, and shared freely between threads.
///
/// # Examples
///
/// ```no_run
/// # fn main() -> Result<(), lm::tokenizer::TokenizerError> {
/// let tokenizer = lm::tokenizer::Tokenizer::from_folder("SmolLM2-135M-Instruct".as_ref())?;
/// let ids = tokenizer.encode("The sky is")?;
/// assert_eq!(tokenizer.decode(&ids, true)?, "The sky is");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    library: tokenizers::Tokenizer,
    path: PathBuf,
    files: BTreeMap<PathBuf, Vec<u8>>,
    special: BTreeMap<String, String>,
    eos_ids: Vec<u32>,
    bos_id: Option<u32>,
    pad_id: Option<u32>,
    /// The class whose pipeline replaced another one in the file.
    replaced: Option<&'static str>,
    vocab_size: usize,
    clean_up: bool,
    /// What each id adds to a text, once it was asked for.
    pieces: OnceLock<Vec<OnceLock<Option<Box<str>>>>>,
}

/// Whether a piece is characters, none of them broken.
fn is_whole(piece: &str) -> bool {
    !piece.is_empty() && !piece.contains(char::REPLACEMENT_CHARACTER)
}

/// Whether a decoder's text of whole pieces is theirs put together, whatever stands beside what: each
/// token is turned into text for itself, and of the whole at most the first character is cut, which
/// belongs to the first token. That is, in this order at most: texts replaced, bytes made characters,
/// all fused, a space cut.
fn adds_up(decoder: &DecoderWrapper) -> bool {
    let DecoderWrapper::Sequence(steps) = decoder else {
        return matches!(decoder, DecoderWrapper::ByteLevel(_));
    };
    let places = steps.get_decoders().iter().map(|step| match step {
        DecoderWrapper::Replace(_) => Some(0),
        DecoderWrapper::ByteFallback(_) => Some(1),
        DecoderWrapper::Fuse(_) => Some(2),
        DecoderWrapper::Strip(strip) if strip.start <= 1 => Some(3),
        _ => None,
    });
    let Some(places) = places.collect::<Option<Vec<usize>>>() else {
        return false;
    };
    // Texts may be replaced in several steps; the others stand once, and a cut behind a fusion only.
    places
        .windows(2)
        .all(|pair| pair[0] < pair[1] || pair == [0, 0])
        && (!places.contains(&3) || places.contains(&2))
}

impl Tokenizer {
    /// The tokenizer of a Hugging Face folder.
    ///
    /// Special tokens come from `tokenizer_config.json`, then `special_tokens_map.json`; where
    /// neither names an end of sequence, `eos_token_id` of `generation_config.json` or
    /// `config.json` counts. What `tokenizer.json` says about truncation and padding is ignored, as
    /// it is by `tokenizer(text)` in transformers.
    ///
    /// The pipeline is [`Pipeline::Transformers`].
    ///
    /// # Errors
    ///
    /// A file that is missing, unreadable or malformed, or an `eos_token` that the vocabulary lacks.
    pub fn from_folder(folder: &Path) -> Result<Self, TokenizerError> {
        Self::from_folder_with(folder, Pipeline::default())
    }

    /// [`Tokenizer::from_folder`] with a choice of the pipeline.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::from_folder`].
    pub fn from_folder_with(folder: &Path, pipeline: Pipeline) -> Result<Self, TokenizerError> {
        let mut files = BTreeMap::new();
        for name in KEPT_FILES {
            keep_file(folder, Path::new(name), &mut files)?;
        }
        let named = folder.join(NAMED_TEMPLATES);
        if named.is_dir() {
            let entries = fs::read_dir(&named).map_err(|source| TokenizerError::Io {
                path: named.clone(),
                source,
            })?;
            for entry in entries {
                let entry = entry.map_err(|source| TokenizerError::Io {
                    path: named.clone(),
                    source,
                })?;
                let relative = Path::new(NAMED_TEMPLATES).join(entry.file_name());
                if relative.extension().is_some_and(|e| e == "jinja") {
                    keep_file(folder, &relative, &mut files)?;
                }
            }
        }
        if !files.contains_key(Path::new("tokenizer.json")) {
            return Err(TokenizerError::Io {
                path: folder.join("tokenizer.json"),
                source: std::io::Error::new(
                    std::io::ErrorKind::NotFound,
                    "No such file or directory",
                ),
            });
        }
        // The model's own configuration is not the tokenizer's to keep, but may know the eos.
        let mut model_files = BTreeMap::new();
        keep_file(folder, Path::new("config.json"), &mut model_files)?;
        Self::build(folder.to_path_buf(), files, &model_files, pipeline)
    }

    /// A tokenizer made in memory: the text of `tokenizer.json` and of `tokenizer_config.json`.
    ///
    /// [`Tokenizer::save`] writes exactly these two texts.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::from_folder`]; files are named relative to `label`.
    pub fn from_json(
        label: &str,
        tokenizer_json: &str,
        tokenizer_config_json: &str,
    ) -> Result<Self, TokenizerError> {
        let files = [
            ("tokenizer.json", tokenizer_json),
            ("tokenizer_config.json", tokenizer_config_json),
        ]
        .map(|(name, text)| (PathBuf::from(name), text.as_bytes().to_vec()))
        .into();
        Self::build(
            PathBuf::from(label),
            files,
            &BTreeMap::new(),
            Pipeline::default(),
        )
    }

    fn build(
        path: PathBuf,
        files: BTreeMap<PathBuf, Vec<u8>>,
        model_files: &BTreeMap<PathBuf, Vec<u8>>,
        pipeline: Pipeline,
    ) -> Result<Self, TokenizerError> {
        let object = |name: &str| json_object(&path, name, files.get(Path::new(name)));
        let config = object("tokenizer_config.json")?;
        let map = object("special_tokens_map.json")?;
        let generation = object("generation_config.json")?;
        let model = json_object(
            &path,
            "config.json",
            model_files.get(Path::new("config.json")),
        )?;

        let bytes = files
            .get(Path::new("tokenizer.json"))
            .map_or(&[][..], Vec::as_slice);
        let (rebuilt, replaced) = match pipeline {
            Pipeline::Transformers => rebuild(bytes, &config, &model),
            Pipeline::File => (None, None),
        };
        let library = load_library(
            &path.join("tokenizer.json"),
            rebuilt.as_deref().unwrap_or(bytes),
        )?;

        let mut special = BTreeMap::new();
        // Folders of the older style have the token's own file win over the configuration.
        let older = !config.contains_key("added_tokens_decoder");
        for name in NAMED_TOKENS {
            let first = token_text(&path, "tokenizer_config.json", name, config.get(name))?;
            let second = token_text(&path, "special_tokens_map.json", name, map.get(name))?;
            let text = if older {
                second.or(first)
            } else {
                first.or(second)
            };
            if let Some(text) = text {
                special.insert(name.to_owned(), text);
            }
        }
        let id_of = |name: &str| special.get(name).and_then(|t| library.token_to_id(t));

        let mut eos_ids = Vec::new();
        match (special.get("eos_token"), id_of("eos_token")) {
            (Some(_), Some(id)) => eos_ids.push(id),
            (Some(token), None) => {
                return Err(TokenizerError::UnknownSpecialToken {
                    path,
                    name: "eos_token".to_owned(),
                    token: token.clone(),
                });
            }
            (None, _) => {}
        }
        for (file, values) in [
            ("generation_config.json", &generation),
            ("config.json", &model),
        ] {
            let ids = token_ids(&path, file, "eos_token_id", values.get("eos_token_id"))?;
            // config.json is asked only where nothing else names an eos.
            if file == "generation_config.json" || eos_ids.is_empty() {
                for id in ids {
                    if !eos_ids.contains(&id) {
                        eos_ids.push(id);
                    }
                }
            }
        }
        if !special.contains_key("eos_token")
            && let Some(text) = eos_ids.first().and_then(|&id| library.id_to_token(id))
        {
            special.insert("eos_token".to_owned(), text);
        }

        let configured_pad = [
            ("generation_config.json", &generation),
            ("config.json", &model),
        ]
        .into_iter()
        .map(|(file, values)| token_ids(&path, file, "pad_token_id", values.get("pad_token_id")))
        .collect::<Result<Vec<_>, _>>()?
        .concat();
        let pad_id = special
            .get("pad_token")
            .and_then(|t| library.token_to_id(t))
            .or(eos_ids.first().copied())
            .or(configured_pad.first().copied());
        let bos_id = special
            .get("bos_token")
            .and_then(|t| library.token_to_id(t));

        let vocab_size = library
            .get_vocab(true)
            .values()
            .map(|&id| id as usize + 1)
            .max()
            .unwrap_or(0);
        let clean_up = config
            .get("clean_up_tokenization_spaces")
            .and_then(Value::as_bool)
            .unwrap_or(false)
            && !matches!(
                library.get_model(),
                tokenizers::models::ModelWrapper::BPE(_)
            );
        Ok(Self {
            inner: Arc::new(Inner {
                library,
                path,
                files,
                special,
                eos_ids,
                bos_id,
                pad_id,
                replaced,
                vocab_size,
                clean_up,
                pieces: OnceLock::new(),
            }),
        })
    }

    /// Token ids of a text, with the special tokens that this tokenizer puts around one by default.
    ///
    /// What `tokenizer(text).input_ids` gives in transformers: some tokenizers add a beginning of
    /// sequence, most add nothing. A special token's text within `text` becomes that token.
    ///
    /// # Errors
    ///
    /// A text that the library refuses.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.run_encoder(text, true)
    }

    /// Token ids of a text with nothing put around it, as chat templates need.
    ///
    /// # Errors
    ///
    /// A text that the library refuses.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.run_encoder(text, false)
    }

    /// [`Tokenizer::encode`] of many texts on all threads, in order.
    ///
    /// # Errors
    ///
    /// The first text that the library refuses.
    pub fn encode_batch(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>, TokenizerError> {
        let encoded: Vec<_> = texts.par_iter().map(|text| self.encode(text)).collect();
        encoded.into_iter().collect()
    }

    fn run_encoder(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self
            .inner
            .library
            .encode_fast(text, special)
            .map_err(|error| self.refused("encode", &error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids, without special tokens where `skip_special` says so.
    ///
    /// Ids that the vocabulary does not have add nothing.
    ///
    /// # Errors
    ///
    /// Ids that the library refuses.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        let text = self
            .inner
            .library
            .decode(ids, skip_special)
            .map_err(|error| self.refused("decode", &error.to_string()))?;
        Ok(if self.inner.clean_up {
            clean_up_spaces(text)
        } else {
            text
        })
    }

    /// The text that each id adds when the ids are decoded one after the other.
    ///
    /// The pieces joined are the whole decoded text, if no character of it is broken. An id that
    /// completes no character yet adds an empty piece, and the id that completes it gets the whole
    /// character. Useful where every token is shown by itself.
    ///
    /// # Errors
    ///
    /// Ids that the library refuses.
    pub fn decode_pieces(&self, ids: &[u32]) -> Result<Vec<Cow<'_, str>>, TokenizerError> {
        if let Some(pieces) = self.usual_pieces(ids)? {
            return Ok(pieces);
        }
        let pieces = self.streamed_pieces(ids)?;
        Ok(pieces.into_iter().map(Cow::Owned).collect())
    }

    /// The pieces, if each id adds here what it adds elsewhere: no id is decoded more than once,
    /// where the library's stream decodes each several times.
    fn usual_pieces(&self, ids: &[u32]) -> Result<Option<Vec<Cow<'_, str>>>, TokenizerError> {
        let Some((&first, rest)) = ids.split_first() else {
            return Ok(None);
        };
        let mut pieces = Vec::with_capacity(ids.len());
        pieces.extend(self.streamed_pieces(&[first])?.into_iter().map(Cow::Owned));
        if !pieces.iter().all(|piece| is_whole(piece)) {
            return Ok(None);
        }
        for &id in rest {
            let Some(piece) = self.usual_piece(id) else {
                return Ok(None);
            };
            pieces.push(Cow::Borrowed(piece));
        }
        if self.inner.library.get_decoder().is_some_and(adds_up) {
            return Ok(Some(pieces));
        }
        let whole = self.inner.library.decode(ids, false);
        let whole = whole.map_err(|error| self.refused("decode", &error.to_string()))?;
        Ok((pieces.concat() == whole).then_some(pieces))
    }

    /// What an id adds to a text, if it is whole characters.
    fn usual_piece(&self, id: u32) -> Option<&str> {
        let all = || {
            (0..self.inner.vocab_size)
                .map(|_| OnceLock::new())
                .collect()
        };
        let known: &Vec<OnceLock<Option<Box<str>>>> = self.inner.pieces.get_or_init(all);
        let piece = known.get(id as usize)?.get_or_init(|| {
            // Behind itself: decoders treat the first token of a text in their own way.
            let piece = self.streamed_pieces(&[id, id]).ok()?.pop()?;
            is_whole(&piece).then(|| piece.into_boxed_str())
        });
        piece.as_deref()
    }

    fn streamed_pieces(&self, ids: &[u32]) -> Result<Vec<String>, TokenizerError> {
        let refused = |error: tokenizers::Error| self.refused("decode", &error.to_string());
        let stream = || self.inner.library.decode_stream(false);
        let mut pieces = Vec::with_capacity(ids.len());
        let mut joined = 0;
        let mut at = stream();
        for &id in ids {
            let piece = match at.step(id) {
                Ok(piece) => piece.unwrap_or_default(),
                // Bytes that no character begins with can break, in some decoders, the whole ones
                // before them, which the stream has given out already. It begins anew, behind the same
                // id: the first token of a text is treated in its own way.
                Err(_) => {
                    at = stream();
                    at.step(id).map_err(refused)?;
                    at.step(id).map_err(refused)?.unwrap_or_default()
                }
            };
            joined += piece.len();
            pieces.push(piece);
        }
        // What never became a whole character is shown at the last id.
        if let Some(last) = pieces.last_mut().filter(|last| last.is_empty()) {
            let whole = self.inner.library.decode(ids, false).map_err(refused)?;
            last.push_str(whole.get(joined..).unwrap_or_default());
        }
        Ok(pieces)
    }

    /// The vocabulary's text of one id, as stored (`Ġthe`), or `None` where it has no such id.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.library.id_to_token(id)
    }

    /// The id of a token's stored text, or `None`.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.library.token_to_id(token)
    }

    /// One more than the largest token id, which a model's vocabulary must not fall below.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    /// The end-of-sequence id that ends a completion in training.
    ///
    /// # Errors
    ///
    /// A tokenizer that names none.
    pub fn eos_id(&self) -> Result<u32, TokenizerError> {
        self.inner
            .eos_ids
            .first()
            .copied()
            .ok_or_else(|| TokenizerError::NoEos {
                path: self.inner.path.clone(),
            })
    }

    /// Every id that ends a generated completion: the tokenizer's own first, then those of
    /// `generation_config.json`. Empty where none is named.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.inner.eos_ids
    }

    /// The text of the end-of-sequence token.
    ///
    /// # Errors
    ///
    /// A tokenizer that names none.
    pub fn eos_text(&self) -> Result<&str, TokenizerError> {
        self.inner
            .special
            .get("eos_token")
            .map(String::as_str)
            .ok_or_else(|| TokenizerError::NoEos {
                path: self.inner.path.clone(),
            })
    }

    /// The beginning-of-sequence id, where the tokenizer names one. It need not be put before a text.
    #[must_use]
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.bos_id
    }

    /// The id that fills up rows: the pad token, else the end of sequence, else 0.
    #[must_use]
    pub fn pad_id(&self) -> u32 {
        self.inner.pad_id.unwrap_or(0)
    }

    /// The named special tokens and their texts, such as `eos_token`, as chat templates see them.
    #[must_use]
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.inner.special
    }

    /// The `tokenizer_class` because of which another pipeline is used than `tokenizer.json`
    /// describes (see [`Pipeline::Transformers`]), or `None` where they are the same.
    #[must_use]
    pub fn replaced_by_class(&self) -> Option<&'static str> {
        self.inner.replaced
    }

    /// The folder or label this tokenizer came from, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The bytes of one of the tokenizer's files, such as `chat_template.jinja`, or `None`.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.inner.files.get(Path::new(name)).map(Vec::as_slice)
    }

    /// The relative paths of the files that [`Tokenizer::save`] writes, in order.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.inner.files.keys().map(PathBuf::as_path)
    }

    /// Writes the tokenizer's files into a folder, byte for byte as they were read.
    ///
    /// # Errors
    ///
    /// A folder or file that cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), TokenizerError> {
        for (relative, bytes) in &self.inner.files {
            let path = folder.join(relative);
            let parent = path.parent().unwrap_or(folder);
            fs::create_dir_all(parent)
                .and_then(|()| fs::write(&path, bytes))
                .map_err(|source| TokenizerError::Io {
                    path: path.clone(),
                    source,
                })?;
        }
        Ok(())
    }

    fn refused(&self, action: &'static str, message: &str) -> TokenizerError {
        TokenizerError::Refused {
            path: self.inner.path.clone(),
            action,
            message: message.to_owned(),
        }
    }
}

fn keep_file(
    folder: &Path,
    relative: &Path,
    files: &mut BTreeMap<PathBuf, Vec<u8>>,
) -> Result<(), TokenizerError> {
    let path = folder.join(relative);
    match fs::read(&path) {
        Ok(bytes) => {
            files.insert(relative.to_path_buf(), bytes);
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(TokenizerError::Io { path, source }),
    }
}

fn load_library(path: &Path, bytes: &[u8]) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let malformed = |message: String| TokenizerError::Malformed {
        path: path.to_path_buf(),
        message,
    };
    // The library unwraps in places while it builds a pipeline; a hostile file must not end us.
    let mut library = catch_unwind(AssertUnwindSafe(|| {
        tokenizers::Tokenizer::from_bytes(bytes)
    }))
    .map_err(|_| malformed("the tokenizers library gave up on this file".to_owned()))?
    .map_err(|error| malformed(format!("not a tokenizer: {error}")))?;
    library
        .with_truncation(None)
        .map_err(|error| malformed(error.to_string()))?;
    library.with_padding(None);
    if library.get_decoder().is_some_and(strips_ends) {
        return Err(malformed(
            "its decoder strips the ends of texts (`stop` above 0), and the tokenizers library \
             fails where a text is shorter; expected 0"
                .to_owned(),
        ));
    }
    Ok(library)
}

/// Whether some step of a decoder cuts characters off the end of a text.
fn strips_ends(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::Strip(strip) => strip.stop > 0,
        DecoderWrapper::Sequence(steps) => steps.get_decoders().iter().any(strips_ends),
        _ => false,
    }
}

/// How GPT-2's successor in Qwen2 splits a text before the merges.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The `tokenizer.json` that transformers 5 works with, and the class if its pipeline differs from
/// the file's. `None` where it uses the file as it is.
fn rebuild(
    bytes: &[u8],
    config: &Map<String, Value>,
    model_config: &Map<String, Value>,
) -> (Option<Vec<u8>>, Option<&'static str>) {
    // A file that is not JSON is reported by the library.
    let Ok(Value::Object(mut file)) = serde_json::from_slice::<Value>(bytes) else {
        return (None, None);
    };
    let Some(class) = rebuilding_class(&file, config, model_config) else {
        return (None, None);
    };
    let space = config.get("add_prefix_space").and_then(Value::as_bool);
    let byte_level = |use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": space.unwrap_or(false),
            "trim_offsets": true, "use_regex": use_regex,
        })
    };
    let (normalizer, pre_tokenizer) = match class {
        "GPT2Tokenizer" => (Value::Null, byte_level(true)),
        "GPTNeoXTokenizer" => (json!({"type": "NFC"}), byte_level(true)),
        "Qwen2Tokenizer" => (
            json!({"type": "NFC"}),
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": false},
                byte_level(false),
            ]}),
        ),
        _ => {
            let legacy = config.get("legacy").and_then(Value::as_bool) == Some(true);
            let scheme = match (space.unwrap_or(true), legacy) {
                (false, _) => "never",
                (true, true) => "always",
                (true, false) => "first",
            };
            (
                Value::Null,
                json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": false}),
            )
        }
    };
    let llama = class == "LlamaTokenizer";
    let decoder = if llama {
        let mut steps = vec![
            json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if space.unwrap_or(true) {
            steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": steps})
    } else {
        byte_level(true)
    };
    let same = file.get("normalizer").unwrap_or(&Value::Null) == &normalizer
        && file.get("pre_tokenizer").unwrap_or(&Value::Null) == &pre_tokenizer;
    file.insert("normalizer".to_owned(), normalizer);
    file.insert("pre_tokenizer".to_owned(), pre_tokenizer);
    file.insert("decoder".to_owned(), decoder);
    if class == "GPTNeoXTokenizer" {
        file.insert("post_processor".to_owned(), Value::Null);
    }
    if let Some(Value::Object(model)) = file.get_mut("model") {
        for name in [
            "dropout",
            "unk_token",
            "continuing_subword_prefix",
            "end_of_word_suffix",
        ] {
            model.insert(name.to_owned(), Value::Null);
        }
        for (name, value) in [
            ("fuse_unk", llama),
            ("byte_fallback", llama),
            ("ignore_merges", false),
        ] {
            model.insert(name.to_owned(), Value::Bool(value));
        }
    }
    if let Some(Value::Object(decoder)) = config.get("added_tokens_decoder") {
        let mut tokens: Vec<(u64, Value)> = decoder
            .iter()
            .filter_map(|(id, token)| {
                let id: u64 = id.parse().ok()?;
                let mut token = token.as_object()?.clone();
                token.shift_remove("__type");
                token.insert("id".to_owned(), id.into());
                Some((id, Value::Object(token)))
            })
            .collect();
        tokens.sort_by_key(|&(id, _)| id);
        let tokens = tokens.into_iter().map(|(_, token)| token).collect();
        file.insert("added_tokens".to_owned(), Value::Array(tokens));
    }
    (
        serde_json::to_vec(&file).ok(),
        if same { None } else { Some(class) },
    )
}

/// The class by whose rules transformers 5 rebuilds a tokenizer, or `None` for the file's own.
fn rebuilding_class(
    file: &Map<String, Value>,
    config: &Map<String, Value>,
    model_config: &Map<String, Value>,
) -> Option<&'static str> {
    let model = file.get("model")?;
    if model.get("type")?.as_str()? != "BPE" || !model.get("vocab")?.is_object() {
        return None;
    }
    let text = |map: &Map<String, Value>, key: &str| {
        map.get(key).and_then(Value::as_str).map(str::to_owned)
    };
    let declared = text(config, "tokenizer_class")
        .or_else(|| text(model_config, "tokenizer_class"))
        .map(|class| class.trim_end_matches("Fast").to_owned());
    let model_type = text(model_config, "model_type").unwrap_or_default();
    let usual = match model_type.as_str() {
        "qwen2" | "qwen3" => Some("Qwen2Tokenizer"),
        "gpt2" => Some("GPT2Tokenizer"),
        "gpt_neox" => Some("GPTNeoXTokenizer"),
        _ => None,
    };
    // Checkpoints of these types carry wrong classes too often, so transformers looks past them.
    let class = match (declared, usual) {
        (Some(_), Some(usual)) if model_type == "qwen2" => usual.to_owned(),
        (Some(_), None) if model_type == "mistral" => return None,
        (Some(declared), _) => declared,
        (None, usual) => usual?.to_owned(),
    };
    if class == "LlamaTokenizer" {
        let holds_byte_level = |key: &str| {
            file.get(key)
                .is_some_and(|part| part.to_string().contains("\"ByteLevel\""))
        };
        if holds_byte_level("pre_tokenizer") || holds_byte_level("decoder") {
            return None;
        }
    }
    [
        "GPT2Tokenizer",
        "LlamaTokenizer",
        "Qwen2Tokenizer",
        "GPTNeoXTokenizer",
    ]
    .into_iter()
    .find(|&known| known == class)
}

fn json_object(
    folder: &Path,
    name: &str,
    bytes: Option<&Vec<u8>>,
) -> Result<Map<String, Value>, TokenizerError> {
    let Some(bytes) = bytes else {
        return Ok(Map::new());
    };
    serde_json::from_slice(bytes).map_err(|error| TokenizerError::Malformed {
        path: folder.join(name),
        message: format!("expected a JSON object: {error}"),
    })
}

/// The text of a special token: a string, an `AddedToken` object, or null for none.
fn token_text(
    folder: &Path,
    file: &str,
    name: &str,
    value: Option<&Value>,
) -> Result<Option<String>, TokenizerError> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => match other.get("content").and_then(Value::as_str) {
            Some(text) => Ok(Some(text.to_owned())),
            None => Err(TokenizerError::Malformed {
                path: folder.join(file),
                message: format!(
                    "{name}: expected a string or an object with `content`, got {other}"
                ),
            }),
        },
    }
}

/// One id, a list of ids, or null for none.
fn token_ids(
    folder: &Path,
    file: &str,
    name: &str,
    value: Option<&Value>,
) -> Result<Vec<u32>, TokenizerError> {
    let one = |value: &Value| {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| TokenizerError::Malformed {
                path: folder.join(file),
                message: format!("{name}: expected a token id or a list of them, got {value}"),
            })
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(one).collect(),
        Some(value) => Ok(vec![one(value)?]),
    }
}

/// What transformers calls `clean_up_tokenization`.
fn clean_up_spaces(text: String) -> String {
    [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ]
    .into_iter()
    .fold(text, |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer of Llama's kind, with `decoder`: spaces are `\u{2581}`, and what has no token is bytes.
    fn llama(folder: &Path, decoder: &Value) -> Result<Tokenizer, TokenizerError> {
        let words = [
            "<unk>",
            "<s>",
            "</s>",
            "\u{2581}",
            "\u{2581}\u{2581}",
            "a",
            "b",
            "\u{2581}a",
            "ab",
            ".",
        ];
        let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
        let vocab: Map<String, Value> = words
            .into_iter()
            .map(String::from)
            .chain(bytes)
            .zip(0..)
            .map(|(token, id): (String, u32)| (token, id.into()))
            .collect();
        let special = |id: u32, content: &str| {
            json!({
                "id": id, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false,
            })
        };
        let file = json!({
            "version": "1.0",
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u{2581}"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
            ]},
            "decoder": decoder,
            "model": {
                "type": "BPE", "vocab": vocab, "byte_fallback": true, "unk_token": "<unk>",
                "merges": [["\u{2581}", "\u{2581}"], ["\u{2581}", "a"], ["a", "b"]],
            },
        });
        fs::write(folder.join("tokenizer.json"), file.to_string()).unwrap();
        fs::write(
            folder.join("tokenizer_config.json"),
            r#"{"eos_token": "</s>"}"#,
        )
        .unwrap();
        Tokenizer::from_folder(folder)
    }

    #[test]
    fn a_decoder_that_fails_on_short_texts_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let strip = |stop| json!({"type": "Strip", "content": " ", "start": 0, "stop": stop});
        let steps = |stop| json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, strip(stop)]});
        for decoder in [strip(1), steps(1)] {
            let error = llama(folder.path(), &decoder).unwrap_err().to_string();
            assert!(
                error.contains("tokenizer.json") && error.contains("`stop`"),
                "{error}"
            );
        }
        llama(folder.path(), &steps(0)).unwrap();
    }

    #[test]
    fn pieces_are_those_of_decoding_id_by_id() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
        let replace = json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "});
        let steps = json!({"type": "Sequence", "decoders": [
            replace, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        // It treats each token by its place, and so is checked on the whole.
        let metaspace = json!({"type": "Metaspace", "replacement": "\u{2581}"});
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let known = |name: &str| Tokenizer::from_folder(&data.join(name)).unwrap();
        for (name, tokenizer, sums) in [
            ("chat", known("chat"), true),
            ("trl", known("trl"), true),
            ("steps", llama(folders[0].path(), &steps).unwrap(), true),
            (
                "metaspace",
                llama(folders[1].path(), &metaspace).unwrap(),
                false,
            ),
        ] {
            assert_eq!(
                tokenizer.inner.library.get_decoder().is_some_and(adds_up),
                sums,
                "{name}"
            );
            let texts = [
                "Once upon a time, there was a cat .",
                " a\n\n  b",
                "na\u{ef}ve \u{1f642}\u{1f468}\u{200d}\u{1f469} \u{e4}\u{301}",
                "\u{fffd}x",
                "a ab  a .  ab",
            ];
            let mut usual = 0;
            let mut check = |ids: &[u32]| {
                let pieces = tokenizer.decode_pieces(ids).unwrap();
                let whole = tokenizer.inner.library.decode(ids, false).unwrap();
                let streamed = tokenizer.streamed_pieces(ids).unwrap();
                assert_eq!(pieces, streamed, "{name} {ids:?}");
                assert!(
                    !is_whole(&whole) || pieces.concat() == whole,
                    "{name} {ids:?}"
                );
                usual += usize::from(tokenizer.usual_pieces(ids).unwrap().is_some());
            };
            check(&[]);
            for text in texts {
                let ids = tokenizer.encode(text).unwrap();
                check(&ids);
                for from in 0..ids.len() {
                    check(&ids[from..]);
                }
            }
            // Tokens that no text has side by side, and ids beyond the vocabulary.
            let n = tokenizer.vocab_size() as u64 + 2;
            for seed in 0..500_u64 {
                let id = |i: u64| (seed * 7919 + i * i * 104_729 + seed * i * 31) % n;
                let ids: Vec<u32> = (0..seed % 9).map(|i| id(i) as u32).collect();
                check(&ids);
            }
            assert!(usual > 100, "{name}: {usual}");
        }
    }
}
