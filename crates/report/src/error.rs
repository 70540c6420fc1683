use std::path::PathBuf;

/// Why a page could not be made or written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The built-in template did not render; a fault of this crate and not of the data.
    #[error("report template: {0}")]
    Template(#[from] minijinja::Error),
    /// A step of writing the file failed; the file that was there before is untouched.
    #[error("{}: cannot {action}: {source}", path.display())]
    Write {
        /// The file that was to be written.
        path: PathBuf,
        /// What failed, as a verb phrase.
        action: &'static str,
        /// What the operating system said.
        source: std::io::Error,
    },
}
