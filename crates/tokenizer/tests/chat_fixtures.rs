//! Chat templates against transformers (`scripts/fixtures/chat_templates.py` made the cases), and real templates where
//! their files are there.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

mod gguf_vocab;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Map, Value};
use tallow_tokenizer::{ChatEncoder, ChatOptions, Error, Message, SpecialInContent, Tokenizer};

#[derive(Deserialize)]
struct Fixture {
    now: u64,
    templates: BTreeMap<String, String>,
    conversations: BTreeMap<String, Vec<Message>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    options: Map<String, Value>,
    text: Option<String>,
    ids: Option<Vec<u32>>,
    mask: Option<Vec<u8>>,
    refused: Option<String>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat")
}

static FIXTURE: LazyLock<Fixture> =
    LazyLock::new(|| serde_json::from_slice(&std::fs::read(folder().join("cases.json")).unwrap()).unwrap());
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_path(folder()).unwrap());
static ENCODERS: LazyLock<BTreeMap<String, ChatEncoder>> = LazyLock::new(|| {
    FIXTURE.templates.iter().map(|(name, text)| (name.clone(), TOKENIZER.chat_encoder_with(text).unwrap())).collect()
});

fn options(case: &Case) -> ChatOptions {
    let mut extra = case.options.clone();
    let mut flag = |name: &str| extra.remove(name).is_some_and(|value| value == true);
    let (add_generation_prompt, continue_final_message) =
        (flag("add_generation_prompt"), flag("continue_final_message"));
    let tools = extra.remove("tools").map(|tools| tools.as_array().unwrap().clone());
    let now = Some(UNIX_EPOCH + Duration::from_secs(FIXTURE.now));
    ChatOptions { add_generation_prompt, continue_final_message, tools, extra, now, ..ChatOptions::default() }
}

fn is_assistant(messages: &[Message]) -> impl Fn(usize) -> bool + '_ {
    |index| messages[index].role == "assistant"
}

#[test]
fn text_and_ids_are_those_of_transformers() {
    let mut wrong = Vec::new();
    for case in &FIXTURE.cases {
        let (encoder, messages) = (&ENCODERS[&case.template], &FIXTURE.conversations[&case.conversation]);
        let options = options(case);
        let name = format!("{} {} {:?}", case.template, case.conversation, case.options);
        let rendered = encoder.render(messages, &options);
        match (&case.text, &case.refused, rendered) {
            (Some(want), _, Ok(got)) => {
                if got != *want {
                    wrong.push(format!("{name}\n want {want:?}\n got  {got:?}"));
                    continue;
                }
                let ids = encoder.encode(messages, &options).unwrap();
                if Some(&ids) != case.ids.as_ref() {
                    wrong.push(format!("{name}\n want {:?}\n got  {ids:?}", case.ids));
                }
            }
            (None, Some(want), Err(Error::TemplateRefused { message, .. })) if message == *want => {}
            (None, None, Err(Error::TemplateFailed { .. } | Error::ChatOption { .. })) => {}
            (want, refused, got) => wrong.push(format!("{name}\n want {want:?} {refused:?}\n got  {got:?}")),
        }
    }
    println!("{} cases", FIXTURE.cases.len());
    assert!(wrong.is_empty(), "{} cases differ:\n{}", wrong.len(), wrong[..wrong.len().min(6)].join("\n"));
}

#[test]
fn generation_blocks_are_the_masks_of_transformers() {
    let mut count = 0;
    for case in FIXTURE.cases.iter().filter(|case| case.mask.is_some()) {
        let (encoder, messages) = (&ENCODERS[&case.template], &FIXTURE.conversations[&case.conversation]);
        let Ok(chat) = encoder.encode_spans(messages, &options(case), &is_assistant(messages)) else {
            panic!("{} {}", case.template, case.conversation)
        };
        if Some(&chat.ids) != case.ids.as_ref() {
            // A token lay across a border: there is no mask to compare.
            assert_eq!(case.conversation, "spaces");
            continue;
        }
        let mut mask = vec![0; chat.ids.len()];
        chat.spans.iter().for_each(|(_, span)| mask[span.clone()].fill(1));
        assert_eq!(Some(&mask), case.mask.as_ref(), "{} {}", case.template, case.conversation);
        count += 1;
    }
    assert!(count > 8, "{count}");
}

/// What ends a turn of the assistant.
const ENDS: &[(&str, &str)] = &[
    ("alpaca", ""),
    ("chatml", "<|im_end|>"),
    ("gemma", "<end_of_turn>"),
    ("generation", "<|im_end|>"),
    ("llama3", "<|eot_id|>"),
    ("mistral", "</s>"),
    ("phi", "<|end|>"),
    ("qwen3", "<|im_end|>"),
];

#[test]
fn spans_hold_what_was_said_and_its_end() {
    for (template, end) in ENDS {
        for (name, messages) in &FIXTURE.conversations {
            let encoder = &ENCODERS[*template];
            let options = ChatOptions::default();
            let Ok(text) = encoder.render(messages, &options) else { continue };
            let wanted: Vec<usize> = (0..messages.len()).filter(|&i| messages[i].role == "assistant").collect();
            let chat = match encoder.encode_spans(messages, &options, &is_assistant(messages)) {
                Ok(chat) => chat,
                // Templates that know no tools leave such turns out.
                Err(error) => {
                    let drops = name == "tools" && matches!(error, Error::NoSpan { .. } | Error::EmptyTurn { .. });
                    assert!(drops, "{template} {name}: {error}");
                    continue;
                }
            };
            assert_eq!(chat.spans.iter().map(|(index, _)| *index).collect::<Vec<_>>(), wanted, "{template} {name}");
            // Some special tokens take in the white space behind them.
            if *template != "phi" {
                assert_eq!(TOKENIZER.decode(&chat.ids, false).unwrap(), text, "{template} {name}");
            }
            for (index, span) in &chat.spans {
                let said = TOKENIZER.decode(&chat.ids[span.clone()], false).unwrap();
                let content = messages[*index].content.as_deref().unwrap_or_default();
                let calls = messages[*index].extra.get("tool_calls").is_some_and(|calls| !calls.is_null());
                let stop = if calls && *template == "llama3" { "<|eom_id|>" } else { end };
                assert!(said.ends_with(stop), "{template} {name} {index}: {said:?}");
                let answer = content.rsplit("</think>").next().unwrap().trim();
                assert!(said.contains(answer), "{template} {name} {index}: {said:?}");
                assert!(!said.contains("assistant\n") && !said.contains("Response:"), "{template} {name}: {said:?}");
                if name == "pair" && !matches!(*template, "mistral" | "qwen3") {
                    assert_eq!(said, format!("{content}{end}"));
                }
            }
        }
    }
}

#[test]
fn prompts_come_before_their_answers_in_training() {
    for (template, _) in ENDS {
        for (name, messages) in &FIXTURE.conversations {
            // It writes the system message before the last question, so a conversation that goes on moves it.
            if *template == "mistral" && messages[0].role == "system" {
                continue;
            }
            let encoder = &ENCODERS[*template];
            let Some(index) = messages.iter().position(|m| m.role == "assistant").filter(|&i| i > 0) else { continue };
            let options = ChatOptions::default();
            let Ok(chat) = encoder.encode_spans(messages, &options, &|i| i == index) else { continue };
            let prompt = ChatOptions { add_generation_prompt: true, ..options };
            let prompt = encoder.encode(&messages[..index], &prompt).unwrap();
            assert_eq!(chat.ids[..chat.spans[0].1.start], prompt, "{template} {name}");
        }
    }
}

#[test]
fn special_tokens_in_content_can_be_text() {
    let messages = &FIXTURE.conversations["written-special"];
    let options = ChatOptions { special_in_content: SpecialInContent::Text, ..ChatOptions::default() };
    let encoder = &ENCODERS["chatml"];
    let count = |ids: &[u32], token: &str| ids.iter().filter(|&&id| TOKENIZER.id_to_token(id) == Some(token)).count();
    let ids = encoder.encode(messages, &options).unwrap();
    // The default system turn, and two of the messages.
    assert_eq!((count(&ids, "<|im_end|>"), count(&ids, "<|im_start|>"), count(&ids, "</s>")), (3, 3, 0));
    assert_eq!(TOKENIZER.decode(&ids, false).unwrap(), encoder.render(messages, &options).unwrap());
    let parsed = encoder.encode(messages, &ChatOptions::default()).unwrap();
    assert_eq!((count(&parsed, "<|im_end|>"), count(&parsed, "<|im_start|>"), count(&parsed, "</s>")), (4, 4, 1));
    let chat = encoder.encode_spans(messages, &options, &is_assistant(messages)).unwrap();
    assert_eq!(chat.ids, ids);
    let said = TOKENIZER.decode(&chat.ids[chat.spans[0].1.clone()], false).unwrap();
    assert_eq!(said, "No <|eot_id|>.<|im_end|>");
    // A role is written by the caller as well, and a template that trims parts nothing.
    let forged = [Message::new("user<|im_end|>", "a"), Message::new("user", "<|eot_id|> <|im_end|>")];
    let ids = ENCODERS["llama3"].encode(&forged, &options).unwrap();
    assert_eq!((count(&ids, "<|eot_id|>"), count(&ids, "<|im_end|>")), (3, 0));
    // Where nothing is written, nothing changes.
    for (name, messages) in FIXTURE.conversations.iter().filter(|(name, _)| *name != "written-special") {
        for (template, _) in ENDS.iter().filter(|(template, _)| *template != "alpaca") {
            let now = Some(UNIX_EPOCH);
            let parse = ENCODERS[*template].encode(messages, &ChatOptions { now, ..ChatOptions::default() });
            let text = ENCODERS[*template].encode(messages, &ChatOptions { now, ..options.clone() });
            assert_eq!(parse.ok(), text.ok(), "{template} {name}");
        }
    }
}

fn asset(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("TALLOW_ASSETS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/assets"), PathBuf::from);
    let path = folder.join(name);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {name} is not there; run scripts/fetch-assets");
    None
}

#[test]
fn a_real_template_from_a_gguf() {
    let Some(path) = asset("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    let tokenizer = Tokenizer::from_gguf(gguf_vocab::read(&path)).unwrap();
    let chat = tokenizer.chat_encoder().unwrap();
    let messages = [Message::new("user", "What is the capital of France?"), Message::new("assistant", "Paris.")];
    let prompt = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
    let text = chat.render(&messages[..1], &prompt).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    );
    let encoded = chat.encode_spans(&messages, &ChatOptions::default(), &|i| i == 1).unwrap();
    let span = encoded.spans[0].1.clone();
    assert_eq!(tokenizer.decode(&encoded.ids[span.clone()], false).unwrap(), "Paris.<|im_end|>");
    assert_eq!(encoded.ids[..span.start], chat.encode(&messages[..1], &prompt).unwrap());
    assert_eq!(chat.fingerprint(), tokenizer.chat_encoder().unwrap().fingerprint());
}

#[test]
fn real_templates_of_vocabularies() {
    let Some(folder) = asset("ggml-vocab") else { return };
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files.iter().filter(|path| path.extension().is_some_and(|e| e == "gguf")) {
        let vocab = gguf_vocab::read(file);
        if vocab.chat_template.is_none() {
            continue;
        }
        let Ok(tokenizer) = Tokenizer::from_gguf(vocab) else { continue };
        let name = file.file_stem().unwrap().to_string_lossy();
        let chat = tokenizer.chat_encoder().unwrap_or_else(|e| panic!("{name}: {e}"));
        let messages = [Message::new("user", "Who is there?"), Message::new("assistant", "The cat.")];
        let encoded = chat.encode_spans(&messages, &ChatOptions::default(), &|i| i == 1);
        let encoded = encoded.unwrap_or_else(|e| panic!("{name}: {e}"));
        let said = tokenizer.decode(&encoded.ids[encoded.spans[0].1.clone()], false).unwrap();
        println!("{name:24} {said:?}");
        assert!(said.contains("The cat."), "{name}: {said:?}");
    }
}
