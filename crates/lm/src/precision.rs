//! What a model computes in.

use burn::tensor::{Device, FloatDType};
use serde::{Deserialize, Serialize};

/// What a model's matrix products and the activations between them are in.
///
/// Parameters, norms, what blocks add up, softmaxes, logits and all that follows them are in f32 either
/// way, and so are gradients of parameters and the optimizer's state: a step in bf16 rounds what it
/// multiplies, and updates exact weights, as autocast does in PyTorch. Products in bf16 are faster
/// where a card has units for them, and activations take half the memory; a processor has none, and
/// there it is slower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 24 bits of significand.
    #[default]
    F32,
    /// 8 bits of significand, and the range of f32.
    Bf16,
}

impl Precision {
    /// Whether a device can compute in it.
    pub fn is_supported(self, device: &Device) -> bool {
        self == Self::F32 || device.supports_dtype(self.dtype())
    }

    pub(crate) fn dtype(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
        }
    }
}
