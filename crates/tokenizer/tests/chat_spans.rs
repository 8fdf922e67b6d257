//! Spans over random conversations, over tokenizers that put spaces before text, and the ways to get an encoder.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::json;
use tallow_tokenizer::{ChatOptions, Error, Message, SpecialInContent, Tokenizer, TokenizerKind, TrainOptions, train};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}\
                      {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

static BYTES: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_path(fixture("chat")).unwrap());
static PIECES: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_path(fixture("bpe.model")).unwrap());
static UNIGRAM: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_path(fixture("unigram.model")).unwrap());
static WORDPIECE: LazyLock<Tokenizer> = LazyLock::new(|| {
    let kind = TokenizerKind::WordPiece;
    let text = ["the user asks, the assistant answers: walking, talked, walked and talking"; 8];
    train(text, &TrainOptions { kind, vocab_size: 120, ..TrainOptions::default() }, |_| {}).unwrap()
});

fn said(tokenizer: &Tokenizer, chat: &tallow_tokenizer::EncodedChat) -> Vec<(usize, String)> {
    let decode = |(index, span): &(usize, std::ops::Range<usize>)| {
        (*index, tokenizer.decode(&chat.ids[span.clone()], false).unwrap())
    };
    chat.spans.iter().map(decode).collect()
}

fn assistant(messages: &[Message]) -> impl Fn(usize) -> bool + '_ {
    |index| messages[index].role == "assistant"
}

fn conversation() -> impl Strategy<Value = Vec<Message>> {
    let part = prop::sample::select(vec![
        "\n",
        "\n\n",
        " ",
        "  ",
        "a",
        "The cat",
        " says",
        "é",
        "🙂",
        "<|im_end|>",
        "</s>",
        "<|im",
        "_end|>",
        "1",
        "'s",
        "{{",
        "\u{FDD0}",
        "### Response:\n",
        "\t",
    ]);
    let content = prop::collection::vec(part, 0..6).prop_map(|parts| parts.concat());
    let role = prop::sample::select(vec!["user", "assistant", "assistant", "system"]);
    prop::collection::vec((role, content), 1..6)
        .prop_map(|turns| turns.into_iter().map(|(role, content)| Message::new(role, content)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn spans_of_random_conversations(messages in conversation(), text in any::<bool>(), prompt in any::<bool>()) {
        let special_in_content = if text { SpecialInContent::Text } else { SpecialInContent::Parse };
        let options =
            ChatOptions { special_in_content, add_generation_prompt: prompt, ..ChatOptions::default() };
        let encoder = BYTES.chat_encoder_with(CHATML).unwrap();
        let wanted = |i: usize| messages[i].role != "system" && !messages[i].content.as_ref().unwrap().trim().is_empty();
        let chat = encoder.encode_spans(&messages, &options, &wanted).unwrap();
        prop_assert_eq!(BYTES.decode(&chat.ids, false).unwrap(), encoder.render(&messages, &options).unwrap());
        let mut end = 0;
        for (_, span) in &chat.spans {
            prop_assert!(span.start >= end && span.end > span.start && span.end <= chat.ids.len());
            end = span.end;
        }
        let expected: Vec<(usize, String)> = (0..messages.len())
            .filter(|&i| wanted(i))
            .map(|i| (i, format!("{}<|im_end|>", messages[i].content.as_ref().unwrap())))
            .collect();
        prop_assert_eq!(said(&BYTES, &chat), expected);
        if text {
            let ends = chat.ids.iter().filter(|&&id| BYTES.id_to_token(id) == Some("<|im_end|>")).count();
            prop_assert_eq!(ends, messages.len());
        }
        if let Some((index, span)) = chat.spans.iter().find(|(i, _)| *i > 0 && messages[*i].role == "assistant") {
            let prompt = ChatOptions { special_in_content, add_generation_prompt: true, ..ChatOptions::default() };
            let only = encoder.encode_spans(&messages, &options, &|i| i == *index).unwrap();
            prop_assert_eq!(&only.ids[..only.spans[0].1.start], encoder.encode(&messages[..*index], &prompt).unwrap());
            prop_assert!(span.start > 0);
        }
    }

    #[test]
    fn spans_where_text_gets_a_space_in_front(messages in conversation(), unigram in any::<bool>()) {
        let tokenizer: &Tokenizer = if unigram { &UNIGRAM } else { &PIECES };
        let template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' ~ m.content ~ eos_token }}\
                        {% else %}{{ '[' ~ m.content ~ ']' }}{% endif %}{% endfor %}";
        let encoder = tokenizer.chat_encoder_with(template).unwrap();
        let wanted = |i: usize| messages[i].role == "assistant" && !messages[i].content.as_ref().unwrap().trim().is_empty();
        let chat = encoder.encode_spans(&messages, &ChatOptions::default(), &wanted).unwrap();
        let indices: Vec<usize> = chat.spans.iter().map(|(index, _)| *index).collect();
        prop_assert_eq!(indices, (0..messages.len()).filter(|&i| wanted(i)).collect::<Vec<_>>());
        for (_, span) in &chat.spans {
            prop_assert_eq!(Some(chat.ids[span.end - 1]), tokenizer.eos_id());
        }
    }
}

#[test]
fn a_token_across_a_border_is_cut() {
    let encoder = BYTES.chat_encoder_with(CHATML).unwrap();
    let messages = [Message::new("user", "Hi"), Message::new("assistant", "\n\ncode")];
    let whole = encoder.encode(&messages, &ChatOptions::default()).unwrap();
    let chat = encoder.encode_spans(&messages, &ChatOptions::default(), &assistant(&messages)).unwrap();
    assert_ne!(whole, chat.ids, "the fixture's tokenizer joins newlines");
    assert_eq!(said(&BYTES, &chat), [(1, "\n\ncode<|im_end|>".to_string())]);
}

#[test]
fn no_space_is_added_to_an_answer() {
    for tokenizer in [&*PIECES, &*UNIGRAM] {
        let encoder = tokenizer.chat_encoder_with("alpaca").unwrap();
        let messages = [Message::new("user", "the river walks"), Message::new("assistant", "under a river stone")];
        let chat = encoder.encode_spans(&messages, &ChatOptions::default(), &assistant(&messages)).unwrap();
        let span = chat.spans[0].1.clone();
        let bytes: Vec<u8> = chat.ids[span.clone()].iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap()).collect();
        assert_eq!(String::from_utf8(bytes).unwrap().trim_end_matches("</s>"), "under a river stone");
        let prompt = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
        assert_eq!(chat.ids[..span.start], encoder.encode(&messages[..1], &prompt).unwrap());
    }
}

#[test]
fn wordpiece_has_spans_too() {
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }} [SEP]\n{% endfor %}\
                    {% if add_generation_prompt %}assistant: {% endif %}";
    let encoder = WORDPIECE.chat_encoder_with(template).unwrap();
    let messages = [Message::new("user", "Walking"), Message::new("assistant", "Talked, walked")];
    let chat = encoder.encode_spans(&messages, &ChatOptions::default(), &assistant(&messages)).unwrap();
    assert_eq!(said(&WORDPIECE, &chat), [(1, "talked, walked [SEP]".to_string())]);
}

#[test]
fn turns_that_cannot_be_learnt_are_errors() {
    let encoder = BYTES.chat_encoder_with(CHATML).unwrap();
    let empty = [Message::new("user", "Hi"), Message::new("assistant", " \n")];
    let error = encoder.encode_spans(&empty, &ChatOptions::default(), &assistant(&empty)).unwrap_err();
    assert!(matches!(error, Error::EmptyTurn { index: 1, .. }), "{error}");
    assert!(encoder.encode_spans(&empty, &ChatOptions::default(), &|_| false).unwrap().spans.is_empty());
    let drops =
        BYTES.chat_encoder_with("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}").unwrap();
    let messages = [Message::new("user", "Hi"), Message::new("assistant", "Yes")];
    let error = drops.encode_spans(&messages, &ChatOptions::default(), &assistant(&messages)).unwrap_err();
    assert!(matches!(&error, Error::NoSpan { index: 1, template, .. } if template == "given"), "{error}");
    // Around the content there is enough to be taken for a turn, but nothing in it is the message's.
    let silent =
        "{% for m in messages %}<{{ m.role }}>said</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let silent = BYTES.chat_encoder_with(silent).unwrap();
    let error = silent.encode_spans(&messages, &ChatOptions::default(), &assistant(&messages)).unwrap_err();
    assert!(error.to_string().contains("leaves its content out"), "{error}");
    assert!(matches!(encoder.render(&[], &ChatOptions::default()), Err(Error::EmptyConversation)));
    let both = ChatOptions { add_generation_prompt: true, continue_final_message: true, ..ChatOptions::default() };
    assert!(matches!(encoder.render(&messages, &both), Err(Error::ChatOption { .. })));
}

#[test]
fn templates_by_name_and_from_files() {
    let error = BYTES.chat_encoder().unwrap_err().to_string();
    assert!(error.contains("chatml") && error.contains("a Jinja text"), "{error}");
    let error = BYTES.chat_encoder_with("chattml").unwrap_err().to_string();
    assert!(error.contains("chattml") && error.contains("chatml"), "{error}");
    let small = train(["a b c"], &TrainOptions::default(), |_| {}).unwrap();
    let error = small.chat_encoder_with("llama3").unwrap_err();
    assert!(matches!(&error, Error::TemplateToken { token, .. } if token == "<|start_header_id|>"), "{error}");
    let messages =
        [Message::new("system", "Be brief."), Message::new("user", "Hi"), Message::new("assistant", "Hello.")];
    for (name, said_by) in [
        ("alpaca", "Hello.</s>"),
        ("chatml", "Hello.<|im_end|>"),
        ("gemma", "Hello.<end_of_turn>"),
        ("llama3", "Hello.<|eot_id|>"),
        ("mistral", " Hello.</s>"),
        ("zephyr", "Hello.</s>"),
    ] {
        let encoder = BYTES.chat_encoder_with(name).unwrap();
        let chat = encoder.encode_spans(&messages, &ChatOptions::default(), &assistant(&messages)).unwrap();
        assert_eq!(said(&BYTES, &chat), [(2, said_by.to_string())], "{name}");
        let bos = chat.ids.iter().filter(|&&id| Some(id) == BYTES.bos_id()).count();
        assert_eq!(bos, usize::from(name != "chatml"), "{name}");
    }

    let dir = tempfile::tempdir().unwrap();
    let own = BYTES.with_chat_template("{{ messages[0].content }}");
    own.save(dir.path()).unwrap();
    let again = Tokenizer::from_path(dir.path()).unwrap();
    assert_eq!(again.chat_template(), own.chat_template());
    let encoder = again.chat_encoder().unwrap();
    assert_eq!(encoder.render(&messages, &ChatOptions::default()).unwrap(), "Be brief.");
    assert_ne!(encoder.fingerprint(), again.chat_encoder_with("chatml").unwrap().fingerprint());
    assert_eq!(encoder.fingerprint(), own.chat_encoder().unwrap().fingerprint());

    let config = json!({"chat_template": [
        {"name": "tool_use", "template": "tools {{ tools|length }}"}, {"name": "default", "template": "plain {{ tools }}"},
    ]});
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let named = Tokenizer::from_path(dir.path()).unwrap();
    named.save(dir.path()).unwrap();
    let named = Tokenizer::from_path(dir.path()).unwrap();
    let tools = ChatOptions { tools: Some(vec![json!({})]), ..ChatOptions::default() };
    let encoder = named.chat_encoder().unwrap();
    assert_eq!(encoder.render(&messages, &ChatOptions::default()).unwrap(), "plain None");
    assert_eq!(encoder.render(&messages, &tools).unwrap(), "tools 1");
    assert_eq!(named.chat_encoder_with("tool_use").unwrap().render(&messages, &tools).unwrap(), "tools 1");

    std::fs::write(dir.path().join("chat_template.jinja"), "alone").unwrap();
    std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    std::fs::write(dir.path().join("additional_chat_templates/rag.jinja"), "rag {{ documents|length }}").unwrap();
    let files = Tokenizer::from_path(dir.path()).unwrap();
    assert_eq!(files.chat_template(), Some("alone"));
    let documents = ChatOptions { documents: Some(vec![json!({}), json!({})]), ..ChatOptions::default() };
    assert_eq!(files.chat_encoder_with("rag").unwrap().render(&messages, &documents).unwrap(), "rag 2");
}
