//! `tallow doctor`, `completions` and the top of the command line, driven as a process.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::path::Path;

use rig::{command, fails, object, stdout};
use serde_json::Value;

fn tallow(args: &str) -> std::process::Output {
    rig::tallow(Path::new("."), args)
}

#[test]
fn doctor_measures_this_machine() {
    let report = object(&tallow("doctor --json"));
    for key in ["devices", "features", "cpu", "threads", "caches", "memory", "peak", "missing"] {
        assert!(!report[key].is_null(), "no {key}");
    }
    let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_f64).expect(pointer);
    assert!(number("/peak/f32_gflops") > 0.1 && number("/peak/read_gb_per_s") > 0.1);
    assert!(number("/threads") >= 1.0 && number("/cpu/cores") >= number("/threads"));
    if cfg!(target_os = "linux") {
        assert!(number("/memory/total") > number("/memory/available"));
    }
}

#[test]
fn doctor_says_what_limits_it() {
    let report =
        stdout(&command().args(["doctor", "--threads", "1"]).env("TALLOW_SIMD", "scalar").output().expect("runs"));
    assert!(report.contains("simd         scalar"), "{report}");
    assert!(report.contains("threads      1 of "), "{report}");
    assert!(report.contains("unset TALLOW_SIMD"), "{report}");
    for line in ["device       cpu", "GFLOP/s f32", "GB/s read"] {
        assert!(report.contains(line), "no {line:?} in {report}");
    }
}

#[test]
fn completions_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = stdout(&tallow(&format!("completions {shell}")));
        assert!(script.contains("tokenizer") && script.contains("vocab-size"), "{shell}");
    }
    fails(&tallow("completions tcsh"), 2, &["tcsh", "fish"]);
}

#[test]
fn no_command_and_unknown_ones_are_wrong_usage() {
    for (args, word) in [("", "Usage"), ("pretrian", "pretrian"), ("doctor --jsn", "--json")] {
        fails(&tallow(args), 2, &[word]);
    }
}
