//! Safetensors: what is written is read, by this crate and by the reference implementation, and the other way round.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests, and their helpers")]

mod support;

use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use support::{Folder, assert_says, safetensors as raw, values};
use tallow_formats::hf::ModelDir;
use tallow_formats::safetensors::{
    INDEX, SafetensorsFile, ShardedSafetensors, TensorData, WEIGHTS, write_safetensors, write_sharded, write_sharded_by,
};
use tallow_formats::{DType, TensorSource};

fn tensor(name: &str, shape: &[usize], values: Vec<f32>) -> TensorData<'static> {
    TensorData::from_fn(name.into(), shape.to_vec(), move || Ok::<_, String>(values.clone()))
}

#[test]
fn what_is_written_is_read_here_and_by_the_reference() {
    let folder = Folder::new();
    let path = folder.path().join("x.safetensors");
    let tensors = vec![
        tensor("b", &[2, 3], vec![1., -2., f32::MIN_POSITIVE, f32::MAX, 5e-45, -0.]),
        tensor("empty", &[0, 7], vec![]),
        tensor("a \"quoted\" ünï\u{1}", &[], vec![4.]),
    ];
    write_safetensors(&path, tensors, &[("format", "pt"), ("note", "ü")]).unwrap();

    let ours = SafetensorsFile::open(&path).unwrap();
    assert_eq!(ours.metadata().get("format").map(String::as_str), Some("pt"));
    assert_eq!(ours.names(), ["b", "empty", "a \"quoted\" ünï\u{1}"]);
    let bytes = std::fs::read(&path).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), 3);
    for (name, view) in theirs.tensors() {
        assert_eq!(ours.info(&name).unwrap().shape, view.shape());
        assert_eq!(ours.bytes(&name).unwrap(), view.data());
    }
    assert_eq!(values(&ours, "b")[3], f32::MAX);
    assert_eq!(folder.names(), ["x.safetensors"], "no temporary file is left");
    let data_start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(data_start % 8, 0, "the data is aligned");
}

#[test]
fn every_dtype_of_the_reference_is_read_or_named() {
    let folder = Folder::new();
    let path = folder.path().join("x.safetensors");
    let numbers = [1.0f32, -2.5, 0.0, 96.0];
    let f64s: Vec<u8> = numbers.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect();
    let f32s: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let f16s: Vec<u8> = numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    let bf16s: Vec<u8> = numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    let floats = [
        (Dtype::F64, DType::F64, f64s),
        (Dtype::F32, DType::F32, f32s),
        (Dtype::F16, DType::F16, f16s),
        (Dtype::BF16, DType::BF16, bf16s),
    ];
    for (theirs, ours, bytes) in floats {
        let view = TensorView::new(theirs, vec![2, 2], &bytes).unwrap();
        serialize_to_file([("x", view)], None, &path).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!((file.info("x").unwrap().dtype, file.bytes("x").unwrap()), (ours, bytes.as_slice()));
        assert_eq!(values(&file, "x"), numbers, "{ours}");
    }
    let integers = [
        (Dtype::I64, DType::I64),
        (Dtype::I32, DType::I32),
        (Dtype::I16, DType::I16),
        (Dtype::I8, DType::I8),
        (Dtype::U32, DType::U32),
        (Dtype::U8, DType::U8),
        (Dtype::BOOL, DType::Bool),
    ];
    for (theirs, ours) in integers {
        let bytes = vec![1u8; theirs.bitsize() / 8 * 3];
        serialize_to_file([("x", TensorView::new(theirs, vec![3], &bytes).unwrap())], None, &path).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!((file.info("x").unwrap().dtype, file.bytes("x").unwrap().len()), (ours, bytes.len()));
        let message = file.read_f32("x", &mut [0.; 3]).unwrap_err().to_string();
        assert_says("integers", &message, &["x.safetensors", "`x`", &ours.to_string(), "cannot be read as weights"]);
    }
    serialize_to_file([("x", TensorView::new(Dtype::F8_E4M3, vec![3], &[0; 3]).unwrap())], None, &path).unwrap();
    let message = SafetensorsFile::open(&path).unwrap_err().to_string();
    assert_says("f8", &message, &["x.safetensors", "`x`", "`F8_E4M3` is not supported", "BF16"]);
}

#[test]
fn reading_asks_for_the_right_name_and_length() {
    let folder = Folder::new();
    let path = folder.path().join("x.safetensors");
    write_safetensors(&path, vec![tensor("a", &[3], vec![1., 2., 3.])], &[]).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    let message = file.read_f32("a", &mut [0.; 2]).unwrap_err().to_string();
    assert_says("length", &message, &["x.safetensors", "`a`", "3 elements but 2"]);
    let message = file.read_f32("b", &mut [0.; 2]).unwrap_err().to_string();
    assert_says("name", &message, &["x.safetensors", "`b`", "no such tensor"]);
    assert!(file.bytes("b").is_err());
}

#[test]
fn past_the_limit_there_are_shards_and_an_index() {
    let tensors = || {
        vec![
            tensor("b", &[3], vec![1., 2., 3.]),
            tensor("large", &[3, 3], (0..9).map(|x| x as f32).collect()),
            tensor("a", &[2], vec![4., 5.]),
            tensor("c", &[1], vec![6.]),
        ]
    };
    // 12, 36, 8 and 4 bytes: one alone is past the limit, the last two fit together exactly.
    let (one, many) = (Folder::new(), Folder::new());
    write_sharded(one.path(), tensors(), &[("format", "pt")]).unwrap();
    write_sharded_by(many.path(), tensors(), &[("format", "pt")], 12).unwrap();
    assert_eq!(one.names(), [WEIGHTS]);
    let names: Vec<String> = (1..=3).map(|i| format!("model-0000{i}-of-00003.safetensors")).collect();
    assert_eq!(many.names(), [names[0].as_str(), &names[1], &names[2], INDEX]);
    let index: serde_json::Value = serde_json::from_slice(&std::fs::read(many.path().join(INDEX)).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 60);
    assert_eq!(index["weight_map"]["large"], names[1].as_str());
    assert_eq!(index["weight_map"]["c"], names[2].as_str());

    let sources = [one, many].map(|folder| {
        folder.write("config.json", "{}");
        let source = ModelDir::open(folder.path()).unwrap().open_weights().unwrap();
        (folder, source)
    });
    for (_, source) in &sources {
        for name in ["a", "b", "c", "large"] {
            assert_eq!(values(source.as_ref(), name), values(sources[0].1.as_ref(), name));
        }
    }
    assert_eq!(sources[1].1.names(), ["a", "b", "c", "large"]);
    assert!(sources[1].1.path_of("large").ends_with(&names[1]));
    assert!(sources[1].1.path_of("none").ends_with(INDEX));
    assert!(sources[1].1.bytes("none").is_err());
}

#[test]
fn exactly_at_the_limit_there_is_one_file() {
    let folder = Folder::new();
    write_sharded_by(folder.path(), vec![tensor("a", &[2], vec![1., 2.])], &[], 8).unwrap();
    assert_eq!(folder.names(), [WEIGHTS]);
    write_sharded_by(folder.path(), vec![], &[], 8).unwrap();
    assert!(SafetensorsFile::open(&folder.path().join(WEIGHTS)).unwrap().names().is_empty());
}

#[test]
fn the_single_file_counts_where_both_are() {
    let folder = Folder::new();
    folder.write("config.json", "{}");
    folder.write(INDEX, "not even JSON");
    write_sharded(folder.path(), vec![tensor("a", &[1], vec![1.])], &[]).unwrap();
    assert_eq!(ModelDir::open(folder.path()).unwrap().open_weights().unwrap().names(), ["a"]);
}

#[test]
fn tensors_that_the_index_forgets_are_there() {
    let folder = Folder::new();
    let data = [0u8; 8];
    let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    folder.write("m.safetensors", raw(header, &data));
    let index = folder.write(INDEX, r#"{"weight_map": {"a": "m.safetensors"}}"#);
    assert_eq!(ShardedSafetensors::open(&index).unwrap().names(), ["a", "b"]);
}

#[test]
fn bad_tensors_are_not_written() {
    let folder = Folder::new();
    let path = folder.write("x.safetensors", "as it was");
    let failing = TensorData::from_fn("a".into(), vec![1], || Err("the disk caught fire"));
    let cases = [
        ("twice", vec![tensor("a", &[1], vec![1.]), tensor("a", &[1], vec![1.])], "is there twice"),
        ("reserved", vec![tensor("__metadata__", &[1], vec![1.])], "keeps this name"),
        ("length", vec![tensor("a", &[2], vec![1.])], "1 values for shape [2]"),
        ("huge", vec![tensor("a", &[usize::MAX, 2], vec![1.])], "more than a computer can hold"),
        ("values", vec![tensor("b", &[1], vec![1.]), failing], "the disk caught fire"),
    ];
    for (case, tensors, reason) in cases {
        let message = write_safetensors(&path, tensors, &[]).unwrap_err().to_string();
        assert_says(case, &message, &["tensor `", reason]);
        assert_eq!(std::fs::read(&path).unwrap(), b"as it was", "{case}");
        assert_eq!(folder.names(), ["x.safetensors"], "{case}");
    }
    let twice = vec![tensor("a", &[1], vec![1.]), tensor("a", &[1], vec![1.])];
    assert!(write_sharded_by(folder.path(), twice, &[], 4).is_err(), "in two shards as well");
}

proptest! {
    #[test]
    fn any_tensors_come_back(
        shapes in proptest::collection::vec(proptest::collection::vec(0usize..4, 0..4), 0..6),
        limit in 0usize..200,
        seed: u32,
    ) {
        let folder = Folder::new();
        let numbers = |i: usize, shape: &[usize]| -> Vec<f32> {
            (0..shape.iter().product()).map(|j: usize| f32::from_bits(seed.rotate_left(i as u32) ^ j as u32)).collect()
        };
        let tensors = shapes.iter().enumerate().map(|(i, s)| tensor(&format!("t{i}"), s, numbers(i, s))).collect();
        write_sharded_by(folder.path(), tensors, &[], limit).unwrap();
        folder.write("config.json", "{}");
        let source = ModelDir::open(folder.path()).unwrap().open_weights().unwrap();
        prop_assert_eq!(source.names().len(), shapes.len());
        for (i, shape) in shapes.iter().enumerate() {
            let name = format!("t{i}");
            prop_assert_eq!(&source.info(&name).unwrap().shape, shape);
            let bytes: Vec<u8> = numbers(i, shape).iter().flat_map(|x| x.to_le_bytes()).collect();
            prop_assert_eq!(source.bytes(&name).unwrap(), bytes.as_slice());
        }
    }
}
