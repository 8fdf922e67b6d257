//! `tallow completions`: a completion script for a shell.

use std::io::Write;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Arguments of `tallow completions`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow completions bash > ~/.local/share/bash-completion/completions/tallow
  tallow completions zsh > \"${fpath[1]}/_tallow\"
  tallow completions fish > ~/.config/fish/completions/tallow.fish")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Runs `tallow completions`.
pub fn run(args: CompletionsArgs) -> anyhow::Result<()> {
    // Into memory first: the generator panics when its reader goes away.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "tallow", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(())
}
