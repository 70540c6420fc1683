//! What the page of a run promises, whatever the data.

use report::{
    Card, OutcomeRow, Plot, ReferenceLine, Sample, SampleCompletion, Series, Token, TrainingReport,
};

const EVIL: &str = "</style></script><script>alert('x')</script><img src=\"http://evil.example/a\" onerror='b'>&amp;\0";

fn evil_report() -> TrainingReport {
    TrainingReport {
        title: EVIL.into(),
        subtitle: EVIL.into(),
        summary_cards: vec![Card {
            label: EVIL.into(),
            value: EVIL.into(),
            note: EVIL.into(),
        }],
        outcomes: vec![OutcomeRow {
            policy: EVIL.into(),
            metric: EVIL.into(),
            mean: 1.0,
            ci_low: 0.5,
            ci_high: 1.5,
            n: 3,
        }],
        curves: vec![Plot {
            title: EVIL.into(),
            x_label: EVIL.into(),
            y_label: EVIL.into(),
            series: vec![Series {
                name: EVIL.into(),
                points: vec![(0.0, 1.0), (1.0, 2.0)],
                band: None,
            }],
            reference_lines: vec![ReferenceLine {
                label: EVIL.into(),
                y: 1.5,
            }],
        }],
        samples: vec![Sample {
            prompt: EVIL.into(),
            policies: vec![SampleCompletion {
                label: EVIL.into(),
                tokens: vec![Token {
                    text: EVIL.into(),
                    kind: Some(EVIL.into()),
                    implicit_reward: Some(0.1),
                    ..Token::default()
                }],
                total_implicit: Some(0.1),
                total_true: None,
            }],
        }],
        recipe_toml: EVIL.into(),
        notes: vec![EVIL.into()],
    }
}

/// The start tags of `html`, names and attributes, with attribute values left out.
fn tags(html: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut rest = html;
    while let Some(start) = rest.find('<') {
        rest = &rest[start + 1..];
        let mut tag = String::new();
        let mut quote = None;
        for (i, c) in rest.char_indices() {
            match (quote, c) {
                (None, '>') => {
                    rest = &rest[i..];
                    break;
                }
                (None, '"' | '\'') => quote = Some(c),
                (Some(q), c) if q == c => quote = None,
                (None, c) => tag.push(c),
                (Some(_), _) => {}
            }
        }
        out.push(tag);
    }
    out
}

#[test]
fn markup_from_data_shows_as_text_everywhere() {
    let html = evil_report().to_html().unwrap();
    // Style and script are this crate's own; what lies between them is what data could reach.
    let body = &html[html.find("<body>").unwrap()..html.rfind("<script>").unwrap()];
    for tag in tags(body) {
        assert!(
            !tag.starts_with("script") && !tag.starts_with("img"),
            "{tag}"
        );
        assert!(!tag.contains("onerror"), "{tag}");
    }
    assert_eq!(html.matches("<script").count(), 1);
    assert_eq!(html.matches("</script").count(), 1);
    assert_eq!(html.matches("</style").count(), 1);
    assert!(!html.contains('\0'));
    assert!(body.matches("&lt;script&gt;").count() >= 12);
}

#[test]
fn markup_of_the_data_would_be_found_by_the_test_above() {
    assert!(tags("<p a=\"<b>\"><img x='>' onerror=1>").contains(&"img x= onerror=1".into()));
}

fn full_report() -> TrainingReport {
    let points = |f: fn(f64) -> f64| (0..2000).map(|i| (f64::from(i), f(f64::from(i)))).collect();
    let plot = |title: &str, unit: &str| Plot {
        title: title.into(),
        x_label: "step".into(),
        y_label: unit.into(),
        series: vec![
            Series {
                name: "chosen".into(),
                points: points(|x| (x * 0.7).sin() + x * 1e-3),
                band: None,
            },
            Series {
                name: "rejected".into(),
                points: points(|x| (x * 1.3).cos() - x * 1e-3),
                band: None,
            },
        ],
        reference_lines: vec![ReferenceLine {
            label: "ceiling".into(),
            y: 0.9,
        }],
    };
    let tokens = |n: u32| -> Vec<Token> {
        (0..n)
            .map(|i| Token {
                text: format!(" word{i}"),
                id: i,
                implicit_reward: Some(f64::from(i).sin()),
                true_reward: Some(f64::from(i).cos()),
                policy_logp: Some(-1.25),
                reference_logp: Some(-1.5),
                kind: Some("fact".into()),
            })
            .collect()
    };
    TrainingReport {
        title: "run".into(),
        outcomes: ["SFT", "DPO"]
            .map(|policy| OutcomeRow {
                policy: policy.into(),
                metric: "true reward (reward units)".into(),
                mean: 1.25,
                ci_low: 1.0,
                ci_high: 1.5,
                n: 256,
            })
            .into(),
        curves: [
            ("Loss", "loss (nats)"),
            ("Rewards", "reward (reward units)"),
            ("Accuracy", "accuracy (fraction)"),
            ("Log-probabilities", "log-probability (nats)"),
            ("Gradient norm", "norm before clipping (1)"),
        ]
        .map(|(title, unit)| plot(title, unit))
        .into(),
        samples: (0..8)
            .map(|_| Sample {
                prompt: "Write a memo.".into(),
                policies: ["SFT", "DPO"]
                    .map(|label| SampleCompletion {
                        label: label.into(),
                        tokens: tokens(120),
                        total_implicit: Some(1.0),
                        total_true: Some(-1.0),
                    })
                    .into(),
            })
            .collect(),
        recipe_toml: "[train]\nbeta = 0.1\n".into(),
        ..TrainingReport::default()
    }
}

#[test]
fn the_page_points_at_nothing_outside() {
    let html = full_report().to_html().unwrap();
    for address in [
        "http:", "https:", "src=", "url(", "@import", "<link", "//cdn",
    ] {
        assert!(!html.contains(address), "{address}");
    }
    assert!(html.contains("default-src 'none'"));
}

#[test]
fn a_run_of_two_thousand_steps_stays_below_two_megabytes() {
    let html = full_report().to_html().unwrap();
    assert!(html.len() < 2_000_000, "{} bytes", html.len());
}

#[test]
fn every_plot_has_axis_labels_units_and_legend() {
    let report = full_report();
    let html = report.to_html().unwrap();
    for plot in &report.curves {
        let start = html
            .find(&format!("aria-label=\"{}: ", plot.title))
            .expect("the plot is on the page");
        let svg = &html[start..start + html[start..].find("</svg>").unwrap()];
        for wanted in [
            ">step<",
            ">chosen<",
            ">rejected<",
            ">ceiling (0.900)<",
            "class=\"legend\"",
        ] {
            assert!(svg.contains(wanted), "{} lacks {wanted}", plot.title);
        }
        assert!(
            svg.contains(&format!(">{}<", plot.y_label)),
            "{}",
            plot.title
        );
        assert!(svg.matches("class=\"tick\"").count() >= 6, "{}", plot.title);
    }
    assert!(html.contains(">true reward (reward units)<"));
}

#[test]
fn what_is_missing_leaves_its_section_out() {
    let html = TrainingReport::default().to_html().unwrap();
    for id in ["outcomes", "curves", "samples", "recipe"] {
        assert!(!html.contains(&format!("id=\"{id}\"")), "{id}");
    }

    let mut report = full_report();
    for completion in report.samples.iter_mut().flat_map(|s| &mut s.policies) {
        completion.total_true = None;
        for token in &mut completion.tokens {
            token.true_reward = None;
        }
    }
    report.outcomes.clear();
    let html = report.to_html().unwrap();
    let body = &html[html.find("<body>").unwrap()..html.rfind("<script>").unwrap()];
    assert!(body.contains("implicit reward of a token"));
    assert!(!body.contains("true reward"));
}

#[test]
fn empty_and_non_finite_input_is_shown_and_not_a_panic() {
    let mut report = full_report();
    report.outcomes[0].mean = f64::NAN;
    report.outcomes[1].ci_high = f64::INFINITY;
    report.curves[0].series[0].points = vec![(0.0, f64::NAN), (1.0, f64::INFINITY)];
    report.curves[0].series[1].points.clear();
    report.curves[1].series[0].points = vec![(3.0, 1.0)];
    report.curves[2].series.clear();
    report.samples[0].prompt.clear();
    report.samples[0].policies[0].tokens.clear();
    report.samples[0].policies[1].tokens[0].implicit_reward = Some(f64::NAN);
    report.samples[0].policies[1].tokens[1].text.clear();
    report.samples[0].policies[1].total_true = Some(f64::NAN);
    report.samples[1].policies.clear();
    let html = report.to_html().unwrap();
    let body = &html[html.find("<body>").unwrap()..html.rfind("<script>").unwrap()];
    assert!(body.contains("no finite mean") && body.contains(">n&#x2f;a<"));
    assert!(body.contains("2 points are not finite and not drawn."));
    assert!(body.contains("no tokens"));
    // A plot without any series is left out.
    assert!(!body.contains(">Accuracy<"));
    assert!(!body.contains("=\"NaN") && !body.contains("points=\"NaN"));
}

#[test]
fn a_report_survives_json() {
    let report = full_report();
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(
        serde_json::from_str::<TrainingReport>(&json).unwrap(),
        report
    );
}
