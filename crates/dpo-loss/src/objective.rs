use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::LossError;

/// A preference loss, by its name in a recipe. The first fifteen are TRL's, with TRL's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// [`crate::dpo_loss`] of scores.
    #[default]
    Sigmoid,
    /// [`crate::hinge_loss`].
    Hinge,
    /// [`crate::ipo_loss`], on scores averaged over tokens.
    Ipo,
    /// [`crate::exo_loss`].
    ExoPair,
    /// [`crate::nca_loss`].
    NcaPair,
    /// [`crate::robust_loss`].
    Robust,
    /// [`crate::bco_loss`].
    BcoPair,
    /// [`crate::sppo_loss`].
    SppoHard,
    /// [`crate::aot_loss`].
    Aot,
    /// [`crate::aot_unpaired_loss`].
    AotUnpaired,
    /// [`crate::apo_zero_loss`].
    ApoZero,
    /// [`crate::apo_down_loss`].
    ApoDown,
    /// [`crate::discopop_loss`].
    Discopop,
    /// [`crate::sft_loss`].
    Sft,
    /// [`crate::dpo_loss`] of scores averaged over tokens; Lambert et al. (2024), arXiv 2411.15124.
    SigmoidNorm,
    /// [`crate::conservative_loss`].
    Cdpo,
    /// [`crate::simpo_loss`].
    Simpo,
    /// [`crate::orpo_loss`].
    Orpo,
    /// [`crate::cpo_loss`].
    Cpo,
    /// [`crate::dpo_positive_loss`].
    DpoPositive,
    /// [`crate::reference_free_loss`].
    ReferenceFree,
    /// [`crate::tdpo1_loss`].
    Tdpo1,
    /// [`crate::tdpo2_loss`].
    Tdpo2,
    /// [`crate::token_weighted_loss`].
    TokenWeighted,
    /// [`crate::step_loss`].
    Step,
}

/// What a loss must know of the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReferenceNeed {
    /// Nothing.
    Absent,
    /// The log-probability of each completion.
    Sums,
    /// The log-probability of each token.
    Tokens,
}

/// Where a loss rests on endless pairs, both sides drawn from the reference and labelled by the
/// Bradley-Terry model of true returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Optimum {
    /// At the policy that solves the KL-regularised problem.
    Exact,
    /// There, if a share `label_smoothing` of the labels was turned, and not otherwise.
    ExactIfTurned,
    /// Elsewhere, or nowhere.
    Other,
}

impl Objective {
    /// Every loss, TRL's fifteen first.
    pub const ALL: [Self; 25] = [
        Self::Sigmoid,
        Self::Hinge,
        Self::Ipo,
        Self::ExoPair,
        Self::NcaPair,
        Self::Robust,
        Self::BcoPair,
        Self::SppoHard,
        Self::Aot,
        Self::AotUnpaired,
        Self::ApoZero,
        Self::ApoDown,
        Self::Discopop,
        Self::Sft,
        Self::SigmoidNorm,
        Self::Cdpo,
        Self::Simpo,
        Self::Orpo,
        Self::Cpo,
        Self::DpoPositive,
        Self::ReferenceFree,
        Self::Tdpo1,
        Self::Tdpo2,
        Self::TokenWeighted,
        Self::Step,
    ];

    /// The name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sigmoid => "sigmoid",
            Self::Hinge => "hinge",
            Self::Ipo => "ipo",
            Self::ExoPair => "exo_pair",
            Self::NcaPair => "nca_pair",
            Self::Robust => "robust",
            Self::BcoPair => "bco_pair",
            Self::SppoHard => "sppo_hard",
            Self::Aot => "aot",
            Self::AotUnpaired => "aot_unpaired",
            Self::ApoZero => "apo_zero",
            Self::ApoDown => "apo_down",
            Self::Discopop => "discopop",
            Self::Sft => "sft",
            Self::SigmoidNorm => "sigmoid_norm",
            Self::Cdpo => "cdpo",
            Self::Simpo => "simpo",
            Self::Orpo => "orpo",
            Self::Cpo => "cpo",
            Self::DpoPositive => "dpo_positive",
            Self::ReferenceFree => "reference_free",
            Self::Tdpo1 => "tdpo1",
            Self::Tdpo2 => "tdpo2",
            Self::TokenWeighted => "token_weighted",
            Self::Step => "step",
        }
    }

    /// Where the loss comes from.
    pub fn source(self) -> &'static str {
        match self {
            Self::Sigmoid => "arXiv 2305.18290, equation 7",
            Self::Hinge => "arXiv 2305.10425 and 2309.06657",
            Self::Ipo => "arXiv 2310.12036, equation 17",
            Self::ExoPair => "arXiv 2402.00856, equation 16",
            Self::NcaPair => "arXiv 2402.05369",
            Self::Robust => "arXiv 2403.00409",
            Self::BcoPair => "arXiv 2404.04656",
            Self::SppoHard => "arXiv 2405.00675, equation 4.7",
            Self::Aot | Self::AotUnpaired => "arXiv 2406.05882",
            Self::ApoZero => "arXiv 2408.06266, equation 7",
            Self::ApoDown => "arXiv 2408.06266, equation 8",
            Self::Discopop => "arXiv 2406.08414, equation 5",
            Self::Sft => "maximum likelihood",
            Self::SigmoidNorm => "arXiv 2411.15124",
            Self::Cdpo => "ericmitchell.ai/cdpo.pdf, equation 3",
            Self::Simpo => "arXiv 2405.14734, equation 6",
            Self::Orpo => "arXiv 2403.07691, equations 6 and 7",
            Self::Cpo => "arXiv 2401.08417",
            Self::DpoPositive => "arXiv 2402.13228, equation 3",
            Self::ReferenceFree => "arXiv 2305.18290, equation 7, uniform reference",
            Self::Tdpo1 | Self::Tdpo2 => "arXiv 2404.11999",
            Self::TokenWeighted => "arXiv 2410.04350",
            Self::Step => "arXiv 2406.18629",
        }
    }

    /// Where the loss rests on endless pairs, with `label_smoothing` above 0 where it is read and
    /// the reverse KL.
    pub fn optimum(self) -> Optimum {
        match self {
            Self::Sigmoid => Optimum::Exact,
            Self::Robust => Optimum::ExactIfTurned,
            _ => Optimum::Other,
        }
    }

    /// Whether `label_smoothing` changes the loss.
    pub fn uses_label_smoothing(self) -> bool {
        matches!(
            self,
            Self::ExoPair
                | Self::Robust
                | Self::Aot
                | Self::AotUnpaired
                | Self::Cdpo
                | Self::Simpo
                | Self::Cpo
        )
    }

    /// Whether the loss has a form under divergences other than the reverse KL.
    pub fn allows_divergence(self) -> bool {
        matches!(
            self,
            Self::Sigmoid
                | Self::SigmoidNorm
                | Self::Hinge
                | Self::Ipo
                | Self::ExoPair
                | Self::Robust
                | Self::Discopop
                | Self::Sft
                | Self::Cdpo
        )
    }

    /// Whether the loss is one of summed log-probabilities, which `ld_alpha` changes.
    ///
    /// `sft` has none, and is left as it is where others in a list are changed.
    pub fn allows_length_desensitising(self) -> bool {
        !matches!(
            self,
            Self::Simpo | Self::Orpo | Self::Tdpo1 | Self::Tdpo2 | Self::TokenWeighted | Self::Step
        )
    }

    /// Whether the loss of a pair can be weighted: not where it mixes pairs.
    pub fn allows_weighting(self) -> bool {
        !matches!(
            self,
            Self::Aot | Self::AotUnpaired | Self::Sft | Self::Orpo | Self::Cpo
        )
    }

    /// Whether the loss of a batch is the mean of its pairs' losses when each is alone.
    pub fn is_pair_mean(self) -> bool {
        // All others either sort the batch or take the mean over its tokens.
        self.allows_weighting()
    }

    /// What the loss must know of the reference.
    pub fn reference_need(self) -> ReferenceNeed {
        match self {
            Self::Sft | Self::Simpo | Self::Orpo | Self::Cpo | Self::ReferenceFree => {
                ReferenceNeed::Absent
            }
            Self::TokenWeighted | Self::Step => ReferenceNeed::Tokens,
            _ => ReferenceNeed::Sums,
        }
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Objective {
    type Err = LossError;

    fn from_str(name: &str) -> Result<Self, LossError> {
        Self::ALL
            .into_iter()
            .find(|objective| objective.name() == name)
            .ok_or_else(|| LossError::UnknownObjective {
                name: name.to_string(),
                known: Self::ALL.map(Self::name).join(", "),
            })
    }
}
