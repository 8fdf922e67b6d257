//! `cargo xtask bench --compare BASE`: the working tree's speed beside another commit's.
//!
//! Both binaries are built first, then take turns, round after round: a machine's speed drifts over minutes, so two
//! series one after the other would compare the hours, not the commits. Ratios are printed; nothing is judged by them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::stages::{cargo, run, timed};

/// What is measured unless the command line says.
const CASES: &[&[&str]] = &[&["train"], &["train", "--dtype", "bf16"], &["ops"]];

/// How to compare.
#[derive(Debug, PartialEq, Eq)]
pub struct Compare {
    base: String,
    rounds: usize,
    /// Arguments of `tallow bench`; none takes [`CASES`].
    case: Vec<String>,
}

impl Compare {
    /// Reads `--compare BASE [--rounds N] [-- ARGS]`.
    pub fn parse(arguments: &[&str]) -> Result<Self> {
        let (options, case) = match arguments.iter().position(|a| *a == "--") {
            Some(at) => (&arguments[..at], arguments[at + 1..].iter().map(|a| (*a).to_owned()).collect()),
            None => (arguments, Vec::new()),
        };
        let mut found = Self { base: String::new(), rounds: 3, case };
        let mut options = options.iter();
        while let Some(option) = options.next() {
            let value = options.next().with_context(|| format!("{option} needs a value"))?;
            match *option {
                "--compare" => found.base = (*value).to_owned(),
                "--rounds" => found.rounds = value.parse().with_context(|| format!("--rounds {value}"))?,
                _ => bail!("unexpected argument {option:?}; see cargo xtask help"),
            }
        }
        ensure!(!found.base.is_empty(), "say what to compare with: --compare BASE, a commit, branch or tag");
        ensure!(found.rounds > 0, "--rounds 0 measures nothing");
        Ok(found)
    }

    /// Builds both, lets them take turns, and prints medians and ratios.
    pub fn run(&self, root: &Path) -> Result<()> {
        let base = build_commit(root, &self.base)?;
        timed("build of the working tree", || {
            run(cargo(root).args(["build", "--release", "--package", "tallow-cli"]))
        })?;
        let head = target(root).join("release/tallow");
        let given: Vec<&str> = self.case.iter().map(String::as_str).collect();
        let cases: Vec<&[&str]> = if given.is_empty() { CASES.to_vec() } else { vec![&given] };
        for case in cases {
            println!("\ntallow bench {}", case.join(" "));
            let mut samples: [Samples; 2] = Default::default();
            for round in 1..=self.rounds {
                eprintln!("round {round} of {}", self.rounds);
                // Who begins changes: the first of a pair may find the machine in another state.
                for turn in if round % 2 == 1 { [0, 1] } else { [1, 0] } {
                    measure([&base, &head][turn], case, &mut samples[turn])?;
                }
            }
            print!("{}", table(&samples[0], &samples[1]));
        }
        Ok(())
    }
}

/// Every number of every round, by the line and the field that it stands in.
type Samples = BTreeMap<String, Vec<f64>>;

/// The release binary of `revision`, built once and kept under its hash.
fn build_commit(root: &Path, revision: &str) -> Result<PathBuf> {
    let hash = output(
        Command::new("git")
            .current_dir(root)
            .args(["rev-parse", "--verify", "--quiet"])
            .arg(format!("{revision}^{{commit}}")),
    )
    .with_context(|| format!("{revision:?} is no commit here"))?;
    let hash = hash.trim();
    let folder = target(root).join("bench");
    let kept = folder.join(format!("tallow-{hash}"));
    if kept.exists() {
        return Ok(kept);
    }
    std::fs::create_dir_all(&folder)?;
    let tree = folder.join("tree");
    let git = |arguments: &[&str]| run(Command::new("git").current_dir(root).args(arguments));
    let path = tree.to_string_lossy();
    timed(&format!("build of {revision}"), || {
        match tree.exists() {
            true => {
                run(Command::new("git").current_dir(&tree).args(["checkout", "--force", "--quiet", "--detach", hash]))?
            }
            // A tree that was deleted may still be registered.
            false => git(&["worktree", "add", "--force", "--quiet", "--detach", &path, hash])?,
        }
        let mut build = cargo(&tree);
        build.args(["build", "--release", "--package", "tallow-cli"]).env("CARGO_TARGET_DIR", folder.join("build"));
        run(&mut build)?;
        let copying = folder.join("copying");
        std::fs::copy(folder.join("build/release/tallow"), &copying)?;
        std::fs::rename(&copying, &kept)?;
        Ok(())
    })?;
    Ok(kept)
}

fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir))
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{}: {command:?}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

fn measure(binary: &Path, case: &[&str], samples: &mut Samples) -> Result<()> {
    let printed = output(Command::new(binary).arg("bench").args(case).arg("--json"))?;
    add_lines(&printed, samples).with_context(|| format!("{} bench {}", binary.display(), case.join(" ")))
}

/// Takes every number of lines of JSON objects; their strings tell one line from another.
fn add_lines(printed: &str, samples: &mut Samples) -> Result<()> {
    for line in printed.lines().filter(|line| !line.trim().is_empty()) {
        let Value::Object(fields) = serde_json::from_str(line)? else { bail!("not an object: {line}") };
        let names: Vec<&str> = fields.values().filter_map(Value::as_str).collect();
        for (field, value) in &fields {
            if let Some(number) = value.as_f64() {
                samples.entry(format!("{} {field}", names.join(" "))).or_default().push(number);
            }
        }
    }
    Ok(())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[half] } else { (sorted[half - 1] + sorted[half]) / 2.0 }
}

/// Medians, their ratio, and how far the rounds of one binary lie apart: a ratio within that says nothing.
fn table(base: &Samples, head: &Samples) -> String {
    let spread = |values: &[f64]| {
        let (least, most) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, m), v| (l.min(*v), m.max(*v)));
        if least > 0.0 { most / least } else { 1.0 }
    };
    let mut text = format!("{:<44} {:>12} {:>12} {:>8} {:>8}\n", "", "base", "here", "ratio", "spread");
    for (name, before) in base {
        let Some(after) = head.get(name) else {
            text += &format!("{name:<44} {:>12.4} {:>12}\n", median(before), "gone");
            continue;
        };
        let (old, new) = (median(before), median(after));
        let ratio = if old == new { 1.0 } else { new / old };
        text +=
            &format!("{name:<44} {old:>12.4} {new:>12.4} {ratio:>8.3} {:>8.2}\n", spread(before).max(spread(after)));
    }
    for (name, after) in head.iter().filter(|(name, _)| !base.contains_key(*name)) {
        text += &format!("{name:<44} {:>12} {:>12.4}\n", "new", median(after));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line() {
        let parsed = Compare::parse(&["--compare", "HEAD~1", "--rounds", "5", "--", "train", "--dim", "64"]).unwrap();
        assert_eq!((parsed.base.as_str(), parsed.rounds), ("HEAD~1", 5));
        assert_eq!(parsed.case, ["train", "--dim", "64"]);
        for wrong in [&["--rounds", "3"][..], &["--compare"], &["--compare", "x", "--rounds", "0"], &["--fast", "x"]] {
            assert!(Compare::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn numbers_are_kept_by_line_and_field_and_compared_by_medians() {
        let (mut base, mut head) = (Samples::new(), Samples::new());
        for ms in [2.0, 9.0, 3.0] {
            add_lines(
                &format!("{{\"op\":\"rope\",\"dtype\":\"f32\",\"ms\":{ms}}}\n{{\"op\":\"old\",\"n\":1}}\n"),
                &mut base,
            )
            .unwrap();
            add_lines(&format!("{{\"op\":\"rope\",\"dtype\":\"f32\",\"ms\":{}}}\n", ms / 2.0), &mut head).unwrap();
        }
        assert_eq!(base["rope f32 ms"], [2.0, 9.0, 3.0]);
        let table = table(&base, &head);
        let line = table.lines().find(|line| line.starts_with("rope f32 ms")).unwrap();
        let fields: Vec<&str> = line.split_whitespace().skip(3).collect();
        assert_eq!(fields, ["3.0000", "1.5000", "0.500", "4.50"]);
        assert!(table.lines().any(|line| line.starts_with("old n") && line.ends_with("gone")), "{table}");
        assert!(add_lines("[1]", &mut base).is_err() && add_lines("{", &mut base).is_err());
    }

    #[test]
    fn the_median_of_an_even_number_is_between() {
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[5.0]), 5.0);
    }
}
