//! Links of the Markdown pages that name a file of the repository: each must be there.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::files::files_below;

/// Folders that hold no page of ours.
const SKIPPED: [&str; 3] = ["target", ".git", "runs"];

/// Checks every `*.md` below `root`; all broken links are listed.
pub fn check(root: &Path) -> Result<()> {
    let pages = files_below(root, "md", &SKIPPED)?;
    let mut broken = Vec::new();
    for page in &pages {
        let text = std::fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
        let folder = page.parent().unwrap_or(root);
        for (line, target) in links(&text) {
            if !folder.join(&target).exists() {
                let name = page.strip_prefix(root).unwrap_or(page).display();
                broken.push(format!("{name}:{line}: {target} does not exist"));
            }
        }
    }
    for link in &broken {
        eprintln!("{link}");
    }
    if !broken.is_empty() {
        bail!("broken links in Markdown pages: {}", broken.len());
    }
    Ok(())
}

/// `(line, path)` of each inline link to a file, without its fragment; links to the web and within the page, and whatever
/// stands in code, are left out.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut fenced = false;
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        // Every second piece between backticks is code.
        let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("code");
        for (start, _) in prose.match_indices("](") {
            let rest = &prose[start + 2..];
            let target = rest.split([')', ' ']).next().unwrap_or_default();
            let path = target.split('#').next().unwrap_or_default();
            let elsewhere = target.contains("://") || target.starts_with("mailto:");
            if !path.is_empty() && !elsewhere {
                found.push((number, path.to_string()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_to_files_are_found_and_others_left_out() {
        let text = "[a](A.md) and [b](docs/b.md#part \"title\")\n[c](https://x.y/z) [d](#d) `[e](e.md)`\n```\n[f](f.md)\n```\n[`g`](g.rs)";
        let expected = [(1, "A.md".to_string()), (1, "docs/b.md".to_string()), (6, "g.rs".to_string())];
        assert_eq!(links(text), expected);
    }

    #[test]
    fn a_broken_link_fails_and_a_good_one_passes() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("docs")).unwrap();
        std::fs::write(folder.path().join("README.md"), "[log](docs/log.md)").unwrap();
        assert!(check(folder.path()).unwrap_err().to_string().contains("broken links in Markdown pages: 1"));
        std::fs::write(folder.path().join("docs/log.md"), "[up](../README.md) [src](../docs)").unwrap();
        check(folder.path()).unwrap();
    }
}
