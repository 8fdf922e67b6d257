//! Every kind of file, and every way in which one can be wrong.
#![allow(clippy::unwrap_used)] // in the helpers too, not only in the tests

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use tallow_data::*;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

/// With the checksum that the `zstd` program adds (without one no reader can see a flipped bit).
fn zst(bytes: &[u8]) -> Vec<u8> {
    let mut out = zstd::stream::write::Encoder::new(vec![], 3).unwrap();
    out.include_checksum(true).unwrap();
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn read(inputs: &[PathBuf], options: ReadOptions) -> Result<(Vec<Document>, ReadReport)> {
    let mut reader = documents(inputs, options)?;
    let mut found = vec![];
    for document in &mut reader {
        found.push(document?);
    }
    Ok((found, reader.into_report()))
}

fn texts(inputs: &[PathBuf], options: ReadOptions) -> Vec<String> {
    read(inputs, options).unwrap().0.into_iter().map(|d| d.text).collect()
}

fn skip() -> ReadOptions {
    ReadOptions { on_malformed: OnMalformed::Skip, ..ReadOptions::default() }
}

fn split(text_split: TextSplit) -> ReadOptions {
    ReadOptions { text_split, ..ReadOptions::default() }
}

/// A table of one optional string column; `None` is null.
fn parquet_file(path: &Path, column: &str, rows: &[Option<&[u8]>]) {
    let schema = parse_message_type(&format!("message m {{ optional binary {column} (UTF8); required int32 n; }}"));
    let properties = Arc::new(WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build());
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema.unwrap()), properties).unwrap();
    for group in rows.chunks(300) {
        let mut out = writer.next_row_group().unwrap();
        let levels: Vec<i16> = group.iter().map(|r| i16::from(r.is_some())).collect();
        let values: Vec<ByteArray> = group.iter().flatten().map(|r| ByteArray::from(r.to_vec())).collect();
        let mut text = out.next_column().unwrap().unwrap();
        text.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        text.close().unwrap();
        let mut numbers = out.next_column().unwrap().unwrap();
        let zeros = vec![0; group.len()];
        numbers.typed::<parquet::data_type::Int32Type>().write_batch(&zeros, None, None).unwrap();
        numbers.close().unwrap();
        out.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn plain_text_whole_split_and_separated() {
    let f = Folder::new();
    let text = "\u{feff}one\r\ntwo\r\n\r\n \t\r\n\r\nthree\n\n\nfour<END>five<END>\n";
    let path = f.file("a.txt", text);
    let whole = texts(std::slice::from_ref(&path), ReadOptions::default());
    assert_eq!(whole, [text.trim_start_matches('\u{feff}').replace("\r\n", "\n")]);
    let kept = ReadOptions { normalize_newlines: false, ..ReadOptions::default() };
    assert!(texts(std::slice::from_ref(&path), kept)[0].starts_with("one\r\ntwo"));

    let (docs, report) = read(std::slice::from_ref(&path), split(TextSplit::BlankLines)).unwrap();
    let found: Vec<_> = docs.iter().map(|d| (d.text.as_str(), d.line)).collect();
    assert_eq!(found, [("one\ntwo\n", 1), ("three\n", 6), ("four<END>five<END>\n", 9)]);
    assert_eq!(report.blank_documents, 0);

    let found = texts(&[path], split(TextSplit::Separator("<END>".to_owned())));
    assert_eq!(found.len(), 2);
    assert_eq!(found[1], "five");
}

#[test]
fn borders_on_every_place_of_a_read_are_found() {
    // Reads are of 256 KiB: borders are moved over that place byte by byte.
    let f = Folder::new();
    for shift in 0..12 {
        let first = "x".repeat((1 << 18) - 6 + shift);
        let path = f.file("a.txt", format!("{first}\n \t\r\ny\n"));
        assert_eq!(texts(&[path], split(TextSplit::BlankLines)), [first.clone() + "\n", "y\n".to_owned()]);
        let path = f.file("b.txt", format!("{first}<|end|>y"));
        let found = texts(&[path], split(TextSplit::Separator("<|end|>".to_owned())));
        assert_eq!(found, [first, "y".to_owned()]);
    }
}

#[test]
fn a_text_beyond_the_limit_is_cut_at_lines_and_reported() {
    let f = Folder::new();
    let text: String = (0..100).map(|i| format!("line {i}\n")).collect();
    let path = f.file("long.txt", &text);
    let options = ReadOptions { max_document_bytes: 100, ..ReadOptions::default() };
    let (docs, report) = read(&[path], options.clone()).unwrap();
    assert!(docs.len() > 7 && docs.iter().all(|d| d.text.len() <= 100 && d.text.ends_with('\n')));
    assert_eq!(docs.iter().map(|d| d.text.as_str()).collect::<String>(), text);
    assert_eq!(report.cut_documents as usize, docs.len() - 1);
    assert_eq!(docs[1].line, docs[0].text.lines().count() as u64 + 1);
    // One line of two-byte characters, with an odd limit: never in the middle of one.
    let path = f.file("wide.txt", "é".repeat(500));
    let options = ReadOptions { max_document_bytes: 101, ..options };
    assert_eq!(texts(&[path], options).concat(), "é".repeat(500));
}

#[test]
fn json_lines_with_every_defect() {
    let f = Folder::new();
    let long = format!("{{\"text\": \"{}\"}}", "x".repeat(5000));
    let cases: [(&str, &str); 13] = [
        ("{\"text\": \"good\"}\r", ""),
        ("", ""),
        ("{\"text\": 5}", "invalid type: integer `5`"),
        ("{\"other\": \"x\"}", "no field `text`"),
        ("{\"text\": \"cut", "EOF"),
        ("[\"text\"]", "is a list, not a record"),
        ("who went", "is no JSON object (it begins with \"who went\"): each line holds one, e.g. {\"text\""),
        ("{\"text\": \"a\"} trailing", "trailing characters"),
        (&long, "longer than 4000 bytes"),
        ("{\"text\": \"\\ud800\"}", "hex escape"),
        ("{\"text\": null}", "invalid type: null"),
        ("{\"text\": \"a\", \"text\": \"b\"}", "appears twice"),
        ("{\"meta\": {\"text\": 1}, \"t\\u0065xt\": \"also good\"}", ""),
    ];
    let lines: Vec<_> = cases.iter().map(|c| c.0).collect();
    let path = f.file("a.jsonl", format!("\u{feff}{}", lines.join("\n")));
    let limited = ReadOptions { max_document_bytes: 4000, ..skip() };
    let (docs, report) = read(std::slice::from_ref(&path), limited).unwrap();
    assert_eq!(docs.iter().map(|d| (d.text.as_str(), d.line)).collect::<Vec<_>>(), [("good", 1), ("also good", 13)]);
    let expected: Vec<_> = cases.iter().enumerate().filter(|(_, c)| !c.1.is_empty()).collect();
    assert_eq!((report.num_malformed as usize, report.malformed.len()), (expected.len(), expected.len()));
    for (malformed, (i, (_, reason))) in report.malformed.iter().zip(expected) {
        assert_eq!(malformed.line as usize, i + 1, "{malformed}");
        assert!(malformed.reason.contains(reason), "{malformed}");
    }
    assert_eq!(report.files[0].malformed, report.num_malformed);

    let deep = f.file("deep.jsonl", format!("{{\"x\": {}", "[".repeat(100_000)));
    assert_eq!(read(&[deep], skip()).unwrap().1.num_malformed, 1);
    let not_utf8 = f.file("bytes.jsonl", b"{\"text\": \"\xff\"}\n{\"text\": \"ok\"}\n");
    let (docs, report) = read(&[not_utf8], skip()).unwrap();
    assert_eq!((docs.len(), report.num_malformed, report.malformed[0].line), (1, 1, 1));
}

#[test]
fn the_policy_decides_what_malformed_records_do() {
    let f = Folder::new();
    let mut lines: Vec<_> = (0..299).map(|i| format!("{{\"text\": \"{i}\"}}")).collect();
    lines.insert(150, "nonsense".to_owned());
    let path = f.file("a.jsonl", lines.join("\n"));
    let (docs, report) = read(std::slice::from_ref(&path), ReadOptions::default()).unwrap();
    assert_eq!((docs.len(), report.num_malformed), (299, 1));
    let strict = ReadOptions { on_malformed: OnMalformed::Error, ..ReadOptions::default() };
    let error = read(std::slice::from_ref(&path), strict).unwrap_err();
    assert!(matches!(&error, Error::Malformed { line: 151, .. }), "{error}");
    let tighter = ReadOptions { max_malformed_fraction: 0.001, ..ReadOptions::default() };
    let error = read(&[path], tighter).unwrap_err().to_string();
    assert!(error.contains("1 of 300 records are malformed") && error.contains("line 151"), "{error}");
}

#[test]
fn another_field_name() {
    let f = Folder::new();
    let path = f.file("a.ndjson", "{\"text\": 1, \"content\": \"c\"}\n");
    assert_eq!(texts(&[path], ReadOptions { field: "content".to_owned(), ..ReadOptions::default() }), ["c"]);
}

#[test]
fn compressed_streams_and_their_damage() {
    let f = Folder::new();
    let members = [gz(b"{\"text\": \"one\"}\n{\"te"), gz(b"xt\": \"two\"}\n")].concat();
    let frames = [zstd::encode_all(&b"first "[..], 3).unwrap(), zstd::encode_all(&b"second"[..], 3).unwrap()].concat();
    let gz_path = f.file("a.jsonl.gz", &members);
    let zst_path = f.file("b.txt.zst", &frames);
    assert_eq!(texts(&[gz_path, zst_path], ReadOptions::default()), ["one", "two", "first second"]);

    let lines: String = (0..20_000).map(|i| format!("{{\"text\": \"line {} of it\"}}\n", i * 7919 % 20_011)).collect();
    let broken = [("t.jsonl.gz", gz(lines.as_bytes())), ("t.jsonl.zst", zst(lines.as_bytes()))];
    for (name, whole) in broken {
        let cut = f.file(name, &whole[..whole.len() * 2 / 3]);
        let error = read(std::slice::from_ref(&cut), ReadOptions::default()).unwrap_err();
        assert!(matches!(&error, Error::DamagedFile { line, .. } if *line > 1000), "{error}");
        let (docs, report) = read(std::slice::from_ref(&cut), skip()).unwrap();
        assert!(docs.len() > 1000 && docs.len() < 20_000);
        assert_eq!((report.damaged_files, report.num_malformed), (1, 1));
        assert_eq!(report.malformed[0].line, docs.len() as u64 + 1);
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 0x10;
        let flipped = f.file(name, flipped);
        assert!(read(&[flipped], ReadOptions::default()).is_err(), "a flipped bit in {name} goes unseen");
        let nonsense = f.file(name, b"this is not compressed at all");
        let error = read(&[nonsense], ReadOptions::default()).unwrap_err();
        assert!(matches!(&error, Error::DamagedFile { .. }), "{error}");
    }
}

#[test]
fn parquet_round_trip_nulls_and_damage() {
    let f = Folder::new();
    let rows: Vec<_> = (0..1000).map(|i| format!("row {i}")).collect();
    let mut cells: Vec<Option<&[u8]>> = rows.iter().map(|r| Some(r.as_bytes())).collect();
    let path = f.path().join("a.parquet");
    parquet_file(&path, "text", &cells);
    assert_eq!(texts(std::slice::from_ref(&path), ReadOptions::default()), rows);

    let zipped = f.file("b.parquet.gz", gz(&std::fs::read(&path).unwrap()));
    assert_eq!(texts(&[zipped], ReadOptions::default()).len(), 1000);

    cells[7] = None;
    cells[500] = Some(b"\xff\xfe");
    cells[600] = Some(b"  ");
    parquet_file(&path, "text", &cells);
    let (docs, report) = read(std::slice::from_ref(&path), ReadOptions::default()).unwrap();
    assert_eq!((docs.len(), report.num_malformed, report.blank_documents), (997, 2, 1));
    let places: Vec<_> = report.malformed.iter().map(|m| (m.line, m.reason.as_str())).collect();
    assert_eq!(places[0], (8, "`text` is null"));
    assert!(places[1].0 == 501 && places[1].1.contains("not UTF-8"), "{places:?}");
    assert_eq!((docs[7].line, docs[7].text.as_str()), (9, "row 8"));

    let error = read(std::slice::from_ref(&path), ReadOptions { field: "body".to_owned(), ..ReadOptions::default() })
        .unwrap_err();
    assert!(error.to_string().contains("no such column; there are: text, n"), "{error}");
    let error =
        read(std::slice::from_ref(&path), ReadOptions { field: "n".to_owned(), ..ReadOptions::default() }).unwrap_err();
    assert!(error.to_string().contains("INT32"), "{error}");

    let whole = std::fs::read(&path).unwrap();
    let cut = f.file("cut.parquet", &whole[..whole.len() - 50]);
    assert!(matches!(read(&[cut], ReadOptions::default()).unwrap_err(), Error::DamagedFile { line: 0, .. }));
    for at in (4..whole.len()).step_by(97) {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x55;
        let path = f.file("flipped.parquet", flipped);
        // Whatever it makes of it: no panic, and never more rows than there were.
        if let Ok((docs, _)) = read(&[path], skip()) {
            assert!(docs.len() <= 1000);
        }
    }
}

#[test]
fn folders_are_read_in_order_and_what_is_left_out_is_listed() {
    let f = Folder::new();
    f.file("b/2.txt", "b2");
    f.file("b/1.md", "b1");
    f.file("a.text", "a");
    f.file("c.TXT", "c");
    f.file(".hidden.txt", "no");
    f.file(".git/x.txt", "no");
    f.file("picture.png", "no");
    f.file("no_extension", "no");
    f.file("empty.txt", "");
    let (docs, report) = read(&[f.path(), f.path().join("a.text")], ReadOptions::default()).unwrap();
    assert_eq!(docs.iter().map(|d| d.text.as_str()).collect::<Vec<_>>(), ["a", "b1", "b2", "c"]);
    let mut skipped: Vec<_> = report.skipped_files.iter().map(|s| s.reason).collect();
    skipped.sort_unstable();
    let twice = "reached before (a link back, or given twice)";
    assert_eq!(skipped, ["empty", "hidden", "hidden", twice, "unknown extension", "unknown extension"]);
    assert_eq!(report.num_skipped_files, 6);
    assert!(report.problems().contains("picture.png: unknown extension"));
}

#[cfg(unix)]
#[test]
fn a_folder_that_links_to_itself_ends() {
    let f = Folder::new();
    f.file("sub/a.txt", "a");
    std::os::unix::fs::symlink(f.path(), f.path().join("sub/loop")).unwrap();
    std::os::unix::fs::symlink(f.path().join("nowhere"), f.path().join("broken.txt")).unwrap();
    let (docs, report) = read(&[f.path()], ReadOptions::default()).unwrap();
    assert_eq!((docs.len(), report.num_skipped_files), (1, 2));
}

#[test]
fn inputs_that_cannot_be_are_refused_at_once() {
    let f = Folder::new();
    let refused = |path: PathBuf| documents(&[path], ReadOptions::default()).err().unwrap().to_string();
    assert!(refused(f.path().join("missing.txt")).contains("no such file or folder"));
    assert!(refused(f.file("a.pdf", "x")).contains("not a kind of file"));
    let told = refused(f.path());
    assert!(told.contains("no readable file") && told.contains("a.pdf: unknown extension"), "{told}");
    assert!(documents(&[], ReadOptions::default()).is_err());
    let bad = ReadOptions { max_malformed_fraction: 1.5, ..ReadOptions::default() };
    assert!(documents(&[f.file("a.txt", "x")], bad).is_err());
}

#[test]
fn text_that_is_not_utf8_is_reported_by_line() {
    let f = Folder::new();
    let latin = f.file("latin.txt", b"fine\nfine\ncaf\xe9\n");
    let utf16 = f.file("utf16.txt", b"\xff\xfeh\0i\0");
    let good = f.file("good.txt", "good");
    let (docs, report) = read(&[latin, utf16, good], skip()).unwrap();
    assert_eq!(docs.len(), 1);
    assert!(report.malformed[0].line == 3 && report.malformed[0].reason.contains("0xe9"), "{report:?}");
    assert!(report.malformed[1].reason.contains("UTF-16"));
}
