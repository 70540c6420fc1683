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
//!
//! ```
//! let recipe = trainer::Recipe::parse(
//!     "name = \"tiny\"\n[task]\ntrain_pairs = 8\n",
//!     "tiny.toml",
//! ).unwrap();
//! assert_eq!(recipe.preference.batch_size, 8); // a default
//! assert!(recipe.to_toml().unwrap().contains("batch_size = 8"));
//! ```

pub mod checkpoint;
mod device;
mod error;
pub mod evaluate;
mod learner;
mod metrics;
mod optimizer;
mod order;
mod page;
mod prepare;
mod progress;
mod recipe;
pub mod reference;
mod run;
pub mod score;
mod stage;
mod statistics;
mod workers;

pub use device::device;
pub use error::TrainError;
pub use learner::{
    Learner, MicroBatch, PREFERENCE_METRICS, SFT_METRICS, StepOutcome, pair_logps,
    preference_micro_batch, preference_values, sft_micro_batch,
};
pub use optimizer::{AdamW, FlatGradients};
pub use order::Order;
pub use page::Judged;
pub use prepare::{Prepared, PreparedTask, prepare};
pub use recipe::{
    CheckpointRecipe, DataRecipe, ModelRecipe, OptimizerRecipe, PreferenceRecipe, Recipe, Schedule,
    SftRecipe, TaskRecipe,
};
pub use run::{Finished, RunOptions, train};
pub use statistics::Estimate;
pub use workers::Workers;
