//! Trains a tokenizer on text files and saves it for Hugging Face:
//! `cargo run -p tallow-tokenizer --example train_tokenizer -- OUT KIND PRE VOCAB_SIZE FILE..`

use tallow_tokenizer::{TokenizerKind, TrainEvent, TrainOptions, train_files};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |name: &str| arguments.next().ok_or(format!("missing argument {name}"));
    let (out, kind, pre, vocab_size) = (next("OUT")?, next("KIND")?, next("PRE")?, next("VOCAB_SIZE")?);
    let files: Vec<String> = arguments.collect();
    let options = TrainOptions {
        kind: kind.parse::<TokenizerKind>()?,
        pre: pre.parse()?,
        vocab_size: vocab_size.parse()?,
        ..TrainOptions::default()
    };
    let tokenizer = train_files(&files, &options, |event| match event {
        TrainEvent::Warning(text) => eprintln!("warning: {text}"),
        other => eprintln!("{other:?}"),
    })?;
    tokenizer.save(&out)?;
    println!("{} tokens, fingerprint {}", tokenizer.vocab_size(), tokenizer.fingerprint());
    Ok(())
}
