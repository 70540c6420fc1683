//! Causal language models in Hugging Face folders, on Burn.
//!
//! Text becomes tokens, tokens become preference pairs, and a model gives the hidden states and
//! logits from which log-probabilities are taken. Weights, configuration and tokenizer are read
//! from and written to the folders that transformers reads and writes.
//!
//! | What | Where |
//! |---|---|
//! | `config.json` of Llama, Mistral, Qwen2, Qwen3, GPT-NeoX and GPT-2 | [`ModelConfig`] |
//! | the transformer | [`Transformer`] |
//! | adapters of low rank, in PEFT's folders | [`LoraConfig`], [`Transformer::with_lora`] |
//! | frozen parameters, and the memory that training needs | [`FreezeSpec`], [`TrainingMemory`] |
//! | gradient checkpointing | [`Checkpointed`] |
//! | cached decoding, greedy or sampled, batched | [`Decoder`], [`Generate`], [`KvCache`] |
//! | a search's tree of prefixes, which share their keys and values | [`PrefixCache`] |
//! | tokenizers and chat templates | [`tokenizer`], [`chat`] |
//! | preference, SFT and labelled rows, and their tokens | [`data`] |
//! | safetensors, whole or sharded | [`weights`] |
//! | files that are whole or absent | [`files`] |
//!
//! ```
//! use lm::{Decoding, Generate, LlamaShape, ModelConfig, Transformer};
//!
//! # fn main() -> Result<(), lm::LmError> {
//! let config = ModelConfig::llama(&LlamaShape {
//!     vocab_size: 32,
//!     hidden_size: 16,
//!     intermediate_size: 40,
//!     n_layers: 2,
//!     n_heads: 4,
//!     n_kv_heads: 2,
//!     max_positions: 64,
//!     tied: true,
//!     eos_id: 1,
//!     pad_id: 0,
//! })?;
//! let model = Transformer::init(config, 7, &burn::tensor::Device::default())?;
//! let options = Generate {
//!     max_new_tokens: 5,
//!     eos_ids: vec![],
//!     decoding: Decoding::Greedy,
//!     seed: 0,
//! };
//! let texts = model.generate(&[[5, 6, 7], [8, 9, 10]], &options)?;
//! assert_eq!(texts.len(), 2);
//! assert_eq!(texts[0].ids.len(), 5);
//! # Ok(())
//! # }
//! ```

mod batch;
pub mod chat;
mod config;
pub mod data;
mod decode;
mod error;
pub mod files;
mod host;
mod lora;
mod model;
mod names;
mod precision;
mod prefix_cache;
mod recompute;
mod sample;
pub mod tokenizer;
mod trainable;
pub mod weights;

pub use batch::{CompletionBatch, Scored};
pub use config::{Family, LlamaShape, MlpKind, ModelConfig, NormKind, Rope};
pub use decode::{Decoder, Decoding, Generate, Generated, KvCache};
pub use error::LmError;
pub use lora::{AdapterFolder, LoraConfig};
pub use model::Transformer;
pub use precision::Precision;
pub use prefix_cache::{PrefixCache, PrefixCacheStats};
pub use recompute::Checkpointed;
pub use sample::{Sampling, sample};
pub use trainable::{FreezeSpec, ParameterInfo, TrainingMemory};
