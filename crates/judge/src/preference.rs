//! Preference rows from scored completions.

use std::collections::{HashMap, HashSet};

use mdp_core::bradley_terry;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::judge::{at_offset, check_band, check_sharpness, finite_rewards};
use crate::statistics::mean;
use crate::{
    Comparison, Judge, JudgeError, Judgement, Progress, Reward, SAME_REWARD, Sample, ScoredSample,
    Verdict,
};

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

impl PreferenceOptions {
    /// Checks the settings, and the samples as far as they are read for rows, before a judge is asked.
    ///
    /// # Errors
    ///
    /// [`JudgeError::Config`] for a band below zero or a sharpness of zero or less,
    /// [`JudgeError::Metadata`] for a `finished` that is neither true nor false.
    pub fn check<'a>(
        &self,
        samples: impl IntoIterator<Item = &'a Sample>,
    ) -> Result<(), JudgeError> {
        check_band(self.band)?;
        if let Labelling::BradleyTerry { sharpness, .. } = self.labelling {
            check_sharpness(sharpness)?;
        }
        if !self.keep_unfinished {
            for (place, sample) in samples.into_iter().enumerate() {
                sample.finished(place)?;
            }
        }
        Ok(())
    }
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
    /// The chosen completion's reward, or its credit under a judge; under drawn labels it may be
    /// the lower one.
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
    /// Comparisons that a judge answered without a verdict.
    pub n_unparsed: usize,
    /// Comparisons that a judge could not be asked about or did not answer. Running again may mend
    /// these.
    pub n_errors: usize,
    /// Prompts left out because of such comparisons, where the best and the worst were sought.
    pub n_incomplete: usize,
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
    options.check(scored.iter().map(|row| &row.sample))?;
    if let Some(index) = scored.iter().position(|row| !row.reward.is_finite()) {
        let reward = scored[index].reward;
        return Err(JudgeError::NotFinite { index, reward });
    }
    let samples = scored.iter().map(|row| &row.sample);
    let (groups, mut report) = grouped(samples, options.keep_unfinished)?;
    let mut rows = Vec::new();
    for group in groups {
        let group: Vec<Contender<'_>> = group
            .into_iter()
            .map(|place| Contender {
                sample: &scored[place].sample,
                reward: scored[place].reward,
            })
            .collect();
        label(&group, options, &mut rows, &mut report);
    }
    report.n_rows = rows.len();
    Ok((rows, report))
}

/// Preference rows of completions that a judge compares two by two.
///
/// Under [`Pairing::AllPairs`] and [`Pairing::Neighbours`] the judge's verdict on a pair is its
/// label, and the rewards of its row are the credits, 1 and 0 from a judge that gives no
/// probabilities; a tie is no row. Under [`Pairing::BestWorst`] each completion meets each other
/// one of its prompt, and its reward is its mean credit over the verdicts; a prompt with a
/// comparison that failed is left out, so that no row depends on which request was lost.
///
/// A reward needs no judge: [`score`] the samples and use [`preferences`], with fewer questions.
///
/// Returns the rows and an account of what was dropped.
///
/// # Errors
///
/// Those of the judge, and those of [`preferences`]; [`JudgeError::Config`] also for drawn labels,
/// since the judge has given them already.
pub fn judged_preferences(
    samples: &[Sample],
    judge: &(impl Judge + ?Sized),
    options: &PreferenceOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Vec<PreferenceRow>, PreferenceReport), JudgeError> {
    check_band(options.band)?;
    if options.labelling != Labelling::HigherReward {
        return Err(JudgeError::Config {
            field: "labelling",
            expected: "higher_reward where a judge compares",
            value: "bradley_terry".into(),
        });
    }
    let (groups, mut report) = grouped(samples.iter(), options.keep_unfinished)?;
    let meetings = match options.pairing {
        Pairing::Neighbours => Pairing::Neighbours,
        Pairing::AllPairs | Pairing::BestWorst => Pairing::AllPairs,
    };
    let pairs: Vec<Vec<(usize, usize)>> = groups
        .iter()
        .map(|group| paired(&vec![0.0; group.len()], meetings))
        .collect();
    let comparisons: Vec<Comparison> = groups
        .iter()
        .zip(&pairs)
        .flat_map(|(group, pairs)| {
            pairs.iter().map(|&(i, j)| Comparison {
                a: samples[group[i]].clone(),
                b: samples[group[j]].clone(),
            })
        })
        .collect();
    let judgements = judge.judge(&comparisons, progress)?;
    if judgements.len() != comparisons.len() {
        return Err(JudgeError::Count {
            judge: judge.identity(),
            expected: comparisons.len(),
            got: judgements.len(),
        });
    }
    let mut left = judgements.as_slice();
    let mut rows = Vec::new();
    for (group, pairs) in groups.iter().zip(&pairs) {
        let (judged, rest) = left.split_at(pairs.len());
        left = rest;
        let is_error = |judgement: &&Judgement| matches!(judgement, Judgement::Failed { .. });
        let is_unparsed = |judgement: &&Judgement| matches!(judgement, Judgement::Unparsed { .. });
        let n_errors = judged.iter().filter(is_error).count();
        report.n_errors += n_errors;
        report.n_unparsed += judged.iter().filter(is_unparsed).count();
        if options.pairing == Pairing::BestWorst {
            if n_errors > 0 {
                report.n_incomplete += 1;
                continue;
            }
            let group = tournament(group, pairs, judged, samples);
            label(&group, options, &mut rows, &mut report);
            continue;
        }
        report.n_single += usize::from(pairs.is_empty());
        let mut n_ties = 0;
        for (&(i, j), judgement) in pairs.iter().zip(judged) {
            let Judgement::Decided(decision) = judgement else {
                continue;
            };
            let side = |place: usize, reward| Contender {
                sample: &samples[group[place]],
                reward,
            };
            let (a, b) = (side(i, decision.credit), side(j, 1.0 - decision.credit));
            match decision.verdict {
                Verdict::A => rows.push(row(a, b, None)),
                Verdict::B => rows.push(row(b, a, None)),
                Verdict::Tie => n_ties += 1,
            }
        }
        report.n_ties += n_ties;
        report.n_all_ties += usize::from(n_ties > 0 && n_ties == pairs.len());
    }
    report.n_rows = rows.len();
    Ok((rows, report))
}

/// A completion and what it is worth.
#[derive(Clone, Copy)]
struct Contender<'a> {
    sample: &'a Sample,
    reward: f64,
}

/// Each completion's mean credit over the verdicts on it. One without any verdict has no place in
/// the comparison and is left out.
fn tournament<'a>(
    group: &[usize],
    pairs: &[(usize, usize)],
    judged: &[Judgement],
    samples: &'a [Sample],
) -> Vec<Contender<'a>> {
    let mut credits = vec![Vec::new(); group.len()];
    for (&(i, j), judgement) in pairs.iter().zip(judged) {
        if let Judgement::Decided(decision) = judgement {
            credits[i].push(decision.credit);
            credits[j].push(1.0 - decision.credit);
        }
    }
    group
        .iter()
        .zip(credits)
        .filter(|(_, credits)| !credits.is_empty())
        .map(|(&place, credits)| Contender {
            sample: &samples[place],
            reward: mean(&credits),
        })
        .collect()
}

/// Makes the rows of one prompt's completions.
fn label(
    group: &[Contender<'_>],
    options: &PreferenceOptions,
    rows: &mut Vec<PreferenceRow>,
    report: &mut PreferenceReport,
) {
    let rewards: Vec<f64> = group.iter().map(|contender| contender.reward).collect();
    let pairs = paired(&rewards, options.pairing);
    report.n_single += usize::from(pairs.is_empty());
    let mut n_ties = 0;
    for &(i, j) in &pairs {
        if (rewards[i] - rewards[j]).abs() <= options.band {
            n_ties += 1;
            continue;
        }
        let row = labelled(group[i], group[j], options.labelling);
        report.n_flipped += usize::from(row.chosen_reward < row.rejected_reward);
        rows.push(row);
    }
    report.n_ties += n_ties;
    report.n_all_ties += usize::from(n_ties > 0 && n_ties == pairs.len());
}

/// The places of the different, usable completions of each prompt, and what was dropped so far.
fn grouped<'a>(
    samples: impl Iterator<Item = &'a Sample>,
    keep_unfinished: bool,
) -> Result<(Vec<Vec<usize>>, PreferenceReport), JudgeError> {
    let mut report = PreferenceReport::default();
    let mut prompts = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut texts = HashSet::new();
    for (place, sample) in samples.enumerate() {
        report.n_samples += 1;
        let group = *prompts.entry(&*sample.prompt).or_insert(groups.len());
        if group == groups.len() {
            groups.push(Vec::new());
        }
        if !keep_unfinished && !sample.finished(place)? {
            report.n_unfinished += 1;
        } else if !texts.insert((group, &*sample.completion)) {
            report.n_duplicates += 1;
        } else {
            groups[group].push(place);
        }
    }
    report.n_prompts = groups.len();
    Ok((groups, report))
}

/// The pairs of completions with these rewards that are compared, by their places.
fn paired(rewards: &[f64], pairing: Pairing) -> Vec<(usize, usize)> {
    let n = rewards.len();
    match pairing {
        Pairing::AllPairs => (0..n)
            .flat_map(|i| (i + 1..n).map(move |j| (i, j)))
            .collect(),
        Pairing::Neighbours => (0..n / 2).map(|i| (2 * i, 2 * i + 1)).collect(),
        Pairing::BestWorst if n < 2 => Vec::new(),
        Pairing::BestWorst => {
            let (mut best, mut worst) = (0, 0);
            for (place, reward) in rewards.iter().enumerate() {
                if *reward > rewards[best] {
                    best = place;
                }
                if *reward < rewards[worst] {
                    worst = place;
                }
            }
            // Where all are equal, a pair of two different ones is a tie to be counted.
            if best == worst {
                worst = 1;
            }
            vec![(best, worst)]
        }
    }
}

fn labelled(first: Contender<'_>, second: Contender<'_>, labelling: Labelling) -> PreferenceRow {
    match labelling {
        Labelling::HigherReward if first.reward > second.reward => row(first, second, None),
        Labelling::HigherReward => row(second, first, None),
        Labelling::BradleyTerry { sharpness, seed } => {
            let p = bradley_terry(sharpness * first.reward, sharpness * second.reward);
            if first_wins(first.sample, second.sample, p, seed) {
                row(first, second, Some(p))
            } else {
                row(second, first, Some(1.0 - p))
            }
        }
    }
}

fn row(chosen: Contender<'_>, rejected: Contender<'_>, p_chosen: Option<f64>) -> PreferenceRow {
    PreferenceRow {
        prompt: chosen.sample.prompt.clone(),
        chosen: chosen.sample.completion.clone(),
        rejected: rejected.sample.completion.clone(),
        chosen_reward: chosen.reward,
        rejected_reward: rejected.reward,
        p_chosen,
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
            ..PreferenceReport::default()
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

    /// Prefers the text that comes later in the alphabet; vowels are as good as each other, it has
    /// no words for "x", and "z" is a text that it cannot be asked about.
    struct Alphabet;

    impl Judge for Alphabet {
        fn identity(&self) -> String {
            "alphabet".into()
        }

        fn judge(
            &self,
            pairs: &[Comparison],
            _: &mut dyn FnMut(Progress),
        ) -> Result<Vec<Judgement>, JudgeError> {
            let judged = pairs.iter().map(|pair| {
                let (a, b) = (&*pair.a.completion, &*pair.b.completion);
                let either = |text| a == text || b == text;
                if either("z") {
                    let reason = "no".into();
                    return Judgement::Failed { reason };
                }
                if either("x") {
                    let reply = "hm".into();
                    return Judgement::Unparsed { reply };
                }
                let verdict = match () {
                    () if "aeiou".contains(a) && "aeiou".contains(b) => Verdict::Tie,
                    () if a > b => Verdict::A,
                    () => Verdict::B,
                };
                Judgement::Decided(crate::Decision {
                    verdict,
                    credit: verdict.credit(),
                    rewards: None,
                    orders: None,
                })
            });
            Ok(judged.collect())
        }
    }

    fn judged(texts: &[&str], pairing: Pairing) -> (Vec<PreferenceRow>, PreferenceReport) {
        let samples: Vec<Sample> = texts.iter().map(|text| Sample::new("p", *text)).collect();
        judged_preferences(&samples, &Alphabet, &options(pairing), &mut |_| ()).unwrap()
    }

    #[test]
    fn a_judge_labels_pairs_by_its_verdicts() {
        let (rows, report) = judged(&["b", "c", "a", "e", "b"], Pairing::AllPairs);
        let all = [("c", "b"), ("b", "a"), ("e", "b"), ("c", "a"), ("e", "c")];
        assert_eq!(texts(&rows), all);
        assert_eq!((report.n_ties, report.n_duplicates), (1, 1));
        let (rows, _) = judged(&["b", "c", "f", "d"], Pairing::Neighbours);
        assert_eq!(texts(&rows), [("c", "b"), ("f", "d")]);
        assert_eq!((rows[0].chosen_reward, rows[0].rejected_reward), (1.0, 0.0));
    }

    #[test]
    fn the_best_and_the_worst_are_found_by_a_tournament() {
        // Two wins and a tie against three defeats.
        let (rows, _) = judged(&["d", "i", "b", "e"], Pairing::BestWorst);
        assert_eq!(texts(&rows), [("i", "b")]);
        assert!((rows[0].chosen_reward - 2.5 / 3.0).abs() < 1e-12);
        assert!(rows[0].rejected_reward.abs() < 1e-12);
        let (rows, report) = judged(&["a", "e", "i"], Pairing::BestWorst);
        assert!(rows.is_empty());
        assert_eq!((report.n_ties, report.n_all_ties), (1, 1));
    }

    #[test]
    fn what_a_judge_left_open_is_counted_and_makes_no_row() {
        let (rows, report) = judged(&["b", "x", "c"], Pairing::AllPairs);
        assert_eq!((texts(&rows), report.n_unparsed), (vec![("c", "b")], 2));
        let (rows, report) = judged(&["b", "x", "c"], Pairing::BestWorst);
        assert_eq!((texts(&rows), report.n_unparsed), (vec![("c", "b")], 2));
        let (rows, report) = judged(&["b", "z", "c"], Pairing::AllPairs);
        assert_eq!((texts(&rows), report.n_errors), (vec![("c", "b")], 2));
        let (rows, report) = judged(&["b", "z", "c"], Pairing::BestWorst);
        assert!(rows.is_empty());
        assert_eq!((report.n_errors, report.n_incomplete), (2, 1));
    }

    #[test]
    fn a_judge_and_drawn_labels_exclude_each_other() {
        let labelling = Labelling::BradleyTerry {
            sharpness: 1.0,
            seed: 0,
        };
        let options = PreferenceOptions {
            labelling,
            ..PreferenceOptions::default()
        };
        let error = judged_preferences(&[], &Alphabet, &options, &mut |_| ()).unwrap_err();
        assert!(
            error.to_string().starts_with("labelling must be"),
            "{error}"
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
