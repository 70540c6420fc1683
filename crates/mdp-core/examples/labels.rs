//! How close tabular DPO comes to the exact optimum as sampled labels grow in number.
//!
//! `cargo run -p mdp-core --example labels -- labels.svg` prints a table and draws it.

#![allow(clippy::print_stdout, reason = "a program that reports")]

use std::error::Error;

use mdp_core::{
    Adam, Beta, PairTable, RewardPlacement, SoftSolution, TabularMdp, Tree, bellman_residuals,
    dpo_loss, minimise_margin_loss, occupancies, solve,
};
use plotters::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const SEEDS: u64 = 8;

fn main() -> Result<(), Box<dyn Error>> {
    let tree = Tree::new(3, 3, 2)?;
    let mdp = TabularMdp::seeded(tree, RewardPlacement::Dense, 4)?;
    let solution = solve(&mdp, Beta::new(0.5)?)?;
    let mut points = Vec::new();
    for exponent in 6..=12 {
        let n_pairs = 10_f64.powf(f64::from(exponent) / 2.0).round();
        let mut squares = 0.0;
        for seed in 0..SEEDS {
            squares += squared_error(&solution, n_pairs as usize, seed)?;
        }
        points.push((n_pairs, (squares / SEEDS as f64).sqrt()));
        let (n_pairs, error) = points[points.len() - 1];
        println!("{n_pairs:>9} labels: error of the advantage {error:.5} reward units");
    }
    let slope = log_log_slope(&points);
    println!("slope {slope:.3} on doubly logarithmic axes");
    if let Some(path) = std::env::args().nth(1) {
        draw(&path, &points, slope)?;
    }
    Ok(())
}

/// The mean square of `β log(π/π*)` over state-action pairs as the reference visits them.
fn squared_error(
    solution: &SoftSolution,
    n_pairs: usize,
    seed: u64,
) -> Result<f64, Box<dyn Error>> {
    let mdp = solution.mdp();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let pairs = PairTable::sample(mdp, mdp.reference(), n_pairs, &mut rng)?;
    let (start, adam) = (mdp.reference().logps(), Adam::default());
    let policy = minimise_margin_loss(mdp, &pairs, solution.beta(), start, adam, dpo_loss)?;
    let residuals = bellman_residuals(solution, &policy)?;
    let visits = occupancies(mdp, mdp.reference())?;
    let (mut total, mut weight) = (0.0, 0.0);
    for (pair, residual) in residuals.iter().enumerate() {
        let visit = visits[pair / mdp.tree().vocab()] * mdp.reference().logps()[pair].exp();
        total += visit * residual * residual;
        weight += visit;
    }
    Ok(total / weight)
}

/// Least squares of log error on log labels.
fn log_log_slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let x_mean = points.iter().map(|(x, _)| x.ln()).sum::<f64>() / n;
    let y_mean = points.iter().map(|(_, y)| y.ln()).sum::<f64>() / n;
    let xy: f64 = points
        .iter()
        .map(|(x, y)| (x.ln() - x_mean) * (y.ln() - y_mean))
        .sum();
    let xx: f64 = points.iter().map(|(x, _)| (x.ln() - x_mean).powi(2)).sum();
    xy / xx
}

fn draw(path: &str, points: &[(f64, f64)], slope: f64) -> Result<(), Box<dyn Error>> {
    let area = SVGBackend::new(path, (640, 400)).into_drawing_area();
    area.fill(&WHITE)?;
    let (first, last) = (points[0], points[points.len() - 1]);
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .caption(format!("Tabular DPO: slope {slope:.2}"), ("sans-serif", 18))
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (first.0 * 0.8..last.0 * 1.25).log_scale(),
            (last.1 * 0.5..first.1 * 2.0).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("sampled labels")
        .y_labels(4)
        .y_desc("error of the advantage, reward units")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .label_style(("sans-serif", 15))
        .light_line_style(TRANSPARENT)
        .draw()?;
    let blue = RGBColor(0, 114, 178);
    chart.draw_series(LineSeries::new(
        points.iter().copied(),
        blue.stroke_width(2),
    ))?;
    chart.draw_series(points.iter().map(|&p| Circle::new(p, 4, blue.filled())))?;
    // The rate of independent labels, through the last point.
    let root = |x: f64| last.1 * (last.0 / x).sqrt();
    let line = points.iter().map(|&(x, _)| (x, root(x)));
    chart.draw_series(LineSeries::new(line, BLACK.mix(0.4)))?;
    area.present()?;
    Ok(())
}
