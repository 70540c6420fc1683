//! dpo-loss
