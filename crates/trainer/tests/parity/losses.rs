//! Losses and what they are made of: values, and gradients of the policy's logps.

use burn::tensor::{Device, Int, Tensor, TensorData};
use dpo_loss::{
    Beta, LossConfig, Objective, Objectives, PairBatch, PairInputs, PairTable, PairTokens,
    TokenLogps, UnpairedBatch, UnpairedLoss, UnpairedObjective, kl_estimate, log_sum_sq_probs,
    position_kls, token_logps, token_stats,
};

use super::{LOGP_TOLERANCE, OP_TOLERANCE, assert_close, noise, numbers, on_both};

/// Completions, twice the pairs, and tokens of the longest.
const ROWS: usize = 8;
const SEQ: usize = 5;

/// `[ROWS, SEQ]`, from `low` to `high` at tokens of completions of unequal length, and 0 behind.
fn table(seed: u64, low: f32, high: f32, device: &Device) -> Tensor<2> {
    let values = noise(seed, ROWS * SEQ);
    let values: Vec<f32> = values
        .iter()
        .enumerate()
        .map(|(at, x)| {
            let is_token = at % SEQ <= at / SEQ % SEQ;
            f32::from(is_token) * (low + (x + 1.0) / 2.0 * (high - low))
        })
        .collect();
    Tensor::from_data(TensorData::new(values, [ROWS, SEQ]), device)
}

fn tokens(values: Tensor<2>, device: &Device) -> PairTokens {
    let mask = table(0, 1.0, 1.0, device);
    PairTokens::from_halves(TokenLogps { values, mask })
}

#[test]
fn every_preference_loss_agrees_with_its_gradient() {
    let beta = Beta::new(0.3).unwrap();
    for objective in Objective::ALL {
        let config = LossConfig {
            label_smoothing: 0.1,
            ..LossConfig::single(objective)
        };
        let objectives = Objectives::new(config).unwrap();
        let [cpu, device] = on_both(|device| {
            let device = &device.clone().autodiff();
            let policy = table(1, -3.0, -0.1, device).require_grad();
            let halves = |table| Some(PairTable::from_halves(table));
            let batch = PairBatch {
                policy: tokens(policy.clone(), device),
                reference: tokens(table(2, -3.0, -0.1, device), device).into(),
                inputs: PairInputs {
                    log_sum_sq_probs: halves(table(3, -2.0, -0.1, device)),
                    position_kls: halves(table(4, 0.0, 1.0, device)),
                    token_weights: halves(table(5, 0.0, 2.0, device)),
                    step_mask: halves(table(6, 1.0, 1.0, device)),
                },
            };
            let loss = objectives.loss(&batch, beta).unwrap();
            let gradients = loss.backward();
            let gradient = policy.grad(&gradients).unwrap();
            [numbers(loss.inner()), numbers(gradient)].concat()
        });
        assert_close(&cpu, &device, LOGP_TOLERANCE, objective.name());
    }
}

#[test]
fn unpaired_losses_agree_with_their_gradients() {
    let beta = Beta::new(0.3).unwrap();
    for loss in [UnpairedLoss::Kto, UnpairedLoss::ApoZeroUnpaired] {
        let objective = UnpairedObjective {
            loss,
            ..UnpairedObjective::default()
        };
        let [cpu, device] = on_both(|device| {
            let device = &device.clone().autodiff();
            let policy = table(1, -3.0, -0.1, device).require_grad();
            let reference = tokens(table(2, -3.0, -0.1, device), device).sums();
            let batch =
                UnpairedBatch::from_pairs(&tokens(policy.clone(), device).sums(), &reference);
            let kl = kl_estimate(reference.chosen, reference.rejected);
            let loss = objective.losses(&batch, kl, beta).unwrap().mean();
            let gradients = loss.backward();
            let gradient = policy.grad(&gradients).unwrap();
            [numbers(loss.inner()), numbers(gradient)].concat()
        });
        assert_close(&cpu, &device, LOGP_TOLERANCE, &format!("{loss:?}"));
    }
}

#[test]
fn logps_and_figures_of_logits_agree_with_their_gradients() {
    // A vocabulary that fills no whole number of any device's groups.
    let (rows, vocab) = (9, 501);
    let logits = |seed, device: &Device| {
        let values: Vec<f32> = noise(seed, rows * vocab).iter().map(|x| 12.0 * x).collect();
        Tensor::<2>::from_data(TensorData::new(values, [rows, vocab]), device)
    };
    let [cpu, device] = on_both(|device| {
        let targets: Vec<i64> = (0..rows as i64).map(|row| row * 55).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [rows]), device);
        let p = logits(1, device).autodiff().require_grad();
        let logps = token_logps(p.clone(), targets.clone());
        let kls = position_kls(logits(2, device).autodiff(), p.clone());
        let weights = Tensor::<1>::from_floats(&noise(3, rows)[..], device).autodiff();
        let gradients = ((logps.clone() + kls.clone()) * weights).sum().backward();
        let stats = token_stats(logits(1, device), targets);
        let figures = [
            numbers(logps.inner()),
            numbers(kls.inner()),
            numbers(log_sum_sq_probs(logits(1, device))),
            numbers(stats.entropy),
            numbers(stats.mean_logit),
            numbers(stats.top1),
        ];
        (figures, numbers(p.grad(&gradients).unwrap()))
    });
    for (cpu, device) in cpu.0.iter().zip(&device.0) {
        assert_close(cpu, device, LOGP_TOLERANCE, "figures");
    }
    assert_close(&cpu.1, &device.1, OP_TOLERANCE, "gradient of the logits");
}
