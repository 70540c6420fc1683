use burn::tensor::{Tensor, activation::log_sigmoid};
use mdp_core::Beta;
use serde::{Deserialize, Deserializer, Serialize};

use crate::LossError;
use crate::divergence::Divergence;
use crate::likelihood::{cpo_loss, orpo_loss, reference_free_loss, sft_loss, simpo_loss};
use crate::logps::PairLogps;
use crate::margin::{
    conservative_loss, discopop_loss, exo_loss, hinge_loss, ipo_loss, robust_loss,
};
use crate::objective::{Objective, ReferenceNeed};
use crate::pair::{PairBatch, PairTable, PairTokens, ReferenceLogps, row_sums};
use crate::pointwise::{
    apo_down_loss, apo_zero_loss, bco_loss, dpo_positive_loss, nca_loss, sppo_loss,
};
use crate::sorted::{aot_loss, aot_unpaired_loss};
use crate::token_level::{step_loss, tdpo1_loss, tdpo2_loss, token_weighted_loss};

/// Losses, their weights and their parameters, as a recipe has them; TRL's names where TRL has one.
///
/// ```
/// # use dpo_loss::{LossConfig, Objective, Objectives};
/// let rpo: LossConfig = toml::from_str(r#"
///     loss = ["sigmoid", "sft"]
///     loss_weights = [1.0, 0.5]
/// "#).unwrap();
/// assert_eq!(rpo, LossConfig::rpo(0.5));
/// let plain: LossConfig = toml::from_str(r#"loss = "hinge""#).unwrap();
/// assert_eq!(plain.loss, [Objective::Hinge]);
/// assert!(Objectives::new(plain).is_ok());
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossConfig {
    /// The losses; one name or a list.
    #[serde(alias = "loss_type", deserialize_with = "one_or_many")]
    pub loss: Vec<Objective>,
    /// A weight for each loss; empty for all 1.
    pub loss_weights: Vec<f64>,
    /// Share of labels taken to be turned; which losses read it, [`Objective`] says.
    pub label_smoothing: f64,
    /// The divergence from the reference.
    pub f_divergence_type: Divergence,
    /// α of [`Divergence::AlphaDivergence`].
    pub f_alpha_divergence_coef: f64,
    /// Weight of tokens past the shorter completion's length, from 0 to 1: LD-DPO, arXiv 2409.06411.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ld_alpha: Option<f64>,
    /// Weighs each pair by how likely the policy is to write it: WPO, arXiv 2406.11827.
    pub use_weighting: bool,
    /// Width of the step between the two halves of `discopop`.
    pub discopop_tau: f64,
    /// Target margin of `simpo`, reward units.
    pub simpo_gamma: f64,
    /// Weight of the fine-tuning term in `cpo`.
    pub cpo_alpha: f64,
    /// Weight of the penalty in `dpo_positive`.
    pub dpop_lambda: f64,
    /// Weight of the KL offset in `tdpo2`.
    pub tdpo_alpha: f64,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            loss: vec![Objective::Sigmoid],
            loss_weights: Vec::new(),
            label_smoothing: 0.0,
            f_divergence_type: Divergence::ReverseKl,
            f_alpha_divergence_coef: 0.5,
            ld_alpha: None,
            use_weighting: false,
            discopop_tau: 0.05,
            simpo_gamma: 0.5,
            cpo_alpha: 1.0,
            dpop_lambda: 50.0,
            tdpo_alpha: 0.5,
        }
    }
}

impl LossConfig {
    /// One loss with default parameters.
    pub fn single(loss: Objective) -> Self {
        Self {
            loss: vec![loss],
            ..Self::default()
        }
    }

    /// MPO, Wang et al. (2024), arXiv 2411.10442: `0.8 sigmoid + 0.2 bco_pair + sft`.
    pub fn mpo() -> Self {
        Self {
            loss: vec![Objective::Sigmoid, Objective::BcoPair, Objective::Sft],
            loss_weights: vec![0.8, 0.2, 1.0],
            ..Self::default()
        }
    }

    /// RPO, Pang et al. (2024), arXiv 2404.19733: `sigmoid + alpha · sft`.
    pub fn rpo(alpha: f64) -> Self {
        Self {
            loss: vec![Objective::Sigmoid, Objective::Sft],
            loss_weights: vec![1.0, alpha],
            ..Self::default()
        }
    }
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Objective>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Names {
        One(String),
        Many(Vec<String>),
    }
    let names = match Names::deserialize(deserializer)? {
        Names::One(name) => vec![name],
        Names::Many(names) => names,
    };
    names
        .iter()
        .map(|name| name.parse().map_err(serde::de::Error::custom))
        .collect()
}

/// What a batch must hold for a choice of losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// What must be known of the reference.
    pub reference: ReferenceNeed,
    /// [`crate::PairInputs::log_sum_sq_probs`].
    pub log_sum_sq_probs: bool,
    /// [`crate::PairInputs::position_kls`].
    pub position_kls: bool,
    /// [`crate::PairInputs::token_weights`].
    pub token_weights: bool,
    /// [`crate::PairInputs::step_mask`].
    pub step_mask: bool,
}

/// A weighted sum of losses whose parameters were checked.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use dpo_loss::*;
///
/// let device = Device::default();
/// let tokens = |chosen: [f32; 2], rejected: [f32; 1]| PairTokens {
///     chosen: TokenLogps {
///         values: Tensor::from_floats([chosen], &device),
///         mask: Tensor::ones([1, 2], &device),
///     },
///     rejected: TokenLogps {
///         values: Tensor::from_floats([rejected], &device),
///         mask: Tensor::ones([1, 1], &device),
///     },
/// };
/// let batch = PairBatch::new(tokens([-1.0, -2.0], [-5.0]), tokens([-2.0, -2.0], [-4.0]));
/// let objectives = Objectives::new(LossConfig::single(Objective::Hinge)).unwrap();
/// // Log-ratios are 1 and -1, so with beta 0.1 the margin is 0.2 and the hinge loss 0.8.
/// let loss = objectives.loss(&batch, Beta::new(0.1).unwrap()).unwrap();
/// assert!((loss.into_scalar::<f32>() - 0.8).abs() < 1e-6);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "LossConfig", into = "LossConfig")]
pub struct Objectives(LossConfig);

impl TryFrom<LossConfig> for Objectives {
    type Error = LossError;

    fn try_from(config: LossConfig) -> Result<Self, LossError> {
        Self::new(config)
    }
}

impl From<Objectives> for LossConfig {
    fn from(objectives: Objectives) -> Self {
        objectives.0
    }
}

impl Objectives {
    /// Checks a choice of losses.
    ///
    /// # Errors
    ///
    /// [`LossError`] for an empty list, weights that do not fit it, a parameter out of its range, or
    /// an option that one of the losses has no form with.
    pub fn new(config: LossConfig) -> Result<Self, LossError> {
        if config.loss.is_empty() {
            return Err(LossError::NoTerms);
        }
        if !config.loss_weights.is_empty() && config.loss_weights.len() != config.loss.len() {
            return Err(LossError::WeightCount {
                terms: config.loss.len(),
                weights: config.loss_weights.len(),
            });
        }
        let this = Self(config);
        for (objective, value) in this.terms() {
            if !value.is_finite() {
                return Err(LossError::Weight { objective, value });
            }
        }
        this.check_parameters()?;
        for &objective in &this.0.loss {
            this.check_options(objective)?;
        }
        Ok(this)
    }

    fn check_parameters(&self) -> Result<(), LossError> {
        let config = &self.0;
        let noise = config.label_smoothing;
        let has = |objective| config.loss.contains(&objective);
        let unit = 0.0..=1.0;
        for (fits, name, value, expected) in [
            (
                unit.contains(&noise),
                "label_smoothing",
                noise,
                "a number from 0 to 1",
            ),
            (
                !has(Objective::ExoPair) || (noise > 0.0 && noise < 1.0),
                "label_smoothing",
                noise,
                "a number above 0 and below 1 for `exo_pair`, such as 1e-3",
            ),
            (
                !has(Objective::Robust) || (0.0..0.5).contains(&noise),
                "label_smoothing",
                noise,
                "a number from 0 to below 0.5 for `robust`",
            ),
            (
                config.ld_alpha.is_none_or(|alpha| unit.contains(&alpha)),
                "ld_alpha",
                config.ld_alpha.unwrap_or_default(),
                "a number from 0 to 1",
            ),
            (
                config.f_alpha_divergence_coef.is_finite(),
                "f_alpha_divergence_coef",
                config.f_alpha_divergence_coef,
                "a finite number",
            ),
            (
                config.discopop_tau.is_finite() && config.discopop_tau > 0.0,
                "discopop_tau",
                config.discopop_tau,
                "a finite number above 0",
            ),
            (
                config.simpo_gamma.is_finite(),
                "simpo_gamma",
                config.simpo_gamma,
                "a finite number",
            ),
            (
                config.cpo_alpha.is_finite() && config.cpo_alpha >= 0.0,
                "cpo_alpha",
                config.cpo_alpha,
                "a finite number, at least 0",
            ),
            (
                config.dpop_lambda.is_finite() && config.dpop_lambda >= 0.0,
                "dpop_lambda",
                config.dpop_lambda,
                "a finite number, at least 0",
            ),
            (
                config.tdpo_alpha.is_finite(),
                "tdpo_alpha",
                config.tdpo_alpha,
                "a finite number",
            ),
        ] {
            if !fits {
                return Err(LossError::Parameter {
                    name,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }

    fn check_options(&self, objective: Objective) -> Result<(), LossError> {
        let config = &self.0;
        let refused = if config.f_divergence_type != Divergence::ReverseKl
            && !objective.allows_divergence()
        {
            Some((
                "f_divergence_type",
                "only `reverse_kl` gives its log-ratios a meaning",
            ))
        } else if config.ld_alpha.is_some() && !objective.allows_length_desensitising() {
            Some((
                "ld_alpha",
                "it weighs tokens of its own or divides by their number",
            ))
        } else if config.use_weighting && !objective.allows_weighting() {
            Some(("use_weighting", "it mixes the pairs of a batch"))
        } else {
            None
        };
        match refused {
            Some((option, reason)) => Err(LossError::Unsupported {
                option,
                objective,
                reason,
            }),
            None => Ok(()),
        }
    }

    /// The losses, weights and parameters.
    pub fn config(&self) -> &LossConfig {
        &self.0
    }

    /// Each loss with its weight.
    pub fn terms(&self) -> impl Iterator<Item = (Objective, f64)> + '_ {
        let weights = self.0.loss_weights.iter().copied();
        // An empty list of weights stands for ones.
        let weights = weights.chain(std::iter::repeat(1.0));
        self.0.loss.iter().copied().zip(weights)
    }

    /// What a batch must hold.
    pub fn needs(&self) -> Needs {
        let has = |objective| self.0.loss.contains(&objective);
        let references = self.0.loss.iter().map(|loss| loss.reference_need());
        Needs {
            reference: references.max().unwrap_or(ReferenceNeed::Absent),
            log_sum_sq_probs: self.0.use_weighting,
            position_kls: has(Objective::Tdpo1) || has(Objective::Tdpo2),
            token_weights: has(Objective::TokenWeighted),
            step_mask: has(Objective::Step),
        }
    }

    /// What was set and changes nothing, in sentences for the log.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let noise = self.0.label_smoothing;
        let deaf: Vec<&str> = self
            .0
            .loss
            .iter()
            .filter(|loss| !loss.uses_label_smoothing())
            .map(|loss| loss.name())
            .collect();
        if noise > 0.0 && !deaf.is_empty() {
            warnings.push(format!(
                "label_smoothing = {noise} does not change {}; `cdpo` and `robust` read it",
                deaf.join(", ")
            ));
        }
        let (config, default) = (&self.0, LossConfig::default());
        let has = |objective| config.loss.contains(&objective);
        let is_alpha = config.f_divergence_type == Divergence::AlphaDivergence;
        for (name, value, default, is_read, reader) in [
            (
                "simpo_gamma",
                config.simpo_gamma,
                default.simpo_gamma,
                has(Objective::Simpo),
                "`simpo`",
            ),
            (
                "cpo_alpha",
                config.cpo_alpha,
                default.cpo_alpha,
                has(Objective::Cpo),
                "`cpo`",
            ),
            (
                "dpop_lambda",
                config.dpop_lambda,
                default.dpop_lambda,
                has(Objective::DpoPositive),
                "`dpo_positive`",
            ),
            (
                "tdpo_alpha",
                config.tdpo_alpha,
                default.tdpo_alpha,
                has(Objective::Tdpo2),
                "`tdpo2`",
            ),
            (
                "discopop_tau",
                config.discopop_tau,
                default.discopop_tau,
                has(Objective::Discopop),
                "`discopop`",
            ),
            (
                "f_alpha_divergence_coef",
                config.f_alpha_divergence_coef,
                default.f_alpha_divergence_coef,
                is_alpha,
                "the divergence `alpha_divergence`",
            ),
        ] {
            if !is_read && value.to_bits() != default.to_bits() {
                warnings.push(format!(
                    "{name} = {value} changes nothing; {reader} reads it"
                ));
            }
        }
        warnings
    }

    /// The log-probability of each completion as the losses read it: the sum over tokens, or with
    /// `ld_alpha` [`PairTokens::length_desensitised_sums`].
    ///
    /// For [`ReferenceLogps::Sums`] that are kept from one step to the next.
    pub fn sums(&self, tokens: &PairTokens) -> PairLogps {
        match self.0.ld_alpha {
            Some(alpha) => tokens.length_desensitised_sums(alpha),
            None => tokens.sums(),
        }
    }

    /// The loss of a batch, `[1]`: the weighted sum of its losses' means.
    ///
    /// # Errors
    ///
    /// [`LossError::MissingInput`] if the batch lacks what [`Objectives::needs`] says,
    /// [`LossError::Shape`] if its tensors do not fit together.
    pub fn loss(&self, batch: &PairBatch, beta: Beta) -> Result<Tensor<1>, LossError> {
        Ok(self.pair_losses(batch, beta)?.mean())
    }

    /// The weighted sum of losses of each pair, `[batch]`; its mean is the [`Objectives::loss`].
    ///
    /// `aot` and `aot_unpaired` have a value for each rank instead, and `sft` shares out its token
    /// mean.
    ///
    /// # Errors
    ///
    /// As [`Objectives::loss`].
    pub fn pair_losses(&self, batch: &PairBatch, beta: Beta) -> Result<Tensor<1>, LossError> {
        batch.check()?;
        let view = View::new(self, batch, beta);
        let mut total: Option<Tensor<1>> = None;
        for (objective, weight) in self.terms() {
            let losses = view.losses(objective)?.mul_scalar(weight);
            total = Some(match total {
                Some(total) => total + losses,
                None => losses,
            });
        }
        // A checked list has at least one entry.
        let total = total.ok_or(LossError::NoTerms)?;
        if !self.0.use_weighting {
            return Ok(total);
        }
        let probs = batch.inputs.log_sum_sq_probs.as_ref();
        let probs = probs.ok_or(LossError::MissingInput {
            objective: self.0.loss[0],
            input: "`log_sum_sq_probs` for `use_weighting`",
        })?;
        Ok(total * likelihood_weights(&batch.policy, probs))
    }
}

/// The WPO weight of each pair, `w(y_c) w(y_r)`, `[batch]`, without gradient.
///
/// `w(y) = exp(1/n Σ_t (log π(y_t|s_t) − log Σ_v π(v|s_t)²))`, equation 2 of Zhou et al. (2024), arXiv
/// 2406.11827.
pub fn likelihood_weights(policy: &PairTokens, log_sum_sq_probs: &PairTable) -> Tensor<1> {
    let counts = policy.counts();
    let side = |table: &crate::TokenLogps, squares: &Tensor<2>, counts: Tensor<1>| {
        let aligned = (table.values.clone() - squares.clone()) * table.mask.clone();
        row_sums(aligned) / counts.clamp_min(1.0)
    };
    let chosen = side(&policy.chosen, &log_sum_sq_probs.chosen, counts.chosen);
    let rejected = side(
        &policy.rejected,
        &log_sum_sq_probs.rejected,
        counts.rejected,
    );
    (chosen + rejected).detach().exp()
}

/// A batch as the losses of one list read it.
struct View<'a> {
    config: &'a LossConfig,
    batch: &'a PairBatch,
    beta: Beta,
    policy: PairLogps,
    reference: Option<PairLogps>,
}

impl<'a> View<'a> {
    fn new(objectives: &'a Objectives, batch: &'a PairBatch, beta: Beta) -> Self {
        Self {
            config: objectives.config(),
            batch,
            beta,
            policy: objectives.sums(&batch.policy),
            reference: match &batch.reference {
                ReferenceLogps::Absent => None,
                ReferenceLogps::Sums(sums) => Some(sums.clone()),
                ReferenceLogps::Tokens(tokens) => Some(objectives.sums(tokens)),
            },
        }
    }

    fn losses(&self, objective: Objective) -> Result<Tensor<1>, LossError> {
        let (config, beta, batch) = (self.config, self.beta, self.batch);
        let noise = config.label_smoothing;
        let margins = || self.margins(objective);
        let ratios = || self.logratios(objective);
        Ok(match objective {
            Objective::Sigmoid => -log_sigmoid(margins()?),
            Objective::Hinge => hinge_loss(margins()?),
            Objective::Ipo => ipo_loss(&self.mean_scores(objective)?, beta),
            Objective::ExoPair => exo_loss(margins()?, noise),
            Objective::NcaPair => nca_loss(&ratios()?, beta),
            Objective::Robust => robust_loss(margins()?, noise),
            Objective::BcoPair => bco_loss(&ratios()?, beta),
            Objective::SppoHard => sppo_loss(&ratios()?, beta),
            Objective::Aot => aot_loss(&self.policy, self.reference(objective)?, beta, noise),
            Objective::AotUnpaired => aot_unpaired_loss(&ratios()?, beta, noise),
            Objective::ApoZero => apo_zero_loss(&ratios()?, beta),
            Objective::ApoDown => apo_down_loss(&ratios()?, beta),
            Objective::Discopop => discopop_loss(margins()?, config.discopop_tau),
            Objective::Sft => sft_loss(&batch.policy.chosen),
            Objective::SigmoidNorm => {
                let scores = self.mean_scores(objective)?;
                -log_sigmoid((scores.chosen - scores.rejected).mul_scalar(beta.get()))
            }
            Objective::Cdpo => conservative_loss(margins()?, noise),
            Objective::Simpo => simpo_loss(&batch.policy, beta, config.simpo_gamma, noise),
            Objective::Orpo => orpo_loss(&batch.policy, beta),
            Objective::Cpo => cpo_loss(
                &self.policy,
                &batch.policy.chosen,
                beta,
                config.cpo_alpha,
                noise,
            ),
            Objective::DpoPositive => dpo_positive_loss(&ratios()?, beta, config.dpop_lambda),
            Objective::ReferenceFree => reference_free_loss(&self.policy, beta),
            Objective::Tdpo1 => tdpo1_loss(&ratios()?, self.position_kls(objective)?, beta),
            Objective::Tdpo2 => {
                let kls = self.position_kls(objective)?;
                tdpo2_loss(&ratios()?, kls, beta, config.tdpo_alpha)
            }
            Objective::TokenWeighted => {
                let weights = batch.inputs.token_weights.as_ref();
                let weights = weights.ok_or_else(|| missing(objective, "`token_weights`"))?;
                token_weighted_loss(&self.token_logratios(objective)?, weights, beta)
            }
            Objective::Step => {
                let mask = batch.inputs.step_mask.as_ref();
                let mask = mask.ok_or_else(|| missing(objective, "`step_mask`"))?;
                step_loss(&self.token_logratios(objective)?, mask, beta)
            }
        })
    }

    fn reference(&self, objective: Objective) -> Result<&PairLogps, LossError> {
        let reference = self.reference.as_ref();
        reference.ok_or_else(|| missing(objective, "the reference's logps"))
    }

    fn logratios(&self, objective: Objective) -> Result<PairLogps, LossError> {
        Ok(self.policy.minus(self.reference(objective)?))
    }

    fn scores(&self, objective: Objective) -> Result<PairLogps, LossError> {
        let ratios = self.logratios(objective)?;
        let alpha = self.config.f_alpha_divergence_coef;
        let divergence = self.config.f_divergence_type;
        Ok(PairLogps {
            chosen: divergence.scores(ratios.chosen, alpha),
            rejected: divergence.scores(ratios.rejected, alpha),
        })
    }

    /// β times the difference of scores.
    fn margins(&self, objective: Objective) -> Result<Tensor<1>, LossError> {
        let scores = self.scores(objective)?;
        Ok((scores.chosen - scores.rejected).mul_scalar(self.beta.get()))
    }

    fn mean_scores(&self, objective: Objective) -> Result<PairLogps, LossError> {
        let scores = self.scores(objective)?;
        let counts = self.batch.policy.counts();
        Ok(PairLogps {
            chosen: scores.chosen / counts.chosen.clamp_min(1.0),
            rejected: scores.rejected / counts.rejected.clamp_min(1.0),
        })
    }

    fn token_logratios(&self, objective: Objective) -> Result<PairTable, LossError> {
        match &self.batch.reference {
            ReferenceLogps::Tokens(reference) => Ok(self.batch.policy.minus(reference)),
            ReferenceLogps::Absent | ReferenceLogps::Sums(_) => {
                Err(missing(objective, "the reference's logps of each token"))
            }
        }
    }

    fn position_kls(&self, objective: Objective) -> Result<&PairTable, LossError> {
        let kls = self.batch.inputs.position_kls.as_ref();
        kls.ok_or_else(|| missing(objective, "`position_kls`"))
    }
}

fn missing(objective: Objective, input: &'static str) -> LossError {
    LossError::MissingInput { objective, input }
}
