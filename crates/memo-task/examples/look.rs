//! Prints a few pairs as a person would judge them, and what each split holds.
//!
//! `cargo run -p memo-task --example look`

#![expect(clippy::print_stdout, reason = "this program is for looking at")]

use memo_task::{MemoConfig, MemoError, MemoTask, RewardKind, Split, ceiling};

/// Enough pairs that two digits of the means are meaningful.
const N_PAIRS: usize = 2000;

fn main() -> Result<(), MemoError> {
    let task = MemoTask::new(MemoConfig::default())?;
    for pair in task.pairs(Split::Eval, 6, 0) {
        print!("\n{}", pair.prompt);
        for (name, completion) in [("chosen", &pair.chosen), ("rejected", &pair.rejected)] {
            print!("\n  {name:8} {:5.1} ", completion.total_reward());
            for ((id, reward), kind) in completion
                .ids
                .iter()
                .zip(&completion.rewards)
                .zip(&completion.kinds)
            {
                let token = task.token(*id).unwrap_or_default();
                match kind {
                    RewardKind::Right | RewardKind::Connective | RewardKind::End => {
                        print!("{token}");
                    }
                    _ => print!("{token}[{reward:.1}]"),
                }
            }
        }
        println!(
            "\n  the label falls so with probability {:.2}",
            pair.p_chosen
        );
    }

    println!("\nvocabulary: {} tokens\n", task.vocab_size());
    println!("| split | prompt tokens | completion tokens | reward | sd | perfect | ceiling |");
    println!("|---|---|---|---|---|---|---|");
    for split in Split::ALL {
        let pairs = task.pairs(split, N_PAIRS, 0);
        let prompts: Vec<f64> = pairs
            .iter()
            .map(|pair| pair.prompt_ids.len() as f64)
            .collect();
        let completions: Vec<_> = pairs
            .iter()
            .flat_map(|pair| [&pair.chosen, &pair.rejected])
            .collect();
        let lengths: Vec<f64> = completions.iter().map(|c| c.ids.len() as f64).collect();
        let rewards: Vec<f64> = completions.iter().map(|c| c.total_reward()).collect();
        let sd = mean(
            &rewards
                .iter()
                .map(|r| (r - mean(&rewards)).powi(2))
                .collect::<Vec<_>>(),
        );
        let perfect: Vec<f64> = rewards
            .iter()
            .map(|r| f64::from(u8::from(*r > -1e-9)))
            .collect();
        println!(
            "| {} | {:.1} ({:.0} to {:.0}) | {:.1} ({:.0} to {:.0}) | {:.2} | {:.2} | {:.1}% | {:.3} |",
            split.name(),
            mean(&prompts),
            min(&prompts),
            max(&prompts),
            mean(&lengths),
            min(&lengths),
            max(&lengths),
            mean(&rewards),
            sd.sqrt(),
            100.0 * mean(&perfect),
            ceiling(&pairs),
        );
    }
    Ok(())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn min(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn max(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}
