//! What the pages of all experiments show alike.

use report::{Plot, escape};

use super::Target;

/// A heading, and a table that says of each claim whether it held.
pub(super) fn targets_table(targets: &[Target]) -> String {
    let mut body = String::from(
        "<h2>Targets</h2><div class=\"scroll\"><table><thead><tr><th>Stated beforehand</th>\
         <th>Measured</th><th>Held</th></tr></thead><tbody>",
    );
    for target in targets {
        let held = match target.held {
            Some(true) => "yes",
            Some(false) => "no",
            None => "too few seeds",
        };
        body += &format!(
            "<tr><td class=\"metric\">{}</td><td class=\"metric\">{}</td><td>{held}</td></tr>",
            escape(&target.claim),
            escape(&target.measured)
        );
    }
    body + "</tbody></table></div>"
}

/// A plot with what a reader of the page should know of it.
pub(super) fn figure(plot: &Plot) -> String {
    format!(
        "<figure>{}<figcaption>{}</figcaption></figure>",
        plot.to_svg(),
        escape(&plot.caption())
    )
}
