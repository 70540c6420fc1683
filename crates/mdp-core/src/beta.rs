//! The strength of the KL penalty.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::MdpError;

/// The strength β of the KL penalty, in reward units per nat.
///
/// It is finite and positive, checked once in [`Beta::new`], so no later code tests it. It is not a
/// sampling temperature: β sets how much reward one nat of divergence from the reference costs.
///
/// # Examples
///
/// ```
/// use mdp_core::Beta;
///
/// assert_eq!(Beta::new(0.1)?.get(), 0.1);
/// assert!(Beta::new(0.0).is_err());
/// assert!(Beta::new(f64::NAN).is_err());
/// # Ok::<(), mdp_core::MdpError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Beta(f64);

impl Beta {
    /// Returns β as a checked value.
    ///
    /// # Errors
    ///
    /// [`MdpError::Beta`] if `value` is not finite or not above zero.
    pub fn new(value: f64) -> Result<Self, MdpError> {
        if value.is_finite() && value > 0.0 {
            Ok(Self(value))
        } else {
            Err(MdpError::Beta { value })
        }
    }

    /// The number, in reward units per nat; finite and positive.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for Beta {
    type Error = MdpError;

    fn try_from(value: f64) -> Result<Self, MdpError> {
        Self::new(value)
    }
}

impl From<Beta> for f64 {
    fn from(beta: Beta) -> Self {
        beta.0
    }
}

impl fmt::Display for Beta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Beta {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0)
    }
}

impl<'de> Deserialize<'de> for Beta {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = f64::deserialize(deserializer)?;
        Self::new(value).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, Serialize)]
    struct Recipe {
        beta: Beta,
    }

    #[test]
    fn every_number_that_is_not_finite_and_positive_is_refused() {
        for value in [0.0, -0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let error = Beta::new(value).unwrap_err().to_string();
            assert!(error.contains("beta"), "{error}");
        }
    }

    #[test]
    fn a_recipe_with_a_bad_beta_is_refused_when_read() {
        assert!(toml::from_str::<Recipe>("beta = 0.1").is_ok());
        // TOML writers drop a trailing zero, so an integer must read as a number too.
        assert!(toml::from_str::<Recipe>("beta = 1").is_ok());
        let error = toml::from_str::<Recipe>("beta = -0.1").unwrap_err();
        assert!(error.to_string().contains("-0.1"), "{error}");
    }

    #[test]
    fn a_written_beta_reads_back_as_the_same_number() {
        let recipe = Recipe {
            beta: Beta::new(0.3).unwrap(),
        };
        let text = toml::to_string(&recipe).unwrap();
        assert_eq!(
            toml::from_str::<Recipe>(&text)
                .unwrap()
                .beta
                .get()
                .to_bits(),
            0.3_f64.to_bits()
        );
    }
}
