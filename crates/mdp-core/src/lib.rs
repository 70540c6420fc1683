//! mdp-core
