//! `tallow chat`, driven as a process: what is piped in is a conversation.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use rig::school::{finetune, school};
use rig::{command, fails, stdout};

/// A short template: alpaca's preamble alone would fill half of the model's positions.
const TEMPLATE: &str = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\\n' }}{% endfor %}\
                        {% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}";
const MODEL: [&str; 2] = ["--model", "out/final"];
const TEMPLATED: [&str; 2] = ["--chat-template", "turns.jinja"];
const GREEDY: [&str; 4] = ["--temperature", "0", "--max-tokens", "8"];

/// The binary with `args`, and `input` piped in.
fn piped(dir: &Path, args: &[&str], input: &str) -> Output {
    let mut command = command();
    command.current_dir(dir).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the binary runs");
    // A process that fails at once reads nothing.
    let _ = child.stdin.take().expect("stdin").write_all(input.as_bytes());
    child.wait_with_output().expect("ends")
}

fn chat(dir: &Path, more: &[&str], input: &str) -> String {
    stdout(&piped(dir, &[&["chat"], &MODEL[..], &GREEDY, more].concat(), input))
}

/// What `tallow generate` makes of a whole prompt, without the prompt.
fn continued(dir: &Path, prompt: &str, more: &[&str]) -> String {
    let text = stdout(&piped(dir, &[&["generate", "--prompt", prompt], &MODEL[..], &GREEDY, more].concat(), ""));
    text.strip_prefix(prompt).expect("the prompt comes first").trim_end_matches('\n').to_owned()
}

#[test]
fn a_turn_sees_those_before_it() {
    let dir = school();
    let at = dir.path();
    fs::write(at.join("turns.jinja"), TEMPLATE).expect("written");
    let said = |input: &str| chat(at, &TEMPLATED, input);

    let first = continued(at, "<user>the fox\n<assistant>", &[]);
    let history = format!("<user>the fox\n<assistant>{first}\n<user>a boat\n<assistant>");
    let second = continued(at, &history, &[]);
    let alone = continued(at, "<user>a boat\n<assistant>", &[]);
    assert!(!first.is_empty() && second != alone, "{second:?} and {alone:?}: the history has no effect on this model");

    let both = format!("{first}\n{second}\n");
    assert_eq!(said("the fox\na boat\n"), both);
    assert_eq!(said("the fox\n\n  \na boat"), both, "empty lines are no turns, and the last line needs no end");
    assert_eq!(said("the fox\na boat\n/exit\nthe sea\n"), both);
    assert_eq!(said("the fox\n/clear\na boat\n"), format!("{first}\n{alone}\n"));
    assert_eq!(said("the sea\n/undo\nthe fox\na boat\n"), said("the sea\n") + &both);
    assert_eq!(said(""), "");

    let told = continued(at, "<system>be brief\n<user>the fox\n<assistant>", &[]);
    assert_eq!(said("the sea\n/system be brief\nthe fox\n"), said("the sea\n") + &told + "\n");
    assert_eq!(chat(at, &[&TEMPLATED[..], &["--system", "be brief"]].concat(), "the fox\n"), told + "\n");
}

#[test]
fn an_adapter_brings_its_template_and_changes_the_answer() {
    let dir = school();
    let at = dir.path();
    fs::write(at.join("turns.jinja"), TEMPLATE).expect("written");
    stdout(&finetune(at, &["train.steps=20", "tokenizer.chat_template=turns.jinja"], &[]));
    let adapted = ["--adapter", "tuned/final"];
    let answer = chat(at, &adapted, "the fox\n");
    assert_eq!(answer, chat(at, &[&adapted[..], &TEMPLATED].concat(), "the fox\n"));
    assert_eq!(answer, continued(at, "<user>the fox\n<assistant>", &adapted) + "\n");
    assert_ne!(answer, chat(at, &TEMPLATED, "the fox\n"), "the adapter changes nothing");
}

#[test]
fn what_cannot_be_is_said_before_anything_is_read() {
    let dir = school();
    let at = dir.path();
    let fail = |more: &[&str], code: i32, words: &[&str]| {
        fails(&piped(at, &[&["chat"], &MODEL[..], more].concat(), "hello\n"), code, words);
    };
    fail(&[], 2, &["chat template", "--chat-template", "alpaca"]);
    fail(&["--chat-template", "chatml"], 2, &["--chat-template chatml", "<|im_"]);
    fail(&["--chat-template", "{% for"], 2, &["--chat-template"]);
    fail(&["--chat-template", "alpaca", "--temperature", "-1"], 2, &["--temperature -1"]);
    fail(&["--adapter", "out/final"], 1, &["adapter_config.json"]);
    // A conversation that no longer fits ends with an error where nobody is there to shorten it.
    let long = "the river ".repeat(60);
    let full = piped(at, &[&["chat"], &MODEL[..], &["--chat-template", "alpaca"]].concat(), &long);
    fails(&full, 1, &["256 positions"]);
}
