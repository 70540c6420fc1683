//! Decoding and tree search on a model from a folder.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Args;
use lm::{Decoder, Decoding, Generate, Precision, PrefixCache, Transformer};
use search::{
    BeamConfig, Leaf, MctsConfig, NodeId, PrefixModel, PrefixTree, Request, Rows, SearchError,
    SearchOutput, beam_search, mcts,
};
use serde_json::{Value, json};

#[derive(Debug, Args)]
struct Task {
    /// Hugging Face folder of the model.
    #[arg(long)]
    model: PathBuf,
    /// JSON file of prompts: an array of token ids for each.
    #[arg(long)]
    prompts: PathBuf,
    /// Tokens that every prompt is continued by; no token ends a text.
    #[arg(long)]
    new_tokens: usize,
    /// Runs before the first that counts.
    #[arg(long, default_value_t = 1)]
    warm_up: usize,
    /// Where to compute.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What matrix products are computed in on a card; a processor decodes in f32.
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionName,
}

/// A [`Precision`], as an argument.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum PrecisionName {
    F32,
    Bf16,
}

#[derive(Debug, Args)]
pub(crate) struct Decode {
    #[command(flatten)]
    task: Task,
    /// Beams; 1 is greedy decoding, of all prompts together.
    #[arg(long, default_value_t = 1)]
    beams: usize,
}

#[derive(Debug, Args)]
pub(crate) struct TreeSearch {
    #[command(flatten)]
    task: Task,
    /// Simulations for each token.
    #[arg(long, default_value_t = 64)]
    simulations: usize,
    /// Simulations in a call of the model.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens considered at each state.
    #[arg(long, default_value_t = 20)]
    top_k: usize,
}

pub(crate) fn serve(case: &Decode) -> anyhow::Result<()> {
    let (model, prompts) = case.task.read()?;
    // First, so that its copies are gone before the one that decodes is made, and no peak counts two.
    let facts = facts(&model);
    if case.beams == 1 {
        let decoder = Decoder::new(&model);
        let options = Generate {
            max_new_tokens: case.task.new_tokens,
            eos_ids: vec![],
            decoding: Decoding::Greedy,
            seed: 0,
        };
        return serve_texts(case, &model, &facts, || {
            let texts = decoder.generate(&prompts, &options)?;
            Ok(texts.into_iter().map(|text| text.ids).collect())
        });
    }
    let mut cache = PrefixCache::new(&model);
    let config = BeamConfig {
        width: case.beams,
        ..BeamConfig::default()
    };
    serve_texts(case, &model, &facts, || {
        let each = prompts.iter();
        each.map(|prompt| {
            let request = Request::new(&prompt[..], [], case.task.new_tokens);
            Ok(tokens(&beam_search(&mut cache, &request, &config)?))
        })
        .collect()
    })
}

fn serve_texts(
    case: &Decode,
    model: &Transformer,
    facts: &Value,
    mut texts: impl FnMut() -> anyhow::Result<Vec<Vec<u32>>>,
) -> anyhow::Result<()> {
    crate::serve(facts, case.task.warm_up, || {
        let began = Instant::now();
        let ids = texts()?;
        let seconds = began.elapsed().as_secs_f64();
        let usage = model.device().memory_pool_usage();
        let held = usage.map(|usage| usage.bytes_reserved);
        Ok(json!({ "seconds": seconds, "ids": ids, "device_bytes": held }))
    })
}

pub(crate) fn serve_tree_search(case: &TreeSearch) -> anyhow::Result<()> {
    let (model, prompts) = case.task.read()?;
    let facts = facts(&model);
    let config = MctsConfig {
        simulations: case.simulations,
        batch: case.batch,
        ..MctsConfig::default()
    };
    let mut timed = Timed {
        model: PrefixCache::new(&model),
        inside: Duration::ZERO,
    };
    crate::serve(&facts, case.task.warm_up, || {
        timed.inside = Duration::ZERO;
        let began = Instant::now();
        let mut expanded = 0;
        let mut ids = Vec::new();
        for prompt in &prompts {
            let mut request = Request::new(&prompt[..], [], case.task.new_tokens);
            request.top_k = Some(case.top_k);
            let output = mcts(&mut timed, &request, &config, Leaf::Zero)?;
            expanded += output.stats.states_expanded;
            ids.push(tokens(&output));
        }
        let seconds = began.elapsed().as_secs_f64();
        Ok(json!({
            "seconds": seconds,
            "ids": ids,
            "states_expanded": expanded,
            "share_outside": 1.0 - timed.inside.as_secs_f64() / seconds,
        }))
    })
}

impl Task {
    fn read(&self) -> anyhow::Result<(Transformer, Vec<Vec<u32>>)> {
        Ok((
            // Nothing is trained further: weights may be kept as they are computed with.
            read_model(&self.model, &self.device, self.precision)?.with_matrices_rounded(),
            crate::read_json(&self.prompts)?,
        ))
    }
}

pub(crate) fn read_model(
    folder: &Path,
    device: &str,
    precision: PrecisionName,
) -> anyhow::Result<Transformer> {
    let device = trainer::device(device)?;
    let precision = match precision {
        PrecisionName::F32 => Precision::F32,
        PrecisionName::Bf16 => Precision::Bf16,
    };
    ensure!(
        precision.is_supported(&device),
        "the device does not compute in bf16"
    );
    Ok(Transformer::read(folder, &device)?.with_precision(precision))
}

/// Weights that a token cannot be computed without reading, which is all but an embedding table
/// that is only looked up, and the bytes that they are read as.
fn facts(model: &Transformer) -> Value {
    let table = |name: &str| {
        ["embed_tokens", "embed_in"]
            .iter()
            .any(|part| name.contains(part))
    };
    let looked_up = |name: &str| !model.config().tied && table(name);
    let tensors = model.to_host().into_iter();
    let read = tensors.filter(|(name, _)| !looked_up(name));
    let weights: usize = read.map(|(_, tensor)| tensor.values.len()).sum();
    let bytes = Decoder::new(model).weight_bytes();
    let each = if model.precision() == Precision::Bf16 {
        2
    } else {
        4
    };
    json!({ "weights_per_token": weights, "bytes_per_token": bytes.unwrap_or(each * weights) })
}

fn tokens(output: &SearchOutput) -> Vec<u32> {
    let best = output.best();
    best.map(|best| best.tokens.clone()).unwrap_or_default()
}

/// A model that adds up the time inside its answers.
struct Timed<M> {
    model: M,
    inside: Duration,
}

impl<M: PrefixModel> PrefixModel for Timed<M> {
    fn vocab(&self) -> usize {
        self.model.vocab()
    }

    fn has_reference(&self) -> bool {
        self.model.has_reference()
    }

    fn has_rewards(&self) -> bool {
        self.model.has_rewards()
    }

    fn begin(&mut self, prompt: &[u32], max_new_tokens: usize) -> Result<(), SearchError> {
        self.model.begin(prompt, max_new_tokens)
    }

    fn expand(
        &mut self,
        prefixes: &PrefixTree,
        frontier: &[NodeId],
        top_k: Option<usize>,
    ) -> Result<Rows, SearchError> {
        let began = Instant::now();
        let rows = self.model.expand(prefixes, frontier, top_k);
        self.inside += began.elapsed();
        rows
    }

    fn retain(&mut self, prefixes: &PrefixTree, live: &[NodeId]) {
        self.model.retain(prefixes, live);
    }
}
