//! GGUF: metadata and tensors as they were written, by hand and by candle; dequantization against candle's.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests, and their helpers")]

mod support;

use std::borrow::Cow;
use std::io::Cursor;

use candle_core::quantized::{GgmlDType, QStorage, QTensor, gguf_file};
use candle_core::{Device, Tensor};
use half::f16;
use proptest::prelude::*;
use support::gguf::{Gguf, Meta};
use support::{Folder, assert_says, values};
use tallow_formats::gguf::{GgmlType, GgufFile, GgufValue};
use tallow_formats::{DType, TensorSource};

fn open(gguf: &Gguf) -> (Folder, GgufFile) {
    let folder = Folder::new();
    let path = folder.write("m.gguf", gguf.build());
    let file = GgufFile::open(&path).unwrap();
    (folder, file)
}

#[test]
fn every_kind_of_value_is_read() {
    let nested = Meta::Array(9, vec![Meta::texts(["x", ""]), Meta::Array(4, vec![])]);
    let gguf = Gguf::new()
        .meta("u8", Meta::U8(255))
        .meta("i8", Meta::Raw(1, vec![0x80]))
        .meta("u16", Meta::Raw(2, vec![0xff, 0xff]))
        .meta("i16", Meta::Raw(3, vec![0xfe, 0xff]))
        .meta("u32", Meta::U32(u32::MAX))
        .meta("i32", Meta::I32(-7))
        .meta("f32", Meta::F32(0.5))
        .meta("bool", Meta::Bool(true))
        .meta("text", Meta::text("ünï"))
        .meta("nested", nested)
        .meta("u64", Meta::U64(u64::MAX))
        .meta("i64", Meta::Raw(11, i64::MIN.to_le_bytes().to_vec()))
        .meta("f64", Meta::F64(0.25))
        .meta("nan", Meta::F32(f32::NAN));
    let (_folder, file) = open(&gguf);
    let expected = [
        ("u8", GgufValue::U64(255)),
        ("i8", GgufValue::I64(-128)),
        ("u16", GgufValue::U64(65_535)),
        ("i16", GgufValue::I64(-2)),
        ("u32", GgufValue::U64(u32::MAX.into())),
        ("i32", GgufValue::I64(-7)),
        ("f32", GgufValue::F32(0.5)),
        ("bool", GgufValue::Bool(true)),
        ("text", GgufValue::String("ünï".into())),
        ("u64", GgufValue::U64(u64::MAX)),
        ("i64", GgufValue::I64(i64::MIN)),
        ("f64", GgufValue::F64(0.25)),
    ];
    for (key, value) in expected {
        assert_eq!(file.get(key), Some(&value), "{key}");
    }
    let keys: Vec<&str> = file.metadata().iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys.first().zip(keys.last()), Some((&"u8", &"nan")), "in the order of the file");
    let nested = file.get_array("nested").unwrap();
    assert_eq!(nested[0].as_array().unwrap()[0].as_str(), Some("x"));
    assert_eq!(nested[1].as_array(), Some(&[][..]));

    assert_eq!(file.get_u64("u8").unwrap(), 255);
    assert_eq!(file.get_f32("f64").unwrap(), 0.25);
    assert_eq!(file.opt_u64("none").unwrap(), None);
    assert_eq!(file.opt_bool("bool").unwrap(), Some(true));
    assert_eq!(file.opt_str("text").unwrap(), Some("ünï"));
    let wrong = [
        (file.get_u64("i32").map(drop), "`i32`: is an integer, not a non-negative integer"),
        (file.get_u64("f32").map(drop), "`f32`: is a float, not a non-negative integer"),
        (file.get_u64("none").map(drop), "`none`: is missing"),
        (file.opt_u64("text").map(drop), "`text`: is a string"),
        (file.get_f32("u8").map(drop), "`u8`: is an integer, not a float"),
        (file.get_f32("nan").map(drop), "`nan`: is NaN, which is no finite number"),
        (file.get_str("bool").map(drop), "`bool`: is a boolean, not a string"),
        (file.get_array("text").map(drop), "`text`: is a string, not an array"),
        (file.opt_bool("u8").map(drop), "`u8`: is an integer, not a boolean"),
        (file.opt_array("u8").map(drop), "`u8`: is an integer, not an array"),
    ];
    for (result, says) in wrong {
        assert_says(says, &result.unwrap_err().to_string(), &["m.gguf", says]);
    }
}

#[test]
fn shapes_are_outermost_first_and_data_is_aligned() {
    for (version, alignment) in [(2, 32), (3, 32), (3, 1), (3, 64), (3, 4096)] {
        let mut gguf = Gguf::new().f32s("a", &[2, 3], 1.5).f32s("scalar", &[], 2.5).f32s("empty", &[0, 4], 0.0);
        gguf = gguf.tensor("i", &[3], 26, vec![0; 12]).tensor("h", &[2], 1, vec![0x00, 0x3c, 0x00, 0xc0]);
        (gguf.version, gguf.alignment) = (version, alignment);
        if alignment != 32 {
            gguf = gguf.meta("general.alignment", Meta::U32(alignment as u32));
        }
        let (_folder, file) = open(&gguf);
        assert_eq!(file.names(), ["a", "scalar", "empty", "i", "h"]);
        assert_eq!(file.info("a").unwrap().shape, [2, 3]);
        assert_eq!(values(&file, "a"), [1.5; 6], "alignment {alignment}");
        assert_eq!(values(&file, "scalar"), [2.5]);
        assert_eq!(values(&file, "empty"), [0f32; 0]);
        assert_eq!(values(&file, "h"), [1.0, -2.0]);
        assert_eq!(file.info("i").unwrap().dtype, DType::I32);
        assert!(file.read_f32("i", &mut [0.; 3]).is_err());
        assert!(file.bytes("none").is_err());
    }
}

/// Ours, candle's, and where a block holds f16 scales.
const TYPES: [(GgmlType, GgmlDType, u32, &[usize]); 11] = [
    (GgmlType::Q4_0, GgmlDType::Q4_0, 2, &[0]),
    (GgmlType::Q4_1, GgmlDType::Q4_1, 3, &[0, 2]),
    (GgmlType::Q5_0, GgmlDType::Q5_0, 6, &[0]),
    (GgmlType::Q5_1, GgmlDType::Q5_1, 7, &[0, 2]),
    (GgmlType::Q8_0, GgmlDType::Q8_0, 8, &[0]),
    (GgmlType::Q2_K, GgmlDType::Q2K, 10, &[80, 82]),
    (GgmlType::Q3_K, GgmlDType::Q3K, 11, &[108]),
    (GgmlType::Q4_K, GgmlDType::Q4K, 12, &[0, 2]),
    (GgmlType::Q5_K, GgmlDType::Q5K, 13, &[0, 2]),
    (GgmlType::Q6_K, GgmlDType::Q6K, 14, &[208]),
    (GgmlType::Q8_K, GgmlDType::Q8K, 15, &[]),
];

/// Random bytes (splitmix64), the scales made finite.
fn random_blocks(kind: GgmlType, scales: &[usize], blocks: usize, mut seed: u64) -> Vec<u8> {
    let mut next = move || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (seed ^ seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb) >> 33
    };
    let mut bytes = vec![];
    for _ in 0..blocks {
        let mut block: Vec<u8> = (0..kind.block().1).map(|_| next() as u8).collect();
        for &at in scales {
            let scale = f16::from_f32((next() % 4001) as f32 / 1000.0 - 2.0);
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        if kind == GgmlType::Q8_K {
            block[..4].copy_from_slice(&((next() % 4001) as f32 / 1000.0 - 2.0).to_le_bytes());
        }
        bytes.extend(block);
    }
    bytes
}

fn candle_values(theirs: GgmlDType, bytes: &[u8], elements: usize) -> Vec<f32> {
    let storage = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, theirs).unwrap();
    let tensor = QTensor::new(storage, elements).unwrap().dequantize(&Device::Cpu).unwrap();
    tensor.to_vec1::<f32>().unwrap()
}

#[test]
fn every_block_type_dequantizes_as_candle_does() {
    for (ours, theirs, id, scales) in TYPES {
        assert_eq!(ours.block(), (theirs.block_size(), theirs.type_size()), "{ours:?}");
        // Past 2^16 elements more than one task converts.
        let (elements_a_block, _) = ours.block();
        let blocks = (3 << 16) / elements_a_block / 2 + 1;
        let bytes = random_blocks(ours, scales, blocks, u64::from(id));
        let elements = blocks * elements_a_block;
        let (_folder, file) = open(&Gguf::new().tensor("x", &[elements as u64], id, bytes.clone()));
        assert_eq!(file.info("x").unwrap().dtype, DType::Ggml(ours));
        let (mine, reference) = (values(&file, "x"), candle_values(theirs, &bytes, elements));
        let scale = reference.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(scale.is_finite() && scale > 1.0, "{ours:?}: the comparison would be empty");
        for (i, (a, b)) in mine.iter().zip(&reference).enumerate() {
            assert!((a - b).abs() <= 1e-6 * scale, "{ours:?}: element {i} is {a}, candle has {b}");
        }
    }
}

#[test]
fn what_candle_writes_is_read() {
    let numbers: Vec<f32> = (0..2 * 256).map(|i| (i as f32 * 0.37).sin()).collect();
    let tensor = Tensor::from_vec(numbers, (2, 256), &Device::Cpu).unwrap();
    let kinds = TYPES.iter().map(|&(_, kind, ..)| kind).chain([GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16]);
    let tensors: Vec<(String, QTensor)> =
        kinds.map(|kind| (format!("{kind:?}"), QTensor::quantize(&tensor, kind).unwrap())).collect();
    let by_name: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let name = gguf_file::Value::String("candle's".into());
    let mut bytes = Cursor::new(vec![]);
    gguf_file::write(&mut bytes, &[("general.name", &name)], &by_name).unwrap();
    let folder = Folder::new();
    let file = GgufFile::open(&folder.write("m.gguf", bytes.into_inner())).unwrap();
    assert_eq!(file.get_str("general.name").unwrap(), "candle's");
    for (name, tensor) in &tensors {
        assert_eq!(file.info(name).unwrap().shape, [2, 256]);
        let reference = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mine = values(&file, name);
        assert!(mine.iter().zip(&reference).all(|(a, b)| (a - b).abs() < 1e-6), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_block_dequantizes_as_candle_does(which in 0..TYPES.len(), blocks in 1usize..5, seed: u64) {
        let (ours, theirs, id, scales) = TYPES[which];
        let bytes = random_blocks(ours, scales, blocks, seed);
        let elements = blocks * ours.block().0;
        let (_folder, file) = open(&Gguf::new().tensor("x", &[elements as u64], id, bytes.clone()));
        let (mine, reference) = (values(&file, "x"), candle_values(theirs, &bytes, elements));
        let scale = reference.iter().fold(1f32, |m, x| m.max(x.abs()));
        prop_assert!(mine.iter().zip(&reference).all(|(a, b)| (a - b).abs() <= 1e-6 * scale));
    }

    #[test]
    fn any_metadata_comes_back(
        keys in proptest::collection::btree_map("[a-z.]{0,12}", any::<(u64, f32, bool, String)>(), 0..8),
    ) {
        let mut gguf = Gguf::new();
        for (key, (number, float, flag, text)) in &keys {
            gguf = gguf
                .meta(&format!("{key}-u"), Meta::U64(*number))
                .meta(&format!("{key}-f"), Meta::F32(*float))
                .meta(&format!("{key}-b"), Meta::Array(7, vec![Meta::Bool(*flag); 3]))
                .meta(&format!("{key}-s"), Meta::text(text));
        }
        let (_folder, file) = open(&gguf);
        prop_assert_eq!(file.metadata().len(), 4 * keys.len());
        for (key, (number, float, flag, text)) in &keys {
            prop_assert_eq!(file.get_u64(&format!("{key}-u")).unwrap(), *number);
            let read = file.get(&format!("{key}-f")).and_then(GgufValue::as_f32).map(f32::to_bits);
            prop_assert_eq!(read, Some(float.to_bits()));
            prop_assert_eq!(file.get_array(&format!("{key}-b")).unwrap(), vec![GgufValue::Bool(*flag); 3]);
            prop_assert_eq!(file.get_str(&format!("{key}-s")).unwrap(), text.as_str());
        }
    }
}

fn with_tokenizer() -> Gguf {
    Gguf::new()
        .meta("tokenizer.ggml.model", Meta::text("gpt2"))
        .meta("tokenizer.ggml.pre", Meta::text("llama-bpe"))
        .meta("tokenizer.ggml.tokens", Meta::texts(["a", "b", "ab"]))
        .meta("tokenizer.ggml.scores", Meta::Array(6, vec![Meta::F32(0.0), Meta::F32(-1.0), Meta::F32(1.0)]))
        .meta("tokenizer.ggml.token_type", Meta::Array(5, vec![Meta::I32(1), Meta::I32(3), Meta::I32(1)]))
        .meta("tokenizer.ggml.merges", Meta::texts(["a b"]))
        .meta("tokenizer.ggml.bos_token_id", Meta::U32(1))
        .meta("tokenizer.ggml.add_bos_token", Meta::Bool(true))
        .meta("tokenizer.ggml.precompiled_charsmap", Meta::Array(0, vec![Meta::U8(7), Meta::U8(8)]))
        .meta("tokenizer.ggml.remove_extra_whitespaces", Meta::Bool(false))
        .meta("tokenizer.chat_template", Meta::text("{{ messages }}"))
}

#[test]
fn the_tokenizer_is_read() {
    let (_folder, file) = open(&with_tokenizer());
    let fields = file.tokenizer_fields().unwrap();
    assert_eq!((fields.model.as_str(), fields.pre.as_deref()), ("gpt2", Some("llama-bpe")));
    assert_eq!(fields.tokens, ["a", "b", "ab"]);
    assert_eq!(fields.scores, Some(vec![0.0, -1.0, 1.0]));
    assert_eq!(fields.token_types, Some(vec![1, 3, 1]));
    assert_eq!(fields.merges, Some(vec!["a b".to_owned()]));
    assert_eq!((fields.bos, fields.eos, fields.add_bos, fields.add_eos), (Some(1), None, Some(true), None));
    assert_eq!((fields.precompiled_charsmap, fields.remove_extra_whitespaces), (Some(vec![7, 8]), Some(false)));
    assert_eq!(fields.chat_template.as_deref(), Some("{{ messages }}"));
}

#[test]
fn a_bad_tokenizer_names_its_key() {
    let cases = [
        ("tokens", Meta::Array(4, vec![Meta::U32(1)]), "no string"),
        ("tokens", Meta::text("a"), "not an array"),
        ("model", Meta::U32(1), "not a string"),
        ("pre", Meta::U32(1), "not a string"),
        ("scores", Meta::Array(6, vec![Meta::F32(0.0)]), "1 entries for 3 tokens"),
        ("scores", Meta::texts(["a", "b", "c"]), "no float"),
        ("token_type", Meta::Array(5, vec![Meta::I32(-1); 3]), "no type"),
        ("merges", Meta::Array(4, vec![Meta::U32(1)]), "no string"),
        ("bos_token_id", Meta::U32(3), "no id of the 3 tokens"),
        ("bos_token_id", Meta::U64(1 << 32), "no id of the 3 tokens"),
        ("bos_token_id", Meta::text("1"), "no id of the 3 tokens"),
        ("add_bos_token", Meta::U32(1), "not a boolean"),
        ("precompiled_charsmap", Meta::Array(4, vec![Meta::U32(256)]), "no byte"),
    ];
    for (name, value, reason) in cases {
        let key = format!("tokenizer.ggml.{name}");
        let (_folder, file) = open(&with_tokenizer().meta(&key, value));
        let message = file.tokenizer_fields().unwrap_err().to_string();
        assert_says(name, &message, &["m.gguf", &format!("`{key}`"), reason]);
    }
    for name in ["model", "tokens"] {
        let key = format!("tokenizer.ggml.{name}");
        let (_folder, file) = open(&with_tokenizer().without(&key));
        assert_says(name, &file.tokenizer_fields().unwrap_err().to_string(), &[&format!("`{key}`"), "is missing"]);
    }
    let (_folder, file) = open(&with_tokenizer().meta("tokenizer.chat_template", Meta::U32(1)));
    assert_says("template", &file.tokenizer_fields().unwrap_err().to_string(), &["`tokenizer.chat_template`"]);
}
