//! The files of one kind below a folder.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Files with this extension, in order of path. Folders with one of the `skipped` names are left out, links to folders
/// too.
pub fn files_below(folder: &Path, extension: &str, skipped: &[&str]) -> Result<Vec<PathBuf>> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                if !skipped.iter().any(|name| entry.file_name() == *name) {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|found| found == extension) {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_sorted_by_path_and_skipped_folders_left_out() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b", "target"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        for name in ["z.py", "a.py", "README.md", "py", "b/c.py", "target/x.py"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let found = files_below(folder.path(), "py", &["target"]).unwrap();
        let names: Vec<_> = found.iter().map(|path| path.strip_prefix(folder.path()).unwrap()).collect();
        assert_eq!(names, [Path::new("a.py"), Path::new("b/c.py"), Path::new("z.py")]);
        assert!(files_below(&folder.path().join("missing"), "py", &[]).is_err());
    }
}
