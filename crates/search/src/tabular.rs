//! Tables walked by handle.

use mdp_core::{LogpRows, MdpError, Node, TabularPolicy};

use crate::{NodeId, PrefixModel, PrefixTree, Rows, SearchError};

/// Tabular policies that continue a prefix from its parent, as a language model continues a cache.
///
/// It keeps the state number of every prefix that it was asked for; a child's number is one
/// multiplication away from its parent's. So a search pays nothing for the length of a prefix. It is
/// also the smallest example of a [`PrefixModel`] with a memory.
///
/// # Examples
///
/// ```
/// use mdp_core::{RewardPlacement, TabularMdp, Tree};
/// use search::{BestFirstConfig, Request, TabularModel, best_first};
///
/// let mdp = TabularMdp::seeded(Tree::new(3, 4, 2)?, RewardPlacement::Dense, 7)?;
/// let mut model = TabularModel::new(mdp.reference())?;
/// let output = best_first(&mut model, &Request::of(mdp.tree()), &BestFirstConfig::default())?;
/// assert!(output.is_optimal());
/// # Ok::<(), search::SearchError>(())
/// ```
#[derive(Clone, Debug)]
pub struct TabularModel<'a> {
    policy: &'a TabularPolicy,
    reference: Option<&'a TabularPolicy>,
    /// State number by node; `u32::MAX` for prefixes that were never asked for.
    states: Vec<u32>,
    /// State number of the prompt.
    root: usize,
}

impl<'a> TabularModel<'a> {
    /// The policy alone.
    ///
    /// # Errors
    ///
    /// [`SearchError::TooManyNodes`] if the states cannot be numbered in 32 bits.
    pub fn new(policy: &'a TabularPolicy) -> Result<Self, SearchError> {
        let nodes = policy.tree().n_states();
        if u32::try_from(nodes).is_err() {
            return Err(SearchError::TooManyNodes { nodes });
        }
        Ok(Self {
            policy,
            reference: None,
            states: Vec::new(),
            root: 0,
        })
    }

    /// The same with a reference over the same tree.
    ///
    /// # Errors
    ///
    /// [`SearchError::Rows`] if the tables differ in size.
    pub fn with_reference(self, reference: &'a TabularPolicy) -> Result<Self, SearchError> {
        let (expected, got) = (self.policy.logps().len(), reference.logps().len());
        if self.policy.tree() != reference.tree() {
            return Err(SearchError::Rows {
                table: "reference",
                expected,
                got,
            });
        }
        Ok(Self {
            reference: Some(reference),
            ..self
        })
    }

    /// The state number of `tokens`, prompt included.
    fn find(&self, tokens: &[u32]) -> Result<usize, SearchError> {
        match self.policy.tree().find_state(tokens)? {
            Node::State(state) => Ok(state),
            Node::Completion(_) => Err(SearchError::Mdp(MdpError::Terminal {
                state: tokens.to_vec(),
            })),
        }
    }

    fn state(&self, prefixes: &PrefixTree, node: NodeId) -> Result<usize, SearchError> {
        let (Some(parent), Some(token)) = (prefixes.parent(node), prefixes.token(node)) else {
            return Ok(self.root);
        };
        let tree = self.policy.tree();
        let known = self.states[parent.index()];
        if known == u32::MAX || token as usize >= tree.vocab() {
            // Nothing to continue from: looked up by its tokens, which also names what is wrong.
            return self.find(&prefixes.state(node));
        }
        match tree.child(known as usize * tree.vocab() + token as usize) {
            Some(state) => Ok(state),
            None => self.find(&prefixes.state(node)),
        }
    }
}

impl PrefixModel for TabularModel<'_> {
    fn vocab(&self) -> usize {
        self.policy.tree().vocab()
    }

    fn has_reference(&self) -> bool {
        self.reference.is_some()
    }

    fn begin(&mut self, prompt: &[u32], _max_new_tokens: usize) -> Result<(), SearchError> {
        self.root = self.find(prompt)?;
        self.states.clear();
        Ok(())
    }

    fn expand(
        &mut self,
        prefixes: &PrefixTree,
        frontier: &[NodeId],
        _top_k: Option<usize>,
    ) -> Result<Rows, SearchError> {
        let vocab = self.vocab();
        let mut logps = Vec::with_capacity(frontier.len() * vocab);
        let mut reference_logps = Vec::new();
        self.states.resize(prefixes.len(), u32::MAX);
        for &node in frontier {
            let state = self.state(prefixes, node)?;
            self.states[node.index()] = state as u32;
            logps.extend_from_slice(self.policy.row(state));
            if let Some(reference) = self.reference {
                reference_logps.extend_from_slice(reference.row(state));
            }
        }
        let rows = Rows::full(LogpRows::new(vocab, logps)?);
        if self.reference.is_some() {
            return rows.with_reference(reference_logps);
        }
        Ok(rows)
    }
}
