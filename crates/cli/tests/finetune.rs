//! `finetune`, `merge` and adapters in the other commands, driven as a process.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::fs;

use rig::run::{names, pretrain, trajectory};
use rig::school::{RUN, finetune, finetune_command, school};
use rig::{fails, object, stdout, tallow};
use serde_json::{Value, json};

#[test]
fn an_adapter_is_trained_resumed_used_and_merged() {
    let dir = school();
    let at = dir.path();
    stdout(&finetune(at, &[], &[]));
    let adapter = at.join("tuned/final/adapter_model.safetensors");
    let (whole, told) = (fs::read(&adapter).expect("an adapter"), trajectory(&at.join("tuned")));
    assert!(!at.join("tuned/final/model.safetensors").exists(), "the base is not saved");

    // From the checkpoint of step 2 on, as if nothing had come after it.
    for name in names(&at.join("tuned/checkpoints")).iter().filter(|name| *name != "step-2") {
        fs::remove_dir_all(at.join("tuned/checkpoints").join(name)).expect("removed");
    }
    fs::remove_dir_all(at.join("tuned/final")).expect("removed");
    stdout(&finetune(at, &[], &["--resume"]));
    assert!(fs::read(&adapter).expect("an adapter") == whole, "other weights after resuming");
    assert_eq!(trajectory(&at.join("tuned")), told);
    let words = ["`adapter.rank` = 2", "the run was started with 4"];
    fails(&finetune(at, &["adapter.rank=2"], &["--resume"]), 2, &words);
    let both = ["adapter.rank=2", "adapter.alpha=8.0", "adapter.dropout=0.0"];
    let words = ["`adapter.alpha` = 8.0", "started with 32.0 (and adapter.rank = 2, was 4)"];
    fails(&finetune(at, &both, &["--resume"]), 2, &words);
    // How it started does not count any more.
    let said = self::told(&finetune(at, &["adapter.init=gaussian", "train.steps=8"], &["--resume"]));
    assert!(said.contains("counts at the start of a run only") && said.contains("continuing at step 6"), "{said}");
    let full = RUN.replace("[adapter]\nrank = 4\ndropout = 0.1\n", "");
    fs::write(at.join("full.toml"), full).expect("written");
    let words = ["`adapter` = (missing)", "with [adapter]"];
    fails(&tallow(at, "finetune full.toml --resume"), 2, &words);

    let score = |more: &str| object(&tallow(at, &format!("score --text fox --json {more}")))["nll"].as_f64();
    let (base, tuned) = (score("--model out/final"), score("--model out/final --adapter tuned/final"));
    assert!(base.is_some() && base != tuned);
    let merged = object(&tallow(at, "merge --model out/final --adapter tuned/final --out merged --json"));
    assert!(merged["max_logit_difference"].as_f64().is_some_and(|x| x < 1e-4), "{merged}");
    assert!(merged["mean_kl"].as_f64().is_some_and(|x| x.abs() < 1e-6) && merged["argmax_differs"] == 0, "{merged}");
    let apart = score("--model merged").zip(tuned).map(|(a, b)| (a - b).abs());
    assert!(apart.is_some_and(|x| x < 1e-3), "{apart:?}");
    fails(&tallow(at, "merge --model out/final --adapter tuned/final --out merged"), 2, &["exists already"]);
    let generated =
        object(&tallow(at, "generate --model out/final --adapter tuned/final --prompt fox --max-tokens 3 --json"));
    assert!(generated["completion_tokens"].as_u64().is_some_and(|n| n <= 3));
}

#[test]
fn a_base_of_four_bits_is_resumed_bit_for_bit() {
    let dir = school();
    let at = dir.path();
    let set = ["adapter.quantize=nf4"];
    stdout(&finetune(at, &set, &[]));
    let adapter = at.join("tuned/final/adapter_model.safetensors");
    let (whole, told) = (fs::read(&adapter).expect("an adapter"), trajectory(&at.join("tuned")));
    for name in names(&at.join("tuned/checkpoints")).iter().filter(|name| *name != "step-2") {
        fs::remove_dir_all(at.join("tuned/checkpoints").join(name)).expect("removed");
    }
    fs::remove_dir_all(at.join("tuned/final")).expect("removed");
    fails(&finetune(at, &[], &["--resume"]), 2, &["adapter.quantize", "nf4"]);
    fails(&finetune(at, &["adapter.quantize=fp4"], &["--resume"]), 2, &["adapter.quantize", "nf4"]);
    stdout(&finetune(at, &set, &["--resume"]));
    assert!(fs::read(&adapter).expect("an adapter") == whole, "other weights after resuming");
    assert_eq!(trajectory(&at.join("tuned")), told);

    // Used and merged over what it was trained beside unless told.
    let score = |more: &str| object(&tallow(at, &format!("score --text fox --json {more}")))["nll"].as_f64();
    let trained = score("--model out/final --adapter tuned/final");
    assert_ne!(trained, score("--model out/final --adapter tuned/final --base original"));
    let merged = object(&tallow(at, "merge --model out/final --adapter tuned/final --out merged --json"));
    assert!(merged["max_logit_difference"].as_f64().is_some_and(|x| x < 1e-4), "{merged}");
    assert_eq!(merged["merged_into"], "trained");
    let apart = score("--model merged").zip(trained).map(|(a, b)| (a - b).abs());
    assert!(apart.is_some_and(|x| x < 1e-3), "{apart:?}");
    let other = object(&tallow(at, "merge --model out/final --adapter tuned/final --out other --base original --json"));
    assert!(other["max_logit_difference"].as_f64().is_some_and(|x| x > 1e-4), "{other}");
    assert!(other["mean_kl"].as_f64().is_some_and(|x| x > 0.0), "{other}");
    let apart = score("--model other").zip(score("--model out/final --adapter tuned/final --base original"));
    assert!(apart.is_some_and(|(a, b)| (a - b).abs() < 1e-3), "{apart:?}");

    // Beside another model of the same shapes only if told.
    stdout(&finetune(at, &["output=whole", "adapter.quantize=none"], &[]));
    stdout(&tallow(at, "merge --model out/final --adapter whole/final --out twin"));
    let twin = "--model twin --adapter tuned/final";
    fails(&tallow(at, &format!("score --text fox {twin}")), 1, &["other weights", "--base original"]);
    fails(&tallow(at, &format!("merge {twin} --out no")), 1, &["other weights", "--base original"]);
    let forced = tallow(at, &format!("merge {twin} --out yes --base original"));
    assert!(forced.status.success() && String::from_utf8_lossy(&forced.stderr).contains("compared beside"));
    let merged = tallow(at, "merge --model twin --adapter whole/final --out twice");
    assert!(merged.status.success() && String::from_utf8_lossy(&merged.stderr).contains("other weights"));
    let plain = tallow(at, "score --text fox --model twin --adapter whole/final");
    assert!(plain.status.success() && String::from_utf8_lossy(&plain.stderr).contains("other weights"));
    let written = tallow(at, "convert --model out/final --adapter tuned/final --to gguf --out four.gguf");
    assert!(written.status.success() && String::from_utf8_lossy(&written.stderr).contains("nf4"));
    // In a GGUF file too, in a folder that was not there.
    let other =
        self::told(&tallow(at, "convert --model twin --adapter whole/final --to gguf --out new/folder/whole.gguf"));
    assert!(other.contains("whole/final was trained beside other weights than those of twin"), "{other}");
    let other = self::told(&tallow(at, "score --text fox --model twin --adapter new/folder/whole.gguf"));
    assert!(other.contains("whole.gguf was trained beside other weights than those of twin"), "{other}");
    let own = self::told(&tallow(at, "score --text fox --model out/final --adapter new/folder/whole.gguf"));
    assert!(!own.contains("other weights"), "{own}");

    stdout(&finetune(at, &["output=plain"], &[]));
    assert_ne!(trajectory(&at.join("plain")), told, "4 bits change the losses");
    fails(&finetune(at, &["output=x", "adapter.quantize=q9"], &[]), 2, &["quantize", "q9", "nf4"]);
    fails(&finetune(at, &["output=x", "adapter.quantize=gguf"], &[]), 2, &["adapter.quantize", "no quantized blocks"]);
    fails(&finetune(at, &["output=x", "adapter.quantize_block=128"], &[]), 2, &["adapter.quantize_block", "nf4"]);
    let block = ["output=x", "adapter.quantize=nf4", "adapter.quantize_block=48"];
    fails(&finetune(at, &block, &[]), 2, &["adapter.quantize_block", "48", "power of two"]);
    let other = finetune(at, &["output=tuned", "adapter.quantize=fp4"], &["--resume"]);
    fails(&other, 2, &["adapter.quantize", "fp4", "started with nf4 (embeddings q8_0,"]);

    // What a default cannot do is not said to have been asked for.
    stdout(&pretrain(at, &["output=narrow", "model.hidden_size=24", "train.steps=1", "data.context_length=256"], &[]));
    let narrow = ["output=x", "model.from=narrow/final", "adapter.quantize=nf4"];
    fails(
        &finetune(at, &narrow, &[]),
        2,
        &["adapter.quantize_embeddings", "q8_0", "the default", "24; use nf4 or none"],
    );
    let said = finetune(at, &[&narrow[..], &["adapter.quantize_embeddings=q8_0"]].concat(), &[]);
    fails(&said, 2, &["adapter.quantize_embeddings"]);
    assert!(!String::from_utf8_lossy(&said.stderr).contains("the default"));
    stdout(&finetune(at, &[&narrow[..], &["adapter.quantize_embeddings=none", "train.steps=1"]].concat(), &[]));
}

#[test]
fn adapters_are_added_by_their_weights_and_converted() {
    let dir = school();
    let at = dir.path();
    stdout(&finetune(at, &["output=one"], &[]));
    stdout(&finetune(at, &["output=two", "seed=8", "adapter.rank=2", "adapter.targets=q_proj"], &[]));
    let score = |more: &str| {
        let scored = object(&tallow(at, &format!("score --model out/final --text fox --json {more}")));
        scored["nll"].as_f64().expect("a number")
    };
    let (base, one) = (score(""), score("--adapter one/final"));
    assert_eq!(score("--adapter one/final=0"), base);
    assert_eq!(score("--adapter one/final --adapter two/final=0"), one);
    let both = score("--adapter one/final=0.5 --adapter two/final=-2");
    assert!(both != base && both != one);
    let merged = "merge --model out/final --adapter one/final=0.5 --adapter two/final=-2 --out both --json";
    let merged = object(&tallow(at, merged));
    assert!(merged["max_logit_difference"].as_f64().is_some_and(|x| x < 1e-4), "{merged}");
    fails(&tallow(at, "score --model out/final --text x --adapter one/final=much"), 2, &["--adapter", "weight"]);
    fails(&tallow(at, "score --model out/final --text x --adapter one/final --adapter one/final"), 1, &["twice"]);
    stdout(&finetune(at, &["output=dora", "adapter.kind=dora"], &[]));
    let dora = "score --model out/final --text x --adapter one/final --adapter dora/final";
    fails(&tallow(at, dora), 1, &["dora/final", "DoRA", "alone"]);
    stdout(&finetune(at, &["output=four", "adapter.quantize=nf4"], &[]));
    let four = "score --model out/final --text x --adapter one/final --adapter four/final";
    fails(
        &tallow(at, four),
        1,
        &["four/final", "beside nf4 (embeddings q8_0, blocks of 64, double quantization);", "--base original"],
    );
    assert!(score("--base original --adapter one/final --adapter four/final").is_finite());

    // As llama.cpp takes adapters, and back.
    let written = object(&tallow(at, "convert --model out/final --adapter one/final --to gguf --out one.gguf --json"));
    assert!(written["max_logit_difference"].as_f64().is_some_and(|x| x < 1e-5), "{written}");
    assert!((score("--adapter one.gguf") - one).abs() < 1e-5);
    fails(&tallow(at, "convert --model out/final --adapter dora/final --to gguf --out d.gguf"), 1, &["tallow merge"]);
    assert!(!at.join("d.gguf").exists());
    let written = object(&tallow(at, "convert --model out/final --to safetensors --out copy --json"));
    assert_eq!(written["max_logit_difference"], 0.0);
    assert!(at.join("copy/model.safetensors").is_file() && at.join("copy/tokenizer.json").is_file());
    fails(&tallow(at, "convert --model out/final --to gguf --out m.gguf"), 2, &["--adapter"]);
    let adapter = "convert --model out/final --adapter one/final --to safetensors --out a";
    fails(&tallow(at, adapter), 2, &["tallow merge"]);
}

#[test]
fn plan_says_what_fits_in_a_memory() {
    let dir = school();
    let at = dir.path();
    let plan = |more: &str| object(&tallow(at, &format!("plan tune.toml --json {more}")));
    // What a run of a certain size takes holds that size, and a byte less does not.
    let sizes = [
        ("micro_batch_size", 40, "--set train.batch_size=40 --set train.micro_batch_size=40"),
        ("context_length", 200, "--set data.context_length=200"),
        ("rank", 8, "--set adapter.rank=8"),
    ];
    for (name, size, set) in sizes {
        let total = plan(set)["memory"]["total"].as_u64().expect("bytes");
        let largest = |memory: u64| plan(&format!("--memory {memory}"))["largest"][name].as_u64().expect("a size");
        assert_eq!((largest(total), largest(total - 1)), (size, size - 1), "{name}");
    }
    // Rows at once that are not given are those of that memory, not of this machine's.
    let batch = "--set train.batch_size=40 --set train.micro_batch_size=";
    let whole = plan(&format!("{batch}40"))["memory"]["total"].as_u64().expect("bytes");
    let text = fs::read_to_string(at.join("tune.toml")).expect("read");
    let free: String =
        text.lines().filter(|line| !line.starts_with("micro_batch_size")).map(|l| l.to_owned() + "\n").collect();
    fs::write(at.join("free.toml"), free).expect("written");
    let sized = object(&tallow(at, &format!("plan free.toml --json --set train.batch_size=40 --memory {}", whole - 1)));
    assert!(
        sized["largest"]["fits"] == true && sized["micro_batch_size"].as_u64().is_some_and(|rows| rows < 40),
        "{sized}"
    );
    // What does not fit is told, and is a failure.
    let small = tallow(at, "plan tune.toml --json --memory 1MiB");
    let none = serde_json::from_slice::<Value>(&small.stdout).expect("JSON")["largest"].clone();
    assert!(none["rank"].is_null() && none["fits"] == false && none["at_bound"]["rank"] == false, "{none}");
    let said = |output: &std::process::Output| {
        assert_eq!(output.status.code(), Some(1), "it does not fit");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let text = said(&tallow(at, "plan tune.toml --memory 1MiB"));
    for words in
        ["error: does not fit in 1 MiB: it takes ", "no smaller train.micro_batch_size, data.context_length or rank"]
    {
        assert!(text.contains(words), "{text}");
    }
    let large = plan("--set train.batch_size=40 --set train.micro_batch_size=40")["memory"]["total"].as_u64();
    let memory = large.expect("bytes") - 1;
    let large = format!("plan tune.toml --set train.batch_size=40 --set train.micro_batch_size=40 --memory {memory}");
    let text = said(&tallow(at, &large));
    for words in ["it would with train.micro_batch_size = 20, or data.context_length = ", ", each with all else"] {
        assert!(text.contains(words), "{text}");
    }
    // Little enough that more rows would need more, and that no context or rank does: these are the model's own bounds.
    let text = stdout(&tallow(at, "plan tune.toml --memory 64MiB"));
    assert!(text.contains("fits         in 64 MiB") && !text.contains("the most that is tried"), "{text}");
    assert!(text.contains("context 256 (the most that the model has), or rank 32 (the most that its"), "{text}");
    let at_bound = &plan("--memory 64MiB")["largest"]["at_bound"];
    assert_eq!(*at_bound, json!({ "micro_batch_size": false, "context_length": true, "rank": true }));
    fails(&tallow(at, "plan tune.toml --memory much"), 2, &["--memory", "4GiB"]);
}

#[test]
fn dora_full_weights_and_early_stopping_run() {
    let dir = school();
    let at = dir.path();
    stdout(&finetune(
        at,
        &["adapter.kind=dora", "output=dora", "adapter.lr_ratio=4", "objective.neftune_alpha=5"],
        &[],
    ));
    assert!(at.join("dora/final/adapter_config.json").is_file());
    // A rate at which nothing changes.
    let set = ["output=stopped", "optimizer.lr=1e-12", "eval.every=1", "eval.patience=1", "train.steps=50"];
    let out = finetune(at, &set, &[]);
    let told = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && told.contains("eval.patience"), "{told}");
    let text = RUN.split("[adapter]").next().expect("a part").to_owned()
        + "[train]\nsteps = 2\nbatch_size = 2\n[optimizer]\nlr = 1e-3\n";
    fs::write(at.join("tune.toml"), text).expect("written");
    stdout(&finetune(at, &["output=full"], &[]));
    assert!(at.join("full/final/model.safetensors").is_file());
}

#[test]
fn mistakes_name_the_key_or_the_line() {
    let dir = school();
    let at = dir.path();
    fails(&finetune(at, &["adapter.rank=1000"], &[]), 2, &["adapter.rank", "1000"]);
    fails(&finetune(at, &["adapter.targets=q_prj"], &[]), 2, &["adapter.targets", "q_proj"]);
    fails(&finetune(at, &["model.from=nowhere"], &[]), 2, &["model.from"]);
    fails(&finetune(at, &["tokenizer.chat_template=chatml"], &[]), 2, &["tokenizer.chat_template", "<|im_"]);
    fails(&finetune(at, &["data.train=['none.jsonl']"], &[]), 2, &["data.train", "none.jsonl"]);
    fs::write(at.join("bad.jsonl"), "{\"messages\": [{\"content\": \"x\"}]}\n").expect("written");
    fails(&finetune(at, &["data.train=['bad.jsonl']"], &[]), 2, &["bad.jsonl, line 1", "role", "on_malformed"]);
    // And what the error says helps.
    let skip = ["data.train=['chat.jsonl', 'bad.jsonl']", "data.on_malformed=skip", "output=skipped"];
    stdout(&finetune(at, &skip, &[]));
    let both = json!({ "messages": [{ "role": "user", "content": "x" }, { "role": "assistant", "content": "y" }],
        "prompt": "x", "completion": "y" });
    fs::write(at.join("both.jsonl"), format!("{both}\n")).expect("written");
    fails(&finetune(at, &["data.train=['both.jsonl']"], &[]), 2, &["both.jsonl, line 1", "shape"]);
    let shaped = ["data.train=['chat.jsonl', 'both.jsonl']", "data.shape=messages", "output=shaped"];
    stdout(&finetune(at, &shaped, &[]));
    let empty = json!({ "messages": [{ "role": "user", "content": "x" }, { "role": "assistant", "content": "" }] });
    fs::write(at.join("bad.jsonl"), format!("{empty}\n")).expect("written");
    fails(&finetune(at, &["data.train=['bad.jsonl']"], &[]), 2, &["bad.jsonl, line 1"]);
    fails(&tallow(at, "generate --model out/final --adapter out --prompt x"), 1, &["adapter_config.json"]);
    fails(
        &tallow(at, "generate --model out/final --adapter nowhere --prompt x"),
        1,
        &["nowhere: there is no such folder"],
    );
    fails(&tallow(at, "pretrain tune.toml"), 2, &["tallow finetune"]);
    // What is no record says what it is.
    for (text, words) in [
        ("who went over the hill\n", ["bad.jsonl, line 1", "is no JSON object (it begins with \"who went"]),
        ("[{\"prompt\": \"a\"}]\n", ["bad.jsonl, line 1", "a list, not an object"]),
        ("{\n  \"prompt\": \"a\"\n}\n", ["bad.jsonl, line 1", "does not end on its line"]),
    ] {
        fs::write(at.join("bad.jsonl"), text).expect("written");
        fails(&finetune(at, &["data.train=['bad.jsonl']"], &[]), 2, &words);
    }
    fails(&finetune(at, &["data.train=['bad.jsonl']"], &[]), 2, &["data.on_malformed = "]);
    // What is set already is not advised.
    for (too_long, advised) in [("drop", true), ("truncate_end", false)] {
        let set = ["output=short", "data.context_length=2", &format!("data.too_long={too_long}")];
        let refused = String::from_utf8_lossy(&finetune(at, &set, &[]).stderr).into_owned();
        assert_eq!(refused.contains("or set data.too_long"), advised, "{refused}");
    }
}

#[test]
fn a_folder_in_the_place_of_another_names_the_right_one() {
    let dir = school();
    let at = dir.path();
    stdout(&finetune(at, &["train.steps=1"], &[]));
    let run = |args: &str| tallow(at, &format!("generate --prompt x {args}"));
    fails(&run("--model tuned/final"), 1, &["this is an adapter", "--adapter"]);
    fails(&run("--model tuned"), 1, &["the folder of a run of an adapter", "tuned/final as --adapter"]);
    fails(&run("--model out"), 1, &["the folder of a run", "out/final: give that"]);
    fails(&run("--model out/final --adapter tuned"), 1, &["tuned/final: give that"]);
    fails(&run("--model out/final --adapter out/final"), 1, &["it is a model: give it as --model"]);
    fails(&run("--model out/final --adapter out"), 1, &["trained all of a model", "out/final"]);
    fails(&tallow(at, "finetune out/final"), 2, &["is the folder of a model", "from = \"out/final\""]);
    fails(&tallow(at, "finetune out"), 2, &["is the folder of a run", "run file"]);
    fails(&tallow(at, "plan data"), 2, &["is a folder; a run file is needed"]);
    #[cfg(unix)]
    fails(&tallow(at, "plan /dev/null"), 2, &["is no regular file; a run file is needed"]);
    fails(&finetune(at, &["output=out/final"], &[]), 2, &["a part of the run"]);
    fs::rename(at.join("out"), at.join("moved")).expect("renamed");
    fs::remove_file(at.join("moved/resolved.toml")).expect("removed");
    fails(&finetune(at, &["model.from=moved/final", "output=moved/final"], &[]), 2, &["holds a model (config.json)"]);
}

#[test]
fn a_plan_is_of_the_command_that_runs_it() {
    let dir = school();
    let at = dir.path();
    let text = RUN.split("[adapter]").next().expect("a part").to_owned() + "[train]\nsteps = 2\nbatch_size = 500\n";
    fs::write(at.join("tune.toml"), &text).expect("written");
    let plan = tallow(at, "plan tune.toml --json");
    let said = told(&plan);
    assert!(
        said.contains("planned as `tallow finetune` runs it") && said.contains("optimizer.lr is not set"),
        "{said}"
    );
    let plan = object(&plan);
    assert_eq!(plan["documents"].as_u64().expect("a count") + plan["held_out"].as_u64().expect("a count"), 40);
    assert!(plan["notes"][0].as_str().is_some_and(|note| note.contains("fewer than train.batch_size = 500")), "{plan}");
    let shown = stdout(&tallow(at, "plan tune.toml"));
    assert!(shown.contains("fewer than train.batch_size = 500"), "{shown}");
    // What says which it is is taken at its word, and text is no conversation.
    let said = told(&tallow(at, "plan tune.toml --set objective.kind=sft"));
    assert!(!said.contains("planned as"), "{said}");
    let pretraining = fs::read_to_string(at.join("run.toml")).expect("read");
    let section =
        &pretraining[pretraining.find("[model]").expect("one")..pretraining.find("[tokenizer]").expect("one")];
    fs::write(at.join("more.toml"), pretraining.replace(section, "[model]\nfrom = \"out/final\"\n\n"))
        .expect("written");
    let said = told(&tallow(at, "plan more.toml"));
    assert!(said.contains("planned as `tallow pretrain` runs it") && !said.contains("optimizer.lr"), "{said}");

    // Where there is any text, in a folder as well, only `tallow pretrain` can read it.
    fs::create_dir_all(at.join("mixed/deep")).expect("made");
    fs::write(at.join("mixed/deep/a.txt"), "once upon a time there was a tale of it all\n".repeat(200))
        .expect("written");
    fs::copy(at.join("text/stories.jsonl"), at.join("stories.jsonl")).expect("copied");
    for data in ["['mixed']", "['stories.jsonl','mixed/deep/a.txt']"] {
        let said = told(&tallow(at, &format!("plan more.toml --set data.train={data} --set data.valid=[]")));
        assert!(said.contains("planned as `tallow pretrain` runs it"), "{said}");
    }

    fs::write(at.join("tune.toml"), RUN).expect("written");
    let shown = stdout(&tallow(at, "plan tune.toml --set adapter.quantize_embeddings=q8_0"));
    assert!(shown.contains("embedding and head, where they are frozen, are kept in q8_0, 8.50 bits"), "{shown}");
    assert!(!shown.contains("kept in none"), "{shown}");
}

#[test]
fn a_learning_rate_of_another_kind_of_run_is_told() {
    let dir = school();
    let at = dir.path();
    let olora = |lr: &str| told(&finetune(at, &["adapter.init=olora", lr], &["--preview", "1"]));
    assert!(olora("optimizer.lr=1e-3").contains("is high for adapter.init = \"olora\""));
    assert!(!olora("optimizer.lr=1e-4").contains("is high"));
    let text = RUN.split("[adapter]").next().expect("a part").to_owned() + "[train]\nsteps = 1\nbatch_size = 2\n";
    fs::write(at.join("tune.toml"), &text).expect("written");
    let said = told(&finetune(at, &[], &[]));
    for words in ["optimizer.lr is not set, and 1e-3 is a rate of pretraining", "weight_decay = 0.1", "1e-5 to 5e-5"] {
        assert!(said.contains(words), "no {words:?} in: {said}");
    }
    let said = told(&finetune(at, &["optimizer.lr=2e-5"], &["--preview", "1"]));
    assert!(!said.contains("rate of pretraining"), "{said}");
}

const TURNS: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}\
                     {% if add_generation_prompt %}<assistant>{% endif %}";

#[test]
fn a_preview_shows_what_is_learnt_and_trains_nothing() {
    let dir = school();
    let at = dir.path();
    let turn = |role: &str, content: &str| json!({ "role": role, "content": content });
    let mut weighted = turn("assistant", "two\nfoxes");
    weighted["weight"] = json!(0.5);
    let conversations = [
        json!({ "messages": [turn("user", "who \u{1b}[31m"), weighted] }),
        json!({ "messages": [turn("user", "and"), turn("assistant", "a boat")] }),
        json!({ "messages": [turn("user", "long"), turn("assistant", &"the river ".repeat(60))] }),
    ];
    let lines: String = conversations.iter().map(|record| format!("{record}\n")).collect();
    fs::write(at.join("few.jsonl"), lines).expect("written");
    fs::write(at.join("turns.jinja"), TURNS).expect("written");
    let set = ["data.train=['few.jsonl']", "data.valid_fraction=0", "tokenizer.chat_template=turns.jinja"];
    let shown = stdout(&finetune(at, &set, &["--preview", "5"]));
    let words = [
        "2 examples in 1 row of 192 tokens",
        "1 example is longer than data.context_length",
        "row 0: 2 examples",
        "<user>and<|endoftext|><assistant>⟦a boat<|endoftext|>⟧",
        "<user>who \\u{1b}[31m<|endoftext|><assistant>⟦×0.5: two↵\nfoxes<|endoftext|>⟧",
    ];
    for word in words {
        assert!(shown.contains(word), "no {word:?} in: {shown}");
    }
    assert!(!shown.contains('\u{1b}'), "no terminal, no colours: {shown}");
    assert!(!at.join("tuned").exists(), "a preview writes nothing");

    let cache = names(&at.join(".tallow-cache"));
    assert_eq!(cache.len(), 1);
    let inspected = format!("data inspect .tallow-cache/{}/train --tokenizer out/final", cache[0]);
    let inspected = stdout(&tallow(at, &inspected));
    assert!(inspected.contains("<user>and<|endoftext|><assistant>⟦a boat<|endoftext|>⟧"), "{inspected}");

    let coloured = |no_color: &str| {
        let mut command = finetune_command(at, &set, &["--preview", "1"]);
        stdout(&command.env("CLICOLOR_FORCE", "1").env("NO_COLOR", no_color).output().expect("the binary runs"))
    };
    let learnt = "\u{1b}[1;32ma boat\u{1b}[0m\u{1b}[1;35m<|endoftext|>\u{1b}[0m";
    assert!(coloured("").contains(&format!("\u{1b}[2m<assistant>\u{1b}[0m{learnt}")), "{}", coloured(""));
    assert_eq!(coloured("1"), shown, "NO_COLOR wins");

    let lines = stdout(&finetune(at, &set, &["--preview", "1", "--json"]));
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("a JSON object")).collect();
    assert_eq!((lines.len(), &lines[0]["dropped"], &lines[0]["documents"]), (2, &json!(1), &json!(2)));
    let documents = lines[1]["documents"].as_array().expect("documents");
    let weighted = documents.iter().find(|document| document["runs"][1]["weight"] == 0.5).expect("the weighted one");
    assert_eq!(weighted["runs"][1]["text"], "two\nfoxes<|endoftext|>");
    let sum: u64 = documents.iter().filter_map(|document| document["learnt"].as_u64()).sum();
    assert_eq!(lines[0]["learnt"], sum);
    fails(&finetune(at, &set, &["--preview", "0"]), 2, &["--preview"]);
    // The last token of a text is only predicted: it takes no place.
    fs::write(at.join("text.jsonl"), json!({ "text": "a fox" }).to_string() + "\n").expect("written");
    let text = ["data.train=['text.jsonl']", "data.valid_fraction=0"];
    let shown = stdout(&finetune(at, &text, &["--preview", "1"]));
    let count = |before: &str, after: &str| -> u64 {
        let at = shown.find(before).expect("there") + before.len();
        shown[at..].split(after).next().and_then(|n| n.parse().ok()).expect("a number")
    };
    assert_eq!(
        count("example 1: ", " tokens (the last is only predicted"),
        count("row 0: 1 example in ", " of 192 places") + 1
    );
    fails(&finetune(at, &set, &["--preview", "1", "--resume"]), 2, &["--resume"]);
}

#[test]
fn a_prefix_lm_is_trained_and_says_that_it_is_one() {
    let dir = school();
    let at = dir.path();
    let prefix = ["objective.kind=prefix", "objective.train_on=last"];
    fails(&finetune(at, &prefix[..1], &[]), 2, &["objective.train_on", "\"last\""]);
    fails(&finetune(at, &["model.prefix_lm=true"], &[]), 2, &["model.prefix_lm", "objective.kind"]);
    fails(&tallow(at, "pretrain run.toml --set objective.kind=prefix"), 2, &["objective.kind", "tallow finetune"]);

    let read =
        |file: &str| -> Value { serde_json::from_slice(&fs::read(at.join(file)).expect("a file")).expect("JSON") };
    stdout(&finetune(at, &prefix, &[]));
    assert_eq!(read("tuned/final/adapter_config.json")["tallow"]["prefix_lm"], true);
    let whole = fs::read(at.join("tuned/final/adapter_model.safetensors")).expect("an adapter");
    for name in names(&at.join("tuned/checkpoints")).iter().filter(|name| *name != "step-2") {
        fs::remove_dir_all(at.join("tuned/checkpoints").join(name)).expect("removed");
    }
    fs::remove_dir_all(at.join("tuned/final")).expect("removed");
    let lines = stdout(&finetune(at, &prefix, &["--preview", "1", "--json"]));
    let row: Value = serde_json::from_str(lines.lines().nth(1).expect("a row")).expect("JSON");
    let first = &row["documents"][0];
    assert_eq!(first["prefix"], json!([0, first["runs"][0]["ids"].as_array().expect("ids").len()]), "{row}");
    stdout(&finetune(at, &prefix, &["--resume"]));
    assert!(fs::read(at.join("tuned/final/adapter_model.safetensors")).expect("an adapter") == whole);
    fails(&finetune(at, &[], &["--resume"]), 2, &["objective.kind"]);

    // Merged it is one itself, and generates the same.
    stdout(&tallow(at, "merge --model out/final --adapter tuned/final --out merged"));
    assert_eq!(read("merged/config.json")["prefix_lm"], true);
    let ids = |model: &str| {
        let args = format!("generate {model} --prompt foxes-went-over --max-tokens 12 --temperature 0 --json");
        object(&tallow(at, &args))["ids"].clone()
    };
    let (adapted, merged) = (ids("--model out/final --adapter tuned/final"), ids("--model merged"));
    assert_eq!(adapted, merged);
    // Taught causally again it is none, which is said.
    let set = ["model.from=merged", "output=causal", "train.steps=1"];
    let out = finetune(at, &set, &[]);
    let told = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && told.contains("becomes a causal model"), "{told}");
    assert_eq!(read("causal/final/adapter_config.json")["tallow"]["prefix_lm"], false);
    // All of the weights.
    let text = RUN.split("[adapter]").next().expect("a part").to_owned() + "[train]\nsteps = 2\nbatch_size = 2\n";
    fs::write(at.join("tune.toml"), text).expect("written");
    stdout(&finetune(at, &[&prefix[..], &["output=full"]].concat(), &[]));
    assert_eq!(read("full/final/config.json")["prefix_lm"], true);
}

/// What a run that may not fail says on stderr.
fn told(output: &std::process::Output) -> String {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{message}");
    message
}

#[test]
fn a_run_says_what_it_trains_and_on_what() {
    let dir = school();
    let at = dir.path();
    let said = told(&finetune(at, &["data.too_long=truncate_end"], &[]));
    for words in [
        "trains 4,352 of 44,192 parameters (9.85%)",
        "LoRA rank 4 on 14 modules",
        "examples, ",
        "packed rows of 192 tokens",
        "to validate on",
    ] {
        assert!(said.contains(words), "no {words:?} in: {said}");
    }
    // The file's length gives way to that of --set; an adapter that is there by --set alone is told.
    let text = RUN.split("[adapter]").next().expect("a part").to_owned() + "[train]\nepochs = 3\nbatch_size = 64\n";
    fs::write(at.join("tune.toml"), text).expect("written");
    let said = told(&finetune(at, &["output=full", "train.steps=1"], &[]));
    for words in
        ["train.steps=1 replaces train.epochs = 3", "trains all 39,", "no [adapter]", "1 step of", "every example"]
    {
        assert!(said.contains(words), "no {words:?} in: {said}");
    }
    let said = told(&finetune(at, &["output=some", "train.steps=1", "adapter.rank=2"], &[]));
    assert!(said.contains("adapter.rank=2 makes it a run of an adapter") && said.contains("LoRA rank 2"), "{said}");

    let plan = object(&tallow(at, "plan tune.toml --json --set objective.kind=sft"));
    let (rows, held_out) = (plan["rows"].as_f64().expect("rows"), plan["held_out"].as_u64().expect("a count"));
    assert_eq!(plan["documents"].as_u64().expect("a count") + held_out, 40);
    let passes = plan["passes"].as_f64().expect("passes");
    assert!((passes - plan["steps"].as_f64().expect("steps") * 64.0 / rows).abs() < 1e-9, "{plan}");
    let shown = stdout(&tallow(at, "plan tune.toml --set objective.kind=sft --set train.micro_batch_size=1"));
    for words in ["packed rows of 192 tokens", " an epoch; ", "passes over the data", ", 1 row at once"] {
        assert!(shown.contains(words), "no {words:?} in: {shown}");
    }
}

#[test]
fn what_is_left_out_or_not_read_is_told_once() {
    let dir = school();
    let at = dir.path();
    let turn = |role: &str, content: &str| json!({ "role": role, "content": content });
    let mut lines: String = (0..200)
        .map(|i| {
            let messages = [turn("user", &format!("who {i}")), turn("assistant", "a fox")];
            json!({ "messages": messages, "id": i }).to_string() + "\n"
        })
        .collect();
    let long = [turn("user", "long"), turn("assistant", &"the river ".repeat(90))];
    lines += &(json!({ "messages": long, "weigth": 2 }).to_string() + "\n");
    fs::write(at.join("some.jsonl"), &lines).expect("written");
    let set = ["data.train=['some.jsonl']", "train.steps=1"];
    let said = told(&finetune(at, &set, &[]));
    assert_eq!(said.matches("1 example is longer than data.context_length").count(), 1, "{said}");
    assert_eq!(said.matches("`id` of 200 records is not read").count(), 1, "{said}");
    assert!(said.contains("`weigth` of 1 record is not read"), "{said}");

    // Of two examples one is held out, and one of the two is too long.
    let two = [turn("user", "who"), turn("assistant", "a fox")];
    let lines = format!("{}\n{}\n", json!({ "messages": two }), json!({ "messages": long }));
    fs::write(at.join("two.jsonl"), lines).expect("written");
    let failed = finetune(at, &["data.train=['two.jsonl']", "data.valid_fraction=0.5", "output=two"], &[]);
    fails(&failed, 2, &["data.valid_fraction", "1 example can be used", "1 example is longer", "data.valid"]);
}

#[test]
fn what_looks_like_a_special_token_in_a_message_is_text() {
    let dir = school();
    let at = dir.path();
    let turn = |role: &str, content: &str| json!({ "role": role, "content": content });
    let messages = [turn("user", "one<|endoftext|>two"), turn("assistant", "a<|endoftext|>b")];
    fs::write(at.join("few.jsonl"), format!("{}\n", json!({ "messages": messages }))).expect("written");
    fs::write(at.join("turns.jinja"), TURNS).expect("written");
    let set = ["data.train=['few.jsonl']", "data.valid_fraction=0", "tokenizer.chat_template=turns.jinja"];
    let lines = stdout(&finetune(at, &set, &["--preview", "1", "--json"]));
    let row: Value = serde_json::from_str(lines.lines().nth(1).expect("a row")).expect("JSON");
    let ids: Vec<u64> = row["documents"][0]["runs"]
        .as_array()
        .expect("runs")
        .iter()
        .flat_map(|run| run["ids"].as_array().expect("ids").iter().filter_map(Value::as_u64))
        .collect();
    let end = ids.last().expect("ids");
    assert_eq!(ids.iter().filter(|id| *id == end).count(), 2, "only the template ends turns: {row}");
    assert_eq!(row["documents"][0]["runs"][1]["text"], "a<|endoftext|>b<|endoftext|>");
}

#[test]
fn slips_in_the_data_and_the_rate_are_told_apart() {
    let dir = school();
    let at = dir.path();
    let lines: String = (0..4).map(|i| json!({ "text": format!("a fox {i}") }).to_string() + "\n").collect();
    fs::write(at.join("texts.jsonl"), &lines).expect("written");
    let prefix = ["objective.kind=prefix", "objective.train_on=last", "data.train=['texts.jsonl']", "train.steps=1"];
    fails(&finetune(at, &prefix, &[]), 2, &["objective.kind", "data.train", "no prompt", "\"sft\""]);
    let mixed = [&prefix[..2], &["data.train=['chat.jsonl', 'texts.jsonl']", "train.steps=1"]].concat();
    let said = told(&finetune(at, &mixed, &[]));
    assert!(said.contains("4 examples of text without a prompt"), "{said}");

    let critic = json!({ "messages": [{ "role": "critic", "content": "x" }, { "role": "assistant", "content": "y" }] });
    fs::write(at.join("critic.jsonl"), format!("{critic}\n")).expect("written");
    let set = ["data.train=['chat.jsonl', 'critic.jsonl']", "output=critic", "train.steps=1"];
    fails(&finetune(at, &set, &[]), 2, &["critic.jsonl, line 1", "\"critic\"", "data.roles", "on_malformed"]);
    fs::write(at.join("turns.jinja"), TURNS).expect("written");
    let named = [&set[..], &["data.roles=['critic']", "tokenizer.chat_template=turns.jinja"]].concat();
    told(&finetune(at, &named, &[]));

    fails(
        &finetune(at, &["output=far", "optimizer.lr=1e9"], &[]),
        1,
        &["optimizer.lr", "too high", "weights are as large"],
    );
    fails(
        &finetune(at, &["output=nowhere"], &["--resume"]),
        2,
        &["nowhere", "no run to continue", "leave out --resume"],
    );
    assert!(!at.join("nowhere").exists());
}
