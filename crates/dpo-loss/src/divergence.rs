use burn::tensor::{DType, Tensor, activation::log_sigmoid};
use serde::{Deserialize, Serialize};

/// The divergence from the reference that a policy pays for; TRL's names.
///
/// DPO under the divergence `D_f` has the score `g(ρ) = f'(e^ρ)` of a log-ratio `ρ` in the place of
/// `ρ` itself (up to a constant, which cancels): Wang et al. (2023), arXiv 2309.16240. With any but
/// [`Divergence::ReverseKl`] the optimum is that of another problem, not of the KL-regularised one.
/// Reported rewards stay `β ρ`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// `g(ρ) = ρ`: the KL penalty of the paper.
    #[default]
    ReverseKl,
    /// `g(ρ) = 1 − e^{−ρ}`.
    ForwardKl,
    /// `g(ρ) = log 2 + log σ(ρ)`.
    JsDivergence,
    /// `g(ρ) = (e^{(α−1)ρ} − 1) / (α − 1)`, with the exponent held below 80 (11 in f16). Within 1e-6
    /// of `α = 1` it is `ρ`.
    AlphaDivergence,
}

/// Nearer to 1 than this, α is 1.
const ALPHA_IS_ONE: f64 = 1e-6;

impl Divergence {
    /// `g` of log-ratios, in nats; any shape.
    pub fn scores<const D: usize>(self, logratios: Tensor<D>, alpha: f64) -> Tensor<D> {
        match self {
            Self::ReverseKl => logratios,
            Self::ForwardKl => (-logratios).exp().neg().add_scalar(1.0),
            Self::JsDivergence => log_sigmoid(logratios).add_scalar(std::f64::consts::LN_2),
            Self::AlphaDivergence if (alpha - 1.0).abs() < ALPHA_IS_ONE => logratios,
            Self::AlphaDivergence => {
                let largest = if logratios.dtype() == DType::F16 {
                    11.0
                } else {
                    80.0
                };
                let exponent = logratios.mul_scalar(alpha - 1.0).clamp_max(largest);
                exponent
                    .exp()
                    .sub_scalar(1.0)
                    .mul_scalar(1.0 / (alpha - 1.0))
            }
        }
    }

    /// The name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::ReverseKl => "reverse_kl",
            Self::ForwardKl => "forward_kl",
            Self::JsDivergence => "js_divergence",
            Self::AlphaDivergence => "alpha_divergence",
        }
    }
}
