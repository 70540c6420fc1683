//! The page of a search: completions with their scores, and the tree that was searched.

use crate::number::plain;
use crate::page::{escape, page_with};
use crate::training::Card;

const CSS: &str = include_str!("search_tree.css");
/// Tokens shown of one state, the most visited first.
const MOST_TOKENS: usize = 12;
/// Prefixes shown of one tree besides the path.
const MOST_NODES: usize = 3000;
/// Every whole number below this is an `f64`.
const WHOLE: f64 = 9e15;

/// A prompt, what was found for it, and the tree.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SearchedPrompt {
    /// Where it stands in the data.
    pub name: String,
    /// The conditioning text.
    pub prompt: String,
    /// What the search cost and how sure it is, in words.
    pub summary: String,
    /// What was found, best first.
    pub completions: Vec<FoundCompletion>,
    /// Every prefix of the search, parents before children, the prompt first; may be empty.
    pub nodes: Vec<SearchNode>,
}

/// A completion that a search returned.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FoundCompletion {
    /// Its text.
    pub text: String,
    /// Why it ends, in a word.
    pub end: String,
    /// Names and values of its scores.
    pub scores: Vec<(String, f64)>,
}

/// A prefix of a search tree.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SearchNode {
    /// Number of the prefix without its last token; `None` for the prompt.
    pub parent: Option<usize>,
    /// Text of the last token.
    pub text: String,
    /// How often the search passed.
    pub visits: usize,
    /// The policy's probability of the token at its parent.
    pub prior: f64,
    /// Score of the prefix, in nats.
    pub score: f64,
    /// `Q` of the token at its parent, in nats.
    pub q: Option<f64>,
    /// `V` of the prefix, in nats.
    pub value: Option<f64>,
    /// Share of the policy's completions below that was not pruned.
    pub covered_mass: f64,
    /// Whether the best completion begins so.
    pub on_path: bool,
    /// Why the completion ends here, if it does.
    pub end: Option<String>,
}

/// A page of searches as one HTML document that needs no other file.
///
/// The path to the best completion is laid out token by token; under each token stand the
/// alternatives at that state, the most visited first, and under those what was searched below them.
/// All text from data is escaped.
pub fn search_page(
    title: &str,
    subtitle: &str,
    cards: &[Card],
    prompts: &[SearchedPrompt],
) -> String {
    let mut body = format!(
        "<h1>{}</h1>\n<p class=\"subtitle\">{}</p>\n<dl class=\"cards\">",
        escape(title),
        escape(subtitle)
    );
    for card in cards {
        body += &format!(
            "<div class=\"card\"><dt>{}</dt><dd class=\"value\">{}</dd><dd class=\"note\">{}</dd></div>",
            escape(&card.label),
            escape(&card.value),
            escape(&card.note)
        );
    }
    body += "</dl>\n";
    for prompt in prompts {
        body += &format!(
            "<section class=\"panel searched\"><h2>{}</h2>\n<div class=\"prompt\">{}</div>\n\
             <p class=\"subtitle\">{}</p>\n",
            escape(&prompt.name),
            escape(&prompt.prompt),
            escape(&prompt.summary)
        );
        for found in &prompt.completions {
            body += &format!(
                "<div class=\"completion\"><header><span>{}</span><span>ends: {}</span></header>\
                 <div class=\"found\">{}</div></div>\n",
                numbers(found.scores.iter().map(|(name, value)| (&name[..], *value))),
                escape(&found.end),
                escape(&found.text)
            );
        }
        tree(&prompt.nodes, &mut body);
        body += "</section>\n";
    }
    page_with(title, &body, CSS, "")
}

fn numbers<'a>(values: impl Iterator<Item = (&'a str, f64)>) -> String {
    let values: Vec<String> = values
        .map(|(name, value)| format!("{} <b>{}</b>", escape(name), written(value)))
        .collect();
    values.join(" \u{b7} ")
}

/// A number as a page writes it; one that is whole, such as a count, without decimals.
fn written(value: f64) -> String {
    if value.fract() == 0.0 && (0.0..WHOLE).contains(&value) {
        format!("{value:.0}")
    } else {
        plain(value)
    }
}

/// The path, each token with what else was searched at its state.
fn tree(nodes: &[SearchNode], body: &mut String) {
    if nodes.len() < 2 {
        return;
    }
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    for (at, node) in nodes.iter().enumerate() {
        if let Some(list) = node.parent.and_then(|parent| children.get_mut(parent)) {
            list.push(at);
        }
    }
    for list in &mut children {
        list.sort_by(|&a, &b| {
            let weight = |at: usize| (nodes[at].visits, nodes[at].prior);
            let ((av, ap), (bv, bp)) = (weight(a), weight(b));
            bv.cmp(&av).then_with(|| bp.total_cmp(&ap))
        });
    }
    *body += &format!(
        "<h3>The tree, {} prefixes</h3>\n<p class=\"subtitle\">The path to the best completion, token by token; \
         open one for what else was searched at its state. p: the policy\u{2019}s probability; Q, V and score in nats.</p>\n\
         <div class=\"tree\"><p class=\"prompt-node\">prompt {}</p>\n",
        nodes.len(),
        readout(&nodes[0], true)
    );
    let mut left = MOST_NODES;
    let mut state = 0;
    loop {
        let next = children[state]
            .iter()
            .copied()
            .find(|&at| nodes[at].on_path);
        let others: Vec<usize> = children[state]
            .iter()
            .copied()
            .filter(|&at| Some(at) != next)
            .collect();
        match next {
            Some(at) if others.is_empty() => *body += &leaf(&nodes[at]),
            Some(at) => {
                *body += &opening(&nodes[at]);
                branches(&others, &children, nodes, &mut left, body);
                *body += "</div></details>\n";
            }
            None => {
                branches(&others, &children, nodes, &mut left, body);
                break;
            }
        }
        state = next.unwrap_or_default();
    }
    *body += "</div>\n";
}

/// What a stack of branches holds: a prefix to write, or text to close the one above.
enum Next {
    Node(usize),
    Text(String),
}

/// Prefixes and all below them, without recursion: a tree may be deep.
fn branches(
    roots: &[usize],
    children: &[Vec<usize>],
    nodes: &[SearchNode],
    left: &mut usize,
    body: &mut String,
) {
    let mut stack = Vec::new();
    push(roots, &mut stack);
    while let Some(next) = stack.pop() {
        match next {
            Next::Text(text) => *body += &text,
            Next::Node(_) if *left == 0 => {}
            Next::Node(at) => {
                *left -= 1;
                if children[at].is_empty() {
                    *body += &leaf(&nodes[at]);
                } else {
                    *body += &opening(&nodes[at]);
                    stack.push(Next::Text("</div></details>\n".into()));
                    push(&children[at], &mut stack);
                }
            }
        }
    }
}

fn push(list: &[usize], stack: &mut Vec<Next>) {
    let more = list.len().saturating_sub(MOST_TOKENS);
    if more > 0 {
        let text = format!("<p class=\"more\">and {more} more</p>\n");
        stack.push(Next::Text(text));
    }
    let shown = list.iter().take(MOST_TOKENS).rev();
    stack.extend(shown.map(|&at| Next::Node(at)));
}

fn opening(node: &SearchNode) -> String {
    format!(
        "<details class=\"node{}\"><summary>{}</summary><div class=\"below\">\n",
        path_class(node),
        line(node)
    )
}

fn leaf(node: &SearchNode) -> String {
    format!("<p class=\"node{}\">{}</p>\n", path_class(node), line(node))
}

fn path_class(node: &SearchNode) -> &'static str {
    if node.on_path { " path" } else { "" }
}

fn line(node: &SearchNode) -> String {
    let text: String = node
        .text
        .chars()
        .map(|c| match c {
            '\n' => '\u{23ce}',
            ' ' => '\u{2423}',
            c => c,
        })
        .collect();
    let end = node.end.as_deref().map(|end| format!(" ({end})"));
    format!(
        "<code>{}</code>{} <span class=\"readout\">{}</span>",
        escape(&text),
        escape(&end.unwrap_or_default()),
        readout(node, false)
    )
}

fn readout(node: &SearchNode, is_prompt: bool) -> String {
    let own = [("p", node.prior), ("score", node.score)];
    let own = own.into_iter().filter(|_| !is_prompt);
    let values = [("Q", node.q), ("V", node.value)];
    let values = values.into_iter().filter_map(|(n, v)| Some((n, v?)));
    let visits = [("visits", node.visits as f64)];
    let covered = [("covered", node.covered_mass)];
    numbers(visits.into_iter().chain(own).chain(values).chain(covered))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(parent: Option<usize>, text: &str, visits: usize, on_path: bool) -> SearchNode {
        SearchNode {
            parent,
            text: text.into(),
            visits,
            prior: 0.5,
            on_path,
            ..SearchNode::default()
        }
    }

    fn html(nodes: Vec<SearchNode>) -> String {
        let prompt = SearchedPrompt {
            prompt: "<script>alert(1)</script>".into(),
            nodes,
            ..SearchedPrompt::default()
        };
        search_page("t", "s", &[], &[prompt])
    }

    #[test]
    fn text_from_data_is_escaped_and_every_element_is_closed() {
        let html = html(vec![
            node(None, "", 3, true),
            node(Some(0), "<b>", 2, true),
            node(Some(0), "</details>", 1, false),
            node(Some(2), "x", 0, false),
        ]);
        assert!(html.contains("&lt;script&gt;alert(1)") && !html.contains("<script>alert"));
        assert!(html.contains("<code>&lt;b&gt;</code>") && html.contains("&lt;/details&gt;"));
        let count = |what: &str| html.matches(what).count();
        assert_eq!(count("<details"), count("</details>"));
        assert_eq!(
            count("<details"),
            2,
            "the path's token, and its alternative"
        );
    }

    #[test]
    fn the_most_visited_alternatives_come_first_and_the_rest_is_counted() {
        let mut nodes = vec![node(None, "", 40, true)];
        nodes.extend((0..30).map(|i| node(Some(0), &format!("t{i}."), i, false)));
        let html = html(nodes);
        let at = |text: &str| html.find(text);
        assert!(at("t29.") < at("t28.") && at("t18.").is_some());
        assert!(at("t17.").is_none() && html.contains("and 18 more"));
    }

    #[test]
    fn counts_have_no_decimals() {
        let html = html(vec![node(None, "", 43, true), node(Some(0), "x", 2, true)]);
        assert!(html.contains("visits <b>43</b>") && html.contains("p <b>0.500</b>"));
    }

    #[test]
    fn a_deep_tree_does_not_overflow_the_stack() {
        let deep = (0..200_000).map(|i: usize| node(i.checked_sub(1), "x", 1, i < 2));
        assert!(html(deep.collect()).len() > 1000);
    }
}
