//! Prints what a training step of a random Llama needs: time, peak memory, and the estimate of it.
//!
//! `cargo run --release -p lm --example training_memory -- KIND ROWS ROW_TOKENS [STEPS]`
//!
//! `KIND` is `plain`, `recompute` (blocks are recomputed), `balanced` (Burn's own gradient
//! checkpointing), `lora`, or `lora-recompute`. One kind a run: the peak is the process's.

use std::error::Error;
use std::time::Instant;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};
use lm::{CompletionBatch, LlamaShape, LoraConfig, ModelConfig, Transformer};

/// Sums of squares of all gradients, so that kinds can be compared.
struct Norm(Option<Gradients>, f64);

impl ModuleVisitor for Norm {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradients = self.0.as_ref().expect("set before the visit");
        if let Some(gradient) = param.val().grad(gradients) {
            self.1 += f64::from(gradient.square().sum().into_scalar::<f32>());
        }
    }
}

/// Peak resident memory of this process in MB, where the system tells.
fn peak_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kb: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kb * 1024.0 / 1e6)
}

#[expect(clippy::print_stdout, reason = "an example shows its result")]
fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, rows, row_tokens, steps @ ..] = &arguments[..] else {
        return Err("usage: training_memory KIND ROWS ROW_TOKENS [STEPS]".into());
    };
    let (rows, row_tokens): (usize, usize) = (rows.parse()?, row_tokens.parse()?);
    let steps: usize = steps.first().map_or(Ok(2), |steps| steps.parse())?;
    let config = ModelConfig::llama(&LlamaShape {
        vocab_size: 2048,
        hidden_size: 256,
        intermediate_size: 680,
        n_layers: 8,
        n_heads: 8,
        n_kv_heads: 4,
        max_positions: row_tokens,
        tied: true,
        eos_id: 1,
        pad_id: 0,
    })?;
    let device = Device::default().autodiff();
    let model = match &kind[..] {
        "balanced" => Transformer::init(config, 1, &device.gradient_checkpointing())?,
        "lora" | "lora-recompute" => {
            let lora = LoraConfig {
                rank: 8,
                alpha: 16.0,
                rank_stabilized: false,
                targets: vec!["all-linear".into()],
            };
            let model = Transformer::init(config, 1, &Device::default())?;
            model.with_lora(&lora, 1)?.train()
        }
        _ => Transformer::init(config, 1, &device)?,
    };
    let prompt: Vec<u32> = (0..row_tokens as u32 / 2).map(|i| 2 + i % 2000).collect();
    let completion: Vec<u32> = (0..row_tokens as u32 / 2)
        .map(|i| 2 + i * 7 % 2000)
        .collect();
    let batch = CompletionBatch::new(&vec![(&prompt[..], &completion[..]); rows], &model.device());
    let before = peak_mb();
    let mut norm = Norm(None, 0.0);
    let mut take = |gradients| {
        norm.0 = Some(gradients);
        model.visit(&mut norm);
    };
    let started = Instant::now();
    for _ in 0..steps {
        if kind.ends_with("recompute") {
            let checkpointed = model.checkpointed(&batch);
            let scored = model.score_hidden(&batch, checkpointed.hidden(), false);
            checkpointed.backward(&model, &-scored.flat.mean(), &mut take);
        } else {
            take((-model.score(&batch, false).flat.mean()).backward());
        }
    }
    let seconds = started.elapsed().as_secs_f64() / steps as f64;
    let memory = model.training_memory(row_tokens);
    let recompute = kind.ends_with("recompute");
    let n_tokens = rows * row_tokens;
    // No optimizer runs here.
    let estimate = memory.total(n_tokens, n_tokens / 2, recompute) - memory.optimizer;
    println!(
        "{kind}: {rows} rows of {row_tokens}, {} trainable of {} parameters: {seconds:.3} s a step, \
         peak {:.0} MB ({:.0} before the first step), estimate {:.0} MB; gradients' sum of squares {:.9e}",
        model.n_trainable_parameters(),
        model.config().n_parameters(),
        peak_mb().unwrap_or(f64::NAN),
        before.unwrap_or(f64::NAN),
        estimate as f64 / 1e6,
        norm.1 / steps as f64,
    );
    Ok(())
}
