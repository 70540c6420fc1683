//! Training from recipe to report, and the `r2q` program.
//!
//! A [`Recipe`] names a model, data and up to two stages; [`train`] runs them and leaves a folder
//! with metrics, checkpoints, a summary, a report and a Hugging Face model.
//!
//! | What | Where |
//! |---|---|
//! | what a run is | [`Recipe`] |
//! | a run from recipe to report | [`train`] |
//! | one training step | [`Learner`] |
//! | AdamW, clipping | [`AdamW`] |
//! | held-out judgement | [`evaluate`] |
//! | rewards of every token of a file | [`score`] |
//! | experiments on the paper's claims | [`reproduce`] |
//! | a device by name, and which there are | [`device`](fn@device), [`device_list`], [`devices`] |
//!
//! ```
//! let recipe = trainer::Recipe::parse(
//!     "name = \"tiny\"\n[task]\ntrain_pairs = 8\n",
//!     "tiny.toml",
//! ).unwrap();
//! assert_eq!(recipe.preference.batch_size, 8); // a default
//! assert!(recipe.to_toml().unwrap().contains("batch_size = 8"));
//! ```

mod cache;
pub mod checkpoint;
mod device;
mod error;
pub mod evaluate;
mod failure;
pub mod folder;
mod learner;
mod metrics;
mod mix;
mod optimizer;
mod order;
mod page;
mod prepare;
mod progress;
mod recipe;
pub mod reference;
pub mod reproduce;
mod run;
mod sampling;
pub mod score;
mod stage;
mod tensorboard;
mod unpaired;
mod workers;

pub use cache::ReferenceCache;
pub use device::{DeviceState, device, device_list, devices};
pub use error::TrainError;
pub use failure::{Shortage, within_memory};
pub use learner::{
    Activations, Compared, Learner, MicroBatch, PREFERENCE_METRICS, Reference, SFT_METRICS,
    StepOutcome, pair_logps, preference_micro_batch, sft_micro_batch,
};
pub use optimizer::{AdamW, FlatGradients};
pub use order::{Order, Source};
pub use page::Judged;
pub use prepare::{Prepared, PreparedTask, prepare, same_tokens};
pub use progress::Progress;
pub use recipe::{
    BestRecipe, CheckpointRecipe, ContrastRecipe, DataRecipe, LoraRecipe, ModelRecipe,
    OptimizerRecipe, PreferenceRecipe, Recipe, Schedule, SftRecipe, SourceRecipe, Sources,
    SyncRecipe, TaskRecipe,
};
pub use run::{Finished, RunOptions, train};
pub use sampling::{
    Policy, PromptSource, Prompts, SampleOptions, base_of_adapter, beta_of_run, policy_shape,
    sample_prompts,
};
pub use unpaired::UNPAIRED_METRICS;
pub use workers::Workers;
