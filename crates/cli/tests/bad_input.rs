//! What goes wrong on purpose, and what the program says: docs/bad-input.md is this table, measured.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::fs;
use std::path::Path;
use std::process::Output;

use rig::run::{model, names, workshop};
use rig::{command, first_error};

/// What is wrong, the command as a shell takes it, the exit code, and a part of the first line of the message.
type Case = (&'static str, &'static str, i32, &'static str);

const RUN_FILES: &[Case] = &[
    ("no run file", "tallow pretrain absent.toml", 2, "absent.toml: there is no such file"),
    ("a model in the place of a run file", "tallow finetune out/final", 2, "is the folder of a model"),
    ("a key without its section", "tallow pretrain run.toml --set rank=4", 2, "nearest is `adapter.rank`"),
    (
        "one path for a list",
        "tallow pretrain run.toml --set data.train=text",
        2,
        "must be a list, e.g. train = [\"text\"]",
    ),
    ("not TOML", "tallow pretrain broken.toml", 2, "broken.toml:2: "),
    ("a run file that is no text", "tallow pretrain binary.toml", 2, "binary.toml:1: "),
    ("an unknown key", "tallow pretrain run.toml --set train.stepz=5", 2, "nearest is `steps`"),
    ("an unknown section", "tallow pretrain run.toml --set trian.steps=5", 2, "nearest is `train`"),
    ("an unknown model key", "tallow pretrain run.toml --set model.hiden_size=8", 2, "nearest is `hidden_size`"),
    ("a wrong type", "tallow pretrain run.toml --set train.batch_size=many", 2, "expected a whole number"),
    ("a wrong choice", "tallow pretrain run.toml --set schedule.kind=cosin", 2, "nearest is `cosine`"),
    ("no value", "tallow pretrain run.toml --set train.steps", 2, "must be key=value"),
    ("two lengths", "tallow pretrain run.toml --set train.tokens=100 --set train.steps=5", 2, "exactly one"),
    ("no step", "tallow pretrain run.toml --set train.steps=0", 2, "at least 1"),
    ("more steps than can be counted", "tallow pretrain run.toml --set train.steps=9000000000000000000", 2, "counted"),
    (
        "a batch that micro-batches do not divide",
        "tallow pretrain run.toml --set train.micro_batch_size=3",
        2,
        "does not divide",
    ),
    ("a batch of billions", "tallow pretrain run.toml --set train.batch_size=4000000000", 2, "train.batch_size"),
    ("a rate that is not a number", "tallow pretrain run.toml --set optimizer.lr=nan", 2, "positive number"),
    ("a negative weight decay", "tallow pretrain run.toml --set optimizer.weight_decay=-1.0", 2, "must be 0"),
    (
        "a warm-up longer than the run",
        "tallow pretrain run.toml --set schedule.warmup_steps=99",
        2,
        "longer than the run",
    ),
    ("a mesh axis", "tallow pretrain run.toml --set parallel.tp=2", 2, "not available yet"),
    ("a section of finetuning", "tallow pretrain run.toml --set adapter.kind=lora", 2, "finetuning"),
    ("an unknown device", "tallow pretrain run.toml --set device=cuda", 2, "auto, cpu"),
];

const MODELS_AND_DATA: &[Case] = &[
    ("an unknown preset", "tallow pretrain run.toml --set model.preset=lama-14m", 2, "nearest is `llama-14m`"),
    (
        "an unknown architecture",
        "tallow pretrain run.toml --set \"model.architectures=['MambaForCausalLM']\"",
        2,
        "not supported",
    ),
    (
        "heads that do not divide the width",
        "tallow pretrain run.toml --set model.num_attention_heads=5",
        2,
        "num_attention_heads = 5",
    ),
    ("a model without layers", "tallow pretrain run.toml --set model.num_hidden_layers=0", 2, "at least 1"),
    ("a model larger than the machine", "tallow pretrain run.toml --set model.hidden_size=400000", 2, "of memory"),
    (
        "a context beyond the model's",
        "tallow pretrain run.toml --set model.max_position_embeddings=16",
        2,
        "16 positions",
    ),
    ("a model that is not there", "tallow pretrain from.toml --set model.from=absent", 2, "absent"),
    (
        "a context beyond the existing model's",
        "tallow pretrain from.toml --set data.context_length=64",
        2,
        "32 positions",
    ),
    ("no such data", "tallow pretrain run.toml --set \"data.train=['absent']\"", 2, "no such file or folder"),
    ("no data at all", "tallow pretrain run.toml --set \"data.train=[]\"", 2, "at least one"),
    ("the folder above the splits", "tallow pretrain run.toml --set \"data.train=['data']\"", 2, "data/train"),
    (
        "data of a kind that is not text",
        "tallow pretrain run.toml --set \"data.train=['binary.toml']\"",
        2,
        "binary.toml",
    ),
    ("a damaged shard", "tallow pretrain run.toml --set \"data.train=['damaged']\"", 1, "damaged"),
    ("an empty text", "tallow pretrain run.toml --set \"data.train=['empty.txt']\"", 2, "empty.txt: empty"),
    ("no such tokenizer", "tallow pretrain run.toml --set tokenizer.path=absent.json", 2, "absent.json"),
    ("a tokenizer that is no tokenizer", "tallow pretrain run.toml --set tokenizer.path=broken.toml", 1, "broken.toml"),
    (
        "data of another tokenizer",
        "tallow pretrain run.toml --set tokenizer.path=other/tokenizer.json",
        2,
        "another tokenizer",
    ),
    ("a vocabulary larger than the model's", "tallow pretrain run.toml --set model.vocab_size=100", 2, "300 tokens"),
    ("another run in the output", "tallow pretrain run.toml --set output=out", 2, "another run"),
    ("an output that cannot be made", "tallow pretrain run.toml --set output=/proc/run", 1, "/proc/run"),
    ("an output that is a file", "tallow pretrain run.toml --set output=empty.txt", 1, "empty.txt"),
    ("a full disk", "ulimit -f 64; tallow pretrain run.toml", 1, "File too large"),
    (
        "a loss that overflows",
        "tallow pretrain run.toml --set output=overflown --set optimizer.lr=1e30",
        1,
        "the loss is",
    ),
];

const FINETUNING: &[Case] = &[
    (
        "a conversation that the template refuses",
        "tallow finetune tune.toml --set tokenizer.chat_template=refusing.jinja",
        2,
        "roles must alternate",
    ),
    ("a misspelt role", "tallow finetune tune.toml --set \"data.train=['role.jsonl']\"", 2, "nearest is \"assistant\""),
    ("an empty answer", "tallow finetune tune.toml --set \"data.train=['empty.jsonl']\"", 2, "turn is empty"),
    ("nothing to learn", "tallow finetune tune.toml --set \"data.train=['masked.jsonl']\"", 2, "would be learnt"),
    ("a weight beyond all measure", "tallow finetune tune.toml --set \"data.train=['heavy.jsonl']\"", 2, "to 1000"),
    (
        "records of two shapes in one file",
        "tallow finetune tune.toml --set \"data.train=['mixed.jsonl']\"",
        2,
        "line 2",
    ),
    (
        "no prompt to see both ways",
        "tallow finetune tune.toml --set objective.kind=prefix --set objective.train_on=last --set \"data.train=['text']\" --set data.context_length=256",
        2,
        "no prompt",
    ),
    (
        "nothing left to validate on",
        "tallow finetune tune.toml --set \"data.train=['two.jsonl']\" --set data.valid_fraction=0.5",
        2,
        "data.valid_fraction",
    ),
    (
        "examples that are all too long",
        "tallow finetune tune.toml --set \"data.train=['long.jsonl']\"",
        2,
        "longer than data.context_length = 32 and left out",
    ),
    ("what is no JSON", "tallow finetune tune.toml --set \"data.train=['plain.jsonl']\"", 2, "is no JSON object"),
    ("QLoRA as a kind", "tallow finetune tune.toml --set adapter.kind=qlora", 2, "adapter.quantize"),
    ("bits for a quantization", "tallow finetune tune.toml --set adapter.quantize=int8", 2, "nearest is `q8_0`"),
    (
        "a part of another run to continue",
        "tallow finetune tune.toml --set output=out/final --resume",
        2,
        "leave out --resume to start a run there",
    ),
    ("an output within another run", "tallow finetune tune.toml --set output=out/final", 2, "a part of the run"),
    ("a rank above the layers'", "tallow finetune tune.toml --set adapter.rank=1000", 2, "adapter.rank"),
    ("layers that the model does not have", "tallow finetune tune.toml --set adapter.targets=q_prj", 2, "q_proj"),
    ("a run to continue that is not there", "tallow finetune tune.toml --resume", 2, "leave out --resume"),
    ("an adapter as a model", "tallow generate --model adapted/final --prompt a", 1, "this is an adapter"),
    (
        "a run in the place of its adapter",
        "tallow generate --model out/final --adapter adapted --prompt a",
        1,
        "adapted/final",
    ),
    (
        "an adapter of another model",
        "tallow generate --model small/final --adapter adapted/final --prompt a",
        1,
        "adapted/final",
    ),
];

const GENERATION: &[Case] = &[
    ("a model that is not there", "tallow generate --model absent --prompt a", 1, "absent"),
    ("a folder without a model", "tallow generate --model text --prompt a", 1, "config.json"),
    ("weights cut short", "tallow generate --model cut --prompt a", 1, "model.safetensors"),
    ("a model without a tokenizer", "tallow generate --model bare --prompt a", 1, "tokenizer"),
    ("a tokenizer larger than the model", "tallow generate --model mismatched --prompt a", 1, "do not belong together"),
    ("no prompt", "tallow generate --model out/final", 2, "required arguments"),
    ("an empty prompt", "tallow generate --model out/final --prompt ''", 2, "no token to continue"),
    (
        "a prompt beyond the context",
        "tallow generate --model out/final --prompt \"$(cat long.txt)\"",
        1,
        "32 positions",
    ),
    ("a negative temperature", "tallow generate --model out/final --prompt a --temperature -1", 2, "--temperature -1"),
    ("a bias of no token", "tallow generate --model out/final --prompt a --logit-bias 999=1", 2, "0 to 299"),
    ("output to a full device", "tallow generate --model out/final --prompt a > /dev/full", 1, "No space left"),
    ("an id beyond the vocabulary", "tallow score --model out/final --ids 1,300 --json", 1, "300"),
    ("ids that are no numbers", "tallow score --model out/final --ids 1,x --json", 2, "--ids"),
    ("nothing to score", "tallow score --model out/final --json", 2, "required arguments"),
    ("a text beyond the context", "tallow score --model out/final --input long.txt", 1, "32 positions"),
    ("no such text", "tallow score --model out/final --input absent.txt", 1, "absent.txt"),
    ("a benchmark of no step", "tallow bench train --steps 0", 2, "--steps"),
    ("a device that this build lacks", "tallow bench train --device cuda", 2, "--device cuda"),
];

/// A workshop with a trained model and everything that is broken.
fn prepared() -> tempfile::TempDir {
    let dir = workshop();
    let at = |name: &str| dir.path().join(name);
    model(dir.path());
    fs::write(at("broken.toml"), "seed = 1\n[train\n").expect("written");
    fs::write(at("binary.toml"), [0xff, 0xfe, 0x00]).expect("written");
    fs::write(at("empty.txt"), "").expect("written");
    fs::write(at("long.txt"), "the river ".repeat(60)).expect("written");
    let text = fs::read_to_string(at("run.toml")).expect("read").replace("output = \"out\"", "output = \"run\"");
    fs::write(at("run.toml"), &text).expect("written");
    let section = &text[text.find("[model]").expect("a section")..text.find("[tokenizer]").expect("a section")];
    fs::write(at("from.toml"), text.replace(section, "[model]\nfrom = \"out/final\"\n\n")).expect("written");
    rig::stdout(&rig::tallow(dir.path(), "tokenizer train --input text --vocab-size 320 --out other"));
    let copy = |from: &str, to: &str, but: &str| {
        fs::create_dir(at(to)).expect("a folder");
        for name in names(&at(from)).iter().filter(|name| *name != but) {
            fs::copy(at(from).join(name), at(to).join(name)).expect("copied");
        }
    };
    copy("out/final", "bare", "tokenizer.json");
    copy("out/final", "mismatched", "tokenizer.json");
    fs::copy(at("other/tokenizer.json"), at("mismatched/tokenizer.json")).expect("copied");
    copy("out/final", "cut", "");
    let weights = fs::read(at("cut/model.safetensors")).expect("read");
    fs::write(at("cut/model.safetensors"), &weights[..weights.len() / 2]).expect("written");
    finetuning(dir.path(), &text);
    copy("data/train", "damaged", "");
    let shard = names(&at("damaged")).into_iter().find(|name| name != "index.json").expect("a shard");
    let bytes = fs::read(at("damaged").join(&shard)).expect("read");
    fs::write(at("damaged").join(&shard), &bytes[..bytes.len() / 2]).expect("written");
    dir
}

/// A run file of finetuning, examples that are wrong, and an adapter with a model that it is not of.
fn finetuning(dir: &Path, pretraining: &str) {
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).expect("written");
    write("small.toml", &pretraining.replace("hidden_size = 32", "hidden_size = 16"));
    rig::stdout(&rig::tallow(dir, "pretrain small.toml --set output=small --set train.steps=1"));
    write("tune.toml", TUNE);
    write("turns.jinja", "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}");
    write("refusing.jinja", "{{ raise_exception('roles must alternate') }}");
    let user = r#"{"role": "user", "content": "a fox"}"#;
    let chat = |turn: &str| format!("{{\"messages\": [{user}, {turn}]}}\n");
    let answer = chat(r#"{"role": "assistant", "content": "a boat"}"#);
    write("chats.jsonl", &answer.repeat(4));
    write("role.jsonl", &chat(r#"{"role": "asistant", "content": "a boat"}"#));
    write("empty.jsonl", &chat(r#"{"role": "assistant", "content": ""}"#));
    write("masked.jsonl", &chat(r#"{"role": "assistant", "content": "a boat", "weight": 0}"#));
    write("heavy.jsonl", &chat(r#"{"role": "assistant", "content": "a boat", "weight": 1e30}"#));
    write("mixed.jsonl", &(answer.clone() + "{\"prompt\": \"a fox\", \"completion\": \" sang\"}\n"));
    let long = "the river ".repeat(60);
    write("long.jsonl", &chat(&format!("{{\"role\": \"assistant\", \"content\": {long:?}}}")));
    write("plain.jsonl", "the river went over the hill\n");
    write("two.jsonl", &(answer + &chat(&format!("{{\"role\": \"assistant\", \"content\": {long:?}}}"))));
    rig::stdout(&rig::tallow(dir, "finetune tune.toml --set output=adapted"));
}

const TUNE: &str = r#"output = "tuned"
[model]
from = "out/final"
[tokenizer]
chat_template = "turns.jinja"
[data]
train = ["chats.jsonl"]
context_length = 32
[adapter]
rank = 2
[train]
steps = 1
batch_size = 1
"#;

/// Runs a line of shell in which `tallow` is the binary.
fn shell(dir: &Path, line: &str) -> Output {
    let binary = command().get_program().to_string_lossy().into_owned();
    // A limit on file sizes is an error to handle, not a signal to die by.
    let script = format!("trap '' XFSZ; {}", line.replace("tallow ", &format!("'{binary}' ")));
    let mut shell = std::process::Command::new("sh");
    // A store that is named alike on every machine.
    shell.args(["-c", &script]).current_dir(dir).env("TALLOW_HOME", "store").env_remove("TALLOW_SIMD");
    shell.output().expect("sh runs")
}

#[test]
fn the_table_of_bad_input_is_what_happens() {
    let dir = prepared();
    let before = names(dir.path());
    let mut page = String::from(PREFACE);
    let mut wrong = vec![];
    for (title, cases) in [
        ("Run files", RUN_FILES),
        ("Models and data", MODELS_AND_DATA),
        ("Finetuning", FINETUNING),
        ("Generation and scoring", GENERATION),
    ] {
        page.push_str(&format!(
            "\n## {title}\n\n| case | command | exit code | first line of the message |\n|---|---|---|---|\n"
        ));
        for (case, line, code, part) in cases {
            let output = shell(dir.path(), line);
            let first = without_process(&first_error(&output));
            if output.status.code() != Some(*code) || !first.contains(part) || first.contains("panicked") {
                let stderr = String::from_utf8_lossy(&output.stderr);
                wrong.push(format!("{case}: `{line}` left with {:?}:\n{stderr}", output.status.code()));
            }
            if !output.stdout.is_empty() {
                wrong.push(format!("{case}: `{line}` wrote to stdout"));
            }
            let cell = |text: &str| text.replace('|', "\\|");
            page.push_str(&format!("| {case} | `{}` | {code} | `{}` |\n", cell(line), cell(&first.replace('`', "'"))));
        }
    }
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
    // The disk that filled up and the run that diverged may have begun; of the others nothing is left.
    let after: Vec<String> = names(dir.path()).into_iter().filter(|name| !before.contains(name)).collect();
    assert_eq!(after, ["overflown", "run"].iter().filter(|n| dir.path().join(n).exists()).copied().collect::<Vec<_>>());
    assert_eq!(names(&dir.path().join("run/checkpoints")), Vec::<String>::new());
    assert!(!dir.path().join("run/final").exists() && !dir.path().join("overflown/final").exists());

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/bad-input.md");
    if std::env::var_os("TALLOW_BLESS").is_some() {
        fs::write(&path, &page).expect("written");
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        without_numbers(&written),
        without_numbers(&page),
        "docs/bad-input.md is stale: TALLOW_BLESS=1 writes it"
    );
}

/// The name of an unfinished file holds the number of the process that writes it.
fn without_process(message: &str) -> String {
    match message.split_once(".tmp-") {
        Some((before, after)) => {
            let rest = after.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-');
            format!("{before}.tmp-PID-N{rest}")
        }
        None => message.to_owned(),
    }
}

/// Sizes of free memory and the like differ from machine to machine.
fn without_numbers(page: &str) -> String {
    page.lines().map(|line| if line.contains("of memory") { "(memory)" } else { line }).collect::<Vec<_>>().join("\n")
}

const PREFACE: &str = "\
# Bad input

What the program says to input that cannot work. Each line was run and its answer written down by a test, which compares
this page with what happens (`TALLOW_BLESS=1 cargo test -p tallow-cli --test bad_input` writes it anew). Exit code 1 is a
failure, 2 wrong usage or configuration. Nothing is written to stdout, and nothing half-written stays behind: a run that
failed on a full disk goes on with `--resume` once there is room.
";
