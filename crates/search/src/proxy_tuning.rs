//! Decoding-time tuning: a base policy moved as an expert was moved from its anti-expert.

use mdp_core::{LogpRows, MdpError, TokenPolicy, log_sum_exp};

use crate::{NodeId, PrefixModel, PrefixTree, Rows, SearchError};

/// `π ∝ base (expert / anti_expert)^alpha`, equation 14 of the paper, as a policy: every search runs
/// on it.
///
/// Also known as emulated fine-tuning: a small expert and anti-expert move a large base. If the pair
/// was trained at `β_train`, `alpha = β_train / β_target` aims at `β_target`; see
/// [`mdp_core::proxy_tuned`] for where that aim is reached. Rows are normalised.
///
/// It is a [`TokenPolicy`] if its three parts are, and a [`PrefixModel`] if they are models, each
/// then with its own caches.
///
/// # Examples
///
/// ```
/// use mdp_core::{TabularPolicy, TokenPolicy, Tree};
/// use search::ProxyTuned;
///
/// let of = |p: f64| TabularPolicy::from_probs(Tree::new(2, 1, 1)?, vec![p, 1.0 - p]);
/// let tuned = ProxyTuned::new(of(0.5)?, of(0.8)?, of(0.5)?, 1.0)?;
/// // From an even base an expert that moved to 0.8 takes it to 0.8; half the way in logits, to 2/3.
/// assert!((tuned.next_logps(&[&[]])?.row(0)[0] - 0.8_f64.ln()).abs() < 1e-12);
/// let half = ProxyTuned::new(of(0.5)?, of(0.8)?, of(0.5)?, 0.5)?;
/// assert!((half.next_logps(&[&[]])?.row(0)[0] - (2.0 / 3.0_f64).ln()).abs() < 1e-12);
/// # Ok::<(), search::SearchError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ProxyTuned<B, E, A> {
    base: B,
    expert: E,
    anti_expert: A,
    alpha: f64,
}

impl<B, E, A> ProxyTuned<B, E, A> {
    /// The three parts and how far to go: 0 is the base alone.
    ///
    /// # Errors
    ///
    /// [`SearchError::Setting`] if `alpha` is not finite. Vocabularies are compared when the first
    /// rows are asked for.
    pub fn new(base: B, expert: E, anti_expert: A, alpha: f64) -> Result<Self, SearchError> {
        if !alpha.is_finite() {
            return Err(SearchError::setting("alpha", alpha, "a finite number"));
        }
        Ok(Self {
            base,
            expert,
            anti_expert,
            alpha,
        })
    }

    /// Moves the base's rows in place and normalises them.
    fn tune(
        &self,
        vocab: usize,
        base: &mut [f64],
        expert: &[f64],
        anti_expert: &[f64],
    ) -> Result<(), MdpError> {
        for (table, got) in [
            ("expert rows", expert.len()),
            ("anti-expert rows", anti_expert.len()),
        ] {
            if got != base.len() {
                return Err(MdpError::TableLength {
                    table,
                    expected: base.len(),
                    got,
                });
            }
        }
        let parts = expert
            .chunks_exact(vocab)
            .zip(anti_expert.chunks_exact(vocab));
        for (row, (expert, anti_expert)) in base.chunks_exact_mut(vocab).zip(parts) {
            for (logp, (expert, anti_expert)) in row.iter_mut().zip(expert.iter().zip(anti_expert))
            {
                // What the base rules out stays out, whatever the ratio of the other two.
                if *logp > f64::NEG_INFINITY && self.alpha != 0.0 {
                    *logp += self.alpha * (expert - anti_expert);
                }
            }
            let total = log_sum_exp(row);
            if let Some(action) = row
                .iter()
                .position(|logp| logp.is_nan() || *logp == f64::INFINITY)
            {
                return Err(MdpError::NotFinite {
                    table: "proxy-tuned logit",
                    state: Vec::new(),
                    action: action as u32,
                    value: row[action],
                });
            }
            for logp in row {
                *logp -= total;
            }
        }
        Ok(())
    }
}

impl<B: TokenPolicy, E: TokenPolicy, A: TokenPolicy> TokenPolicy for ProxyTuned<B, E, A> {
    fn vocab(&self) -> usize {
        self.base.vocab()
    }

    fn next_logps(&self, states: &[&[u32]]) -> Result<LogpRows, MdpError> {
        let vocab = self.base.vocab();
        let mut base = self.base.next_logps(states)?.into_values();
        let expert = self.expert.next_logps(states)?.into_values();
        let anti_expert = self.anti_expert.next_logps(states)?.into_values();
        self.tune(vocab, &mut base, &expert, &anti_expert)?;
        LogpRows::new(vocab, base)
    }
}

impl<B: PrefixModel, E: PrefixModel, A: PrefixModel> PrefixModel for ProxyTuned<B, E, A> {
    fn vocab(&self) -> usize {
        self.base.vocab()
    }

    fn begin(&mut self, prompt: &[u32], max_new_tokens: usize) -> Result<(), SearchError> {
        self.base.begin(prompt, max_new_tokens)?;
        self.expert.begin(prompt, max_new_tokens)?;
        self.anti_expert.begin(prompt, max_new_tokens)
    }

    fn expand(
        &mut self,
        prefixes: &PrefixTree,
        frontier: &[NodeId],
        _top_k: Option<usize>,
    ) -> Result<Rows, SearchError> {
        // Whole rows: what is likely under the base need not be under the three together.
        let mut base = whole(
            &self.base.expand(prefixes, frontier, None)?,
            self.base.vocab(),
        )?;
        let expert = whole(
            &self.expert.expand(prefixes, frontier, None)?,
            self.expert.vocab(),
        )?;
        let anti_expert = self.anti_expert.expand(prefixes, frontier, None)?;
        let anti_expert = whole(&anti_expert, self.anti_expert.vocab())?;
        self.tune(self.base.vocab(), &mut base, &expert, &anti_expert)?;
        Ok(Rows::full(LogpRows::new(self.base.vocab(), base)?))
    }

    fn retain(&mut self, prefixes: &PrefixTree, live: &[NodeId]) {
        self.base.retain(prefixes, live);
        self.expert.retain(prefixes, live);
        self.anti_expert.retain(prefixes, live);
    }
}

/// Logps as `[states, vocab]`, minus infinity for tokens that are not there.
fn whole(rows: &Rows, vocab: usize) -> Result<Vec<f64>, SearchError> {
    let mut values = vec![f64::NEG_INFINITY; rows.len() * vocab];
    for (i, values) in values.chunks_exact_mut(vocab).enumerate() {
        let row = rows.row(i);
        for (at, &logp) in row.logps.iter().enumerate() {
            let token = row.token(at);
            *values
                .get_mut(token as usize)
                .ok_or(SearchError::TokenOutside {
                    place: "the model's answer",
                    token,
                    vocab,
                })? = logp;
        }
    }
    Ok(values)
}
