//! Worked solutions of problems: their steps, and which step is the first wrong one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use lm::data::{Content, DataError, read_preferences};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::TrainError;

/// Results of two solutions are one number if they differ by no more than this share of it: they
/// were printed with a few digits.
const SAME_RESULT: f64 = 1e-6;

/// A right and a wrong solution of one problem.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Solutions {
    /// Which problem, by its place among those of the file.
    pub problem: usize,
    pub question: String,
    pub right: String,
    pub wrong: String,
    /// The first step of `wrong` whose result no right solution of the problem in the file comes
    /// to, from 0; none where there is no such step, or no other.
    pub first_error: Option<usize>,
}

/// Reads preferences in text: a prompt that is a question, a right solution that was chosen, a wrong
/// one that was rejected.
pub(super) fn read(path: &Path) -> Result<Vec<Solutions>, TrainError> {
    let mut all = Vec::new();
    let mut problems: BTreeMap<String, usize> = BTreeMap::new();
    for row in read_preferences(path)? {
        let row = row?;
        let text = |column: &str, content: Content| match content {
            Content::Text(text) => Ok(text),
            Content::Chat(_) => Err(DataError::WrongType {
                location: row.location.clone(),
                column: column.into(),
                expected: "a string, the question or the steps of its solution".into(),
                found: "a list of messages".into(),
            }),
        };
        let question = text("prompt", row.prompt)?;
        let next = problems.len();
        all.push(Solutions {
            problem: *problems.entry(question.clone()).or_insert(next),
            question,
            right: text("chosen", row.chosen)?,
            wrong: text("rejected", row.rejected)?,
            first_error: None,
        });
    }
    let mut known: Vec<Vec<f64>> = vec![Vec::new(); problems.len()];
    for pair in &all {
        known[pair.problem].extend(pair.right.lines().flat_map(results));
    }
    for pair in &mut all {
        pair.first_error = first_error(&pair.wrong, &known[pair.problem]);
    }
    Ok(all)
}

/// Pairs of some problems to train on, and pairs of others whose first error is known.
pub(super) fn split(
    all: &[Solutions],
    (n_train, n_held_out): (usize, usize),
    seed: u64,
) -> (Vec<&Solutions>, Vec<&Solutions>) {
    let n_problems = all.iter().map(|pair| pair.problem + 1).max().unwrap_or(0);
    let mut order: Vec<usize> = (0..n_problems).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let mut of_problem: Vec<Vec<&Solutions>> = vec![Vec::new(); n_problems];
    for pair in all {
        of_problem[pair.problem].push(pair);
    }
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    for problem in order {
        let pairs = of_problem[problem].iter().copied();
        if held_out.len() < n_held_out {
            held_out.extend(pairs.filter(|pair| pair.first_error.is_some()));
        } else {
            train.extend(pairs);
        }
    }
    train.truncate(n_train);
    held_out.truncate(n_held_out);
    (train, held_out)
}

/// The first of several steps with a result that is none of the `right` ones.
fn first_error(wrong: &str, right: &[f64]) -> Option<usize> {
    let steps = steps(wrong);
    let is_right = |result: f64| {
        let mut right = right.iter();
        right.any(|&right| (result - right).abs() <= SAME_RESULT * right.abs().max(1.0))
    };
    let mut errs = steps
        .iter()
        .map(|step| !results(&wrong[step.clone()]).all(is_right));
    let first = errs.position(|errs| errs)?;
    (steps.len() > 1).then_some(first)
}

/// Where the steps of a solution lie in it: its lines, but for empty ones and the answer's.
pub(super) fn steps(solution: &str) -> Vec<Range<usize>> {
    let mut steps = Vec::new();
    let mut start = 0;
    for line in solution.split('\n') {
        if !line.trim().is_empty() && !line.starts_with("A:") {
            steps.push(start..start + line.len());
        }
        start += line.len() + 1;
    }
    steps
}

/// What a line computes: the numbers behind the equals signs of its calculator marks, as in
/// `2*3=<<2*3=6>>6`.
fn results(line: &str) -> impl Iterator<Item = f64> {
    let marks = line.split("<<").skip(1);
    marks.filter_map(|rest| {
        let (mark, _) = rest.split_once(">>")?;
        let (_, result) = mark.rsplit_once('=')?;
        result.trim().parse().ok()
    })
}

/// The means of `values` over the tokens of each step of `solution`, as `tokens` spell it out.
///
/// A token belongs to the step in which its first letter stands; one of white space alone, to the
/// step that it begins or ends in. `None` where the tokens do not hold the solution, as when it was
/// cut, or a step has no token with values.
pub(super) fn step_means<const N: usize>(
    tokens: &[String],
    values: impl IntoIterator<Item = Option<[f64; N]>>,
    solution: &str,
) -> Option<Vec<[f64; N]>> {
    let text = tokens.concat();
    let begin = text.find(solution)?;
    let steps = steps(solution);
    let mut sums = vec![([0.0; N], 0_usize); steps.len()];
    let mut at = 0;
    for (token, values) in tokens.iter().zip(values) {
        let blank = token.len() - token.trim_start().len();
        let letter = if blank == token.len() { at } else { at + blank };
        at += token.len();
        let holds = |step: &Range<usize>| {
            (begin + step.start..=begin + step.end).contains(&letter)
                && letter < begin + solution.len()
        };
        if let (Some(values), Some(step)) = (values, steps.iter().position(holds)) {
            let (sums, n) = &mut sums[step];
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += value;
            }
            *n += 1;
        }
    }
    let mean = |(sums, n): ([f64; N], usize)| (n > 0).then(|| sums.map(|sum| sum / n as f64));
    sums.into_iter().map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: &str = "He has 2*3=<<2*3=6>>6 apples.\nSo 6+1.5=<<6+1.5=7.5>>7.5 in all.\nA: 7.5";
    const WRONG: &str =
        "He has 2*3=<<2*3=6.0>>6 apples.\n\nHe eats.\nSo 6-1.5=<<6-1.5=4.5>>4.5 are left.\nA: 4.5";

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn the_first_error_is_the_first_result_that_no_right_solution_has() {
        let known: Vec<f64> = RIGHT.lines().flat_map(results).collect();
        assert_eq!(known, [6.0, 7.5]);
        assert_eq!(steps(WRONG).len(), 3);
        assert_eq!(first_error(WRONG, &known), Some(2));
        assert_eq!(first_error(WRONG, &[]), Some(0));
        // Every result is right, as where a step is left out; and a solution of one step has no
        // other to tell it from.
        assert_eq!(first_error(RIGHT, &known), None);
        assert_eq!(first_error("2-3=<<2-3=-1>>-1\nA: -1", &known), None);
    }

    #[test]
    fn problems_are_trained_on_or_held_out() {
        let all: Vec<Solutions> = (0..40)
            .map(|row| Solutions {
                problem: row / 2,
                question: format!("question {}", row / 2),
                right: RIGHT.into(),
                wrong: WRONG.into(),
                first_error: (row % 4 != 0).then_some(2),
            })
            .collect();
        let (train, held_out) = split(&all, (15, 10), 1);
        assert_eq!((train.len(), held_out.len()), (15, 10));
        assert!(held_out.iter().all(|pair| pair.first_error.is_some()));
        let trained = |problem| train.iter().any(|pair| pair.problem == problem);
        assert!(!held_out.iter().any(|pair| trained(pair.problem)));
        assert_ne!(split(&all, (15, 10), 2), (train, held_out));
    }

    #[test]
    fn tokens_belong_to_the_step_that_their_letters_stand_in() {
        let tokens = strings(&["<s>", "a b", "\n", "\nc", " d\n", "A: 1", "</s>"]);
        let values = [9.0, 1.0, 3.0, 5.0, 7.0, 9.0, 9.0].map(|x| Some([x, -x]));
        let solution = "a b\n\nc d\nA: 1";
        let means = |n: usize, values: [Option<[f64; 2]>; 7]| {
            step_means(&tokens[..n], values[..n].iter().copied(), solution)
        };
        assert_eq!(means(7, values), Some(vec![[2.0, -2.0], [6.0, -6.0]]));
        let mut unread = values;
        unread[4] = None;
        assert_eq!(means(7, unread), Some(vec![[2.0, -2.0], [5.0, -5.0]]));
        unread[3] = None;
        assert_eq!(means(7, unread), None);
        assert_eq!(means(3, values), None);
    }
}
