//! Developer commands: `cargo xtask check-deps | check | docs | test | fixtures | bench`.
//!
//! Not part of the product: nothing depends on this crate, and it depends on no room of the house, so that it builds in
//! seconds and works while a room is broken.
#![forbid(unsafe_code)]

mod bench;
mod edges;
mod files;
mod links;
mod metadata;
mod stages;
mod unsafe_code;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

const HELP: &str = "\
Developer commands of Tallow.

Usage: cargo xtask COMMAND

Commands:
  check-deps  the rooms' allowed edges, anyhow and unsafe code only where they may be
  check       fmt --check, check-deps, clippy with warnings denied, docs; stops at the first that fails
  docs        API pages with warnings (broken links, missing docs) denied, and the links of the Markdown pages
  test        every test and doctest of the workspace, by cargo-nextest where it is installed
  fixtures    writes the committed fixtures again: scripts/fixtures/*.py (needs torch, transformers, peft, bitsandbytes;
              PYTHON names the interpreter, python3 by default)
  bench       --compare BASE [--rounds 3] [-- ARGS]: `tallow bench ARGS` of the working tree and of commit BASE in turn
              (training in f32 and bf16, and single ops, unless told), and the ratios of their medians
  help        this text
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let command = match arguments.as_slice() {
        [] | ["help" | "-h" | "--help"] | [_, "-h" | "--help"] => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        ["bench", options @ ..] => return finish(bench(options)),
        [command] => *command,
        [_, extra, ..] => {
            eprintln!("error: unexpected argument {extra:?}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    let result = match command {
        "check-deps" => check_deps(),
        "check" => check(),
        "docs" => workspace_root().and_then(|root| stages::docs(&root)),
        "test" => workspace_root().and_then(|root| stages::test(&root)),
        "fixtures" => workspace_root().and_then(|root| stages::fixtures(&root)),
        unknown => {
            eprintln!("error: unknown command {unknown:?}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    finish(result)
}

fn bench(options: &[&str]) -> Result<()> {
    bench::Compare::parse(options)?.run(&workspace_root()?)
}

fn finish(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The folder of the root manifest.
fn workspace_root() -> Result<PathBuf> {
    let own =
        std::env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR is not set: run it as `cargo xtask`")?;
    let root = PathBuf::from(own).join("../..");
    root.canonicalize().with_context(|| format!("no workspace at {}", root.display()))
}

/// Every rule of the house that can be read off manifests and sources; all violations are listed, not the first alone.
fn check_deps() -> Result<()> {
    let root = workspace_root()?;
    let metadata = metadata::load(&root)?;
    let mut violations = edges::check(&metadata);
    violations.extend(unsafe_code::check(&metadata)?);
    if violations.is_empty() {
        println!("check-deps: {} packages keep to the table of edges", metadata.packages.len());
        return Ok(());
    }
    for violation in &violations {
        eprintln!("{violation}");
    }
    let count = violations.len();
    bail!("violations of the architecture: {count} (see ARCHITECTURE.md; the table is crates/xtask/src/edges.rs)");
}

fn check() -> Result<()> {
    let root = workspace_root()?;
    stages::fmt(&root)?;
    stages::timed("check-deps", check_deps)?;
    stages::clippy(&root)?;
    stages::docs(&root)
}
