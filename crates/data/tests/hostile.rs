//! Input that means harm: any bytes under any name, and more text than fits into memory.
#![allow(clippy::unwrap_used)] // in the helpers too, not only in the tests

use std::io::Write;
use std::path::PathBuf;

use proptest::prelude::*;
use tallow_data::*;

const NAMES: [&str; 9] = [
    "a.txt",
    "a.txt.gz",
    "a.txt.zst",
    "a.jsonl",
    "a.jsonl.gz",
    "a.jsonl.zst",
    "a.parquet",
    "a.parquet.gz",
    "a.parquet.zst",
];

/// Bytes that get past the first check of each format, and then are anything.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let head = prop::sample::select(vec![
        &b""[..],
        b"PAR1",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
        b"\x28\xb5\x2f\xfd\x04",
        b"{\"text\": \"",
        b"\xef\xbb\xbf",
    ]);
    let tail = prop::sample::select(vec![&b""[..], b"PAR1", b"\x10\x00\x00\x00PAR1", b"\"}\n", b"\n\n"]);
    (head, prop::collection::vec(any::<u8>(), 0..300), tail).prop_map(|(h, m, t)| [h, &m, t].concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_documents_or_reported(bytes in bytes(), name in prop::sample::select(NAMES.to_vec()), cap in 16usize..400) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, &bytes).unwrap();
        for text_split in [TextSplit::WholeFile, TextSplit::BlankLines, TextSplit::Separator("\n\0".to_owned())] {
            let options = ReadOptions {
                on_malformed: OnMalformed::Skip, max_document_bytes: cap, text_split, ..ReadOptions::default()
            };
            let Ok(mut reader) = documents(std::slice::from_ref(&path), options) else {
                prop_assert!(bytes.is_empty());
                continue;
            };
            let mut total = 0;
            for document in &mut reader {
                let document = document.unwrap();
                prop_assert!(!document.text.trim().is_empty() && document.text.len() <= cap);
                total += document.text.len() as u64;
            }
            let report = reader.report();
            prop_assert_eq!(report.bytes, total);
            prop_assert!(report.documents + report.num_malformed + report.blank_documents > 0 || bytes.len() < 40);
        }
    }
}

/// One id a document, so that the time goes into reading.
struct Lengths;

impl Encode for Lengths {
    fn encode_documents(&self, docs: &[&str]) -> Result<Vec<Vec<u32>>> {
        Ok(docs.iter().map(|d| vec![(d.len() % 1000) as u32, 1]).collect())
    }

    fn vocab_size(&self) -> usize {
        1001
    }

    fn eos_id(&self) -> Option<u32> {
        Some(1000)
    }

    fn bos_id(&self) -> Option<u32> {
        None
    }

    fn fingerprint(&self) -> String {
        "lengths".to_owned()
    }
}

/// The test below runs this one as a process of its own; alone it does nothing.
#[test]
fn large_preparation_in_a_child() {
    let Ok(dir) = std::env::var("TALLOW_TEST_LARGE_IN") else { return };
    let dir = PathBuf::from(dir);
    let options = PrepareOptions { valid_fraction: 0.1, max_document_bytes: 4 << 20, ..PrepareOptions::default() };
    let inputs = [dir.join("a.jsonl.gz"), dir.join("b.txt.zst")];
    let report = prepare(&inputs, &Lengths, &dir.join("out"), &options, &mut |_| {}).unwrap();
    assert!(report.read.bytes > 250 << 20, "{}", report.read.bytes);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 128 << 10, "{kib} KiB of memory for {} bytes of text", report.read.bytes);
}

#[cfg(target_os = "linux")]
#[test]
fn memory_does_not_grow_with_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let line = format!("{{\"text\": \"{}\"}}\n", "lorem ipsum ".repeat(5000));
    let file = std::fs::File::create(dir.path().join("a.jsonl.gz")).unwrap();
    let mut gz = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    let mut zst = zstd::Encoder::new(std::fs::File::create(dir.path().join("b.txt.zst")).unwrap(), 1).unwrap();
    for i in 0..2200 {
        gz.write_all(line.replacen("lorem", &i.to_string(), 1).as_bytes()).unwrap();
        zst.write_all(line.as_bytes()).unwrap();
    }
    gz.finish().unwrap();
    zst.finish().unwrap();
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "large_preparation_in_a_child", "--nocapture"])
        .env("TALLOW_TEST_LARGE_IN", dir.path())
        .env("RAYON_NUM_THREADS", "2")
        .status()
        .unwrap();
    assert!(status.success(), "see above");
    assert_eq!(verify(&dir.path().join("out")).unwrap().damaged, []);
}
