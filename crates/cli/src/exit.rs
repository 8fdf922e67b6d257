//! Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted.

use std::process::ExitCode;

/// Something failed.
pub const FAILED: u8 = 1;
/// Wrong usage or configuration.
pub const USAGE: u8 = 2;
/// Stopped by Ctrl-C or SIGTERM, in good order.
pub const INTERRUPTED: u8 = 130;

/// An error that is the user's to mend.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The run was stopped and has saved what it had.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// An error that is the user's to mend: exit code 2.
pub fn usage(message: String) -> anyhow::Error {
    anyhow::Error::new(Usage(message))
}

/// Prints an error with its causes on stderr, and the exit code for it.
pub fn report(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    if error.is::<Interrupted>() {
        return ExitCode::from(INTERRUPTED);
    }
    if closed_pipe(&error) {
        return ExitCode::SUCCESS;
    }
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !message.contains(&cause) {
            message.push_str(if message.is_empty() { "" } else { ": " });
            message.push_str(&cause);
        }
    }
    crate::terminal::line(&format!("error: {message}"));
    ExitCode::from(if is_usage(&error) { USAGE } else { FAILED })
}

fn is_usage(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<Usage>() || cause.downcast_ref::<tallow_train::Error>().is_some_and(tallow_train::Error::is_usage)
    })
}

/// The reader of our output went away (`tallow ... | head`): not a failure.
fn closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}
