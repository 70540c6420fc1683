use burn::tensor::{Int, Tensor};

/// The log-probability of each target under its row of logits.
///
/// `log π(a|s) = z_a − log Σ_v exp z_v`, with the largest logit taken out first, so that no
/// exponential overflows.
///
/// `logits` is `[rows, vocab]`, `targets` is `[rows]`; the result is `[rows]`, in nats.
///
/// # Panics
///
/// If the number of rows differs.
pub fn token_logps(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let [rows, _] = logits.dims();
    assert_eq!(targets.dims(), [rows], "one target for each row of logits");
    let (shifted, log_total) = shifted_log_total(logits);
    // The target is shifted too before the subtraction: large logits would cancel digits.
    let picked = shifted.gather(1, targets.reshape([rows, 1]));
    (picked - log_total).reshape([rows])
}

/// Logits less the largest of their row, `[rows, vocab]`, and `log Σ_v exp` of that, `[rows, 1]`.
pub(crate) fn shifted_log_total(logits: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    // The shift cancels in every use, so that no gradient needs to pass through it.
    let largest = logits.clone().detach().max_dim(1);
    let shifted = logits - largest;
    let log_total = shifted.clone().exp().sum_dim(1).log();
    (shifted, log_total)
}

/// Per-token log-probabilities of a batch of completions.
#[derive(Clone, Debug)]
pub struct TokenLogps {
    /// `[batch, seq]`, nats; zero where the mask is zero.
    pub values: Tensor<2>,
    /// `[batch, seq]`; one at completion tokens, zero elsewhere.
    pub mask: Tensor<2>,
}

impl TokenLogps {
    /// Puts the log-probabilities of the completion tokens, which stand one after the other in
    /// `flat`, `[n_tokens]`, to their places in a `[batch, seq]` table.
    ///
    /// `places` holds `row * seq + column` of each token.
    ///
    /// # Panics
    ///
    /// If `flat` and `places` differ in length.
    pub fn scatter(flat: Tensor<1>, places: Tensor<1, Int>, batch: usize, seq: usize) -> Self {
        assert_eq!(flat.dims(), places.dims(), "one place for each token");
        let device = flat.device();
        let table = |values: Tensor<1>| {
            Tensor::<1>::zeros([batch * seq], &device)
                .select_assign(
                    0,
                    places.clone(),
                    values,
                    burn::tensor::IndexingUpdateOp::Add,
                )
                .reshape([batch, seq])
        };
        Self {
            mask: table(flat.ones_like().detach()),
            values: table(flat),
        }
    }

    /// `log π(y|x)` of each row, `[batch]`, in nats.
    pub fn sums(&self) -> Tensor<1> {
        let [batch, _] = self.values.dims();
        self.values.clone().sum_dim(1).reshape([batch])
    }

    /// Number of completion tokens of each row, `[batch]`.
    pub fn counts(&self) -> Tensor<1> {
        let [batch, _] = self.mask.dims();
        self.mask.clone().sum_dim(1).reshape([batch])
    }
}

/// Summed log-probabilities of the two completions of each pair.
#[derive(Clone, Debug)]
pub struct PairLogps {
    /// `[batch]`, nats.
    pub chosen: Tensor<1>,
    /// `[batch]`, nats.
    pub rejected: Tensor<1>,
}

impl PairLogps {
    /// Splits the sums of a batch whose first half are the chosen completions and whose second
    /// half, in the same order, are the rejected ones.
    ///
    /// # Panics
    ///
    /// If the batch is odd.
    pub fn from_halves(sums: Tensor<1>) -> Self {
        let [rows] = sums.dims();
        assert_eq!(rows % 2, 0, "chosen and rejected halves are of one size");
        Self {
            chosen: sums.clone().narrow(0, 0, rows / 2),
            rejected: sums.narrow(0, rows / 2, rows / 2),
        }
    }

    /// Log-ratios: these logps, the policy's, minus the reference's; nats.
    pub fn minus(&self, reference: &Self) -> Self {
        Self {
            chosen: self.chosen.clone() - reference.chosen.clone(),
            rejected: self.rejected.clone() - reference.rejected.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use proptest::prelude::*;

    use super::*;

    /// f32 rounding of a sum of a few dozen exponentials.
    const TOLERANCE: f64 = 2e-6;

    fn logps(logits: &[Vec<f32>], targets: &[i64]) -> Vec<f32> {
        let device = Device::default();
        let shape = [logits.len(), logits[0].len()];
        let logits = Tensor::from_data(TensorData::new(logits.concat(), shape), &device);
        let targets = TensorData::new(targets.to_vec(), [targets.len()]);
        token_logps(logits, Tensor::from_data(targets, &device))
            .try_into_vec_as()
            .unwrap()
    }

    #[test]
    fn equal_logits_give_the_log_of_their_number() {
        let got = logps(&[vec![3.0; 8]], &[5]);
        assert!((f64::from(got[0]) + 8f64.ln()).abs() < TOLERANCE);
    }

    #[test]
    fn huge_logits_neither_overflow_nor_lose_the_answer() {
        let got = logps(&[vec![1e4, 1e4 - 1.0], vec![-1e4, -1e4]], &[0, 1]);
        let expected = -(1.0 + (-1f64).exp()).ln();
        assert!((f64::from(got[0]) - expected).abs() < TOLERANCE);
        assert!((f64::from(got[1]) + 2f64.ln()).abs() < TOLERANCE);
    }

    #[test]
    fn scattered_tokens_sum_by_row_and_leave_zeros_elsewhere() {
        let device = Device::default();
        let flat = Tensor::from_floats([-1.0, -2.0, -4.0], &device);
        let places = Tensor::from_ints([1, 2, 5], &device);
        let table = TokenLogps::scatter(flat, places, 2, 3);
        let values: Vec<f32> = table.values.clone().try_into_vec_as().unwrap();
        assert_eq!(values, [0.0, -1.0, -2.0, 0.0, 0.0, -4.0]);
        assert_eq!(table.sums().try_into_vec_as::<f32>().unwrap(), [-3.0, -4.0]);
        assert_eq!(table.counts().try_into_vec_as::<f32>().unwrap(), [2.0, 1.0]);
    }

    proptest! {
        #[test]
        fn probabilities_of_all_targets_sum_to_one(
            row in prop::collection::vec(-30f32..30.0, 1..12), shift in -50f32..50.0,
        ) {
            let all: Vec<i64> = (0..row.len() as i64).collect();
            let got = logps(&vec![row.clone(); row.len()], &all);
            let total: f64 = got.iter().map(|&logp| f64::from(logp).exp()).sum();
            prop_assert!((total - 1.0).abs() < 1e-5);
            // A constant added to all logits changes nothing, beyond the rounding of the sum.
            let shifted: Vec<f32> = row.iter().map(|x| x + shift).collect();
            let moved = logps(&vec![shifted; all.len()], &all);
            for (a, b) in got.iter().zip(moved) {
                prop_assert!((a - b).abs() < 1e-4);
            }
        }
    }
}
