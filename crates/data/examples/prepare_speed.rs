//! How fast text becomes shards, and shards batches: `prepare_speed INPUT.. [--tokenizer tokenizer.json | --vocab N]`.
//!
//! Without a tokenizer a byte is a token; `--vocab N` trains byte-level BPE on the inputs first.
//!
//! Prints one line a measurement: preparation (first and second of two runs, so that the second reads from the page
//! cache), verification, and the loader's rows of 1,024 tokens.

use std::path::PathBuf;
use std::time::Instant;

use tallow_data::{
    Encode, Loader, LoaderOptions, PrepareOptions, ReadOptions, TokenDataset, Utf8Bytes, documents, prepare, verify,
};
use tallow_tokenizer::{Tokenizer, TrainOptions, train};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut inputs = vec![];
    let mut encoder: Box<dyn Encode> = Box::new(Utf8Bytes);
    let mut vocab = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--tokenizer" => {
                let path = args.next().ok_or("--tokenizer needs a path")?;
                encoder = Box::new(Tokenizer::from_path(path)?);
            }
            "--vocab" => vocab = Some(args.next().ok_or("--vocab needs a number")?.parse()?),
            _ => inputs.push(PathBuf::from(arg)),
        }
    }
    if let Some(vocab_size) = vocab {
        let texts = documents(&inputs, ReadOptions::default())?.map(|d| d.map(|d| d.text));
        let texts = texts.collect::<Result<Vec<_>, _>>()?;
        let started = Instant::now();
        let options = TrainOptions { vocab_size, ..TrainOptions::default() };
        encoder = Box::new(train(texts, &options, |_| {})?);
        println!("tokenizer: {} tokens trained in {:.2} s", encoder.vocab_size(), started.elapsed().as_secs_f64());
    }
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("tokens");
    let options = PrepareOptions { valid_fraction: 0.01, overwrite: true, ..PrepareOptions::default() };
    for run in 1..=2 {
        let report = prepare(&inputs, &*encoder, &out, &options, &mut |_| {})?;
        let (text, tokens) = (report.read.bytes as f64, report.train.tokens + report.valid.tokens);
        println!(
            "prepare {run}: {:.1} MB of text, {} documents, {tokens} tokens in {:.2} s: {:.1} MB/s, {:.2} Mtok/s; {}",
            text / 1e6,
            report.documents,
            report.seconds,
            text / 1e6 / report.seconds,
            tokens as f64 / 1e6 / report.seconds,
            report.split_rule,
        );
    }
    let started = Instant::now();
    let verified = verify(&out)?;
    println!("verify: {:.1} MB/s", verified.bytes as f64 / 1e6 / started.elapsed().as_secs_f64());
    let loader = Loader::new(TokenDataset::open(&[out.join("train")])?, LoaderOptions::default())?;
    let started = Instant::now();
    let rows = loader.rows_per_epoch();
    for first in (0..rows).step_by(16) {
        loader.batch(first, 16)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("loader: {rows} rows in {seconds:.3} s: {:.1} Mtok/s", rows as f64 * 1024.0 / 1e6 / seconds);
    Ok(())
}
