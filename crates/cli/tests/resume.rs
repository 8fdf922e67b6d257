//! Stopping at any instant and going on, driven as a process: the result is that of never having stopped.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rig::run::{metrics, names, pretrain, pretrain_command, trajectory, weights, workshop};
use rig::school::{finetune_command, school};
use rig::{fails, object, stdout, tallow};

/// A fixed sequence of numbers below 1.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn start(dir: &Path, set: &[&str], flags: &[&str]) -> Child {
    spawned(pretrain_command(dir, set, flags))
}

fn spawned(mut command: Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs")
}

/// Every checkpoint that can be seen is whole: its hashes are those of its manifest's files.
fn all_whole(run: &Path) {
    for name in names(&run.join("checkpoints")).iter().filter(|name| name.starts_with("step-")) {
        let dir = run.join("checkpoints").join(name);
        let text = fs::read_to_string(dir.join("manifest.json")).expect("a manifest");
        let files: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).expect("JSON");
        assert!(files.len() >= 5, "{name}: {files:?}");
        for file in files.keys() {
            assert!(dir.join(file).is_file(), "{name} has no {file}");
        }
    }
}

/// Kills a run at `kills` random instants, goes on each time, and compares with a run that was let be. A run that is done
/// before the kills are is compared, and another one begun.
fn killed_and_resumed(set: &[&str], kills: usize, seed: u64) {
    kill_and_resume(&workshop(), &Job { command: pretrain_command, weights: "model.safetensors" }, set, kills, seed);
}

/// What is killed, and what it leaves in `final/`.
struct Job {
    command: fn(&Path, &[&str], &[&str]) -> Command,
    weights: &'static str,
}

fn kill_and_resume(dir: &tempfile::TempDir, job: &Job, set: &[&str], kills: usize, seed: u64) {
    let run = |set: &[&str], flags: &[&str]| (job.command)(dir.path(), set, flags).output().expect("the binary runs");
    let weights = |run: &Path| fs::read(run.join("final").join(job.weights)).expect("final weights");
    let with = |output: &'static str| [set, &[output]].concat();
    let started = Instant::now();
    stdout(&run(&with("output=whole"), &[]));
    let whole = started.elapsed().as_secs_f64();
    let broken = dir.path().join("broken");
    // A kill may come before there is anything to go on with.
    let flags = || if broken.exists() { &["--resume"][..] } else { &[] };
    let compare = |at: &[Option<u64>]| {
        stdout(&run(&with("output=broken"), flags()));
        assert!(weights(&broken) == weights(&dir.path().join("whole")), "other weights after kills at {at:?}");
        assert_eq!(trajectory(&broken), trajectory(&dir.path().join("whole")), "after kills at {at:?}");
        let left: Vec<String> = [names(&broken), names(&broken.join("checkpoints"))]
            .concat()
            .into_iter()
            .filter(|n| n.starts_with('.') || n.ends_with(".tmp") || n.starts_with("removing-"))
            .collect();
        assert_eq!(left, Vec::<String>::new(), "leftovers of killed processes");
        fs::remove_dir_all(&broken).expect("removed");
    };
    let (mut dice, mut at, mut all) = (Dice(seed), vec![], vec![]);
    for _ in 0..kills {
        let mut child = spawned((job.command)(dir.path(), &with("output=broken"), flags()));
        std::thread::sleep(Duration::from_secs_f64(dice.roll() * whole));
        child.kill().expect("SIGKILL");
        child.wait().expect("ends");
        all_whole(&broken);
        at.push(newest(&broken));
        if broken.join("final").exists() {
            compare(&at);
            all.append(&mut at);
        }
    }
    compare(&at);
    all.append(&mut at);
    // Shown with --nocapture: the newest checkpoint after each kill.
    println!("{kills} kills in runs of {whole:.2} s: {all:?}");
    assert!(all.iter().flatten().any(|&step| step > 0), "no kill hit a run that had a checkpoint: {all:?}");
}

/// The newest checkpoint of a run.
fn newest(run: &Path) -> Option<u64> {
    names(&run.join("checkpoints")).iter().filter_map(|name| name.strip_prefix("step-")?.parse().ok()).max()
}

/// Micro-batches of 2 rows in a step of 6, so that kills fall between them; checkpoints every other step.
const ACCUMULATING: [&str; 6] = [
    "train.steps=30",
    "train.batch_size=6",
    "train.micro_batch_size=2",
    "eval.every=5",
    "checkpoint.every=2",
    "checkpoint.keep=2",
];

#[test]
fn twenty_kills_change_nothing() {
    killed_and_resumed(&ACCUMULATING, 20, 0x51ed_2701);
}

#[test]
fn kills_change_nothing_in_bf16_with_dropout_and_recomputation() {
    let more = ["train.dtype=bf16", "model.residual_dropout=0.1", "train.activation_checkpointing=blocks"];
    killed_and_resumed(&[&ACCUMULATING[..], &more].concat(), 8, 0x0dd_ba11);
}

#[test]
fn kills_change_nothing_where_documents_are_padded_and_epochs_pass() {
    let more = ["data.packing=false", "train.batch_size=12", "train.steps=60"];
    killed_and_resumed(&[&ACCUMULATING[..], &more].concat(), 6, 0x00c0_ffee);
}

/// The adapter of `rig::school`: dropout, micro-batches of 2 rows, held-out examples, epochs that pass.
const ADAPTED: [&str; 5] =
    ["train.steps=30", "train.batch_size=6", "eval.every=5", "checkpoint.every=2", "checkpoint.keep=2"];

#[test]
fn kills_change_nothing_in_an_adapter() {
    let job = Job { command: finetune_command, weights: "adapter_model.safetensors" };
    kill_and_resume(&school(), &job, &ADAPTED, 12, 0x0ada_97e5);
}

#[test]
fn kills_change_nothing_in_dora_with_bf16_recomputation_and_noise() {
    let job = Job { command: finetune_command, weights: "adapter_model.safetensors" };
    let more = [
        "adapter.kind=dora",
        "train.dtype=bf16",
        "train.activation_checkpointing=blocks",
        "objective.neftune_alpha=5",
        "data.packing=false",
    ];
    kill_and_resume(&school(), &job, &[&ADAPTED[..], &more].concat(), 6, 0x0d05_a111);
}

#[test]
fn kills_change_nothing_beside_a_quantized_base() {
    let job = Job { command: finetune_command, weights: "adapter_model.safetensors" };
    let four_bits = ["adapter.quantize=nf4", "adapter.quantize_embeddings=q8_0"];
    kill_and_resume(&school(), &job, &[&ADAPTED[..], &four_bits].concat(), 8, 0x0041_07a5);
}

/// Waits until the run has done some steps, then sends the signal.
fn signalled(dir: &Path, set: &[&str], signal: &str) -> Output {
    let child = start(dir, set, &[]);
    let file = dir.join("broken/metrics.jsonl");
    let begin = Instant::now();
    while fs::read_to_string(&file).map_or(0, |text| text.lines().count()) < 3 {
        assert!(begin.elapsed() < Duration::from_secs(60), "the run does not start");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().expect("kill runs").success());
    child.wait_with_output().expect("ends")
}

#[test]
fn signals_save_a_checkpoint_and_leave_with_130() {
    let dir = workshop();
    let set = |output: &'static str| {
        [
            "train.steps=400",
            "train.batch_size=6",
            "train.micro_batch_size=3",
            "eval.every=0",
            "checkpoint.every=0",
            output,
        ]
    };
    stdout(&pretrain(dir.path(), &set("output=whole"), &[]));
    for signal in ["-INT", "-TERM"] {
        let output = signalled(dir.path(), &set("output=broken"), signal);
        fails(&output, 130, &["saving a checkpoint", "stopped at step", "--resume"]);
        let broken = dir.path().join("broken");
        let done = metrics(&broken).last().and_then(|line| line["step"].as_u64()).expect("a step");
        assert!((3..400).contains(&done), "{signal}: {done}");
        assert_eq!(names(&broken.join("checkpoints")), [format!("step-{done}")]);
        assert!(!broken.join("final").exists() && broken.join("curve.svg").is_file());
        stdout(&pretrain(dir.path(), &set("output=broken"), &["--resume"]));
        assert!(weights(&broken) == weights(&dir.path().join("whole")), "{signal}");
        assert_eq!(trajectory(&broken), trajectory(&dir.path().join("whole")), "{signal}");
        fs::remove_dir_all(&broken).expect("removed");
    }
}

#[test]
fn resuming_without_a_checkpoint_starts_from_the_beginning() {
    let dir = workshop();
    fails(&pretrain(dir.path(), &["train.steps=2"], &["--resume"]), 2, &["out", "leave out --resume"]);
    assert!(!dir.path().join("out").exists());
    stdout(&pretrain(dir.path(), &["train.steps=2"], &[]));
    let expected = trajectory(&dir.path().join("out"));
    // As a kill before the first checkpoint leaves it: metrics, but nothing to go on from.
    fs::remove_dir_all(dir.path().join("out/checkpoints")).expect("removed");
    let again = pretrain(dir.path(), &["train.steps=2"], &["--resume"]);
    stdout(&again);
    assert!(String::from_utf8_lossy(&again.stderr).contains("no checkpoint yet"));
    assert_eq!(trajectory(&dir.path().join("out")), expected, "old lines are dropped");
    stdout(&pretrain(dir.path(), &["train.steps=2"], &["--resume"]));
    assert_eq!(trajectory(&dir.path().join("out")), expected, "a finished run stays as it is");
}

#[test]
fn a_longer_run_goes_on_and_says_what_changed() {
    let dir = workshop();
    stdout(&pretrain(dir.path(), &["train.steps=4"], &[]));
    let output = pretrain(dir.path(), &["train.steps=8"], &["--resume"]);
    stdout(&output);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("train.steps was 4 and is 8") && message.contains("continuing at step 4"), "{message}");
    let steps = metrics(&dir.path().join("out")).iter().filter(|line| line.get("loss").is_some()).count();
    assert_eq!(steps, 8);
}

#[test]
fn a_run_that_is_finished_says_so_and_stays_as_it_is() {
    let dir = workshop();
    let out = dir.path().join("out");
    stdout(&pretrain(dir.path(), &["train.steps=6"], &[]));
    let everything = |out: &Path| {
        let files = ["resolved.toml", "metrics.jsonl", "curve.svg", "final/model.safetensors"];
        files.map(|file| fs::read(out.join(file)).expect("a file"))
    };
    let before = everything(&out);
    for (steps, lr, words) in [
        (
            "train.steps=6",
            "optimizer.lr=3e-3",
            ["all 6 steps are done; nothing is trained, and resolved.toml stays;", "raise train.steps"],
        ),
        (
            "train.steps=4",
            "optimizer.lr=1e-4",
            ["6 steps are done, and the run file asks for 4", "(without effect: optimizer.lr, "],
        ),
    ] {
        let again = pretrain(dir.path(), &[steps, lr], &["--resume"]);
        stdout(&again);
        let message = String::from_utf8_lossy(&again.stderr);
        for word in words {
            assert!(message.contains(word), "no {word:?} in {message}");
        }
        assert!(!message.contains("from here on"), "{message}");
        assert!(everything(&out) == before, "{steps}: something was written");
    }
    // What a kill kept from being written is: also where what it should have replaced is there still.
    fs::rename(out.join("final"), dir.path().join("final-of-6")).expect("moved");
    let again = pretrain(dir.path(), &["train.steps=6"], &["--resume", "--json"]);
    assert!(stdout(&again).contains("\"final\""));
    assert!(everything(&out) == before);
    stdout(&pretrain(dir.path(), &["train.steps=8"], &["--resume"]));
    let of_8 = everything(&out);
    assert!(of_8[3] != before[3]);
    fs::remove_dir_all(out.join("final")).expect("removed");
    fs::rename(dir.path().join("final-of-6"), out.join("final")).expect("moved");
    stdout(&pretrain(dir.path(), &["train.steps=8"], &["--resume"]));
    assert!(everything(&out) == of_8);
}

#[test]
fn what_lies_in_the_final_folder_of_a_finished_run_stays() {
    let dir = workshop();
    let out = dir.path().join("out");
    stdout(&pretrain(dir.path(), &["train.steps=2"], &[]));
    fs::write(out.join("final/README.md"), "mine").expect("written");
    let before = (names(&out), names(&out.join("final")));
    let again = pretrain(dir.path(), &["train.steps=2"], &["--resume", "--json"]);
    assert!(stdout(&again).contains("\"final\""));
    assert_eq!((names(&out), names(&out.join("final"))), before);
}

#[test]
fn a_run_that_stopped_early_is_finished() {
    let dir = workshop();
    let out = dir.path().join("out");
    // A rate at which nothing gets better after the first validations.
    let set = |steps: &'static str| [steps, "optimizer.lr=1e-12", "eval.every=1", "eval.patience=2"];
    let first = pretrain(dir.path(), &set("train.steps=50"), &[]);
    stdout(&first);
    let told = String::from_utf8_lossy(&first.stderr).into_owned();
    assert!(told.contains("(eval.patience): stopped"), "{told}");
    let everything =
        || ["resolved.toml", "metrics.jsonl", "final/model.safetensors"].map(|f| fs::read(out.join(f)).ok());
    let before = everything();
    let done = newest(&out).expect("a checkpoint");
    let exactly: &'static str = format!("train.steps={done}").leak();
    for steps in ["train.steps=50", "train.steps=60", exactly] {
        let again = pretrain(dir.path(), &set(steps), &["--resume"]);
        stdout(&again);
        let told = String::from_utf8_lossy(&again.stderr).into_owned();
        assert!(told.contains("the run is finished") && told.contains("eval.patience"), "{told}");
        assert!(everything() == before, "{steps}: something was written");
    }
    // What is written again is the best, however the steps are asked for.
    fs::remove_dir_all(out.join("final")).expect("removed");
    stdout(&pretrain(dir.path(), &set(exactly), &["--resume"]));
    assert!(everything()[2] == before[2]);
    let more = ["train.steps=50", "optimizer.lr=1e-12", "eval.every=1", "eval.patience=4"];
    stdout(&pretrain(dir.path(), &more, &["--resume"]));
    assert!(newest(&out).expect("a checkpoint") > done);
}

#[test]
fn what_was_killed_before_its_first_line_starts_with_resume() {
    let dir = workshop();
    // The run's folder may hold anything that is no other run's: a log, the run file itself, the data.
    for output in ["empty", "text", "."] {
        fs::create_dir_all(dir.path().join(output)).expect("made");
        fs::write(dir.path().join(output).join("train.log"), "").expect("written");
        let set = ["train.steps=2", &format!("output={output}")];
        let started = pretrain(dir.path(), &set, &["--resume"]);
        stdout(&started);
        let message = String::from_utf8_lossy(&started.stderr);
        assert!(message.contains("starting from the beginning"), "{message}");
        assert!(dir.path().join(output).join("final").is_dir());
    }
    let model = ["train.steps=2", "output=text/final"];
    let words = ["text/final", "a part of the run in text", "choose another `output`, and leave out --resume"];
    fails(&pretrain(dir.path(), &model, &["--resume"]), 2, &words);
}

#[test]
fn checkpoints_are_gone_on_from_without_the_resolved_run_file() {
    let dir = workshop();
    let out = dir.path().join("out");
    stdout(&pretrain(dir.path(), &["train.steps=4"], &[]));
    fs::remove_file(out.join("resolved.toml")).expect("removed");
    let words = ["holds another run", "continue it with --resume"];
    fails(&pretrain(dir.path(), &["train.steps=6"], &[]), 2, &words);
    let on = pretrain(dir.path(), &["train.steps=6"], &["--resume"]);
    stdout(&on);
    let message = String::from_utf8_lossy(&on.stderr);
    assert!(message.contains("continuing at step 4"), "{message}");
    assert!(out.join("resolved.toml").is_file());
    fs::remove_file(out.join("resolved.toml")).expect("removed");
    stdout(&pretrain(dir.path(), &["train.steps=6"], &["--resume"]));
    assert!(out.join("resolved.toml").is_file(), "of a finished run too");
}

#[test]
fn the_memory_of_a_step_is_that_of_the_run() {
    let dir = workshop();
    stdout(&pretrain(dir.path(), &["train.steps=3"], &[]));
    let memory: Vec<u64> = metrics(&dir.path().join("out")).iter().filter_map(|line| line["memory"].as_u64()).collect();
    assert!(memory.len() == 3 && memory.is_sorted(), "{memory:?}");
    let plan = object(&tallow(dir.path(), "plan run.toml --json"))["memory"].clone();
    let held: u64 = ["weights", "gradients", "optimizer"].iter().filter_map(|name| plan[name].as_u64()).sum();
    assert!(held > 0 && memory[0] >= held, "{memory:?} of at least {held}");
}

#[test]
fn another_run_is_never_resumed_in_place() {
    let dir = workshop();
    stdout(&pretrain(dir.path(), &["train.steps=4"], &[]));
    let before = fs::read(dir.path().join("out/resolved.toml")).expect("resolved");
    for (set, words) in [
        ("model.hidden_size=64", ["model.hidden_size", "started with 32"]),
        ("seed=9", ["seed", "started with 5"]),
        ("data.context_length=16", ["data.context_length", "started with 32"]),
    ] {
        fails(&pretrain(dir.path(), &["train.steps=4", set], &["--resume"]), 2, &words);
    }
    let other = ["train.steps=4", "data.train=['text']", "data.valid=[]"];
    let words = ["`data.train` = [\"text\"]", "started with [\"data/train\"]", "cannot resume", "training data"];
    fails(&pretrain(dir.path(), &other, &["--resume"]), 2, &words);
    assert_eq!(fs::read(dir.path().join("out/resolved.toml")).expect("resolved"), before);
}

#[test]
fn a_preset_that_was_edited_is_another_model() {
    let dir = workshop();
    let preset = |theta: &str| {
        let sizes = "hidden_size = 32\nintermediate_size = 64\nnum_hidden_layers = 2\nnum_attention_heads = 2";
        let text = format!("architectures = [\"LlamaForCausalLM\"]\n{sizes}\nrope_theta = {theta}\n");
        fs::write(dir.path().join("mine.toml"), text).expect("written");
    };
    let text = fs::read_to_string(dir.path().join("run.toml")).expect("read");
    let model = &text[text.find("[model]").expect("a section")..text.find("[tokenizer]").expect("a section")];
    let text = text.replace(model, "[model]\npreset = \"mine.toml\"\n\n");
    fs::write(dir.path().join("run.toml"), text).expect("written");
    preset("10000.0");
    stdout(&pretrain(dir.path(), &["train.steps=4"], &[]));
    preset("500.0");
    let other = pretrain(dir.path(), &["train.steps=6"], &["--resume"]);
    fails(&other, 2, &["model.rope_theta", "500", "started with 10000"]);
    preset("10000.0");
    stdout(&pretrain(dir.path(), &["train.steps=6"], &["--resume"]));
}

#[test]
fn a_damaged_checkpoint_is_told_and_an_earlier_one_used() {
    let dir = workshop();
    let set = |output: &'static str| ["train.steps=12", "checkpoint.every=4", "eval.every=0", "data.valid=[]", output];
    stdout(&pretrain(dir.path(), &set("output=whole"), &[]));
    stdout(&pretrain(dir.path(), &set("output=broken"), &[]));
    let broken = dir.path().join("broken");
    let damage = |name: &str| {
        let path = broken.join("checkpoints").join(name).join("optimizer.safetensors");
        let mut bytes = fs::read(&path).expect("read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).expect("written");
    };
    damage("step-12");
    let output = pretrain(dir.path(), &set("output=broken"), &["--resume"]);
    stdout(&output);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("step-12") && message.contains("optimizer.safetensors is damaged"), "{message}");
    assert!(message.contains("continuing at step 8"), "{message}");
    assert!(weights(&broken) == weights(&dir.path().join("whole")));
    damage("step-12");
    damage("step-8");
    fails(&pretrain(dir.path(), &set("output=broken"), &["--resume"]), 1, &["checkpoints", "none is whole"]);
}

#[test]
fn a_damaged_newer_checkpoint_does_not_push_out_a_good_one() {
    let dir = workshop();
    let run = |steps: &str, keep: &str, flags: &[&str]| {
        let set = [steps, keep, "checkpoint.every=4", "eval.every=0", "data.valid=[]"];
        stdout(&pretrain(dir.path(), &set, flags));
        names(&dir.path().join("out/checkpoints"))
    };
    assert_eq!(run("train.steps=12", "checkpoint.keep=2", &[]), ["step-12", "step-8"]);
    fs::write(dir.path().join("out/checkpoints/step-12/optimizer.safetensors"), "damaged").expect("written");
    assert_eq!(run("train.steps=10", "checkpoint.keep=1", &["--resume"]), ["step-10", "step-12"]);
    assert_eq!(run("train.steps=14", "checkpoint.keep=1", &["--resume"]), ["step-14"]);
}

#[test]
fn a_full_disk_stops_the_run_and_room_lets_it_go_on() {
    let dir = workshop();
    let set = |output: &'static str| ["train.steps=8", "eval.every=0", "checkpoint.every=3", output];
    stdout(&pretrain(dir.path(), &set("output=whole"), &[]));
    // No file may grow beyond 64 blocks of 512 bytes: the weights do not fit, everything smaller does.
    let sets: String = set("output=broken").iter().map(|s| format!(" --set {s}")).collect();
    let script = format!("trap '' XFSZ; ulimit -f 64; exec '{}' pretrain run.toml{sets}", env!("CARGO_BIN_EXE_tallow"));
    let output = Command::new("sh").args(["-c", &script]).current_dir(dir.path()).output().expect("sh runs");
    fails(&output, 1, &["broken/checkpoints", "File too large"]);
    let broken = dir.path().join("broken");
    assert_eq!(names(&broken.join("checkpoints")), Vec::<String>::new(), "nothing half-written");
    assert!(!broken.join("final").exists());
    stdout(&pretrain(dir.path(), &set("output=broken"), &["--resume"]));
    assert!(weights(&broken) == weights(&dir.path().join("whole")));
    assert_eq!(trajectory(&broken), trajectory(&dir.path().join("whole")));
}

#[test]
fn two_processes_never_write_to_one_run() {
    let dir = workshop();
    let mut first = start(dir.path(), &["train.steps=100000", "eval.every=0", "checkpoint.every=0"], &[]);
    let begin = Instant::now();
    while !dir.path().join("out/metrics.jsonl").is_file() && begin.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
    }
    let second = pretrain(dir.path(), &["train.steps=100000"], &["--resume"]);
    first.kill().expect("SIGKILL");
    first.wait().expect("ends");
    fails(&second, 2, &["out", "another process"]);
}
