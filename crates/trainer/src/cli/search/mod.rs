//! `r2q search`: completions found by searching with a policy and its reference.

mod plan;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use anyhow::{Context, bail};
use burn::tensor::Device;
use clap::{ArgMatches, Args, ValueEnum};
use lm::PrefixCache;
use lm::chat::{ChatTemplate, Message, RenderOptions};
use mdp_core::Beta;
use report::{Card, FoundCompletion, SearchNode, SearchedPrompt, search_page};
use search::{Budget, Constraints, PrefixModel, ProxyTuned, Request, Score, SearchOutput, Stopped};
use serde_json::{Value, json};
use trainer::{Policy, PromptSource, Prompts, device, same_tokens};

use super::{check_new_folder, stop_on_ctrl_c, write_rows};
use plan::{Algorithm, BackupName, ScoreName, Stopping};

/// What `search` takes.
#[derive(Debug, Args)]
pub(crate) struct SearchArgs {
    /// The policy: a Hugging Face folder, or a PEFT folder whose base is here.
    #[arg(long, value_name = "DIR")]
    policy: PathBuf,
    /// Its reference, of the same tokens.
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// Proxy tuning: search the policy moved as this model was moved from --anti-expert.
    #[arg(
        long,
        value_name = "DIR",
        requires = "anti_expert",
        conflicts_with = "reference"
    )]
    expert: Option<PathBuf>,
    /// Proxy tuning: what --expert was before its training.
    #[arg(long, value_name = "DIR", requires = "expert")]
    anti_expert: Option<PathBuf>,
    /// Proxy tuning: how far to go; 0 is the policy alone.
    #[arg(
        long,
        allow_negative_numbers = true,
        default_value_t = 1.0,
        requires = "expert"
    )]
    alpha: f64,
    /// One prompt.
    #[arg(long, value_name = "TEXT", group = "which")]
    prompt: Option<String>,
    /// Put --prompt into the policy's chat template, as a user's message.
    #[arg(long, requires = "prompt")]
    chat: bool,
    /// Prompts: JSON lines with a column `prompt`, a string or a list of messages.
    #[arg(long, value_name = "FILE", group = "which")]
    data: Option<PathBuf>,
    /// This many held-out prompts of the embedded memo task.
    #[arg(long, value_name = "N", group = "which")]
    memo_prompts: Option<usize>,
    /// How to search.
    #[arg(long, value_enum, default_value_t = Algorithm::Beam)]
    algorithm: Algorithm,
    /// What to maximise; `log-ratio` and `mix` need --reference.
    #[arg(long, value_enum, default_value_t = ScoreName::Likelihood)]
    score: ScoreName,
    /// How much of the reference's log-probability `mix` subtracts.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.5)]
    reference_weight: f64,
    /// Reward units per nat, for the implicit reward that is reported [default: of the run that the
    /// policy lies in, or 0.1].
    #[arg(long, allow_negative_numbers = true)]
    beta: Option<f64>,
    /// The most tokens of a completion.
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// The fewest tokens before an end.
    #[arg(long, default_value_t = 0)]
    min_new_tokens: usize,
    /// Consider only the tokens likeliest under the policy at each state [default: all; 50 for lookahead
    /// and mcts, which hold a node for each, but for the soft backup].
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// A text that ends a completion, in the tokens that the tokenizer gives it; may be repeated.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// A token id that must not appear; may be repeated.
    #[arg(long, value_name = "ID")]
    ban: Vec<u32>,
    /// Completions returned by beam, best-first and mcts --at-end.
    #[arg(long, value_name = "N", default_value_t = 1)]
    n_best: usize,
    /// beam, lookahead: prefixes kept at each length.
    #[arg(long, default_value_t = 5)]
    width: usize,
    /// beam: scores are divided by the length to this power.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.0)]
    length_penalty: f64,
    /// beam: when to stop looking.
    #[arg(long, value_enum, default_value_t = Stopping::Never)]
    early_stopping: Stopping,
    /// beam: groups kept apart by --diversity-penalty.
    #[arg(long, default_value_t = 1)]
    groups: usize,
    /// beam: nats that a token costs a later group for each earlier one that took it.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.0)]
    diversity_penalty: f64,
    /// sample, best-of-n: completions drawn.
    #[arg(long, default_value_t = 8)]
    n: usize,
    /// sample, best-of-n: divides the logits.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    temperature: f64,
    /// sample, best-of-n: keep the fewest likeliest tokens whose probability reaches this.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of draws and of Gumbel noise, each prompt's its own, and of the memo task's prompts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// mcts: simulations for each token, or in all with --at-end.
    #[arg(long, default_value_t = 64)]
    simulations: usize,
    /// mcts, best-first: states in one batch.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// mcts: how a prefix's value follows from those below it.
    #[arg(long, value_enum, default_value_t = BackupName::Max)]
    backup: BackupName,
    /// mcts: weight of the prior against the values.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.25)]
    exploration: f64,
    /// mcts: one tree from the prompt, without committing to a token at a time.
    #[arg(long)]
    at_end: bool,
    /// mcts: choose the first token by Gumbel noise among this many.
    #[arg(long, value_name = "N")]
    gumbel: Option<usize>,
    /// lookahead: tokens to plan.
    #[arg(long, default_value_t = 2)]
    depth: usize,
    /// The most tokens through the model for one prompt.
    #[arg(long, value_name = "N")]
    budget_tokens: Option<usize>,
    /// The most seconds for one prompt.
    #[arg(long, allow_negative_numbers = true, value_name = "S")]
    budget_seconds: Option<f64>,
    /// The most MiB of keys and values; what is beyond is computed again.
    #[arg(long, value_name = "MIB")]
    cache_mib: Option<usize>,
    /// Trees on the page, those of the first prompts.
    #[arg(long, value_name = "N", default_value_t = 20)]
    page_trees: usize,
    /// The folder to write, new or empty.
    #[arg(long, value_name = "DIR", default_value = "search")]
    out: PathBuf,
    /// Where to compute: cpu, wgpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

impl SearchArgs {
    /// Searches; `matches` says which flags were given.
    pub(crate) fn run(&self, matches: &ArgMatches) -> anyhow::Result<()> {
        check_new_folder(&self.out)?;
        let plan = self.plan(matches)?;
        let needs_reference = self.score != ScoreName::Likelihood;
        if needs_reference && self.reference.is_none() {
            bail!("--score {}: needs --reference DIR", name_of(self.score));
        }
        let beta = match self.beta {
            Some(beta) => Beta::new(beta).context("--beta")?,
            None if self.reference.is_some() => trainer::beta_of_run(&self.policy)?,
            // Nothing is reported in its units.
            None => Beta::new(1.0)?,
        };
        let device = device(&self.device)?;
        let policy = Policy::read(&self.policy, &device)?;
        let read = |folder: &Option<PathBuf>| {
            let folder = folder.as_deref();
            folder
                .map(|folder| other(folder, &policy, &device))
                .transpose()
        };
        let (reference, expert) = (read(&self.reference)?, read(&self.expert)?);
        let anti_expert = read(&self.anti_expert)?;
        let prompts = self.prompts(&policy)?;
        // A prompt that some model cannot read is told now, and not after the searches before it.
        let models = [
            Some(&policy),
            reference.as_ref(),
            expert.as_ref(),
            anti_expert.as_ref(),
        ];
        for Policy { model, folder, .. } in models.into_iter().flatten() {
            let checked = model
                .config()
                .check_prompts(&prompts.ids, self.max_new_tokens);
            checked.with_context(|| folder.display().to_string())?;
        }
        let cache = |model| {
            let cache = PrefixCache::new(model);
            match self.cache_mib {
                Some(mib) => cache.limit_bytes(mib.saturating_mul(1 << 20)),
                None => cache,
            }
        };
        let mut model: Box<dyn PrefixModel + '_> = match (&reference, &expert, &anti_expert) {
            (Some(reference), ..) => {
                Box::new(cache(&policy.model).with_reference(&reference.model)?)
            }
            (_, Some(expert), Some(anti_expert)) => Box::new(ProxyTuned::new(
                cache(&policy.model),
                cache(&expert.model),
                cache(&anti_expert.model),
                self.alpha,
            )?),
            _ => Box::new(cache(&policy.model)),
        };
        let stop = self
            .stop
            .iter()
            .map(|text| policy.tokenizer.encode_plain(text));
        let stop = stop.collect::<Result<Vec<_>, _>>()?;
        // The search at hand returns its best so far, and no further one begins.
        let cancelled = stop_on_ctrl_c()?;
        eprintln!("searching, prompts: {}", prompts.texts.len());
        let (mut rows, mut pages) = (Vec::new(), Vec::new());
        let (mut seconds, mut states) = (0.0, 0);
        for (number, (text, ids)) in prompts.texts.iter().zip(&prompts.ids).enumerate() {
            if number > 0 && cancelled.load(Ordering::Relaxed) {
                break;
            }
            let request = Request {
                score: match self.score {
                    ScoreName::Likelihood => Score::Likelihood,
                    ScoreName::LogRatio => Score::LogRatio,
                    ScoreName::Mix => Score::Mix {
                        reference: self.reference_weight,
                    },
                },
                beta,
                top_k: self.top_k(),
                constraints: Constraints {
                    stop: stop.clone(),
                    banned: self.ban.clone(),
                    min_new_tokens: self.min_new_tokens,
                    processor: None,
                },
                budget: Budget {
                    tokens: self.budget_tokens,
                    simulations: None,
                    seconds: self.budget_seconds,
                },
                cancel: Some(cancelled),
                keep_tree: number < self.page_trees,
                ..Request::new(&ids[..], policy.tokenizer.eos_ids(), self.max_new_tokens)
            };
            let output = plan
                .seeded(number)
                .search(&mut *model, &request)
                .with_context(|| format!("prompt {number}, from 0"))?;
            seconds += output.stats.seconds;
            states += output.stats.states_expanded;
            rows.push(row(text, &output, &policy)?);
            if number < self.page_trees {
                pages.push(searched(number, text, &output, &policy)?);
            }
        }
        std::fs::create_dir_all(&self.out).with_context(|| self.out.display().to_string())?;
        let (lines, page) = (
            self.out.join("completions.jsonl"),
            self.out.join("report.html"),
        );
        write_rows(&lines, &rows)?;
        let per_second = states as f64 / seconds.max(f64::MIN_POSITIVE);
        let speed = format!("{per_second:.1}");
        let cards = [
            card("prompts", &rows.len().to_string(), ""),
            card(
                "states expanded",
                &states.to_string(),
                "tokens through the model",
            ),
            card("states per second", &speed, ""),
        ];
        let title = format!(
            "Search: {}, {}",
            name_of(self.algorithm),
            name_of(self.score)
        );
        let subtitle = self.subtitle();
        report::write_atomically(&page, &search_page(&title, &subtitle, &cards, &pages))?;
        if cancelled.load(Ordering::Relaxed) {
            eprintln!("stopped: the best found so far is written");
        }
        eprintln!(
            "prompts: {}, states: {states}, {speed} a second",
            rows.len()
        );
        eprintln!("completions: {}", lines.display());
        eprintln!("page:        {}", page.display());
        Ok(())
    }

    /// The models searched with.
    fn subtitle(&self) -> String {
        let others = [
            ("reference", &self.reference),
            ("expert", &self.expert),
            ("anti-expert", &self.anti_expert),
        ];
        let mut text = format!("policy {}", self.policy.display());
        for (name, folder) in others {
            if let Some(folder) = folder {
                text += &format!(", {name} {}", folder.display());
            }
        }
        text
    }

    fn prompts(&self, policy: &Policy) -> anyhow::Result<Prompts> {
        let source = match (&self.prompt, &self.data, self.memo_prompts) {
            (Some(text), ..) if self.chat => {
                let template = ChatTemplate::from_tokenizer(&policy.tokenizer)?;
                let Some(template) = template else {
                    bail!("--chat: {} has no chat template", self.policy.display());
                };
                let message: Message =
                    serde_json::from_value(json!({"role": "user", "content": text}))?;
                let options = RenderOptions {
                    add_generation_prompt: true,
                    ..RenderOptions::default()
                };
                let text = template.render(&[message], &options)?;
                return Ok(Prompts {
                    ids: vec![policy.tokenizer.encode_plain(&text)?],
                    texts: vec![text],
                });
            }
            (Some(text), ..) => {
                return Ok(Prompts {
                    texts: vec![text.clone()],
                    ids: vec![policy.tokenizer.encode(text)?],
                });
            }
            (_, Some(path), _) => PromptSource::File(path.clone()),
            (_, _, Some(n)) => PromptSource::Memo { n, seed: self.seed },
            _ => bail!("which prompts? give --prompt TEXT, --data FILE or --memo-prompts N"),
        };
        Ok(source.read(&policy.tokenizer)?)
    }
}

/// The name that the command line gives a value.
fn name_of(value: impl ValueEnum) -> String {
    let value = value.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_string())
}

/// A model beside the policy, which must have the policy's tokens.
fn other(folder: &Path, policy: &Policy, device: &Device) -> anyhow::Result<Policy> {
    let other = Policy::read(folder, device)?;
    let vocab = |policy: &Policy| policy.model.config().vocab_size;
    if vocab(&other) != vocab(policy) {
        bail!(
            "{}: has a vocabulary of {}, the policy one of {}",
            folder.display(),
            vocab(&other),
            vocab(policy)
        );
    }
    same_tokens("the policy", &policy.tokenizer, &other.tokenizer)
        .map_err(|reason| anyhow::anyhow!("{}: {reason}", folder.display()))?;
    Ok(other)
}

fn card(label: &str, value: &str, note: &str) -> Card {
    Card {
        label: label.into(),
        value: value.into(),
        note: note.into(),
    }
}

/// A line of `completions.jsonl`.
fn row(prompt: &str, output: &SearchOutput, policy: &Policy) -> anyhow::Result<Value> {
    let mut completions = Vec::with_capacity(output.completions.len());
    for found in &output.completions {
        let mut row = serde_json::to_value(found)?;
        row["completion"] = policy.tokenizer.decode(&found.tokens, true)?.into();
        completions.push(row);
    }
    Ok(json!({
        "prompt": prompt,
        "completion": completions.first().map(|row| row["completion"].clone()),
        "completions": completions,
        "is_optimal": output.is_optimal(),
        "upper_bound": output.upper_bound,
        "stats": output.stats,
    }))
}

/// A prompt of the page.
fn searched(
    number: usize,
    prompt: &str,
    output: &SearchOutput,
    policy: &Policy,
) -> anyhow::Result<SearchedPrompt> {
    let mut completions = Vec::new();
    for found in &output.completions {
        let mut scores = vec![("score".to_string(), found.score)];
        scores.push(("log p".into(), found.logp));
        let more = [
            ("reference log p", found.reference_logp),
            ("implicit reward", found.implicit_reward),
        ];
        scores.extend(more.into_iter().filter_map(|(n, v)| Some((n.into(), v?))));
        scores.push(("tokens".into(), found.tokens.len() as f64));
        completions.push(FoundCompletion {
            text: policy.tokenizer.decode(&found.tokens, true)?,
            end: word(&found.end)?,
            scores,
        });
    }
    let mut nodes = Vec::new();
    for node in output.tree.iter().flat_map(|tree| &tree.nodes) {
        let text = match node.token {
            None => String::new(),
            Some(id) => policy.tokenizer.decode(&[id], false)?,
        };
        nodes.push(SearchNode {
            parent: node.parent,
            text,
            visits: node.visits,
            prior: node.prior,
            score: node.score,
            q: node.q,
            value: node.value,
            covered_mass: node.covered_mass,
            on_path: node.on_path,
            end: node.end.as_ref().map(word).transpose()?,
        });
    }
    let stats = &output.stats;
    let proof = if output.is_optimal() {
        "proven the best of all; "
    } else {
        ""
    };
    let covered = match stats.covered_mass {
        mass if mass < 1e-3 => format!("{mass:.1e}"),
        mass => format!("{mass:.3}"),
    };
    let stopped = match stats.stopped {
        Stopped::Done => "",
        Stopped::Budget => "; stopped by the budget",
        Stopped::Cancelled => "; stopped by Ctrl-C",
    };
    Ok(SearchedPrompt {
        name: format!("Prompt {number}"),
        prompt: prompt.into(),
        summary: format!(
            "{proof}{} states in {} calls, {:.2} s, covered mass {covered}{stopped}",
            stats.states_expanded, stats.model_calls, stats.seconds
        ),
        completions,
        nodes,
    })
}

/// The name under which a value is written to JSON.
fn word(value: &impl serde::Serialize) -> anyhow::Result<String> {
    let value = serde_json::to_value(value)?;
    Ok(value.as_str().unwrap_or_default().to_string())
}
