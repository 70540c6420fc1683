//! The ways of decoding that are compared, and what each makes of one prompt.

use lm::PrefixCache;
use memo_task::{Memo, MemoTask};
use search::{
    Backup, BeamConfig, BestFirstConfig, Budget, Completion, End, Leaf, MctsConfig, PrefixModel,
    Request, SampleConfig, Score, SearchError, SearchOutput, beam_search, best_first, greedy, mcts,
    sample,
};

/// What a beam ranks its prefixes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ranking {
    /// `Σ log π`.
    Likelihood,
    /// The same over the length: transformers' default.
    LikelihoodByLength,
    /// `Σ log(π/π_ref)`, any token.
    LogRatio,
    /// The same over the length.
    LogRatioByLength,
    /// `Σ log(π/π_ref)` among the likeliest few tokens of each state.
    LogRatioTop,
}

/// Tokens of a state that [`Ranking::LogRatioTop`] looks at.
pub(super) const TOP: usize = 5;

impl Ranking {
    pub(super) const ALL: [Self; 5] = [
        Self::Likelihood,
        Self::LikelihoodByLength,
        Self::LogRatio,
        Self::LogRatioByLength,
        Self::LogRatioTop,
    ];

    pub(super) fn name(self) -> String {
        match self {
            Self::Likelihood => "likelihood".into(),
            Self::LikelihoodByLength => "likelihood over length".into(),
            Self::LogRatio => "log-ratio".into(),
            Self::LogRatioByLength => "log-ratio over length".into(),
            Self::LogRatioTop => format!("log-ratio, top {TOP}"),
        }
    }

    fn length_penalty(self) -> f64 {
        match self {
            Self::LikelihoodByLength | Self::LogRatioByLength => 1.0,
            Self::Likelihood | Self::LogRatio | Self::LogRatioTop => 0.0,
        }
    }

    fn needs_reference(self) -> bool {
        !matches!(self, Self::Likelihood | Self::LikelihoodByLength)
    }
}

/// Who says which draw is best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chooser {
    Likelihood,
    ImplicitReward,
    TrueReward,
}

impl Chooser {
    pub(super) const ALL: [Self; 3] = [Self::Likelihood, Self::ImplicitReward, Self::TrueReward];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Likelihood => "likelihood",
            Self::ImplicitReward => "implicit reward",
            Self::TrueReward => "true reward",
        }
    }
}

/// One way of decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Sample,
    Greedy,
    Beam(usize, Ranking),
    BestOf(usize, Chooser),
    Mcts(Backup),
    /// The likeliest completion by best-first search, or the likeliest that any method found.
    Map,
}

impl Method {
    /// All of them, `Map` last.
    pub(super) fn all(widths: &[usize]) -> Vec<Self> {
        let mut all = vec![Self::Sample, Self::Greedy];
        for ranking in Ranking::ALL {
            all.extend(widths.iter().map(|&width| Self::Beam(width, ranking)));
        }
        for chooser in Chooser::ALL {
            all.extend(widths.iter().map(|&n| Self::BestOf(n, chooser)));
        }
        all.extend([Backup::Max, Backup::Soft, Backup::Mean].map(Self::Mcts));
        all.push(Self::Map);
        all
    }

    pub(super) fn name(self) -> String {
        match self {
            Self::Sample => "sample".into(),
            Self::Greedy => "greedy".into(),
            Self::Beam(width, ranking) => format!("{width} beams, {}", ranking.name()),
            Self::BestOf(n, chooser) => format!("best of {n}, {}", chooser.name()),
            Self::Mcts(Backup::Max) => "MCTS, max backup".into(),
            Self::Mcts(Backup::Soft) => "MCTS, soft backup".into(),
            Self::Mcts(Backup::Mean) => "MCTS, mean backup".into(),
            Self::Map => "MAP".into(),
        }
    }
}

/// What a method made of a prompt.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub ids: Vec<u32>,
    /// `Σ log π` by the search, nats.
    logp: f64,
    /// Whether it was cut at the most tokens allowed.
    pub cut: bool,
    /// Tokens through the policy.
    pub states: usize,
    /// Whether it is proven to be the likeliest of all.
    pub certified: bool,
}

impl Found {
    fn of(completion: &Completion, states: usize) -> Self {
        Self {
            ids: completion.tokens.clone(),
            logp: completion.logp,
            cut: completion.end != End::Eos,
            states,
            certified: false,
        }
    }

    fn best(output: &SearchOutput) -> Option<Self> {
        let best = output.best()?;
        Some(Self::of(best, output.stats.states_expanded))
    }
}

/// A policy alone, and the same beside its reference.
pub(super) struct Caches<'a> {
    pub alone: PrefixCache<'a>,
    pub beside: PrefixCache<'a>,
}

/// What all prompts are decoded with.
#[derive(Clone, Copy)]
pub(super) struct Limits<'a> {
    pub widths: &'a [usize],
    pub max_new_tokens: usize,
    /// States that best-first search expands at the most.
    pub map_states: usize,
    /// Simulations of the tree search, for each token.
    pub simulations: usize,
}

/// What every method of [`Method::all`] makes of a prompt, in their order.
pub(super) fn decode(
    caches: &mut Caches<'_>,
    limits: Limits<'_>,
    task: &MemoTask,
    (memo, prompt): (&Memo, &[u32]),
    seed: u64,
) -> Result<Vec<Found>, SearchError> {
    let request = Request::new(prompt, [task.eos_id()], limits.max_new_tokens);
    let drawn = SampleConfig {
        n: limits.widths.iter().copied().max().unwrap_or(1),
        seed,
        ..SampleConfig::default()
    };
    let drawn = sample(&mut caches.beside, &request, &drawn)?.completions;
    let truth: Vec<f64> = drawn
        .iter()
        .map(|completion| {
            let rewards = task.token_rewards(memo, &completion.tokens);
            rewards.iter().map(|token| token.reward).sum()
        })
        .collect();
    let mut all: Vec<Found> = Vec::new();
    for method in Method::all(limits.widths) {
        let found = match method {
            Method::Sample => drawn.first().map(|c| Found::of(c, c.tokens.len())),
            Method::Greedy => Found::best(&greedy(&mut caches.alone, &request)?),
            Method::Beam(width, ranking) => {
                let config = BeamConfig {
                    width,
                    length_penalty: ranking.length_penalty(),
                    ..BeamConfig::default()
                };
                let by_ratio = ranking.needs_reference();
                let request = Request {
                    score: if by_ratio {
                        Score::LogRatio
                    } else {
                        Score::Likelihood
                    },
                    top_k: (ranking == Ranking::LogRatioTop).then_some(TOP),
                    ..request.clone()
                };
                let model: &mut dyn PrefixModel = if by_ratio {
                    &mut caches.beside
                } else {
                    &mut caches.alone
                };
                Found::best(&beam_search(model, &request, &config)?)
            }
            Method::BestOf(n, chooser) => {
                let drawn = &drawn[..n.min(drawn.len())];
                let value = |(index, completion): &(usize, &Completion)| match chooser {
                    Chooser::Likelihood => completion.logp,
                    Chooser::ImplicitReward => completion.implicit_reward.unwrap_or(0.0),
                    Chooser::TrueReward => truth[*index],
                };
                let best = drawn
                    .iter()
                    .enumerate()
                    .max_by(|a, b| value(a).total_cmp(&value(b)));
                let states = drawn.iter().map(|completion| completion.tokens.len()).sum();
                best.map(|(_, completion)| Found::of(completion, states))
            }
            Method::Mcts(backup) => {
                let config = MctsConfig {
                    simulations: limits.simulations,
                    backup,
                    ..MctsConfig::default()
                };
                Found::best(&mcts(&mut caches.alone, &request, &config, Leaf::Zero)?)
            }
            Method::Map => Some(map(caches, limits, &request, &all)?),
        };
        all.push(found.expect("a search that nothing stops finds a completion"));
    }
    Ok(all)
}

/// The likeliest completion: of all, if it is certified, or of those found.
fn map(
    caches: &mut Caches<'_>,
    limits: Limits<'_>,
    request: &Request<'_>,
    found: &[Found],
) -> Result<Found, SearchError> {
    /// States of a call: more cost states that one by one would not be needed.
    const BATCH: usize = 8;
    let request = Request {
        budget: Budget {
            tokens: Some(limits.map_states),
            ..Budget::default()
        },
        ..request.clone()
    };
    let config = BestFirstConfig {
        batch: BATCH,
        ..BestFirstConfig::default()
    };
    let output = best_first(&mut caches.alone, &request, &config)?;
    let states = output.stats.states_expanded;
    if let (true, Some(best)) = (output.is_optimal(), Found::best(&output)) {
        return Ok(Found {
            certified: true,
            ..best
        });
    }
    let whole = output
        .completions
        .iter()
        .filter(|c| c.end != End::Unfinished);
    let best = whole
        .map(|completion| Found::of(completion, states))
        .chain(found.iter().cloned())
        .max_by(|a, b| a.logp.total_cmp(&b.logp))
        .expect("the methods before it found something");
    Ok(Found { states, ..best })
}
