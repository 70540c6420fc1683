//! The prefixes of a search, numbered, each by its parent and its last token.

use crate::SearchError;

/// A prefix by its number in a [`PrefixTree`].
///
/// Numbers are given in order of creation and never again, so a model can keep a table beside the
/// tree: `table[node.index()]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(crate) u32);

impl NodeId {
    /// The prompt itself.
    pub const ROOT: Self = Self(0);

    /// The number.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Token prefixes as links to their parents: 12 bytes each, whatever their length.
///
/// The prefix of a node is its parent's and one token more. Prefixes that begin alike share their
/// beginning, as their keys and values do in a language model's cache: what a model has to compute
/// for a node, given its parent's cache, is one token.
///
/// # Examples
///
/// ```
/// use search::{NodeId, PrefixTree};
///
/// let mut tree = PrefixTree::new([7, 8]);
/// let a = tree.push(NodeId::ROOT, 1)?;
/// let b = tree.push(a, 2)?;
/// assert_eq!(tree.completion(b), [1, 2]);
/// assert_eq!(tree.state(b), [7, 8, 1, 2]);
/// assert_eq!((tree.parent(b), tree.token(b), tree.depth(b)), (Some(a), Some(2), 2));
/// # Ok::<(), search::SearchError>(())
/// ```
#[derive(Clone, Debug)]
pub struct PrefixTree {
    prompt: Vec<u32>,
    parents: Vec<u32>,
    tokens: Vec<u32>,
    depths: Vec<u32>,
}

impl PrefixTree {
    /// The tree that holds the prompt alone.
    #[must_use]
    pub fn new(prompt: impl Into<Vec<u32>>) -> Self {
        Self {
            prompt: prompt.into(),
            parents: vec![u32::MAX],
            tokens: vec![u32::MAX],
            depths: vec![0],
        }
    }

    /// The new prefix of `parent` and `token`. The same prefix pushed twice is two nodes.
    ///
    /// # Errors
    ///
    /// [`SearchError::TooManyNodes`] past four billion.
    ///
    /// # Panics
    ///
    /// If there is no such parent.
    pub fn push(&mut self, parent: NodeId, token: u32) -> Result<NodeId, SearchError> {
        let nodes = self.len();
        // The largest number stands for "no parent".
        let id = u32::try_from(nodes)
            .ok()
            .filter(|&id| id < u32::MAX)
            .ok_or(SearchError::TooManyNodes { nodes })?;
        let depth = self.depths[parent.index()] + 1;
        self.parents.push(parent.0);
        self.tokens.push(token);
        self.depths.push(depth);
        Ok(NodeId(id))
    }

    /// The prompt.
    #[must_use]
    pub fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// The number of prefixes, the prompt included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.parents.len()
    }

    /// Never: the prompt is always there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The prefix without its last token; `None` for the prompt.
    ///
    /// # Panics
    ///
    /// If there is no such node.
    #[must_use]
    pub fn parent(&self, node: NodeId) -> Option<NodeId> {
        let parent = self.parents[node.index()];
        (parent != u32::MAX).then_some(NodeId(parent))
    }

    /// The last token; `None` for the prompt.
    ///
    /// # Panics
    ///
    /// If there is no such node.
    #[must_use]
    pub fn token(&self, node: NodeId) -> Option<u32> {
        (node != NodeId::ROOT).then(|| self.tokens[node.index()])
    }

    /// Tokens after the prompt.
    ///
    /// # Panics
    ///
    /// If there is no such node.
    #[must_use]
    pub fn depth(&self, node: NodeId) -> usize {
        self.depths[node.index()] as usize
    }

    /// The node, its parent, and so on to the prompt.
    pub fn ancestors(&self, node: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        std::iter::successors(Some(node), |&at| self.parent(at))
    }

    /// The tokens after the prompt.
    ///
    /// # Panics
    ///
    /// If there is no such node.
    #[must_use]
    pub fn completion(&self, node: NodeId) -> Vec<u32> {
        let mut tokens = Vec::with_capacity(self.depth(node));
        self.write_completion(node, &mut tokens);
        tokens
    }

    /// The whole prefix, prompt and completion.
    ///
    /// # Panics
    ///
    /// If there is no such node.
    #[must_use]
    pub fn state(&self, node: NodeId) -> Vec<u32> {
        let mut tokens = Vec::with_capacity(self.prompt.len() + self.depth(node));
        tokens.extend_from_slice(&self.prompt);
        self.write_completion(node, &mut tokens);
        tokens
    }

    fn write_completion(&self, node: NodeId, tokens: &mut Vec<u32>) {
        let start = tokens.len();
        tokens.extend(self.ancestors(node).filter_map(|at| self.token(at)));
        tokens[start..].reverse();
    }

    /// Whether the completion at `node` ends with `tokens`.
    pub(crate) fn ends_with(&self, node: NodeId, tokens: &[u32]) -> bool {
        let mut last = self.ancestors(node).map(|at| self.token(at));
        tokens
            .iter()
            .rev()
            .all(|&token| last.next().flatten() == Some(token))
    }

    /// The node on the way from the prompt to `node` that has `depth` tokens.
    pub(crate) fn ancestor_at(&self, node: NodeId, depth: usize) -> NodeId {
        self.ancestors(node)
            .find(|&at| self.depth(at) <= depth)
            .unwrap_or(NodeId::ROOT)
    }

    /// Bytes that the tree has allocated.
    pub(crate) fn bytes(&self) -> usize {
        4 * (self.parents.capacity() + self.tokens.capacity() + self.depths.capacity())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ending_is_sought_in_the_completion_and_not_in_the_prompt() {
        let mut tree = PrefixTree::new([1, 2]);
        let a = tree.push(NodeId::ROOT, 2).unwrap();
        let b = tree.push(a, 3).unwrap();
        assert!(tree.ends_with(b, &[3]) && tree.ends_with(b, &[2, 3]));
        assert!(
            !tree.ends_with(b, &[2, 2, 3]),
            "the prompt's 2 is no part of it"
        );
        assert!(!tree.ends_with(NodeId::ROOT, &[2]));
        assert_eq!(tree.ancestor_at(b, 1), a);
        assert_eq!(tree.ancestor_at(b, 0), NodeId::ROOT);
    }
}
