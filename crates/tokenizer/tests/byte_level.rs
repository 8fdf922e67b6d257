//! Byte-level BPE: training, encoding against the `tokenizers` crate, round trips, streaming, saving.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use proptest::prelude::*;
use std::sync::LazyLock;
use tallow_tokenizer::{EncodeOptions, Error, PreTokenizer, Tokenizer, TrainEvent, TrainOptions, train};

/// A small corpus with repeated words, digits, code, accents and other scripts.
fn corpus() -> Vec<String> {
    let lines = [
        "The quick brown fox jumps over the lazy dog; the dog didn't mind, and they'll all be happy.",
        "In 1984 there were 365 days, 12 months and 52 weeks: 3.14159 is not 22/7.",
        "fn main() {\n    println!(\"hello, world\");\n}\n\n\n",
        "Les élèves étudient près de la forêt. Das Mädchen läuft über die Straße.",
        "日本語の文章です。中文也可以。Привет, мир! 안녕하세요 😀👍",
    ];
    (0..40).map(|i| format!("{} {}", lines[i % lines.len()], lines[(i * 7 + 1) % lines.len()])).collect()
}

fn trained(pre: &str) -> Tokenizer {
    let pre = PreTokenizer::from_name(pre).unwrap();
    let options = TrainOptions { vocab_size: 500, pre, ..TrainOptions::default() };
    train(corpus(), &options, |_| {}).unwrap()
}

static SMOLLM: LazyLock<Tokenizer> = LazyLock::new(|| trained("smollm"));

fn theirs(ours: &Tokenizer) -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_bytes(serde_json::to_vec(&ours.to_json().unwrap()).unwrap()).unwrap()
}

fn samples() -> Vec<String> {
    let mut all = corpus();
    all.extend(
        [
            "",
            " ",
            "\n",
            "  two  spaces ",
            "don't DON'T",
            "12345678",
            "naïve café",
            "\u{0}\u{7f}",
            "e\u{301}",
            "ſ'ſ",
            "\r\n\r\n x",
        ]
        .map(String::from),
    );
    all.push("abcdefghij".repeat(200));
    all.push(" ".repeat(300));
    all
}

#[test]
fn ids_equal_those_of_the_tokenizers_crate_for_every_pre_tokenizer() {
    for name in PreTokenizer::names() {
        let ours = trained(name);
        let theirs = theirs(&ours);
        for text in samples() {
            let expected = theirs.encode_fast(text.as_str(), false).unwrap();
            assert_eq!(ours.encode(&text, false).unwrap(), expected.get_ids(), "{name} on {text:?}");
            assert_eq!(ours.decode(expected.get_ids(), false).unwrap(), text, "{name}");
        }
    }
}

#[test]
fn the_trainer_agrees_with_the_tokenizers_crate() {
    use tokenizers::models::TrainerWrapper;
    use tokenizers::models::bpe::BpeTrainer;
    let ours = train(
        corpus(),
        &TrainOptions { vocab_size: 450, min_frequency: 0, special_tokens: Some(vec![]), ..TrainOptions::default() },
        |_| {},
    )
    .unwrap();
    let mut theirs = theirs(&ours);
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    let trainer = BpeTrainer::builder().vocab_size(450).show_progress(false).initial_alphabet(alphabet).build();
    theirs.train(&mut TrainerWrapper::from(trainer), corpus().into_iter()).unwrap();
    let theirs: serde_json::Value = serde_json::from_str(&theirs.to_string(false).unwrap()).unwrap();
    assert_eq!(ours.to_json().unwrap()["model"]["vocab"], theirs["model"]["vocab"]);
    assert_eq!(ours.to_json().unwrap()["model"]["merges"], theirs["model"]["merges"]);
}

#[test]
fn training_is_deterministic_and_order_free() {
    let options = TrainOptions { vocab_size: 400, ..TrainOptions::default() };
    let mut reversed = corpus();
    reversed.reverse();
    let one = train(corpus(), &options, |_| {}).unwrap();
    let other = train(reversed, &options, |_| {}).unwrap();
    assert_eq!(one.to_json().unwrap().to_string(), other.to_json().unwrap().to_string());
    assert_eq!(one.fingerprint(), other.fingerprint());
    let different = train(corpus(), &TrainOptions { vocab_size: 401, ..options }, |_| {}).unwrap();
    assert_ne!(one.fingerprint(), different.fingerprint());
}

#[test]
fn a_small_corpus_warns_and_bad_options_fail() {
    let mut events = Vec::new();
    let options = TrainOptions { vocab_size: 5000, ..TrainOptions::default() };
    let small = train(["tiny tiny tiny"], &options, |e| events.push(e)).unwrap();
    let warned = events.iter().any(|e| {
        matches!(e, TrainEvent::Warning(text) if text.contains(&small.vocab_size().to_string()) && text.contains("5000"))
    });
    assert!(warned, "{events:?}");
    assert!(small.vocab_size() < 300);

    let too_small = TrainOptions { vocab_size: 256, ..TrainOptions::default() };
    let message = train(corpus(), &too_small, |_| {}).unwrap_err().to_string();
    assert!(message.contains("vocab_size = 256") && message.contains("257"), "{message}");
    assert!(matches!(train([""; 0], &options, |_| {}), Err(Error::EmptyCorpus)));
    assert!(matches!(train([""], &options, |_| {}), Err(Error::EmptyCorpus)));
    let twice = TrainOptions { special_tokens: Some(vec!["a".into(), "a".into()]), ..TrainOptions::default() };
    assert!(matches!(train(corpus(), &twice, |_| {}), Err(Error::BadOption { option: "special_tokens", .. })));
}

#[test]
fn saving_and_loading_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    SMOLLM.save(dir.path()).unwrap();
    for path in [dir.path().to_path_buf(), dir.path().join("tokenizer.json")] {
        let again = Tokenizer::from_path(&path).unwrap();
        assert_eq!(again.fingerprint(), SMOLLM.fingerprint());
        assert_eq!(again.eos_id(), Some(0));
        assert_eq!(again.bos_id(), Some(0));
        assert_eq!(again.pre_tokenizer().unwrap().name(), "smollm");
        for text in samples() {
            assert_eq!(again.encode(&text, true).unwrap(), SMOLLM.encode(&text, true).unwrap());
        }
    }
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "no temporary file stays behind: {names:?}");

    let file = dir.path().join("sub").join("mine.json");
    SMOLLM.save(&file).unwrap();
    assert_eq!(Tokenizer::from_path(&file).unwrap().fingerprint(), SMOLLM.fingerprint());
}

#[test]
fn special_tokens_are_text_unless_asked_for() {
    let text = "a<|endoftext|>b";
    let plain = SMOLLM.encode(text, true).unwrap();
    assert!(!plain.contains(&0));
    assert_eq!(SMOLLM.decode(&plain, true).unwrap(), text);
    let parsed = SMOLLM.encode_with(text, EncodeOptions { parse_special: true, ..Default::default() }).unwrap();
    assert_eq!(parsed.iter().filter(|&&id| id == 0).count(), 1);
    assert_eq!(SMOLLM.decode(&parsed, true).unwrap(), "ab");
    assert_eq!(SMOLLM.decode(&parsed, false).unwrap(), text);
    let framed = SMOLLM.encode_with("x", EncodeOptions { add_bos: true, add_eos: true, parse_special: false }).unwrap();
    assert_eq!((framed[0], framed[framed.len() - 1], framed.len()), (0, 0, 3));
    assert!(SMOLLM.is_special(0) && !SMOLLM.is_special(1));
    let bare = TrainOptions { vocab_size: 300, special_tokens: Some(vec![]), ..TrainOptions::default() };
    let bare = train(corpus(), &bare, |_| {}).unwrap();
    let error = bare.encode_with("x", EncodeOptions { add_eos: true, ..Default::default() }).unwrap_err();
    assert!(matches!(error, Error::NoSpecialToken { role: "eos" }));
}

#[test]
fn batches_and_documents_keep_order() {
    let texts = samples();
    let single: Vec<_> = texts.iter().map(|t| SMOLLM.encode(t, false).unwrap()).collect();
    assert_eq!(SMOLLM.encode_batch(&texts, false).unwrap(), single);
    assert_eq!(SMOLLM.encode_documents(&texts).unwrap(), single);
}

#[test]
fn ids_and_tokens_match_up() {
    for id in 0..SMOLLM.vocab_size() as u32 {
        let token = SMOLLM.id_to_token(id).unwrap();
        assert_eq!(SMOLLM.token_to_id(token), Some(id));
    }
    let the = SMOLLM.token_to_id("Ġthe").unwrap();
    assert_eq!(SMOLLM.token_bytes(the).unwrap(), b" the");
    let outside = SMOLLM.vocab_size() as u32;
    assert!(SMOLLM.id_to_token(outside).is_none() && SMOLLM.token_bytes(outside).is_none());
    assert!(matches!(SMOLLM.decode(&[1, outside], false), Err(Error::UnknownId { .. })));
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.decode_stream(false);
    let mut out = String::new();
    for &id in ids {
        out.push_str(&stream.push(id).unwrap().unwrap_or_default());
    }
    out.push_str(&stream.flush().unwrap().unwrap_or_default());
    out
}

proptest! {
    #[test]
    fn decoding_inverts_encoding(text in any::<String>()) {
        let ids = SMOLLM.encode(&text, false).unwrap();
        prop_assert_eq!(SMOLLM.decode(&ids, false).unwrap(), text.clone());
        prop_assert_eq!(streamed(&SMOLLM, &ids), text);
    }

    #[test]
    fn streaming_equals_decoding_for_any_ids(ids in proptest::collection::vec(0u32..500, 0..40)) {
        let ids: Vec<u32> = ids.into_iter().map(|id| id % SMOLLM.vocab_size() as u32).collect();
        prop_assert_eq!(streamed(&SMOLLM, &ids), SMOLLM.decode(&ids, false).unwrap());
    }

    #[test]
    fn ids_equal_those_of_the_tokenizers_crate(text in "[ a-zA-Z'0-9\\n\\t.,!?é日😀<|>]{0,60}") {
        static THEIRS: LazyLock<tokenizers::Tokenizer> = LazyLock::new(|| {
            let mut theirs = theirs(&SMOLLM);
            theirs.set_encode_special_tokens(true);
            theirs
        });
        let expected = THEIRS.encode_fast(text.as_str(), false).unwrap();
        prop_assert_eq!(SMOLLM.encode(&text, false).unwrap(), expected.get_ids());
    }
}
