//! `r2q sample`: completions of prompts.

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use trainer::{Policy, Workers, device, sample_prompts};

use super::{PromptArgs, SamplingArgs, check_new, mean_tokens, stop_on_ctrl_c, write_rows};

/// What `sample` takes.
#[derive(Debug, Args)]
pub(crate) struct SampleArgs {
    /// The policy: a Hugging Face folder, or a PEFT folder whose base is here.
    #[arg(long, value_name = "DIR")]
    policy: PathBuf,
    #[command(flatten)]
    prompts: PromptArgs,
    /// Completions of each prompt.
    #[arg(long, default_value_t = 1)]
    n: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// The file to write, JSON lines.
    #[arg(long, value_name = "FILE", default_value = "samples.jsonl")]
    out: PathBuf,
}

impl SampleArgs {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        check_new(&self.out)?;
        let options = self.sampling.options(self.n)?;
        self.prompts.source(&options)?;
        let policy = Policy::read(&self.policy, &device(&self.sampling.device)?)?;
        let prompts = self.prompts.read(&policy.tokenizer, &options)?;
        let workers = Workers::on(&policy.model.device(), self.sampling.workers);
        let stop = Some(stop_on_ctrl_c()?);
        let samples = sample_prompts(&policy, &prompts, &options, (&workers, "sample"), stop)?;
        let (n_sampled, n_prompts) = (samples.len() / options.n, prompts.texts.len());
        if samples.is_empty() {
            bail!("stopped before all completions of a prompt were there; nothing is written");
        }
        write_rows(&self.out, &samples)?;
        if n_sampled < n_prompts {
            eprintln!("stopped: the first {n_sampled} of {n_prompts} prompts are written");
        }
        eprintln!(
            "{} completions of {n_sampled} prompts, {:.1} tokens in the mean: {}",
            samples.len(),
            mean_tokens(&samples),
            self.out.display()
        );
        Ok(())
    }
}
