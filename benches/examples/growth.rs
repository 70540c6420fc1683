//! What a pair costs as it grows from 128 to 2,048 tokens, and whether a run of 10,000 steps slows
//! down or swells.
//!
//! `cargo run --release -p benches --example growth -- [DIR]` prints two tables, and draws them into
//! `DIR`. It takes a minute or two, on a machine that does nothing else.

#![allow(clippy::print_stdout, reason = "a program that reports")]

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use burn::tensor::Device;
use dpo_loss::{Beta, Objectives};
use lm::{CompletionBatch, LlamaShape, ModelConfig, Transformer};
use report::{Plot, Series};
use trainer::{Activations, AdamW, Learner, OptimizerRecipe, pair_logps, preference_micro_batch};

/// As in the programs that train.
#[global_allocator]
static ALLOCATOR: allocator::MiMalloc = allocator::MiMalloc;

/// Tokens of a prompt with one of its completions, half of them prompt.
const LENGTHS: [usize; 5] = [128, 256, 512, 1024, 2048];
/// Rounds in which every length has its turn.
const ROUNDS: usize = 5;
/// Steps of the long run, and how many of them one figure is the median of.
const STEPS: usize = 10_000;
const WINDOW: usize = 500;
/// The shape `small` of `benches/peers`.
const SMALL: LlamaShape = LlamaShape {
    vocab_size: 4096,
    hidden_size: 256,
    intermediate_size: 688,
    n_layers: 6,
    n_heads: 8,
    n_kv_heads: 8,
    max_positions: 2048,
    tied: false,
    eos_id: 2,
    pad_id: 0,
};
const TINY: LlamaShape = LlamaShape {
    vocab_size: 64,
    hidden_size: 32,
    intermediate_size: 64,
    n_layers: 1,
    n_heads: 2,
    n_kv_heads: 2,
    ..SMALL
};

fn main() -> anyhow::Result<()> {
    allocator::keep_freed_memory();
    let folder = std::env::args_os().nth(1);
    // The tiny model first: what a process has held, it keeps.
    let plots = [drift()?, growth()?];
    if let Some(folder) = folder {
        let folder = Path::new(&folder);
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        for (name, plot) in ["drift.svg", "growth.svg"].iter().zip(plots) {
            report::write_atomically(&folder.join(name), &plot.to_standalone_svg())?;
        }
    }
    Ok(())
}

/// Seconds of a pair by its length.
fn growth() -> anyhow::Result<Plot> {
    let mut steps = LENGTHS
        .iter()
        .map(|&n| Steps::new(&SMALL, LENGTHS[LENGTHS.len() - 1] / n, n))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut seconds = vec![Vec::new(); LENGTHS.len()];
    // The first round is not counted.
    for round in 0..=ROUNDS {
        for (steps, seconds) in steps.iter_mut().zip(&mut seconds) {
            let taken = steps.take()?;
            if round > 0 {
                seconds.push(taken / steps.pairs.len() as f64);
            }
        }
    }
    println!(
        "| tokens | pairs a step | ms a pair | attention's part of its operations, % | GFLOP/s |"
    );
    println!("| --- | --- | --- | --- | --- |");
    let mut measured = Vec::new();
    let mut expected = Vec::new();
    let mut rate = None;
    for ((&n, steps), seconds) in LENGTHS.iter().zip(&steps).zip(&mut seconds) {
        let [products, attention] = operations(&SMALL, n);
        let all = products + attention;
        let seconds = median(seconds);
        // Of the shortest: what the others would take if every operation took as long.
        let rate = *rate.get_or_insert(all / seconds);
        measured.push((n as f64, seconds * 1e3));
        expected.push((n as f64, all / rate * 1e3));
        println!(
            "| {n} | {} | {:.1} | {:.1} | {:.1} |",
            steps.pairs.len(),
            seconds * 1e3,
            attention / all * 100.0,
            all / seconds / 1e9
        );
    }
    Ok(Plot {
        title: "What a pair costs".into(),
        x_label: "tokens of a prompt and a completion".into(),
        y_label: "a pair's part of a step (ms)".into(),
        series: vec![
            series("measured", measured),
            series("its operations, at the rate of the shortest", expected),
        ],
        ..Plot::default()
    })
}

/// The time of steps along a run.
fn drift() -> anyhow::Result<Plot> {
    let mut steps = Steps::new(&TINY, 4, 16)?;
    let mut points = Vec::new();
    println!("| steps | ms a step, median | resident, MB |");
    println!("| --- | --- | --- |");
    for end in (WINDOW..=STEPS).step_by(WINDOW) {
        let mut seconds = (0..WINDOW)
            .map(|_| steps.take())
            .collect::<anyhow::Result<Vec<_>>>()?;
        let ms = median(&mut seconds) * 1e3;
        let resident = resident_mb().map_or("unknown".into(), |mb| format!("{mb:.1}"));
        println!("| {end} | {ms:.3} | {resident} |");
        points.push((end as f64, ms));
    }
    Ok(Plot {
        title: "A long run".into(),
        x_label: "step".into(),
        y_label: format!("a step, median of {WINDOW} (ms)"),
        series: vec![series("measured", points)],
        ..Plot::default()
    })
}

fn series(name: &str, points: Vec<(f64, f64)>) -> Series {
    Series {
        name: name.into(),
        points,
        band: None,
    }
}

/// DPO steps on the same random pairs over and over.
struct Steps {
    learner: Learner,
    pairs: Vec<[Vec<u32>; 3]>,
    width: usize,
    device: Device,
}

impl Steps {
    fn new(shape: &LlamaShape, pairs: usize, tokens: usize) -> anyhow::Result<Self> {
        let device = Device::default();
        let model = Transformer::init(ModelConfig::llama(shape)?, 1, &device)?;
        let optimizer = OptimizerRecipe {
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            ..OptimizerRecipe::default()
        };
        let ids = |seed| benches::ids(tokens / 2, seed, shape.vocab_size);
        Ok(Self {
            learner: Learner::new(model, AdamW::new(&optimizer)),
            pairs: (0..pairs)
                .map(|pair| [0, 1, 2].map(|part| ids(3 * pair + part)))
                .collect(),
            width: shape.hidden_size,
            device,
        })
    }

    /// The seconds of one, with making its batch.
    fn take(&mut self) -> anyhow::Result<f64> {
        let began = Instant::now();
        let (pairs, device, width) = (&self.pairs, &self.device, self.width);
        let (objectives, beta) = (Objectives::default(), Beta::new(0.1)?);
        self.learner.step(1, 1e-5, |model, _| {
            let pairs: Vec<(&[u32], &[u32], &[u32])> = pairs
                .iter()
                .map(|[prompt, chosen, rejected]| (&prompt[..], &chosen[..], &rejected[..]))
                .collect();
            let batch = CompletionBatch::for_pairs(&pairs, width, device);
            // What the reference's logps are changes nothing about the time.
            let zeros = vec![0.0; pairs.len()];
            preference_micro_batch(
                model,
                &batch,
                &pair_logps(&zeros, &zeros, device).into(),
                &objectives,
                beta,
                Activations::Keep,
            )
        });
        self.device.sync()?;
        Ok(began.elapsed().as_secs_f64())
    }
}

/// Operations that a pair of `n` tokens cannot do without, its prompt computed once: of products with
/// weights, and of attention; counted as `benches/peers/compare.py` counts them.
fn operations(shape: &LlamaShape, n: usize) -> [f64; 2] {
    let (prompt, completion) = (n / 2, n / 2);
    let (width, layers) = (shape.hidden_size, shape.n_layers);
    let keys_and_values = 2 * width * width;
    let rest = 2 * width * width + 3 * width * shape.intermediate_size;
    // A completion's last token predicts nothing, and is not read.
    let (read, behind) = (2 * completion, 2 * (completion - 1));
    let tokens = prompt + behind;
    let blocks = layers * keys_and_values * tokens + rest * ((layers - 1) * tokens + read);
    let products = 2 * (blocks + width * shape.vocab_size * read);
    let seen = (layers - 1) * prompt * (prompt + 1) / 2
        + prompt
        + layers * behind * (2 * prompt + completion) / 2;
    let attention = 4 * width * seen;
    // Once forward and twice backward.
    [products, attention].map(|once| 3.0 * once as f64)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Memory of this process, where Linux says it.
fn resident_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kb: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kb / 1e3)
}
