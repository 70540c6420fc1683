//! The page around the content: style, script, policy; and how it reaches the disk.

use std::io::Write;
use std::path::Path;

use crate::error::ReportError;
use crate::svg;
use crate::tokens;

/// A whole HTML document with this crate's style and script inside.
///
/// `title` is escaped. `body` is trusted HTML: the caller escapes what comes from data, with
/// [`escape`]. The document loads nothing, and tells the browser to load nothing.
///
/// # Examples
///
/// ```
/// let html = report::page("a < b", &format!("<p>{}</p>", report::escape("x > y")));
/// assert!(html.contains("<title>a &lt; b</title>") && html.contains("x &gt; y"));
/// ```
pub fn page(title: &str, body: &str) -> String {
    page_with(title, body, "", "")
}

/// [`page`] with more style and script behind its own.
pub(crate) fn page_with(title: &str, body: &str, css: &str, js: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n\
         <title>{}</title>\n<style>\n{}{}{}{css}\n</style>\n</head>\n<body>\n{body}\n<script>\n{}{js}</script>\n</body>\n</html>\n",
        escape(title),
        include_str!("page.css"),
        svg::CSS,
        tokens::token_css(),
        tokens::JS
    )
}

/// `text` as HTML that shows it, in element content and in quoted attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            // HTML has no way to write NUL; a reader would see a broken page or nothing.
            '\0' => out += "\u{2400}",
            c => out.push(c),
        }
    }
    out
}

/// Puts `contents` at `path` so that a reader finds the whole old file or the whole new one.
///
/// Writes a temporary file in the same folder, syncs it, and renames it over `path`.
///
/// # Errors
///
/// [`ReportError::Write`] when the folder does not exist or a step fails; what was at `path`
/// before is then still there, and the temporary file is removed.
pub fn write_atomically(path: &Path, contents: &str) -> Result<(), ReportError> {
    let failed = |action| {
        move |source| ReportError::Write {
            path: path.to_owned(),
            action,
            source,
        }
    };
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".report-").suffix(".tmp");
    // A temporary file is private by default; a report is for whoever the umask allows.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder
        .tempfile_in(folder)
        .map_err(failed("create a temporary file beside it"))?;
    file.write_all(contents.as_bytes())
        .map_err(failed("write"))?;
    file.as_file().sync_all().map_err(failed("sync"))?;
    file.persist(path)
        .map_err(|e| failed("rename the temporary file to it")(e.error))?;
    // The rename is in the folder, so the folder is synced too; not every system can.
    if let Ok(folder) = std::fs::File::open(folder) {
        folder.sync_all().ok();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_replaces_the_whole_file_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.html");
        write_atomically(&path, "a long first version").unwrap();
        write_atomically(&path, "second").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_names_the_file_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing").join("report.html");
        let message = write_atomically(&missing, "x").unwrap_err().to_string();
        assert!(
            message.contains("missing") && message.contains("cannot create"),
            "{message}"
        );

        // A folder stands where the file should go: the rename fails after the write.
        let taken = folder.path().join("taken");
        std::fs::create_dir(&taken).unwrap();
        let message = write_atomically(&taken, "x").unwrap_err().to_string();
        assert!(message.contains("cannot rename"), "{message}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_what_the_umask_lets_them() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        let atomic = folder.path().join("atomic");
        std::fs::write(&plain, "x").unwrap();
        write_atomically(&atomic, "x").unwrap();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode();
        assert_eq!(mode(&plain), mode(&atomic));
    }

    #[test]
    fn escaped_text_has_no_markup_left() {
        assert_eq!(
            escape("<a href='x' b=\"y\">&\0"),
            "&lt;a href=&#39;x&#39; b=&quot;y&quot;&gt;&amp;\u{2400}"
        );
    }
}
