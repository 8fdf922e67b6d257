//! The few fields of `cargo metadata` that the checks read.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// The packages of the workspace.
#[derive(Debug, Deserialize)]
pub struct Metadata {
    /// Members only: it is read with `--no-deps`.
    pub packages: Vec<Package>,
}

/// One package of the workspace.
#[derive(Debug, Deserialize)]
pub struct Package {
    /// Its name, `tallow-nn` for instance.
    pub name: String,
    /// Its manifest; the sources lie beside it.
    pub manifest_path: PathBuf,
    /// What it depends on directly, of every kind.
    pub dependencies: Vec<Dependency>,
}

/// One line of a manifest's dependencies.
#[derive(Debug, Deserialize)]
pub struct Dependency {
    /// The package's name, whatever it is renamed to.
    pub name: String,
    /// `null` is a normal dependency.
    pub kind: Option<Kind>,
}

/// The table that a dependency stands in, where it is not `[dependencies]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `[dev-dependencies]`.
    Dev,
    /// `[build-dependencies]`.
    Build,
}

/// Asks cargo about the workspace at `root`. Offline: manifests alone are read.
pub fn load(root: &Path) -> Result<Metadata> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["metadata", "--format-version", "1", "--no-deps", "--offline"]).current_dir(root);
    let output = command.output().context("cannot run cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).context("cargo metadata wrote something else than expected")
}
