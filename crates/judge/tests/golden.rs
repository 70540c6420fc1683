//! The length-controlled fit is statsmodels' logistic regression.
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

use judge::length_controlled;
use serde::Deserialize;

/// The fit's weak prior moves a coefficient of size 1 by about `1e-3 / (n · p · (1 − p))`, which is
/// below 3e-5 with these pairs.
const PRIOR: f64 = 5e-5;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    credits: Vec<f64>,
    length_differences: Vec<f64>,
    length_scale: f64,
    intercept: f64,
    slope: f64,
}

#[test]
fn coefficients_agree_with_statsmodels() {
    let text = include_str!("../../../testdata/judge/logistic.json");
    let golden: Golden = serde_json::from_str(text).unwrap();
    assert_eq!(golden.cases.len(), 2);
    for case in golden.cases {
        let groups: Vec<usize> = (0..case.credits.len()).collect();
        let fit = length_controlled(&case.credits, &case.length_differences, &groups, 0).unwrap();
        let rate = fit.win_rate.mean;
        for (found, expected) in [
            ((rate / (1.0 - rate)).ln(), case.intercept),
            (fit.length_coefficient, case.slope),
            (fit.length_scale, case.length_scale),
        ] {
            let error = (found - expected).abs();
            assert!(error < PRIOR, "{}: {found}, expected {expected}", case.name);
        }
    }
}
