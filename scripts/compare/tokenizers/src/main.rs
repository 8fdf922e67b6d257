//! Encoding and training speed of Tallow's tokenizer beside `tokenizers`, `tiktoken-rs` and `bpe` (GitHub's).
//!
//! ```sh
//! scripts/fetch-assets tokenizers
//! cargo run --release --manifest-path scripts/compare/tokenizers/Cargo.toml -- \
//!     target/assets/tiktoken/cl100k_base.tiktoken FOLDER_OR_FILE... [--rounds 3] [--threads 2] [--vocab 4096]
//! ```
//!
//! A file is a document. Every encoder has cl100k_base and must give the same ids, or the program stops. Each round takes
//! the encoders in turn and makes them anew (but for `bpe`, which has no cache), so that none is warm. `tokenizers` runs with
//! the regex engine that Tallow builds it with, fancy-regex. Prints MB/s (10^6 bytes of text) a round.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use tallow_tokenizer::{PreTokenizer, Tokenizer, TrainOptions};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::{PreTokenizerWrapper, byte_level::ByteLevel, sequence::Sequence, split::Split};
use tokenizers::{AddedToken, SplitDelimiterBehavior, TokenizerBuilder};

struct Args {
    ranks: PathBuf,
    paths: Vec<PathBuf>,
    rounds: usize,
    threads: usize,
    vocab: usize,
}

fn args() -> Result<Args> {
    let mut found = Args { ranks: PathBuf::new(), paths: Vec::new(), rounds: 3, threads: 2, vocab: 4096 };
    let mut given = std::env::args().skip(1);
    let mut positional = Vec::new();
    while let Some(arg) = given.next() {
        let mut number = || -> Result<usize> { Ok(given.next().context("a number is missing")?.parse()?) };
        match arg.as_str() {
            "--rounds" => found.rounds = number()?,
            "--threads" => found.threads = number()?,
            "--vocab" => found.vocab = number()?,
            _ => positional.push(PathBuf::from(arg)),
        }
    }
    ensure!(positional.len() > 1, "give the rank file and at least one folder or file of text");
    found.ranks = positional.remove(0);
    found.paths = positional;
    Ok(found)
}

fn read(path: &Path, docs: &mut Vec<String>) -> Result<()> {
    if path.is_dir() {
        let mut inner: Vec<_> = std::fs::read_dir(path)?.map(|e| Ok(e?.path())).collect::<std::io::Result<_>>()?;
        inner.sort();
        return inner.iter().try_for_each(|p| read(p, docs));
    }
    // `tokenizers` makes special tokens of `<|...|>` in a document, the others do not.
    if let Ok(text) = std::fs::read_to_string(path)
        && !text.contains("<|")
    {
        docs.push(text);
    }
    Ok(())
}

type Encode = Box<dyn Fn(&[String]) -> Result<Vec<Vec<u32>>> + Sync>;

fn tallow(ranks: &Path) -> Result<Encode> {
    let tokenizer = Tokenizer::from_tiktoken(ranks, "cl100k_base")?;
    Ok(Box::new(move |docs| Ok(tokenizer.encode_documents(docs)?)))
}

fn hugging_face(ranks: &Path) -> Result<Encode> {
    let json = Tokenizer::from_tiktoken(ranks, "cl100k_base")?.to_json()?.to_string();
    let tokenizer: tokenizers::Tokenizer = json.parse().map_err(|e| anyhow::anyhow!("{e}"))?;
    Ok(Box::new(move |docs| {
        let inputs: Vec<&str> = docs.iter().map(String::as_str).collect();
        let encodings = tokenizer.encode_batch_fast(inputs, false).map_err(|e| anyhow::anyhow!("{e}"))?;
        Ok(encodings.iter().map(|e| e.get_ids().to_vec()).collect())
    }))
}

fn tiktoken() -> Result<Encode> {
    let bpe = tiktoken_rs::cl100k_base()?;
    Ok(Box::new(move |docs| Ok(docs.par_iter().map(|d| bpe.encode_ordinary(d)).collect())))
}

fn github() -> Result<Encode> {
    let bpe = bpe_openai::cl100k_base();
    Ok(Box::new(move |docs| Ok(docs.par_iter().map(|d| bpe.encode(d.as_str())).collect())))
}

fn encoding(args: &Args, docs: &[String], megabytes: f64) -> Result<()> {
    let mut want: Option<Vec<Vec<u32>>> = None;
    for round in 1..=args.rounds {
        for name in ["tallow", "tokenizers", "tiktoken-rs", "bpe"] {
            let encode = match name {
                "tallow" => tallow(&args.ranks)?,
                "tokenizers" => hugging_face(&args.ranks)?,
                "tiktoken-rs" => tiktoken()?,
                _ => github()?,
            };
            let start = Instant::now();
            let ids = encode(docs)?;
            let seconds = start.elapsed().as_secs_f64();
            let tokens: usize = ids.iter().map(Vec::len).sum();
            println!("encode round {round} {name:12} {:8.1} MB/s  {tokens} tokens", megabytes / seconds);
            match &want {
                Some(want) if *want != ids => bail!("{name} gives other ids"),
                Some(_) => {}
                None => want = Some(ids),
            }
        }
    }
    Ok(())
}

const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn train_tallow(docs: &[String], vocab: usize) -> Result<usize> {
    let options = TrainOptions { vocab_size: vocab, pre: "llama-bpe".parse::<PreTokenizer>()?, ..Default::default() };
    Ok(tallow_tokenizer::train(docs, &options, |_| {})?.vocab_size())
}

fn train_hugging_face(docs: &[String], vocab: usize) -> Result<usize> {
    let error = |e: tokenizers::Error| anyhow::anyhow!("{e}");
    let pattern = tokenizers::pre_tokenizers::split::SplitPattern::Regex(CL100K.into());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(error)?;
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        tokenizers::NormalizerWrapper,
        PreTokenizerWrapper,
        tokenizers::PostProcessorWrapper,
        tokenizers::DecoderWrapper,
    >::default()
    .with_model(BPE::default())
    .with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(vec![
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)),
    ]))))
    .build()
    .map_err(error)?;
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from("<|endoftext|>", true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut trainer, docs.iter()).map_err(error)?;
    Ok(tokenizer.get_vocab_size(true))
}

fn training(args: &Args, docs: &[String], megabytes: f64) -> Result<()> {
    for round in 1..=args.rounds {
        for name in ["tallow", "tokenizers"] {
            let start = Instant::now();
            let vocab = if name == "tallow" { train_tallow(docs, args.vocab) } else { train_hugging_face(docs, args.vocab) }?;
            let seconds = start.elapsed().as_secs_f64();
            println!("train  round {round} {name:12} {:8.1} MB/s  {seconds:.2} s, {vocab} tokens", megabytes / seconds);
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let args = args()?;
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global()?;
    let mut docs = Vec::new();
    args.paths.iter().try_for_each(|p| read(p, &mut docs))?;
    let bytes: usize = docs.iter().map(String::len).sum();
    println!("{} documents, {bytes} bytes, {} threads", docs.len(), args.threads);
    encoding(&args, &docs, bytes as f64 / 1e6)?;
    training(&args, &docs, bytes as f64 / 1e6)
}
