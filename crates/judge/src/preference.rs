//! Preference rows from scored completions.

use std::collections::{HashMap, HashSet};

use mdp_core::bradley_terry;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::judge::{at_offset, check_band, check_sharpness, finite_rewards};
use crate::{JudgeError, Progress, Reward, SAME_REWARD, Sample, ScoredSample};

/// The samples with their rewards, in their order. `progress` is called after each batch.
///
/// # Errors
///
/// Those of the reward, and [`JudgeError::NotFinite`].
pub fn score(
    samples: &[Sample],
    reward: &(impl Reward + ?Sized),
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<ScoredSample>, JudgeError> {
    // Enough to keep an external command busy, few enough to show that it is alive.
    const BATCH: usize = 128;
    let mut scored = Vec::with_capacity(samples.len());
    for batch in samples.chunks(BATCH) {
        let rewards =
            finite_rewards(reward, batch).map_err(|error| at_offset(error, scored.len()))?;
        scored.extend(
            rewards
                .into_iter()
                .zip(batch)
                .map(|(reward, sample)| ScoredSample {
                    reward,
                    sample: sample.clone(),
                }),
        );
        progress(Progress {
            done: scored.len(),
            total: samples.len(),
        });
    }
    Ok(scored)
}

/// Which completions of a prompt are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pairing {
    /// The best with the worst, one pair a prompt; the earlier of equals.
    #[default]
    BestWorst,
    /// Each with each.
    AllPairs,
    /// The first with the second, the third with the fourth, and so on: independent pairs.
    Neighbours,
}

/// Which of two compared completions is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Labelling {
    /// The one with the higher reward.
    #[default]
    HigherReward,
    /// A draw: A is chosen over B with probability `σ(sharpness · (reward_a − reward_b))`, the
    /// Bradley-Terry model (equation 1 of <https://arxiv.org/abs/2404.12358>, scaled).
    ///
    /// A draw depends on the seed, the prompt and the two texts alone: other prompts, other pairs
    /// and their order change nothing.
    BradleyTerry {
        /// Nats per reward unit, above 0.
        sharpness: f64,
        /// Seed of the draws.
        seed: u64,
    },
}

/// How preference rows are made of scored completions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PreferenceOptions {
    /// Which completions are compared. Default: best and worst.
    pub pairing: Pairing,
    /// Which is chosen. Default: the one with the higher reward.
    pub labelling: Labelling,
    /// Two rewards that differ by at most this are a tie, and no row. Default: rounding alone.
    pub band: f64,
    /// Whether completions that were cut off (`"finished": false`) are used. Default: no, because
    /// whoever trains on the rows appends the end of the text, which was not there when the
    /// completion was rewarded.
    pub keep_unfinished: bool,
}

impl Default for PreferenceOptions {
    fn default() -> Self {
        Self {
            pairing: Pairing::default(),
            labelling: Labelling::default(),
            band: SAME_REWARD,
            keep_unfinished: false,
        }
    }
}

/// A row of a preference file, in TRL's standard format with extra columns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PreferenceRow {
    /// The conditioning text.
    pub prompt: String,
    /// The preferred completion.
    pub chosen: String,
    /// The other.
    pub rejected: String,
    /// The chosen completion's reward; under drawn labels it may be the lower one.
    pub chosen_reward: f64,
    /// The rejected completion's reward.
    pub rejected_reward: f64,
    /// The probability that a drawn label fell as it did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub p_chosen: Option<f64>,
}

/// What became rows, and what did not and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreferenceReport {
    /// Completions that came.
    pub n_samples: usize,
    /// Prompts that came.
    pub n_prompts: usize,
    /// Rows made.
    pub n_rows: usize,
    /// Completions dropped because they were cut off.
    pub n_unfinished: usize,
    /// Completions dropped because the prompt had the same text before.
    pub n_duplicates: usize,
    /// Prompts without a pair because fewer than two different completions were left.
    pub n_single: usize,
    /// Pairs dropped because their rewards differ by no more than the band.
    pub n_ties: usize,
    /// Prompts with pairs, all of which were ties.
    pub n_all_ties: usize,
    /// Rows whose drawn label chose the lower reward.
    pub n_flipped: usize,
}

/// Preference rows of scored completions, grouped by prompt in the order of their first sample.
///
/// Returns the rows and an account of what was dropped.
///
/// # Errors
///
/// [`JudgeError::Config`] for a band below zero or a sharpness of zero or less,
/// [`JudgeError::NotFinite`] for a reward, [`JudgeError::Metadata`] for a `finished` that is
/// neither true nor false.
///
/// # Examples
///
/// ```
/// use judge::{PreferenceOptions, Sample, ScoredSample, preferences};
///
/// let scored = [(" Hello!", 1.0), (" Hm.", -0.5), (" Hi!", 1.0)].map(|(text, reward)| {
///     ScoredSample { reward, sample: Sample::new("Greet me.", text) }
/// });
/// let (rows, report) = preferences(&scored, &PreferenceOptions::default())?;
/// assert_eq!((&*rows[0].chosen, &*rows[0].rejected), (" Hello!", " Hm."));
/// assert_eq!((report.n_rows, report.n_ties), (1, 0));
/// # Ok::<(), judge::JudgeError>(())
/// ```
pub fn preferences(
    scored: &[ScoredSample],
    options: &PreferenceOptions,
) -> Result<(Vec<PreferenceRow>, PreferenceReport), JudgeError> {
    check_band(options.band)?;
    if let Labelling::BradleyTerry { sharpness, .. } = options.labelling {
        check_sharpness(sharpness)?;
    }
    let mut report = PreferenceReport {
        n_samples: scored.len(),
        ..PreferenceReport::default()
    };
    let groups = grouped(scored, options, &mut report)?;
    let mut rows = Vec::new();
    for group in &groups {
        let pairs = paired(group, options.pairing);
        report.n_single += usize::from(pairs.is_empty());
        let mut n_ties = 0;
        for &(first, second) in &pairs {
            if (first.reward - second.reward).abs() <= options.band {
                n_ties += 1;
                continue;
            }
            let row = labelled(first, second, options.labelling);
            report.n_flipped += usize::from(row.chosen_reward < row.rejected_reward);
            rows.push(row);
        }
        report.n_ties += n_ties;
        report.n_all_ties += usize::from(n_ties > 0 && n_ties == pairs.len());
    }
    report.n_rows = rows.len();
    Ok((rows, report))
}

/// The different, usable completions of each prompt.
fn grouped<'a>(
    scored: &'a [ScoredSample],
    options: &PreferenceOptions,
    report: &mut PreferenceReport,
) -> Result<Vec<Vec<&'a ScoredSample>>, JudgeError> {
    let mut places = HashMap::new();
    let mut groups: Vec<Vec<&ScoredSample>> = Vec::new();
    let mut texts = HashSet::new();
    for (index, row) in scored.iter().enumerate() {
        if !row.reward.is_finite() {
            return Err(JudgeError::NotFinite {
                index,
                reward: row.reward,
            });
        }
        let place = *places.entry(&*row.sample.prompt).or_insert(groups.len());
        if place == groups.len() {
            groups.push(Vec::new());
        }
        if !options.keep_unfinished && !row.sample.finished(index)? {
            report.n_unfinished += 1;
        } else if !texts.insert((place, &*row.sample.completion)) {
            report.n_duplicates += 1;
        } else {
            groups[place].push(row);
        }
    }
    report.n_prompts = groups.len();
    Ok(groups)
}

type Pairs<'a> = Vec<(&'a ScoredSample, &'a ScoredSample)>;

fn paired<'a>(group: &[&'a ScoredSample], pairing: Pairing) -> Pairs<'a> {
    match pairing {
        Pairing::AllPairs => (0..group.len())
            .flat_map(|i| (i + 1..group.len()).map(move |j| (i, j)))
            .map(|(i, j)| (group[i], group[j]))
            .collect(),
        Pairing::Neighbours => group.chunks_exact(2).map(|two| (two[0], two[1])).collect(),
        Pairing::BestWorst => {
            if group.len() < 2 {
                return Vec::new();
            }
            let (mut best, mut worst) = (0, 0);
            for (place, row) in group.iter().enumerate() {
                if row.reward > group[best].reward {
                    best = place;
                }
                if row.reward < group[worst].reward {
                    worst = place;
                }
            }
            // Where all are equal, a pair of two different ones is a tie to be counted.
            if best == worst {
                worst = 1;
            }
            vec![(group[best], group[worst])]
        }
    }
}

fn labelled(first: &ScoredSample, second: &ScoredSample, labelling: Labelling) -> PreferenceRow {
    let (first_chosen, p_first) = match labelling {
        Labelling::HigherReward => (first.reward > second.reward, None),
        Labelling::BradleyTerry { sharpness, seed } => {
            let p = bradley_terry(sharpness * first.reward, sharpness * second.reward);
            (first_wins(&first.sample, &second.sample, p, seed), Some(p))
        }
    };
    let (chosen, rejected) = if first_chosen {
        (first, second)
    } else {
        (second, first)
    };
    PreferenceRow {
        prompt: chosen.sample.prompt.clone(),
        chosen: chosen.sample.completion.clone(),
        rejected: rejected.sample.completion.clone(),
        chosen_reward: chosen.reward,
        rejected_reward: rejected.reward,
        p_chosen: p_first.map(|p| if first_chosen { p } else { 1.0 - p }),
    }
}

/// A draw that is true with probability `p_first`, the same whichever of the two comes first.
fn first_wins(first: &Sample, second: &Sample, p_first: f64, seed: u64) -> bool {
    let (one, other) = (&first.completion, &second.completion);
    let in_order = one <= other;
    let (low, high) = if in_order { (one, other) } else { (other, one) };
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    for text in [&first.prompt, low, high] {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    let mut rng = ChaCha8Rng::from_seed(hash.finalize().into());
    let p_low = if in_order { p_first } else { 1.0 - p_first };
    (rng.random::<f64>() < p_low) == in_order
}

#[cfg(test)]
mod tests {
    use super::*;
    use mdp_core::sigmoid;

    fn scored(prompt: &str, completions: &[(&str, f64)]) -> Vec<ScoredSample> {
        let row = |(text, reward): &(&str, f64)| ScoredSample {
            reward: *reward,
            sample: Sample::new(prompt, *text),
        };
        completions.iter().map(row).collect()
    }

    fn texts(rows: &[PreferenceRow]) -> Vec<(&str, &str)> {
        rows.iter().map(|r| (&*r.chosen, &*r.rejected)).collect()
    }

    fn options(pairing: Pairing) -> PreferenceOptions {
        PreferenceOptions {
            pairing,
            ..PreferenceOptions::default()
        }
    }

    #[test]
    fn each_pairing_makes_the_pairs_it_says() {
        let four = scored("p", &[("a", 2.0), ("b", 0.0), ("c", 3.0), ("d", 1.0)]);
        let made = |pairing| preferences(&four, &options(pairing)).unwrap().0;
        assert_eq!(texts(&made(Pairing::BestWorst)), [("c", "b")]);
        assert_eq!(texts(&made(Pairing::Neighbours)), [("a", "b"), ("c", "d")]);
        let all = [
            ("a", "b"),
            ("c", "a"),
            ("a", "d"),
            ("c", "b"),
            ("d", "b"),
            ("c", "d"),
        ];
        assert_eq!(texts(&made(Pairing::AllPairs)), all);
    }

    #[test]
    fn whatever_makes_no_row_is_counted() {
        let mut rows = scored("p", &[("a", 1.0), ("b", 1.25), ("a", 7.0), ("c", 3.0)]);
        rows.extend(scored("alone", &[("a", 1.0)]));
        rows.extend(scored("equal", &[("a", 1.0), ("b", 1.0)]));
        rows.extend(scored("cut", &[("a", 1.0), ("b", 2.0)]));
        let last = rows.len() - 1;
        rows[last].sample = rows[last].sample.clone().with("finished", false);
        let mut options = options(Pairing::AllPairs);
        options.band = 0.25;
        let (made, report) = preferences(&rows, &options).unwrap();
        assert_eq!(texts(&made), [("c", "a"), ("c", "b")]);
        let expected = PreferenceReport {
            n_samples: 9,
            n_prompts: 4,
            n_rows: 2,
            n_unfinished: 1,
            n_duplicates: 1,
            n_single: 2,
            n_ties: 2,
            n_all_ties: 1,
            n_flipped: 0,
        };
        assert_eq!(report, expected);
        options.keep_unfinished = true;
        assert_eq!(preferences(&rows, &options).unwrap().1.n_rows, 3);
    }

    #[test]
    fn a_prompt_of_equals_is_one_tie_under_best_and_worst() {
        let equal = scored("p", &[("a", 1.0), ("b", 1.0), ("c", 1.0)]);
        let (rows, report) = preferences(&equal, &options(Pairing::BestWorst)).unwrap();
        assert!(rows.is_empty());
        assert_eq!(
            (report.n_ties, report.n_all_ties, report.n_single),
            (1, 1, 0)
        );
    }

    #[test]
    fn drawn_labels_follow_bradley_terry_and_their_seed() {
        let (difference, sharpness, n) = (0.5, 2.0, 4000);
        let rows: Vec<ScoredSample> = (0..n)
            .flat_map(|i| scored(&i.to_string(), &[("a", difference), ("b", 0.0)]))
            .collect();
        let mut options = options(Pairing::BestWorst);
        let mut made = |seed| {
            options.labelling = Labelling::BradleyTerry { sharpness, seed };
            preferences(&rows, &options).unwrap()
        };
        let (first, report) = made(1);
        let p = sigmoid(sharpness * difference);
        // Four standard deviations of a share.
        let deviation = 4.0 * (p * (1.0 - p) / f64::from(n)).sqrt();
        let share = 1.0 - report.n_flipped as f64 / f64::from(n);
        assert!((share - p).abs() < deviation, "{share} is not near {p}");
        for row in &first {
            let expected = if row.chosen == "a" { p } else { 1.0 - p };
            assert!((row.p_chosen.unwrap() - expected).abs() < 1e-12);
        }
        assert_eq!(made(1).0, first);
        assert_ne!(made(2).0, first);
    }

    #[test]
    fn a_drawn_label_does_not_depend_on_the_order_of_samples() {
        let labelling = Labelling::BradleyTerry {
            sharpness: 1.0,
            seed: 5,
        };
        let options = PreferenceOptions {
            labelling,
            ..options(Pairing::AllPairs)
        };
        let completions = [("a", 0.3), ("b", 0.1), ("c", 0.2), ("d", 0.0), ("e", 0.4)];
        let mut backwards = completions;
        backwards.reverse();
        let sorted = |completions: &[(&str, f64)]| {
            let (rows, _) = preferences(&scored("p", completions), &options).unwrap();
            let mut pairs: Vec<(String, String)> = rows
                .into_iter()
                .map(|row| (row.chosen, row.rejected))
                .collect();
            pairs.sort();
            pairs
        };
        assert_eq!(sorted(&completions), sorted(&backwards));
    }

    #[test]
    fn a_row_is_what_trl_reads() {
        let (rows, _) = preferences(
            &scored("p", &[("a", 1.0), ("b", 0.0)]),
            &PreferenceOptions::default(),
        )
        .unwrap();
        assert_eq!(
            serde_json::to_string(&rows[0]).unwrap(),
            r#"{"prompt":"p","chosen":"a","rejected":"b","chosen_reward":1.0,"rejected_reward":0.0}"#
        );
    }

    #[test]
    fn a_reward_that_is_no_number_is_refused() {
        let rows = scored("p", &[("a", 1.0), ("b", f64::NAN)]);
        let error = preferences(&rows, &PreferenceOptions::default()).unwrap_err();
        assert!(
            error.to_string().starts_with("sample 1: reward is NaN"),
            "{error}"
        );
    }
}
