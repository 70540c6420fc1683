//! What deeper search does to a policy that is not optimal: likelihood falls, implicit reward rises,
//! and the policy over-rates its own samples more with every token (S6 and S7 of the book).
//!
//! `cargo run -p mdp-core --example depth -- depth.svg` prints a table and draws it.

#![allow(clippy::print_stdout, reason = "a program that reports")]

use std::error::Error;

use mdp_core::{
    Beta, RewardPlacement, TabularMdp, TabularPolicy, Tree, implicit_rewards, mean_path_error,
    solve,
};
use plotters::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const NAMES: [&str; 4] = [
    "best sum of implicit rewards",
    "mean error, own samples",
    "mean error, optimal samples",
    "best likelihood, times beta",
];

fn main() -> Result<(), Box<dyn Error>> {
    let beta = Beta::new(0.5)?;
    let tree = Tree::new(4, 8, 0)?;
    let mdp = TabularMdp::seeded(tree.clone(), RewardPlacement::Dense, 1)?;
    let solution = solve(&mdp, beta)?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let policy = TabularPolicy::random(tree.clone(), 1.0, &mut rng)?;
    let logps = tree.path_sums(policy.logps());
    let rewards = tree.path_sums(&implicit_rewards(&mdp, &policy, beta)?);

    let mut curves = vec![vec![(0.0, 0.0)]; NAMES.len()];
    println!("depth  {}", NAMES.join(" | "));
    for depth in 1..=tree.horizon() {
        let best = |table: &[f64]| {
            let values = tree.prefixes(depth).map(|pair| table[pair]);
            values.fold(f64::NEG_INFINITY, f64::max)
        };
        let row = [
            best(&rewards),
            mean_path_error(&solution, &policy, &policy, depth)?,
            mean_path_error(&solution, &policy, &solution.optimal_policy(), depth)?,
            beta.get() * best(&logps),
        ];
        println!(
            "{depth:>5}  {:.3} | {:.3} | {:.3} | {:.3}",
            row[0], row[1], row[2], row[3]
        );
        for (curve, value) in curves.iter_mut().zip(row) {
            curve.push((depth as f64, value));
        }
    }
    match std::env::args().nth(1) {
        Some(path) => draw(&path, &curves),
        None => Ok(()),
    }
}

fn draw(path: &str, curves: &[Vec<(f64, f64)>]) -> Result<(), Box<dyn Error>> {
    // Four of the Okabe-Ito colours, told apart by every kind of colour vision.
    const COLOURS: [RGBColor; 4] = [
        RGBColor(213, 94, 0),
        RGBColor(0, 114, 178),
        RGBColor(0, 158, 115),
        RGBColor(0, 0, 0),
    ];
    let values = || curves.iter().flatten().map(|&(_, y)| y);
    let (low, high) = (values().fold(0.0, f64::min), values().fold(0.0, f64::max));
    let depths = curves[0].len() as f64 - 1.0;
    let area = SVGBackend::new(path, (640, 400)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..depths + 0.2, low - 0.5..high * 1.45)?;
    chart
        .configure_mesh()
        .x_labels(9)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .x_desc("depth of search, tokens")
        .y_desc("reward units")
        .label_style(("sans-serif", 15))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for ((curve, name), colour) in curves.iter().zip(NAMES).zip(COLOURS) {
        chart
            .draw_series(LineSeries::new(curve.clone(), colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 14))
        .background_style(WHITE)
        .draw()?;
    area.present()?;
    Ok(())
}
