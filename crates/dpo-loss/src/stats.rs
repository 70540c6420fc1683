use burn::tensor::{Int, Tensor};

use crate::logps::shifted_log_total;

/// What is logged of the distributions at completion tokens; no gradient passes.
#[derive(Clone, Debug)]
pub struct TokenStats {
    /// Entropy of the next token, `[rows]`, nats.
    pub entropy: Tensor<1>,
    /// Mean logit over the vocabulary, `[rows]`.
    pub mean_logit: Tensor<1>,
    /// One where the target is the most likely token, `[rows]`; of equals, the lowest id is it.
    pub top1: Tensor<1>,
}

/// Entropy, mean logit and top-1 hits at each row of logits `[rows, vocab]`.
///
/// `targets` is `[rows]`.
pub fn token_stats(logits: Tensor<2>, targets: Tensor<1, Int>) -> TokenStats {
    let logits = logits.detach();
    let [rows, _] = logits.dims();
    let (shifted, log_total) = shifted_log_total(logits.clone());
    let probabilities = (shifted.clone() - log_total.clone()).exp();
    // H = log Σ exp z − Σ p z
    let entropy = log_total - (probabilities * shifted).sum_dim(1);
    let best = logits.clone().argmax(1).reshape([rows]);
    TokenStats {
        entropy: entropy.reshape([rows]),
        mean_logit: logits.mean_dim(1).reshape([rows]),
        top1: best.equal(targets).float(),
    }
}

/// `log Σ_v π(v|s)²` at each row of logits `[rows, vocab]`; `[rows]`, without gradient.
///
/// The log-probability that a token drawn from the policy gets on average; WPO, equation 2 of Zhou et
/// al. (2024), arXiv 2406.11827, compares the tokens of a completion with it.
pub fn log_sum_sq_probs(logits: Tensor<2>) -> Tensor<1> {
    let logits = logits.detach();
    let [rows, _] = logits.dims();
    let (shifted, log_total) = shifted_log_total(logits);
    let squares = shifted.mul_scalar(2.0).exp().sum_dim(1).log();
    (squares - log_total.mul_scalar(2.0)).reshape([rows])
}

/// `KL(p ‖ q)` of the distributions at each row of two tables of logits, `[rows, vocab]` each;
/// `[rows]`, nats. Gradients pass to both.
///
/// With `p` the reference and `q` the policy these are the KLs of TDPO.
///
/// # Panics
///
/// If the shapes differ.
pub fn position_kls(p: Tensor<2>, q: Tensor<2>) -> Tensor<1> {
    assert_eq!(p.dims(), q.dims(), "two distributions of one vocabulary");
    let [rows, _] = p.dims();
    let logps = |logits: Tensor<2>| {
        let (shifted, log_total) = shifted_log_total(logits);
        shifted - log_total
    };
    let (p, q) = (logps(p), logps(q));
    (p.clone().exp() * (p - q)).sum_dim(1).reshape([rows])
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn a_uniform_row_has_the_entropy_of_its_size() {
        let device = Device::default();
        let logits = Tensor::from_floats([[2.0, 2.0, 2.0, 2.0], [0.0, 30.0, 0.0, -2.0]], &device);
        let stats = token_stats(logits, Tensor::from_ints([0, 1], &device));
        let entropy: Vec<f32> = stats.entropy.try_into_vec_as().unwrap();
        // f32 rounding near one, and a distribution that is all but certain.
        assert!((entropy[0] - 4f32.ln()).abs() < 1e-6 && entropy[1].abs() < 1e-5);
        assert_eq!(
            stats.mean_logit.try_into_vec_as::<f32>().unwrap(),
            [2.0, 7.0]
        );
        assert_eq!(stats.top1.try_into_vec_as::<f32>().unwrap(), [1.0, 1.0]);
    }

    /// Probabilities of the rows below, worked by hand: (1/4, 3/4) and (1/2, 1/2).
    fn rows(device: &Device) -> [Tensor<2>; 2] {
        let three = 3f32.ln();
        [
            Tensor::from_floats([[5.0, 5.0 + three]], device),
            Tensor::from_floats([[-2.0, -2.0]], device),
        ]
    }

    #[test]
    fn sums_of_squared_probabilities_are_those_worked_by_hand() {
        let [skewed, even] = rows(&Device::default());
        let got: f32 = log_sum_sq_probs(skewed).into_scalar();
        assert!((got - (10f32 / 16.0).ln()).abs() < 1e-6);
        let got: f32 = log_sum_sq_probs(even).into_scalar();
        assert!((got - 0.5f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn position_kls_are_those_worked_by_hand_and_zero_of_equals() {
        let [skewed, even] = rows(&Device::default());
        let got: f32 = position_kls(skewed.clone(), even.clone()).into_scalar();
        assert!((got - (0.25 * 0.5f32.ln() + 0.75 * 1.5f32.ln())).abs() < 1e-6);
        let got: f32 = position_kls(even.clone(), skewed).into_scalar();
        assert!((got - 0.5 * (2f32.ln() + (2f32 / 3.0).ln())).abs() < 1e-6);
        let got: f32 = position_kls(even.clone(), even).into_scalar();
        assert!(got.abs() < 1e-6);
    }
}
