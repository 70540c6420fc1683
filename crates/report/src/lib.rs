//! Self-contained HTML pages about a run: plain structs in, one `String` out.
//!
//! A page has its style, its pictures and its few lines of script inside it. It loads nothing
//! (a content security policy says so to the browser), follows the reader's light or dark
//! setting, prints, and fits a phone. Every text that comes from data is escaped: a completion
//! that holds HTML shows as text.
//!
//! ```
//! use report::{Card, Plot, Series, TrainingReport};
//!
//! let report = TrainingReport {
//!     title: "memo, beta 0.1".into(),
//!     summary_cards: vec![Card {
//!         label: "win rate against SFT".into(),
//!         value: "0.84".into(),
//!         note: "95% interval 0.79 to 0.88".into(),
//!     }],
//!     curves: vec![Plot {
//!         title: "Loss".into(),
//!         x_label: "step".into(),
//!         y_label: "loss (nats)".into(),
//!         series: vec![Series {
//!             name: "train".into(),
//!             points: vec![(0.0, 0.693), (10.0, 0.51), (20.0, 0.42)],
//!             ..Series::default()
//!         }],
//!         ..Plot::default()
//!     }],
//!     ..TrainingReport::default()
//! };
//! let html = report.to_html()?;
//! assert!(html.contains("loss (nats)"));
//! // What the run does not have leaves no section behind.
//! assert!(!html.contains("id=\"samples\""));
//! # Ok::<(), report::ReportError>(())
//! ```
//!
//! | For | Use |
//! |---|---|
//! | the page of a training run | [`TrainingReport`], with [`Card`], [`OutcomeRow`], [`Sample`] |
//! | a line plot as SVG, inside a page or as a file | [`Plot`], [`Series`], [`Band`], [`ReferenceLine`] |
//! | means with their intervals as SVG | [`whisker_svg`] |
//! | completions scored token by token, side by side | [`ScorePage`], with [`ScoredRow`] and [`PageRow`]; [`terminal_tokens`] |
//! | completions that a search found, and its tree | [`search_page`], with [`SearchedPrompt`], [`SearchNode`] |
//! | tokens coloured by a reward | [`Token`], [`token_spans`], [`DivergingScale`], [`scale_legend`] |
//! | another page with the same look | [`page`], with [`escape`] for its text |
//! | a file that is whole or not there | [`write_atomically`] |
//!
//! The SVG is written here and not by a plotting library, because its colours are CSS classes:
//! that is what lets one picture serve light, dark and print, and lets the script read values
//! back from it.

mod error;
mod number;
mod outcomes;
mod page;
mod plot;
mod scores;
mod search_tree;
mod svg;
mod thin;
mod tokens;
mod training;

pub use error::ReportError;
pub use outcomes::{OutcomeRow, whisker_svg};
pub use page::{escape, page, write_atomically};
pub use plot::{Band, Plot, ReferenceLine, Series};
pub use scores::{
    PageRow, ScorePage, ScoredCompletion, ScoredRow, ScoredToken, TokenScores, terminal_tokens,
};
pub use search_tree::{FoundCompletion, SearchNode, SearchedPrompt, search_page};
pub use tokens::{DivergingScale, Readout, Token, scale_legend, token_css, token_spans};
pub use training::{Card, Sample, SampleCompletion, TrainingReport};
