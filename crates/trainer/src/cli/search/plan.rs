//! Which search the flags ask for, settled before any model is read.

use anyhow::bail;
use clap::parser::ValueSource;
use clap::{ArgMatches, ValueEnum};
use search::{
    Backup, BeamConfig, BestFirstConfig, Commit, EarlyStopping, Judge, Leaf, LookaheadConfig,
    MctsConfig, PrefixModel, Request, RootChoice, SampleConfig, SearchError, SearchOutput,
    beam_search, best_first, best_of_n, greedy, lookahead, mcts, sample,
};

use super::super::{MOST_AT_ONCE, check_count};
use super::{SearchArgs, name_of};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Algorithm {
    Greedy,
    Sample,
    Beam,
    BestFirst,
    Mcts,
    BestOfN,
    Lookahead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ScoreName {
    Likelihood,
    LogRatio,
    Mix,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Stopping {
    AtOnce,
    Estimate,
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum BackupName {
    Max,
    Soft,
    Mean,
}

/// Flags that some algorithms alone have a use for, by clap's names.
const USED_BY: [(&str, &[Algorithm]); 16] = {
    use Algorithm::{Beam, BestFirst, BestOfN, Lookahead, Mcts, Sample};
    [
        ("n_best", &[Beam, BestFirst, Mcts]),
        ("width", &[Beam, Lookahead]),
        ("length_penalty", &[Beam]),
        ("early_stopping", &[Beam]),
        ("groups", &[Beam]),
        ("diversity_penalty", &[Beam]),
        ("n", &[Sample, BestOfN]),
        ("temperature", &[Sample, BestOfN]),
        ("top_p", &[Sample, BestOfN]),
        ("simulations", &[Mcts]),
        ("batch", &[Mcts, BestFirst]),
        ("backup", &[Mcts]),
        ("exploration", &[Mcts]),
        ("at_end", &[Mcts]),
        ("gumbel", &[Mcts]),
        ("depth", &[Lookahead]),
    ]
};

/// Tokens of a state for algorithms that hold a node for each, unless something else is asked for: a
/// vocabulary of 150,000 would fill the memory in a few hundred states.
const TOP_K: usize = 50;

/// An algorithm with its settings, all of them in range.
#[derive(Clone, Copy)]
pub(super) enum Plan {
    Greedy,
    Sample(SampleConfig),
    BestOfN(SampleConfig),
    Beam(BeamConfig),
    BestFirst(BestFirstConfig),
    Lookahead(LookaheadConfig),
    Mcts(MctsConfig),
}

impl SearchArgs {
    /// The search that was asked for; `matches` says which flags were given.
    pub(super) fn plan(&self, matches: &ArgMatches) -> anyhow::Result<Plan> {
        let given = |name: &str| matches.value_source(name) == Some(ValueSource::CommandLine);
        for (name, algorithms) in USED_BY {
            if given(name) && !algorithms.contains(&self.algorithm) {
                let others: Vec<String> = algorithms.iter().map(|&it| name_of(it)).collect();
                bail!(
                    "{}: --algorithm {} has no use for it; {} has",
                    flag(name),
                    name_of(self.algorithm),
                    others.join(" or ")
                );
            }
        }
        if given("reference_weight") && self.score != ScoreName::Mix {
            bail!(
                "--reference-weight: --score {} has no use for it; mix has",
                name_of(self.score)
            );
        }
        if given("beta") && self.reference.is_none() {
            bail!("--beta: is of the implicit reward, which needs --reference DIR");
        }
        if given("diversity_penalty") && self.groups < 2 {
            bail!("--diversity-penalty: keeps --groups apart, and there is one");
        }
        if given("n_best") && self.algorithm == Algorithm::Mcts && !self.at_end {
            bail!("--n-best: mcts writes one completion unless --at-end is given");
        }
        for (flag, count) in [
            ("--max-new-tokens", self.max_new_tokens),
            ("--top-k", self.top_k.unwrap_or(1)),
            ("--simulations", self.simulations),
            ("--depth", self.depth),
        ] {
            check_count(flag, count, 1..=usize::MAX)?;
        }
        for (flag, count) in [
            ("--n-best", self.n_best),
            ("--width", self.width),
            ("--groups", self.groups),
            ("--n", self.n),
            ("--batch", self.batch),
            ("--gumbel", self.gumbel.unwrap_or(1)),
            ("--memo-prompts", self.memo_prompts.unwrap_or(1)),
        ] {
            check_count(flag, count, 1..=MOST_AT_ONCE)?;
        }
        if self.min_new_tokens > self.max_new_tokens {
            bail!(
                "--min-new-tokens: expected at most the {} of --max-new-tokens, got {}",
                self.max_new_tokens,
                self.min_new_tokens
            );
        }
        let plan = self.settings();
        plan.check().map_err(|error| match error {
            SearchError::Setting {
                name,
                value,
                expected,
            } => anyhow::anyhow!("{}: expected {expected}, got {value}", flag(name)),
            other => other.into(),
        })?;
        Ok(plan)
    }

    /// How many tokens are considered at each state; all, if it is not said.
    pub(super) fn top_k(&self) -> Option<usize> {
        let holds_all = match self.algorithm {
            // Of soft values what is left out is lost: they would fall with every state opened.
            Algorithm::Mcts => self.backup != BackupName::Soft,
            algorithm => algorithm == Algorithm::Lookahead,
        };
        // What is asked for by name is not cut.
        let asked = self.gumbel.unwrap_or(0).max(self.width);
        self.top_k.or(holds_all.then_some(TOP_K.max(asked)))
    }

    fn settings(&self) -> Plan {
        let drawn = SampleConfig {
            n: self.n,
            temperature: self.temperature,
            top_k: None,
            top_p: self.top_p,
            seed: self.seed,
        };
        match self.algorithm {
            Algorithm::Greedy => Plan::Greedy,
            Algorithm::Sample => Plan::Sample(drawn),
            Algorithm::BestOfN => Plan::BestOfN(drawn),
            Algorithm::Beam => Plan::Beam(BeamConfig {
                width: self.width,
                n_best: self.n_best,
                length_penalty: self.length_penalty,
                early_stopping: match self.early_stopping {
                    Stopping::AtOnce => EarlyStopping::AtOnce,
                    Stopping::Estimate => EarlyStopping::Estimate,
                    Stopping::Never => EarlyStopping::Never,
                },
                groups: self.groups,
                diversity_penalty: self.diversity_penalty,
            }),
            Algorithm::BestFirst => Plan::BestFirst(BestFirstConfig {
                n_best: self.n_best,
                batch: self.batch,
            }),
            Algorithm::Lookahead => Plan::Lookahead(LookaheadConfig {
                depth: self.depth,
                width: Some(self.width),
            }),
            Algorithm::Mcts => Plan::Mcts(MctsConfig {
                simulations: self.simulations,
                batch: self.batch,
                backup: match self.backup {
                    BackupName::Max => Backup::Max,
                    BackupName::Soft => Backup::Soft,
                    BackupName::Mean => Backup::Mean,
                },
                commit: if self.at_end {
                    Commit::AtEnd
                } else {
                    Commit::EachToken
                },
                root: match self.gumbel {
                    None => RootChoice::Puct,
                    Some(considered) => RootChoice::Gumbel {
                        considered,
                        seed: self.seed,
                    },
                },
                exploration: self.exploration,
                n_best: self.n_best,
                trace: false,
            }),
        }
    }
}

impl Plan {
    fn check(&self) -> Result<(), SearchError> {
        match self {
            Self::Greedy => Ok(()),
            Self::Sample(config) | Self::BestOfN(config) => config.check(),
            Self::Beam(config) => config.check(),
            Self::BestFirst(config) => config.check(),
            Self::Lookahead(config) => config.check(),
            Self::Mcts(config) => config.check(),
        }
    }

    /// The same with draws of its own for a prompt: equal prompts are not drawn alike, nor is the noise
    /// of different ones.
    pub(super) fn seeded(mut self, prompt: usize) -> Self {
        let mix = |seed: &mut u64| *seed ^= (prompt as u64) << 32;
        match &mut self {
            Self::Sample(config) | Self::BestOfN(config) => mix(&mut config.seed),
            Self::Mcts(MctsConfig {
                root: RootChoice::Gumbel { seed, .. },
                ..
            }) => mix(seed),
            _ => {}
        }
        self
    }

    /// Searches for one prompt.
    pub(super) fn search(
        &self,
        model: &mut (dyn PrefixModel + '_),
        request: &Request<'_>,
    ) -> Result<SearchOutput, SearchError> {
        match self {
            Self::Greedy => greedy(model, request),
            Self::Sample(config) => sample(model, request, config),
            Self::BestOfN(config) => best_of_n(model, request, config, Judge::Score),
            Self::Beam(config) => beam_search(model, request, config),
            Self::BestFirst(config) => best_first(model, request, config),
            Self::Lookahead(config) => lookahead(model, request, config, Leaf::Zero),
            Self::Mcts(config) => mcts(model, request, config, Leaf::Zero),
        }
    }
}

/// The flag of an argument or a setting.
fn flag(name: &str) -> String {
    format!("--{}", name.replace('_', "-"))
}
