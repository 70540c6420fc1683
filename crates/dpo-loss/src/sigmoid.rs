use burn::tensor::{Tensor, activation::log_sigmoid};
use mdp_core::Beta;

use crate::logps::PairLogps;

/// The DPO loss of each pair.
///
/// `−log σ(β (chosen log-ratio − rejected log-ratio))`, where a log-ratio is policy minus
/// reference: equation 9 of Rafailov et al. (2024), arXiv 2404.12358, which is equation 7 of
/// arXiv 2305.18290. `log σ` is computed as such, since `σ` underflows at margins near −90.
///
/// Returns `[batch]`, in nats; reduce it in the caller.
pub fn dpo_loss(policy: &PairLogps, reference: &PairLogps, beta: Beta) -> Tensor<1> {
    let logratios = policy.minus(reference);
    -log_sigmoid((logratios.chosen - logratios.rejected).mul_scalar(beta.get()))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn pair(values: [f32; 2], device: &Device) -> PairLogps {
        PairLogps {
            chosen: Tensor::from_floats([values[0]], device),
            rejected: Tensor::from_floats([values[1]], device),
        }
    }

    fn loss(policy: [f32; 2], reference: [f32; 2], beta: f64) -> f64 {
        let device = Device::default();
        let beta = Beta::new(beta).unwrap();
        let loss = dpo_loss(&pair(policy, &device), &pair(reference, &device), beta);
        f64::from(loss.into_scalar::<f32>())
    }

    /// f32 arithmetic on numbers of order one.
    const TOLERANCE: f64 = 1e-6;

    #[test]
    fn loss_is_log_two_when_policy_equals_reference() {
        assert!((loss([-7.0, -3.0], [-7.0, -3.0], 0.1) - 2f64.ln()).abs() < TOLERANCE);
    }

    #[test]
    fn swapping_a_pair_negates_its_margin() {
        let (one, other) = (
            loss([-3.0, -5.0], [-4.0, -4.0], 0.5),
            loss([-5.0, -3.0], [-4.0, -4.0], 0.5),
        );
        // -log σ(m) + log σ(-m) = -m
        assert!((one - other + 1.0).abs() < TOLERANCE);
    }

    #[test]
    fn extreme_margins_stay_finite() {
        assert!(loss([900.0, -900.0], [0.0, 0.0], 1.0).abs() < TOLERANCE);
        assert!((loss([-900.0, 900.0], [0.0, 0.0], 1.0) - 1800.0).abs() < 1e-3);
    }

    #[test]
    fn gradient_equals_finite_differences() {
        let device = Device::default().autodiff();
        let (policy, reference, beta) = ([-3.0_f32, -4.5], [-3.5, -4.0], 0.3);
        let tracked = PairLogps {
            chosen: Tensor::from_floats([policy[0]], &device).require_grad(),
            rejected: Tensor::from_floats([policy[1]], &device).require_grad(),
        };
        let total = dpo_loss(
            &tracked,
            &pair(reference, &device),
            Beta::new(beta).unwrap(),
        );
        let grads = total.sum().backward();
        let step = 1e-2;
        for (side, tensor) in [&tracked.chosen, &tracked.rejected].into_iter().enumerate() {
            let got: f32 = tensor.grad(&grads).unwrap().into_scalar();
            let (mut up, mut down) = (policy, policy);
            up[side] += step;
            down[side] -= step;
            let slope = (loss(up, reference, beta) - loss(down, reference, beta)) / (2.0 * 1e-2);
            // Central differences in f32 at this step are good to about 1e-5.
            assert!(
                (f64::from(got) - slope).abs() < 5e-5,
                "{got} against {slope}"
            );
        }
    }
}
