//! What every loss must obey: slopes, padding, order, batches, symmetry, and how losses relate.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use burn::tensor::{DType, Device, Tensor};
use common::{Rows, longest, number, ones, pair_table, table, tokens, tracked};
use dpo_loss::{
    Beta, Divergence, LossConfig, LossError, Objective, Objectives, PairBatch, PairInputs,
    ReferenceLogps, ReferenceNeed, UnpairedBatch, UnpairedLoss, UnpairedObjective,
};
use proptest::prelude::*;

/// Sums of a few dozen doubles of order one to a hundred.
const ROUNDING: f64 = 1e-11;

/// A batch as rows of numbers, chosen completions first.
#[derive(Clone, Debug)]
struct Numbers {
    policy: Rows,
    reference: Rows,
    squares: Rows,
    kls: Rows,
    weights: Rows,
    steps: Rows,
}

impl Numbers {
    fn all(&self) -> [&Rows; 6] {
        [
            &self.policy,
            &self.reference,
            &self.squares,
            &self.kls,
            &self.weights,
            &self.steps,
        ]
    }

    fn map(&self, change: impl Fn(&Rows) -> Rows) -> Self {
        let [policy, reference, squares, kls, weights, steps] = self.all().map(change);
        Self {
            policy,
            reference,
            squares,
            kls,
            weights,
            steps,
        }
    }

    fn n_pairs(&self) -> usize {
        self.policy.len() / 2
    }

    /// The pairs with these numbers, in this order.
    fn pick(&self, pairs: &[usize]) -> Self {
        let n = self.n_pairs();
        self.map(|rows| {
            let both = pairs
                .iter()
                .copied()
                .chain(pairs.iter().map(|&pair| n + pair));
            both.map(|row| rows[row].clone()).collect()
        })
    }

    /// Chosen for rejected.
    fn swapped(&self) -> Self {
        let n = self.n_pairs();
        self.map(|rows| [&rows[n..], &rows[..n]].concat())
    }

    fn exchanged(&self) -> Self {
        Self {
            policy: self.reference.clone(),
            reference: self.policy.clone(),
            ..self.clone()
        }
    }

    fn batch(&self, padding: usize, device: &Device) -> (PairBatch, Tensor<2>, Tensor<2>) {
        let seq = longest(&self.policy) + padding;
        let policy = tracked(table(&self.policy, seq, device));
        let kls = tracked(table(&self.kls, seq, device));
        let reference = table(&self.reference, seq, device);
        let batch = PairBatch {
            policy: tokens(policy.clone(), &self.policy, device),
            reference: tokens(reference, &self.reference, device).into(),
            inputs: PairInputs {
                log_sum_sq_probs: Some(pair_table(&self.squares, seq, device)),
                position_kls: Some(dpo_loss::PairTable::from_halves(kls.clone())),
                token_weights: Some(pair_table(&self.weights, seq, device)),
                step_mask: Some(pair_table(&self.steps, seq, device)),
            },
        };
        (batch, policy, kls)
    }

    fn loss(&self, config: &LossConfig) -> f64 {
        let (batch, ..) = self.batch(0, &Device::default());
        number(objectives(config).loss(&batch, beta()).unwrap())
    }
}

fn beta() -> Beta {
    Beta::new(0.3).unwrap()
}

fn objectives(config: &LossConfig) -> Objectives {
    Objectives::new(config.clone()).unwrap()
}

/// One loss with a share of turned labels that every loss takes.
fn single(objective: Objective) -> LossConfig {
    LossConfig {
        label_smoothing: 0.1,
        ..LossConfig::single(objective)
    }
}

prop_compose! {
    fn row(length: usize)(
        policy in prop::collection::vec(-3.0..-0.1, length),
        shift in prop::collection::vec(-1.0..1.0, length),
        squares in prop::collection::vec(-2.0..-0.1, length),
        kls in prop::collection::vec(0.0..1.0, length),
        weights in prop::collection::vec(0.0..2.0, length),
        steps in prop::collection::vec(prop::bool::ANY, length),
    ) -> [Vec<f64>; 6] {
        let reference = policy.iter().zip(&shift).map(|(p, s): (&f64, &f64)| p + s).collect();
        let steps = steps.into_iter().map(|one| f64::from(u8::from(one))).collect();
        [policy, reference, squares, kls, weights, steps]
    }
}

prop_compose! {
    fn numbers()(n_pairs in 1_usize..5)(
        rows in prop::collection::vec((1_usize..6).prop_flat_map(row), 2 * n_pairs)
    ) -> Numbers {
        let column = |i: usize| rows.iter().map(|row| row[i].clone()).collect();
        Numbers {
            policy: column(0),
            reference: column(1),
            squares: column(2),
            kls: column(3),
            weights: column(4),
            steps: column(5),
        }
    }
}

/// Pairs of different lengths; no margin at a kink of the hinge.
fn some_numbers() -> Numbers {
    Numbers {
        policy: vec![
            vec![-1.0, -0.5, -2.0],
            vec![-0.25],
            vec![-1.5, -0.75],
            vec![-0.6, -1.1, -0.4, -0.9],
        ],
        reference: vec![
            vec![-1.2, -1.5, -1.0],
            vec![-1.25],
            vec![-1.0, -2.0],
            vec![-0.7, -0.6, -0.8, -1.0],
        ],
        squares: vec![
            vec![-0.5, -1.0, -0.3],
            vec![-0.7],
            vec![-0.4, -0.2],
            vec![-1.0, -0.6, -0.8, -0.1],
        ],
        kls: vec![
            vec![0.1, 0.3, 0.2],
            vec![0.4],
            vec![0.05, 0.25],
            vec![0.15, 0.35, 0.45, 0.5],
        ],
        weights: vec![
            vec![0.5, 1.5, 1.0],
            vec![2.0],
            vec![0.25, 1.25],
            vec![1.0, 0.0, 0.75, 1.1],
        ],
        steps: vec![
            vec![0.0, 1.0, 1.0],
            vec![1.0],
            vec![1.0, 0.0],
            vec![0.0, 1.0, 1.0, 0.0],
        ],
    }
}

/// Central differences in doubles: the square of the step, and rounding over the step.
const SLOPE_STEP: f64 = 1e-5;
const SLOPE_TOLERANCE: f64 = 2e-9;

#[test]
fn every_gradient_equals_finite_differences_in_doubles() {
    let numbers = some_numbers();
    let device = Device::default().autodiff();
    let seq = longest(&numbers.policy);
    let mut configs: Vec<LossConfig> = Objective::ALL.map(single).to_vec();
    for f_divergence_type in [
        Divergence::ForwardKl,
        Divergence::JsDivergence,
        Divergence::AlphaDivergence,
    ] {
        configs.push(LossConfig {
            f_divergence_type,
            ..LossConfig::default()
        });
    }
    configs.push(LossConfig {
        ld_alpha: Some(0.4),
        ..LossConfig::default()
    });
    configs.push(LossConfig::mpo());
    for config in configs {
        let (batch, policy, kls) = numbers.batch(0, &device);
        let gradients = objectives(&config).loss(&batch, beta()).unwrap().backward();
        type Pick = fn(&mut Numbers) -> &mut Rows;
        let sides: [(&str, Tensor<2>, Pick); 2] = [
            ("logp", policy, |numbers| &mut numbers.policy),
            ("KL", kls, |numbers| &mut numbers.kls),
        ];
        let mut largest = 0.0_f64;
        for (what, tensor, rows) in sides {
            let got: Vec<f64> = match tensor.grad(&gradients) {
                Some(gradient) => gradient.try_into_vec_as().unwrap(),
                None => vec![0.0; numbers.policy.len() * seq],
            };
            for row in 0..numbers.policy.len() {
                for column in 0..numbers.policy[row].len() {
                    let (mut up, mut down) = (numbers.clone(), numbers.clone());
                    rows(&mut up)[row][column] += SLOPE_STEP;
                    rows(&mut down)[row][column] -= SLOPE_STEP;
                    let mut slope = (up.loss(&config) - down.loss(&config)) / (2.0 * SLOPE_STEP);
                    let got = got[row * seq + column];
                    if what == "KL" && row < numbers.n_pairs() && config.loss == [Objective::Tdpo2]
                    {
                        // TDPO₂ stops this gradient; its loss does depend on the number.
                        assert!(slope.abs() > 1e-3);
                        slope = 0.0;
                    }
                    assert!(
                        (got - slope).abs() < SLOPE_TOLERANCE * slope.abs().max(1.0),
                        "{:?}: {what} of row {row}, column {column}: {got} against {slope}",
                        config.loss
                    );
                    largest = largest.max(got.abs());
                }
            }
        }
        assert!(largest > 1e-3, "{:?} has no slope to check", config.loss);
    }
}

#[test]
fn unpaired_gradients_equal_finite_differences_in_doubles() {
    let logps = [-3.0, -1.5, -2.0];
    let device = Device::default().autodiff();
    let objective = UnpairedObjective {
        desirable_weight: 1.5,
        ..UnpairedObjective::default()
    };
    let loss = |logps: &[f64], device: &Device| {
        let policy = tracked(common::vector(logps, device));
        let batch = UnpairedBatch {
            policy: policy.clone(),
            reference: common::vector(&[-2.5, -2.5, -1.0], device),
            desirable: common::vector(&[1.0, 0.0, 1.0], device),
        };
        let kl = common::vector(&[0.2], device);
        (objective.losses(&batch, kl, beta()).unwrap().mean(), policy)
    };
    let (value, policy) = loss(&logps, &device);
    let gradients = value.backward();
    let got: Vec<f64> = policy.grad(&gradients).unwrap().try_into_vec_as().unwrap();
    for i in 0..3 {
        let (mut up, mut down) = (logps, logps);
        up[i] += SLOPE_STEP;
        down[i] -= SLOPE_STEP;
        let plain = Device::default();
        let slope =
            (number(loss(&up, &plain).0) - number(loss(&down, &plain).0)) / (2.0 * SLOPE_STEP);
        assert!((got[i] - slope).abs() < SLOPE_TOLERANCE && slope.abs() > 1e-3);
    }
}

/// Losses that see of policy and reference only differences, and treat the two sides of a pair as
/// mirror images.
fn is_mirrored(objective: Objective) -> bool {
    !matches!(
        objective,
        Objective::NcaPair
            | Objective::ApoDown
            | Objective::Sft
            | Objective::Simpo
            | Objective::Orpo
            | Objective::Cpo
            | Objective::DpoPositive
            | Objective::ReferenceFree
            | Objective::Tdpo1
            | Objective::Tdpo2
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn padding_changes_nothing(numbers in numbers(), padding in 1_usize..4) {
        let device = Device::default();
        for objective in Objective::ALL {
            let objectives = objectives(&single(objective));
            let loss = |padding| {
                let (batch, ..) = numbers.batch(padding, &device);
                number(objectives.loss(&batch, beta()).unwrap())
            };
            prop_assert!((loss(0) - loss(padding)).abs() < ROUNDING, "{objective}");
        }
    }

    #[test]
    fn the_order_of_pairs_changes_nothing(numbers in numbers()) {
        let backwards: Vec<usize> = (0..numbers.n_pairs()).rev().collect();
        for config in Objective::ALL.map(single) {
            let turned = numbers.pick(&backwards).loss(&config);
            prop_assert!((numbers.loss(&config) - turned).abs() < ROUNDING, "{:?}", config.loss);
        }
    }

    #[test]
    fn a_batch_is_the_mean_of_its_pairs_save_where_documented(numbers in numbers()) {
        let n = numbers.n_pairs();
        for objective in Objective::ALL {
            if objective.is_pair_mean() {
                let config = single(objective);
                let alone: f64 = (0..n).map(|pair| numbers.pick(&[pair]).loss(&config)).sum();
                let together = numbers.loss(&config);
                prop_assert!((together - alone / n as f64).abs() < ROUNDING, "{objective}");
            }
        }
    }

    #[test]
    fn swapping_a_pair_is_swapping_policy_and_reference(numbers in numbers()) {
        for objective in Objective::ALL.into_iter().filter(|&o| is_mirrored(o)) {
            let config = single(objective);
            let (swapped, exchanged) = (numbers.swapped(), numbers.exchanged());
            let gap = swapped.loss(&config) - exchanged.loss(&config);
            prop_assert!(gap.abs() < ROUNDING, "{objective}: {gap:e}");
        }
    }

    #[test]
    fn a_list_is_the_weighted_sum_of_its_losses(numbers in numbers(), weights in prop::array::uniform3(-1.0..2.0)) {
        let list = [Objective::Ipo, Objective::Sft, Objective::Aot];
        let config = LossConfig { loss: list.to_vec(), loss_weights: weights.to_vec(), ..single(Objective::Sft) };
        let sum: f64 = list.iter().zip(weights).map(|(&o, w)| w * numbers.loss(&single(o))).sum();
        prop_assert!((numbers.loss(&config) - sum).abs() < ROUNDING);
    }

    #[test]
    fn losses_become_dpo_where_their_parameter_vanishes(numbers in numbers()) {
        let plain = numbers.map(|rows| ones(rows));
        let unit = Numbers {
            policy: numbers.policy.clone(),
            reference: numbers.reference.clone(),
            kls: numbers.kls.iter().map(|row| vec![0.0; row.len()]).collect(),
            ..plain
        };
        let dpo = unit.loss(&LossConfig::default());
        let calm = |objective| LossConfig { dpop_lambda: 0.0, ..LossConfig::single(objective) };
        for objective in [
            Objective::Cdpo, Objective::Robust, Objective::DpoPositive, Objective::Tdpo1,
            Objective::Tdpo2, Objective::TokenWeighted, Objective::Step,
        ] {
            prop_assert!((unit.loss(&calm(objective)) - dpo).abs() < ROUNDING, "{objective}");
        }
        let whole = LossConfig { ld_alpha: Some(1.0), ..LossConfig::default() };
        prop_assert!((unit.loss(&whole) - dpo).abs() < ROUNDING);
        let near_one = LossConfig {
            f_divergence_type: Divergence::AlphaDivergence,
            f_alpha_divergence_coef: 1.0,
            ..LossConfig::default()
        };
        prop_assert!((unit.loss(&near_one) - dpo).abs() < ROUNDING);
    }

    #[test]
    fn dpo_with_a_silent_reference_is_the_reference_free_loss(numbers in numbers()) {
        let silent = Numbers {
            reference: numbers.reference.iter().map(|row| vec![0.0; row.len()]).collect(),
            ..numbers
        };
        let free = silent.loss(&LossConfig::single(Objective::ReferenceFree));
        prop_assert!((silent.loss(&LossConfig::default()) - free).abs() < ROUNDING);
        let cpo = LossConfig { cpo_alpha: 0.0, ..LossConfig::single(Objective::Cpo) };
        prop_assert!((silent.loss(&cpo) - free).abs() < ROUNDING);
    }

    #[test]
    fn kept_reference_sums_give_the_same_loss(numbers in numbers()) {
        for objective in Objective::ALL {
            let mut config = single(objective);
            if objective.allows_length_desensitising() {
                config.ld_alpha = Some(0.25);
            }
            let objectives = objectives(&config);
            let (mut batch, ..) = numbers.batch(0, &Device::default());
            let fresh = number(objectives.loss(&batch, beta()).unwrap());
            let ReferenceLogps::Tokens(reference) = &batch.reference else { unreachable!() };
            batch.reference = match objectives.needs().reference {
                ReferenceNeed::Absent => ReferenceLogps::Absent,
                ReferenceNeed::Sums => objectives.sums(reference).into(),
                ReferenceNeed::Tokens => continue,
            };
            let kept = number(objectives.loss(&batch, beta()).unwrap());
            prop_assert!((fresh - kept).abs() < ROUNDING, "{objective}");
        }
    }
}

#[test]
fn aot_and_token_means_are_no_means_of_pairs() {
    // The cases above leave these out; here they do depend on the batch.
    let mut numbers = some_numbers();
    // Now policy and reference put the two pairs in different orders.
    numbers.reference[0] = vec![-0.2, -0.1, -0.1];
    for objective in [
        Objective::Aot,
        Objective::AotUnpaired,
        Objective::Sft,
        Objective::Orpo,
    ] {
        assert!(!objective.is_pair_mean());
        let config = single(objective);
        let alone = numbers.pick(&[0]).loss(&config) + numbers.pick(&[1]).loss(&config);
        assert!(
            (numbers.loss(&config) - alone / 2.0).abs() > 1e-3,
            "{objective}"
        );
    }
}

#[test]
fn values_worked_by_hand() {
    // One pair: ρ_c = -1 + 2 = 1 over two tokens, ρ_r = -2 + 1 = -1 over one. β = 0.5, so m = 1.
    let device = Device::default();
    let numbers = Numbers {
        policy: vec![vec![-0.75, -0.25], vec![-2.0]],
        reference: vec![vec![-1.5, -0.5], vec![-1.0]],
        squares: vec![vec![-0.5, -0.5], vec![-1.0]],
        kls: vec![vec![0.5, 0.25], vec![0.25]],
        weights: vec![vec![2.0, 0.0], vec![0.5]],
        steps: vec![vec![0.0, 1.0], vec![1.0]],
    };
    let (batch, ..) = numbers.batch(1, &device);
    let beta = Beta::new(0.5).unwrap();
    let nll = |margin: f64| (-margin).exp().ln_1p();
    let odds = |logp: f64| (logp.exp() / (1.0 - logp.exp())).ln();
    let noisy = |loss| LossConfig {
        label_smoothing: 0.25,
        ..LossConfig::single(loss)
    };
    for (config, expected) in [
        (single(Objective::Sigmoid), nll(1.0)),
        (noisy(Objective::Cdpo), 0.75 * nll(1.0) + 0.25 * nll(-1.0)),
        (
            noisy(Objective::Robust),
            (0.75 * nll(1.0) - 0.25 * nll(-1.0)) / 0.5,
        ),
        // Mean logps are -1/2 and -2: 0.5 · 1.5 − 0.5.
        (LossConfig::single(Objective::Simpo), nll(0.25)),
        (LossConfig::single(Objective::Cpo), nll(0.5) + 0.5),
        (LossConfig::single(Objective::ReferenceFree), nll(0.5)),
        (
            LossConfig::single(Objective::Orpo),
            0.5 + 0.5 * nll(odds(-0.5) - odds(-2.0)),
        ),
        // The chosen completion is likelier than under the reference: no penalty.
        (LossConfig::single(Objective::DpoPositive), nll(1.0)),
        // K_c = 0.75, K_r = 0.25: m − 0.5 (0.25 − 0.75).
        (LossConfig::single(Objective::Tdpo1), nll(1.25)),
        (LossConfig::single(Objective::Tdpo2), nll(1.125)),
        // 2 · 0.75 + 0 · 0.25 against 0.5 · −1.
        (LossConfig::single(Objective::TokenWeighted), nll(1.0)),
        // 0.25 against −1.
        (LossConfig::single(Objective::Step), nll(0.625)),
        // Mean scores 1/2 and −1, less 1 / (2 β) = 1.
        (LossConfig::single(Objective::Ipo), 0.25),
        (
            LossConfig {
                ld_alpha: Some(0.5),
                ..LossConfig::default()
            },
            nll(0.5 * (0.875 + 1.0)),
        ),
        // w_c = e^{−1/2 + 1/2} = 1, w_r = e^{−2 + 1}.
        (
            LossConfig {
                use_weighting: true,
                ..LossConfig::default()
            },
            (-1f64).exp() * nll(1.0),
        ),
    ] {
        let got = number(objectives(&config).loss(&batch, beta).unwrap());
        assert!(
            (got - expected).abs() < ROUNDING,
            "{:?}: {got} against {expected}",
            config.loss
        );
    }
    // Swapped, the chosen completion is less likely by 1: λ = 50 adds 50 to its deficit.
    let (batch, ..) = numbers.swapped().batch(0, &device);
    let config = LossConfig::single(Objective::DpoPositive);
    let got = number(objectives(&config).loss(&batch, beta).unwrap());
    assert!((got - nll(-26.0)).abs() < ROUNDING);
}

#[test]
fn extreme_log_ratios_stay_finite_in_single_precision() {
    let device = Device::default();
    for (chosen, rejected) in [(300.0, -300.0), (-300.0, 300.0)] {
        let side = |policy: f32| dpo_loss::TokenLogps {
            values: Tensor::from_floats([[policy]], &device),
            mask: Tensor::ones([1, 1], &device),
        };
        let pair = |chosen, rejected| dpo_loss::PairTokens {
            chosen: side(chosen),
            rejected: side(rejected),
        };
        let batch = PairBatch::new(pair(chosen, rejected), pair(0.0, 0.0));
        assert_eq!(batch.policy.chosen.values.dtype(), DType::F32);
        for objective in Objective::ALL {
            let objectives = objectives(&single(objective));
            let needs = objectives.needs();
            // No such log-probability: it is above 0.
            if needs.reference == ReferenceNeed::Sums && !needs.position_kls {
                let loss = objectives.loss(&batch, Beta::new(1.0).unwrap()).unwrap();
                assert!(
                    loss.into_scalar::<f32>().is_finite(),
                    "{objective} at {chosen}"
                );
            }
        }
    }
}

#[test]
fn a_sure_completion_has_finite_odds() {
    let device = Device::default().autodiff();
    let numbers = Numbers {
        policy: vec![vec![0.0], vec![-1e-9]],
        ..some_numbers()
            .pick(&[0])
            .map(|_| vec![vec![-1.0], vec![-1.0]])
    };
    let (batch, policy, _) = numbers.batch(0, &device);
    let loss = objectives(&single(Objective::Orpo))
        .loss(&batch, beta())
        .unwrap();
    let gradients = loss.backward();
    assert!(number(loss).is_finite());
    let gradient: Vec<f64> = policy.grad(&gradients).unwrap().try_into_vec_as().unwrap();
    assert!(gradient.iter().all(|g| g.is_finite()));
}

#[test]
fn combinations_that_have_no_meaning_are_refused() {
    let refused = |toml: &str| toml::from_str::<Objectives>(toml).unwrap_err().to_string();
    for (toml, part) in [
        ("loss = []", "at least one"),
        (
            "loss = \"dpo\"",
            "unknown loss `dpo`, expected one of sigmoid, hinge",
        ),
        ("loss_weight = [1.0]", "unknown field `loss_weight`"),
        (
            "loss = [\"sft\"]\nloss_weights = [1.0, 2.0]",
            "2 entries for 1 losses",
        ),
        (
            "loss = \"sft\"\nloss_weights = [nan]",
            "weight of `sft` is NaN",
        ),
        ("loss = \"exo_pair\"", "above 0 and below 1 for `exo_pair`"),
        (
            "loss = \"robust\"\nlabel_smoothing = 0.5",
            "below 0.5 for `robust`",
        ),
        ("label_smoothing = -0.1", "from 0 to 1"),
        ("ld_alpha = 1.5", "`ld_alpha` is 1.5"),
        (
            "loss = \"discopop\"\ndiscopop_tau = 0.0",
            "`discopop_tau` is 0",
        ),
        (
            "loss = \"simpo\"\nld_alpha = 0.5",
            "`ld_alpha` does not work with loss `simpo`",
        ),
        (
            "loss = [\"sigmoid\", \"aot\"]\nuse_weighting = true",
            "`use_weighting` does not work with loss `aot`",
        ),
        ("loss = \"sft\"\nuse_weighting = true", "with loss `sft`"),
        ("f_divergence_type = \"kl\"", "unknown variant `kl`"),
    ] {
        let error = refused(toml);
        assert!(error.contains(part), "{toml}: {error}");
    }
    // TRL's list of losses that have a form under other divergences.
    let allowed: Vec<&str> = Objective::ALL[..15]
        .iter()
        .filter(|objective| {
            let config = LossConfig {
                f_divergence_type: Divergence::JsDivergence,
                ..single(**objective)
            };
            Objectives::new(config).is_ok()
        })
        .map(|objective| objective.name())
        .collect();
    let trls = "sigmoid hinge ipo exo_pair robust discopop sft sigmoid_norm";
    assert_eq!(allowed.join(" "), trls);
}

#[test]
fn a_recipe_survives_a_round_trip() {
    let config = LossConfig {
        label_smoothing: 0.1,
        f_divergence_type: Divergence::ForwardKl,
        ld_alpha: Some(0.5),
        ..LossConfig::rpo(0.5)
    };
    let objectives = objectives(&config);
    let text = toml::to_string(&objectives).unwrap();
    assert!(text.contains("loss = [\"sigmoid\", \"sft\"]"), "{text}");
    assert_eq!(toml::from_str::<Objectives>(&text).unwrap(), objectives);
    let default = toml::to_string(&Objectives::default()).unwrap();
    assert_eq!(
        toml::from_str::<Objectives>(&default).unwrap(),
        Objectives::default()
    );
    for objective in Objective::ALL {
        assert_eq!(objective.name().parse(), Ok(objective));
        let quoted = format!("\"{objective}\"");
        assert_eq!(serde_json::to_string(&objective).unwrap(), quoted);
    }
}

#[test]
fn label_smoothing_changes_exactly_the_losses_that_say_so() {
    let numbers = some_numbers();
    for objective in Objective::ALL {
        let at = |label_smoothing| LossConfig {
            label_smoothing,
            ..single(objective)
        };
        let changes = (numbers.loss(&at(0.1)) - numbers.loss(&at(0.2))).abs() > 1e-6;
        assert_eq!(changes, objective.uses_label_smoothing(), "{objective}");
        assert_eq!(objectives(&at(0.1)).warnings().is_empty(), changes);
    }
}

#[test]
fn a_number_that_no_loss_reads_is_warned_of() {
    let with = |loss: &[Objective]| LossConfig {
        simpo_gamma: 0.7,
        tdpo_alpha: 0.1,
        loss: loss.to_vec(),
        ..LossConfig::default()
    };
    let warned = |loss: &[Objective]| objectives(&with(loss)).warnings().join("; ");
    assert!(warned(&[Objective::Simpo, Objective::Tdpo2]).is_empty());
    let sigmoid = warned(&[Objective::Sigmoid]);
    assert!(
        sigmoid.contains("simpo_gamma = 0.7") && sigmoid.contains("`tdpo2`"),
        "{sigmoid}"
    );
    assert!(objectives(&LossConfig::default()).warnings().is_empty());
}

#[test]
fn a_batch_that_lacks_or_misfits_something_is_refused_by_name() {
    let (batch, ..) = some_numbers().batch(0, &Device::default());
    let bare = PairBatch::new(batch.policy.clone(), ReferenceLogps::Absent);
    for objective in Objective::ALL {
        let objectives = objectives(&single(objective));
        let needs = objectives.needs();
        let enough = needs.reference == ReferenceNeed::Absent;
        match objectives.loss(&bare, beta()) {
            Ok(_) => assert!(enough, "{objective}"),
            Err(LossError::MissingInput {
                objective: named, ..
            }) => {
                assert!(named == objective && !enough, "{objective}");
            }
            Err(other) => panic!("{objective}: {other}"),
        }
    }
    // A reference of one pair would broadcast over a batch of two.
    let (small, ..) = some_numbers().pick(&[1]).batch(0, &Device::default());
    let ReferenceLogps::Tokens(one) = &small.reference else {
        unreachable!()
    };
    let wrong = PairBatch::new(batch.policy.clone(), one.sums());
    let error = Objectives::default().loss(&wrong, beta()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "chosen reference logps has shape [1], expected [2]"
    );
    let kto = UnpairedObjective {
        undesirable_weight: -1.0,
        ..UnpairedObjective::default()
    };
    assert!(kto.check().is_err() && UnpairedObjective::default().check().is_ok());
    let text = "loss = \"apo_zero_unpaired\"";
    let parsed: UnpairedObjective = toml::from_str(text).unwrap();
    assert!(parsed.loss == UnpairedLoss::ApoZeroUnpaired && !parsed.needs_kl());
}

#[test]
fn unpaired_apo_zero_of_a_pair_is_apo_zero() {
    let numbers = some_numbers();
    let (batch, ..) = numbers.batch(0, &Device::default());
    let ReferenceLogps::Tokens(reference) = &batch.reference else {
        unreachable!()
    };
    let unpaired = UnpairedBatch::from_pairs(&batch.policy.sums(), &reference.sums());
    let objective = UnpairedObjective {
        loss: UnpairedLoss::ApoZeroUnpaired,
        ..UnpairedObjective::default()
    };
    let kl = common::vector(&[0.7], &Device::default());
    let unpaired = number(objective.losses(&unpaired, kl, beta()).unwrap().mean());
    let paired = numbers.loss(&LossConfig::single(Objective::ApoZero));
    assert!((2.0 * unpaired - paired).abs() < ROUNDING);
}
