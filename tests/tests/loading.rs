//! Opening models from damaged and hostile files: every error names the file and the key or tensor in it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests, and their helpers")]

#[path = "../../crates/formats/tests/support/gguf.rs"]
mod gguf;

use std::path::{Path, PathBuf};

use gguf::{Gguf, Meta};
use serde_json::{Value, json};
use tallow::formats::safetensors::{INDEX, TensorData, WEIGHTS, write_safetensors, write_sharded_by};
use tallow::models::parse_config;
use tallow::nn::{ForwardContext, plan_params};
use tallow::open::{Dtype, open, open_files};
use tallow::tokenizer::{TrainOptions, train};

/// Name and shape of each tensor to write.
type Tensors = Vec<(String, Vec<usize>)>;

struct Model(tempfile::TempDir);

impl Model {
    fn empty() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A tiny Llama as a Hugging Face directory, without a tokenizer.
    fn dir() -> Self {
        Self::with(&config(), tensors(&config()))
    }

    fn with(config: &Value, tensors: Tensors) -> Self {
        let model = Self::empty();
        model.write("config.json", config.to_string());
        write_safetensors(&model.file(WEIGHTS), data(tensors), &[("format", "pt")]).unwrap();
        model
    }

    fn sharded() -> Self {
        let model = Self::empty();
        model.write("config.json", config().to_string());
        write_sharded_by(model.0.path(), data(tensors(&config())), &[], 600).unwrap();
        model
    }

    fn gguf(gguf: &Gguf) -> Self {
        let model = Self::empty();
        model.write("m.gguf", gguf.build());
        model
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.file(name), bytes).unwrap();
    }

    fn path(&self) -> PathBuf {
        if self.file("m.gguf").exists() { self.file("m.gguf") } else { self.0.path().into() }
    }
}

fn config() -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12,
           "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32})
}

/// What a model of this configuration asks for.
fn tensors(config: &Value) -> Tensors {
    let config = parse_config(config).unwrap().config;
    let (_, specs) = plan_params(|b| config.build(b)).unwrap();
    specs.iter().map(|spec| (spec.name.clone(), spec.stored_shape())).collect()
}

fn data(tensors: Tensors) -> Vec<TensorData<'static>> {
    let each = |(name, shape): (String, Vec<usize>)| {
        let elements = shape.iter().product();
        TensorData::from_fn(name, shape, move || Ok::<_, String>(vec![0f32; elements]))
    };
    tensors.into_iter().map(each).collect()
}

fn text_of(path: &Path) -> String {
    path.display().to_string()
}

fn error(path: &Path) -> String {
    match open(&text_of(path), Dtype::F32) {
        Ok(_) => "it was opened".into(),
        Err(e) => e.to_string(),
    }
}

fn assert_says(case: &str, message: &str, fragments: &[&str]) {
    for fragment in fragments {
        assert!(message.contains(fragment), "{case}: {message:?} does not say {fragment:?}");
    }
}

/// A tiny Llama as a GGUF file, its head tied, with a vocabulary of `tokens` tokens.
fn llama(tokens: usize) -> Gguf {
    let names: Vec<String> = (0..tokens).map(|i| format!("t{i}")).collect();
    let mut gguf = Gguf::new()
        .meta("general.architecture", Meta::text("llama"))
        .meta("llama.context_length", Meta::U32(32))
        .meta("llama.embedding_length", Meta::U32(8))
        .meta("llama.block_count", Meta::U32(2))
        .meta("llama.feed_forward_length", Meta::U32(12))
        .meta("llama.attention.head_count", Meta::U32(2))
        .meta(KV, Meta::U32(1))
        .meta(EPS, Meta::F32(1e-5))
        .meta("tokenizer.ggml.model", Meta::text("gpt2"))
        .meta("tokenizer.ggml.pre", Meta::text("gpt-2"))
        .meta("tokenizer.ggml.tokens", Meta::texts(names.iter().map(String::as_str)))
        .meta("tokenizer.ggml.merges", Meta::texts([]))
        .f32s("token_embd.weight", &[16, 8], 0.5)
        .f32s("output_norm.weight", &[8], 1.0);
    for block in 0..2 {
        for (name, shape) in BLOCK {
            gguf = gguf.f32s(&format!("blk.{block}.{name}.weight"), shape, 0.1);
        }
    }
    gguf
}

const KV: &str = "llama.attention.head_count_kv";
const EPS: &str = "llama.attention.layer_norm_rms_epsilon";
const BLOCK: [(&str, &[usize]); 9] = [
    ("attn_norm", &[8]),
    ("attn_q", &[8, 8]),
    ("attn_k", &[4, 8]),
    ("attn_v", &[4, 8]),
    ("attn_output", &[8, 8]),
    ("ffn_norm", &[8]),
    ("ffn_gate", &[12, 8]),
    ("ffn_up", &[12, 8]),
    ("ffn_down", &[8, 12]),
];

#[test]
fn whole_models_open_from_every_kind_of_file() {
    let sharded = Model::sharded();
    assert!(sharded.file(INDEX).exists());
    for model in [Model::dir(), sharded, Model::gguf(&llama(16))] {
        let path = model.path();
        let opened = open(&text_of(&path), Dtype::F32).map_err(|e| e.to_string()).unwrap();
        let ids = candle_core::Tensor::new(&[[1u32, 2, 3]], opened.device()).unwrap();
        let logits = opened.decoder().logits(&ids, &mut ForwardContext::causal(1, 3).unwrap()).unwrap();
        assert_eq!(logits.dims(), [1, 3, 16], "{}", path.display());
    }
}

#[test]
fn places_without_a_model_say_so() {
    let model = Model::empty();
    for name in ["none", "none.gguf"] {
        let missing = model.file(name);
        assert_says(name, &error(&missing), &[&text_of(&missing), "no such file or folder"]);
    }
    let folder = text_of(&model.path());
    assert_says("empty folder", &error(&model.path()), &[&folder, "config.json is missing", "is empty"]);
    model.write("tokenizer.json", "{}");
    assert_says("other files", &error(&model.path()), &["config.json is missing", "holds tokenizer.json"]);
    model.write("config.json", config().to_string());
    assert_says("no weights", &error(&model.path()), &[&folder, "model.safetensors is missing"]);
    model.write("pytorch_model.bin", "");
    assert_says("pickle", &error(&model.path()), &["pytorch_model.bin", "save_pretrained"]);
}

#[test]
fn bad_configurations_name_the_file_and_the_key() {
    let huge = json!(1u64 << 60);
    // Key, value (null removes it), and what the message says besides the file.
    let cases: Vec<(&str, Value, &[&str])> = vec![
        ("architectures", json!(["LlamaForCasualLM"]), &["`LlamaForCasualLM`", "nearest is `LlamaForCausalLM`"]),
        ("architectures", json!(["GPT2Model"]), &["nearest is `GPT2LMHeadModel`", "MistralForCausalLM"]),
        ("architectures", json!("LlamaForCausalLM"), &["`architectures`", "must be a list"]),
        ("architectures", json!([1]), &["`architectures`", "must be a list"]),
        ("architectures", json!([]), &["`architectures`", "must be a list"]),
        ("architectures", Value::Null, &["`architectures`", "is missing"]),
        ("hidden_size", Value::Null, &["`hidden_size`: is missing"]),
        ("vocab_size", Value::Null, &["`vocab_size`: is missing"]),
        ("hidden_size", json!("wide"), &["`hidden_size`", "invalid type"]),
        ("hidden_size", json!(8.5), &["`hidden_size`", "8.5"]),
        ("hidden_size", json!(-8), &["`hidden_size`", "-8"]),
        ("hidden_size", json!(9), &["`hidden_size`", "no multiple of num_attention_heads"]),
        ("hidden_size", huge.clone(), &["`hidden_size`", "more than any model has"]),
        ("vocab_size", huge.clone(), &["`vocab_size`", "more than any model has"]),
        ("intermediate_size", huge.clone(), &["`intermediate_size`", "more than any model has"]),
        ("num_hidden_layers", json!(1_000_000_000), &["`num_hidden_layers`", "more than any model has"]),
        ("num_hidden_layers", json!(0), &["`num_hidden_layers`", "at least 1"]),
        ("num_attention_heads", huge.clone(), &["`num_attention_heads`", "more than any model has"]),
        ("num_key_value_heads", json!(3), &["`num_key_value_heads`", "does not divide"]),
        ("head_dim", huge.clone(), &["`head_dim`", "more than any model has"]),
        ("head_dim", json!(3), &["`head_dim`", "is odd"]),
        ("head_dim", json!(0), &["`head_dim`", "at least 1"]),
        ("max_position_embeddings", huge, &["`max_position_embeddings`", "more than any model has"]),
        ("max_position_embeddings", json!(0), &["`max_position_embeddings`", "at least 1"]),
        ("sliding_window", json!(0), &["`sliding_window`", "at least 1"]),
        ("hidden_act", json!("gelu"), &["`hidden_act`", "`gelu` is not supported", "`silu` is"]),
        ("rms_norm_eps", json!(-1.0), &["`rms_norm_eps`", "-1"]),
        ("rope_theta", json!(0), &["`rope_theta`", "positive"]),
        ("rope_scaling", json!({"rope_type": "longrope"}), &["`rope_scaling`", "longrope", "llama3"]),
        ("rope_scaling", json!({"rope_type": "linear"}), &["`rope_scaling`", "factor"]),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 0.0}), &["`rope_scaling`", "factor = 0"]),
        ("rope_scaling", json!("linear"), &["`rope_scaling`"]),
        ("rope_parameters", json!({"rope_theta": "1e4"}), &["`rope_parameters.rope_theta`", "is not a number"]),
        ("attention_dropout", json!(2), &["`attention_dropout`", "below 1"]),
        ("quantization_config", json!({"quant_method": "gptq"}), &["`quantization_config`", "gptq", "GGUF"]),
    ];
    for (key, value, fragments) in cases {
        let mut config = config();
        match (value, config.as_object_mut()) {
            (Value::Null, Some(map)) => drop(map.remove(key)),
            (value, _) => config[key] = value,
        }
        let model = Model::with(&config, vec![]);
        let message = error(&model.path());
        assert_says(key, &message, &[&text_of(&model.file("config.json"))]);
        assert_says(key, &message, fragments);
    }
    let texts: [(&str, &[u8], &str); 5] = [
        ("cut off", b"{\"architectures\": [", "is not JSON"),
        ("no text", b"\xff\xfe", "is not JSON"),
        ("empty", b"", "is not JSON"),
        ("a list", b"[]", "is not a JSON object"),
        ("out of range", b"{\"rms_norm_eps\": 1e999}", "number out of range"),
    ];
    for (case, text, reason) in texts {
        let model = Model::dir();
        model.write("config.json", text);
        assert_says(case, &error(&model.path()), &[&text_of(&model.file("config.json")), reason]);
    }
}

#[test]
fn weights_that_do_not_fit_name_the_file_and_the_tensor() {
    let q = "model.layers.1.self_attn.q_proj.weight";
    let up = "model.layers.0.mlp.up_proj.weight";
    let (third, bias) = ("model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias");
    let change = |name: &str, shape: Option<&[usize]>| {
        let mut all = tensors(&config());
        all.retain(|(n, _)| n != name);
        all.extend(shape.map(|shape| (name.to_owned(), shape.to_vec())));
        Model::with(&config(), all)
    };
    let embed = "model.embed_tokens.weight";
    let cases: Vec<(&str, Model, Vec<&str>)> = vec![
        ("missing", change(q, None), vec![q, "is missing"]),
        ("missing head", change("lm_head.weight", None), vec!["`lm_head.weight`", "is missing"]),
        ("wrong shape", change(q, Some(&[8, 9])), vec![q, "[8, 9]", "needs [8, 8]"]),
        ("transposed", change(up, Some(&[8, 12])), vec![up, "needs [12, 8]"]),
        ("other rank", change(q, Some(&[64])), vec![q, "[64]", "needs [8, 8]"]),
        ("vocabulary", change(embed, Some(&[17, 8])), vec![embed, "[17, 8]", "vocabulary"]),
        ("extra layer", change(third, Some(&[8])), vec![third, "no such parameter"]),
        ("extra bias", change(bias, Some(&[8])), vec![bias, "no such parameter"]),
    ];
    for (case, model, fragments) in cases {
        let message = error(&model.path());
        assert_says(case, &message, &[&text_of(&model.file(WEIGHTS))]);
        assert_says(case, &message, &fragments);
    }
    // What older files carry and models compute is no error.
    let computed = change("model.layers.0.self_attn.rotary_emb.inv_freq", Some(&[2]));
    assert!(open(&text_of(&computed.path()), Dtype::Bf16).is_ok());

    // A configuration of a giant over the weights of a dwarf is refused before anything is allocated.
    let model = Model::dir();
    let mut giant = config();
    for (key, value) in [("vocab_size", 1 << 24), ("hidden_size", 1 << 20), ("intermediate_size", 1 << 20)] {
        giant[key] = json!(value);
    }
    giant["head_dim"] = json!(8);
    giant["num_hidden_layers"] = json!(4096);
    model.write("config.json", giant.to_string());
    assert_says("giant", &error(&model.path()), &[&text_of(&model.file(WEIGHTS)), embed, "[16, 8]"]);
}

#[test]
fn damaged_weights_name_the_file() {
    let model = Model::dir();
    let whole = std::fs::read(model.file(WEIGHTS)).unwrap();
    for len in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        model.write(WEIGHTS, &whole[..len]);
        assert_says("cut off", &error(&model.path()), &[&text_of(&model.file(WEIGHTS))]);
    }
    // As many bytes, of something that is no weight.
    let at = whole.windows(5).position(|w| w == b"\"F32\"").unwrap();
    model.write(WEIGHTS, [&whole[..at], b"\"I32\"", &whole[at + 5..]].concat());
    assert_says("integers", &error(&model.path()), &[&text_of(&model.file(WEIGHTS)), "tensor `", "holds I32"]);

    let sharded = Model::sharded();
    let index = std::fs::read_to_string(sharded.file(INDEX)).unwrap();
    let at = index.find("model-00001-of-").unwrap();
    let file = &index[at..at + "model-00001-of-00000.safetensors".len()];
    let in_index = text_of(&sharded.file(INDEX));
    sharded.write(INDEX, index.replace(file, "../model.safetensors"));
    assert_says("outside", &error(&sharded.path()), &[&in_index, "tensor `", "not a plain file name"]);
    sharded.write(INDEX, &index);
    std::fs::remove_file(sharded.file(file)).unwrap();
    assert_says("shard", &error(&sharded.path()), &[&in_index, "tensor `", file, "is missing"]);
}

#[test]
fn bad_ggufs_name_the_file_and_the_key() {
    let with = |key: &str, value: Meta| llama(16).meta(key, value);
    let (arch, base) = ("general.architecture", "llama.rope.freq_base");
    let (heads, blocks) = ("llama.attention.head_count", "llama.block_count");
    let (context, scaling) = ("llama.context_length", "llama.rope.scaling.type");
    let (rotated, experts, eos) = ("llama.rope.dimension_count", "llama.expert_count", "tokenizer.ggml.eos_token_id");
    let partial = with(rotated, Meta::U32(2)).meta("llama.attention.key_length", Meta::U32(4));
    let mut cases: Vec<(&str, Gguf, Vec<&str>)> = vec![
        ("other", with(arch, Meta::text("lama")), vec!["`lama`", "nearest is `llama`", "gpt2"]),
        ("mistyped", with(arch, Meta::U32(1)), vec![arch, "not a string"]),
        ("kv by layer", with(KV, Meta::Array(4, vec![Meta::U32(1), Meta::U32(1)])), vec![KV, "an array"]),
        ("kv", with(KV, Meta::U32(3)), vec![KV, "does not divide"]),
        ("heads", with(heads, Meta::U32(0)), vec![heads, "at least 1"]),
        ("blocks", with(blocks, Meta::U64(1 << 60)), vec![blocks, "more than any model"]),
        ("context", with(context, Meta::U64(u64::MAX)), vec![context, "more than any model"]),
        ("NaN", with(EPS, Meta::F32(f32::NAN)), vec![EPS, "NaN", "no finite number"]),
        ("infinite", with(base, Meta::F32(f32::INFINITY)), vec![base, "inf", "no finite number"]),
        ("negative", with(base, Meta::F32(-1.0)), vec![base, "not a positive number"]),
        ("base as text", with(base, Meta::text("1e4")), vec![base, "a string"]),
        ("yarn", with(scaling, Meta::text("yarn")), vec![scaling, "`yarn`", "linear"]),
        ("partial rotation", partial, vec![rotated, "partial rotation"]),
        ("experts", with(experts, Meta::U32(8)), vec![experts, "not supported"]),
        ("frequencies", llama(16).f32s("rope_freqs.weight", &[2], 1.0), vec!["`rope_freqs.weight`", "not supported"]),
        ("eos", with(eos, Meta::text("x")), vec![eos, "a string"]),
        ("tokens", llama(17), vec!["17 tokens", "vocabulary is 16"]),
        ("version", Gguf { version: 1, ..llama(16) }, vec!["version 1", "convert the model anew"]),
        ("extra", llama(16).f32s("blk.2.attn_norm.weight", &[8], 1.0), vec!["tensor `blk.2.attn_norm.weight`"]),
    ];
    for key in [arch, context, "llama.embedding_length", blocks, "llama.feed_forward_length", heads, EPS] {
        cases.push(("missing key", llama(16).without(key), vec![key, "is missing"]));
    }
    let without = |name: &str| {
        let mut gguf = llama(16);
        gguf.tensors.retain(|t| t.name != name);
        gguf
    };
    let down = vec!["model.layers.1.mlp.down_proj.weight", "`blk.1.ffn_down.weight`", "is missing"];
    cases.push(("missing tensor", without("blk.1.ffn_down.weight"), down));
    cases.push(("no embedding", without("token_embd.weight"), vec!["`token_embd.weight`", "no embedding matrix"]));
    let mut shape = llama(16);
    shape.tensors[3].dims = vec![4, 16];
    cases.push(("wrong shape", shape, vec!["q_proj", "[16, 4]", "needs [8, 8]"]));
    for (case, gguf, fragments) in cases {
        let model = Model::gguf(&gguf);
        let message = error(&model.path());
        assert_says(case, &message, &[&text_of(&model.path())]);
        assert_says(case, &message, &fragments);
    }
    let whole = llama(16).build();
    for len in (0..whole.len()).step_by(97) {
        let model = Model::empty();
        model.write("m.gguf", &whole[..len]);
        assert_says("cut off", &error(&model.path()), &[&text_of(&model.path())]);
    }
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let model = Model::dir();
    let options = TrainOptions { vocab_size: 280, ..TrainOptions::default() };
    let tokenizer = train(["some words and more words"], &options, |_| {}).unwrap();
    tokenizer.save(model.path()).unwrap();
    let size = format!("{} tokens", tokenizer.vocab_size());
    assert_says("larger", &error(&model.path()), &[&text_of(&model.path()), &size, "vocabulary is 16"]);
}

#[test]
fn a_tokenizer_that_cannot_be_read_is_told_when_it_is_needed() {
    let reason = |model: &Model| {
        let opened = open(&text_of(&model.path()), Dtype::F32).map_err(|e| e.to_string()).unwrap();
        opened.tokenizer().err().map(|e| e.to_string()).unwrap_or_default()
    };
    let dir = Model::dir();
    dir.write("tokenizer.json", "{");
    assert_says("tokenizer.json", &reason(&dir), &[&text_of(&dir.file("tokenizer.json"))]);
    let gguf = Model::gguf(&llama(16).meta("tokenizer.ggml.pre", Meta::text("no-such")));
    assert_says("pre-tokenizer", &reason(&gguf), &[&text_of(&gguf.path()), "no-such"]);
    let files = open_files(&text_of(&gguf.path())).map_err(|e| e.to_string()).unwrap();
    assert_says("pre-tokenizer", &files.tokenizer.err().unwrap_or_default(), &["no-such"]);
}
