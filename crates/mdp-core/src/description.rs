//! A process from a small TOML file.

use std::fs;
use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;

use crate::tabular::{check_finite, check_support};
use crate::{MdpError, RewardPlacement, TabularMdp, TabularPolicy, Tree};

/// The file as written; [`TabularMdp::from_str`] documents the keys.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    vocab: usize,
    horizon: usize,
    eos: u32,
    #[serde(default)]
    prompt: Vec<u32>,
    seed: Option<u64>,
    placement: Option<RewardPlacement>,
    reference: Option<Vec<f64>>,
    #[serde(default)]
    state: Vec<State>,
    #[serde(default)]
    completion: Vec<Completion>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    tokens: Vec<u32>,
    reference: Option<Vec<f64>>,
    environment: Option<Vec<f64>>,
    rewards: Option<Vec<f64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Completion {
    tokens: Vec<u32>,
    reward: f64,
}

impl FromStr for TabularMdp {
    type Err = MdpError;

    /// Reads a process from TOML.
    ///
    /// `vocab`, `horizon` and `eos` are required. `prompt` is empty, the reference uniform and every
    /// reward 0 unless the file says otherwise: `reference` is a row for all states; `seed` with
    /// `placement` (`"dense"` or `"terminal-only"`) draws both as [`TabularMdp::seeded`] does; a
    /// `[[state]]` gives the rows of one state; a `[[completion]]` sets the reward of a last token.
    ///
    /// # Errors
    ///
    /// [`MdpError::Toml`] with line and column, or what the constructors say, with the state.
    ///
    /// # Examples
    ///
    /// ```
    /// use mdp_core::TabularMdp;
    ///
    /// let mdp: TabularMdp = r#"
    ///     vocab = 3
    ///     horizon = 2
    ///     eos = 2
    ///     reference = [0.5, 0.25, 0.25]
    ///
    ///     [[state]]
    ///     tokens = [0]
    ///     environment = [0.1, 0.1, 0.8]
    ///     rewards = [0.0, 0.0, 1.0]
    ///
    ///     [[completion]]
    ///     tokens = [1, 2]
    ///     reward = -1.5
    /// "#
    /// .parse()?;
    /// assert!(mdp.is_environment(1));
    /// assert_eq!(mdp.rewards(), [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, -1.5]);
    /// # Ok::<(), mdp_core::MdpError>(())
    /// ```
    fn from_str(text: &str) -> Result<Self, MdpError> {
        let description: Description = toml::from_str(text).map_err(|error| MdpError::Toml {
            message: error.to_string(),
        })?;
        description.build()
    }
}

impl TabularMdp {
    /// Reads a process from a TOML file; its keys are those of [`TabularMdp::from_str`].
    ///
    /// # Errors
    ///
    /// [`MdpError::Read`] naming the file, with everything that its content can get wrong.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, MdpError> {
        let path = path.as_ref();
        let named = |message: String| MdpError::Read {
            path: path.to_owned(),
            message,
        };
        let text = fs::read_to_string(path).map_err(|error| named(error.to_string()))?;
        text.parse()
            .map_err(|error: MdpError| named(error.to_string()))
    }
}

impl Description {
    fn build(self) -> Result<TabularMdp, MdpError> {
        let tree = Tree::new(self.vocab, self.horizon, self.eos)?.with_prompt(self.prompt);
        let (mut reference, mut rewards) = match (self.seed, self.placement) {
            (Some(seed), placement) => {
                let placement = placement.unwrap_or(RewardPlacement::Dense);
                let mdp = TabularMdp::seeded(tree.clone(), placement, seed)?;
                (mdp.reference().logps().to_vec(), mdp.rewards().to_vec())
            }
            (None, Some(_)) => {
                return Err(MdpError::Toml {
                    message: "placement says where random rewards go, so it needs a seed".into(),
                });
            }
            (None, None) => (
                TabularPolicy::uniform(tree.clone()).logps().to_vec(),
                vec![0.0; tree.n_pairs()],
            ),
        };
        if let Some(row) = &self.reference {
            check_support("reference", &[], row, tree.vocab())?;
            for state in reference.chunks_exact_mut(tree.vocab()) {
                write_logps(state, row);
            }
        }
        let mut environment = vec![None; tree.n_states()];
        let mut said = vec![false; tree.n_states()];
        for state in self.state {
            let crate::Node::State(at) = tree.find(&state.tokens)? else {
                return Err(MdpError::Terminal {
                    state: state.tokens,
                });
            };
            if std::mem::replace(&mut said[at], true) {
                let tokens = state.tokens;
                return Err(MdpError::Toml {
                    message: format!("two [[state]] have the tokens {tokens:?}; expected one"),
                });
            }
            if state.reference.is_some() && state.environment.is_some() {
                let tokens = state.tokens;
                return Err(MdpError::Toml {
                    message: format!(
                        "the [[state]] of the tokens {tokens:?} has a reference and an environment; \
                         there the environment chooses, so expected one of the two"
                    ),
                });
            }
            if let Some(row) = &state.reference {
                check_support("reference", &state.tokens, row, tree.vocab())?;
                write_logps(&mut reference[tree.row(at)], row);
            }
            if let Some(row) = state.rewards {
                if row.len() != tree.vocab() {
                    return Err(MdpError::TableLength {
                        table: "rewards of a state",
                        expected: tree.vocab(),
                        got: row.len(),
                    });
                }
                rewards[tree.row(at)].copy_from_slice(&row);
            }
            environment[at] = state.environment;
        }
        for completion in self.completion {
            let last = tree.completion(&completion.tokens)?;
            rewards[last] = completion.reward;
        }
        check_finite("reward", &tree, &rewards)?;
        let mdp = TabularMdp::new(TabularPolicy::from_logps(tree.clone(), reference)?, rewards)?;
        if environment.iter().all(Option::is_none) {
            return Ok(mdp);
        }
        let mut rows = environment.into_iter();
        mdp.with_environment(|_| rows.next().flatten())
    }
}

fn write_logps(logps: &mut [f64], probs: &[f64]) {
    for (logp, p) in logps.iter_mut().zip(probs) {
        *logp = p.ln();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        text.parse::<TabularMdp>().unwrap_err().to_string()
    }

    #[test]
    fn a_seed_gives_the_process_that_code_gives() {
        let text = "vocab = 3\nhorizon = 3\neos = 0\nseed = 5\nplacement = \"terminal-only\"";
        let file: TabularMdp = text.parse().unwrap();
        let tree = Tree::new(3, 3, 0).unwrap();
        let code = TabularMdp::seeded(tree, RewardPlacement::TerminalOnly, 5).unwrap();
        assert_eq!(file.rewards(), code.rewards());
        assert_eq!(file.reference().logps(), code.reference().logps());
    }

    #[test]
    fn each_kind_of_bad_input_is_named_with_its_place_and_number() {
        let head = "vocab = 3\nhorizon = 2\neos = 2\n";
        let twice = "[[state]]\ntokens = [0]\n[[state]]\ntokens = [0]\n";
        assert!(error(&format!("{head}{twice}")).contains("two [[state]] have the tokens [0]"));
        let both = "[[state]]\ntokens = [0]\nreference = [1, 0, 0]\nenvironment = [0, 0, 1]\n";
        assert!(error(&format!("{head}{both}")).contains("expected one of the two"));
        assert!(error("vocab = 3\nhorizon = 0\neos = 2").contains("horizon is 0"));
        assert!(error("vocab = 3\nhorizon = 2\neos = 3").contains("eos is token 3"));
        assert!(error("vocab = 200\nhorizon = 20\neos = 3").contains("allowed are"));
        let row =
            |key: &str, row: &str| error(&format!("{head}[[state]]\ntokens = [1]\n{key} = {row}"));
        assert!(row("reference", "[0.5, 0.0, 0.5]").contains("[1] gives token 1 probability 0"));
        assert!(row("reference", "[0.5, 0.2, 0.5]").contains("[1] sums to 1.2"));
        assert!(row("environment", "[0.5, 0.2, 0.5]").contains("[1] sums to 1.2"));
        assert!(row("rewards", "[0.5, nan, 0.5]").contains("state [1], token 1, is NaN"));
        assert!(row("rewards", "[0.5]").contains("1 entries, expected 3"));
        let ending = format!("{head}[[state]]\ntokens = [2]");
        assert!(error(&ending).contains("terminal"));
        let unfinished = format!("{head}[[completion]]\ntokens = [0]\nreward = 1.0");
        assert!(error(&unfinished).contains("not complete"));
        assert!(error(&format!("{head}gamma = 0.9")).contains("gamma"));
        assert!(error(&format!("{head}placement = \"dense\"")).contains("seed"));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let message = TabularMdp::from_file("no/such/process.toml")
            .unwrap_err()
            .to_string();
        assert!(message.contains("no/such/process.toml"), "{message}");
    }
}
