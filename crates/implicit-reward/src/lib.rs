//! implicit-reward
