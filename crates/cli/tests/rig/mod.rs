//! Driving the real binary as a process.

#![allow(dead_code, reason = "each test file compiles this module for itself and uses its part of it")]

pub mod run;
pub mod school;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The binary, with nothing set that would change what it does here.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tallow"));
    command.stdin(Stdio::null()).env_remove("TALLOW_SIMD").env_remove("RAYON_NUM_THREADS");
    command
}

/// Runs the binary with `args` split at white space, in `dir`.
pub fn tallow(dir: &Path, args: &str) -> Output {
    command().args(args.split_whitespace()).current_dir(dir).output().expect("the binary runs")
}

/// Its stdout, if it left with 0.
pub fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

/// The one JSON object that is all of stdout, if it left with 0.
pub fn object(output: &Output) -> Value {
    serde_json::from_str(&stdout(output)).expect("one JSON object")
}

/// Asserts that it left with `code`, wrote nothing to stdout, and names every one of `words` on stderr.
pub fn fails(output: &Output, code: i32, words: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(output.stdout.is_empty(), "a failure wrote to stdout");
    assert!(!message.contains("panicked"), "{message}");
    for word in words {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
}

/// The first line on stderr that tells of the failure.
pub fn first_error(output: &Output) -> String {
    let message = String::from_utf8_lossy(&output.stderr);
    message.lines().find(|line| line.starts_with("error: ")).unwrap_or_default().to_owned()
}
