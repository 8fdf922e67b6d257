//! The commands that the checks are made of, each with its time.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::files::files_below;
use crate::links;

/// Runs `work` and reports how long it took.
pub fn timed(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("== {name}");
    let start = Instant::now();
    let result = work().with_context(|| format!("{name} failed"));
    eprintln!(
        "== {name}: {} in {:.1} s",
        if result.is_ok() { "done" } else { "failed" },
        start.elapsed().as_secs_f64()
    );
    result
}

/// The layout of every file.
pub fn fmt(root: &Path) -> Result<()> {
    timed("fmt", || run(cargo(root).args(["fmt", "--all", "--check"])))
}

/// Lints of every target, warnings denied.
pub fn clippy(root: &Path) -> Result<()> {
    timed("clippy", || run(cargo(root).args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])))
}

/// API pages and Markdown pages: a broken link or a missing page is an error.
pub fn docs(root: &Path) -> Result<()> {
    let mut command = cargo(root);
    command.args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    timed("docs", || {
        links::check(root)?;
        run(&mut command)
    })
}

/// Every test. The doctests, which cargo-nextest does not run, come first, so that the output ends with the summary of
/// the larger part; both parts run even if the first fails.
pub fn test(root: &Path) -> Result<()> {
    if !has_nextest(root) {
        return timed("tests and doctests", || run(cargo(root).args(["test", "--workspace", "--no-fail-fast"])));
    }
    let doctests = timed("doctests", || run(cargo(root).args(["test", "--workspace", "--doc", "--no-fail-fast"])));
    eprintln!("== tests");
    let tests = run(cargo(root).args(["nextest", "run", "--workspace", "--no-fail-fast"])).context("tests failed");
    doctests.and(tests)
}

/// Runs every fixture script, in order of name.
pub fn fixtures(root: &Path) -> Result<()> {
    let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let folder = root.join("scripts/fixtures");
    let scripts = files_below(&folder, "py", &[])?;
    if scripts.is_empty() {
        bail!("no *.py in {}", folder.display());
    }
    for script in scripts {
        let name = script.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        timed(&name, || run(Command::new(&python).arg(&script).current_dir(root)))?;
    }
    Ok(())
}

/// A cargo command in `root`, by the cargo that runs this.
pub fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(root);
    command
}

fn has_nextest(root: &Path) -> bool {
    let status = cargo(root).args(["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Runs a command; its failure is an error that shows it.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}");
    let status = command.status().with_context(|| format!("cannot run {shown}"))?;
    if !status.success() {
        bail!("{status}: {shown}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_fails_or_is_missing_is_an_error() {
        assert!(run(&mut Command::new("false")).unwrap_err().to_string().contains("false"));
        assert!(run(&mut Command::new("no-such-program-here")).is_err());
        assert!(timed("x", || bail!("broken")).unwrap_err().to_string().contains("x failed"));
    }
}
