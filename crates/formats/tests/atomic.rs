//! Files and folders appear whole or not at all.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests, and their helpers")]

mod support;

use std::path::Path;

use support::{Folder, assert_says};
use tallow_formats::{AtomicDir, atomic_write, sha256_file, write_json};

#[test]
fn a_write_replaces_and_leaves_nothing_else() {
    let folder = Folder::new();
    let path = folder.write("a.json", "old");
    write_json(&path, &serde_json::json!({"x": 1})).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\n  \"x\": 1\n}\n");
    atomic_write(&path, b"").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"");
    assert_eq!(folder.names(), ["a.json"]);
}

#[test]
fn a_failing_write_leaves_the_old_file() {
    let folder = Folder::new();
    // A folder with something in it cannot be replaced by a file: the rename is what fails.
    std::fs::create_dir(folder.path().join("taken")).unwrap();
    folder.write("taken/inside", "old");
    let message = atomic_write(&folder.path().join("taken"), b"new").unwrap_err().to_string();
    assert_says("rename", &message, &["taken"]);
    assert_eq!(std::fs::read(folder.path().join("taken/inside")).unwrap(), b"old");
    assert_eq!(folder.names(), ["taken"], "the temporary file is removed");

    struct Unwritable;
    impl serde::Serialize for Unwritable {
        fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
            Err(serde::ser::Error::custom("no"))
        }
    }
    let path = folder.write("a.json", "old");
    assert!(write_json(&path, &Unwritable).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(folder.names(), ["a.json", "taken"]);
}

#[test]
fn places_that_cannot_be_written_say_so() {
    let folder = Folder::new();
    folder.write("file", "old");
    for bad in ["no-such-folder/a", "file/a", "..", "file/.."] {
        let message = atomic_write(&folder.path().join(bad), b"new").unwrap_err().to_string();
        assert_says(bad, &message, &[bad]);
    }
    assert!(atomic_write(Path::new("/"), b"new").is_err());
    assert!(AtomicDir::create(&folder.path().join("..")).is_err());
    assert!(AtomicDir::create(&folder.path().join("file/inside")).is_err());
    let message = AtomicDir::create(&folder.path().join("file")).unwrap_err().to_string();
    assert_says("a file in its place", &message, &["file", "choose another name"]);
    assert_eq!(folder.names(), ["file"]);
}

#[test]
fn writers_at_once_do_not_mix() {
    let folder = Folder::new();
    let path = folder.path().join("a");
    let contents: Vec<Vec<u8>> = (0..8u8).map(|i| vec![i; 100_000 + usize::from(i)]).collect();
    std::thread::scope(|scope| {
        for bytes in &contents {
            let path = &path;
            scope.spawn(move || (0..10).for_each(|_| atomic_write(path, bytes).unwrap()));
        }
    });
    assert!(contents.contains(&std::fs::read(&path).unwrap()), "one of them, whole");
    assert_eq!(folder.names(), ["a"]);
}

#[test]
fn a_folder_appears_when_it_is_whole() {
    let folder = Folder::new();
    let target = folder.path().join("deep/er/model");
    let dir = AtomicDir::create(&target).unwrap();
    std::fs::write(dir.path().join("a"), "1").unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    std::fs::write(dir.path().join("sub/b"), "2").unwrap();
    assert!(!target.exists());
    dir.commit_replacing().unwrap();
    assert_eq!(std::fs::read(target.join("sub/b")).unwrap(), b"2");

    let dir = AtomicDir::create(&target).unwrap();
    std::fs::write(dir.path().join("c"), "3").unwrap();
    assert!(target.join("a").exists(), "the old one stays until the new one is whole");
    dir.commit_replacing().unwrap();
    assert!(!target.join("a").exists() && target.join("c").exists());
    assert_eq!(std::fs::read_dir(target.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn a_folder_that_is_given_up_leaves_nothing() {
    let folder = Folder::new();
    let target = folder.path().join("model");
    std::fs::create_dir(&target).unwrap();
    folder.write("model/a", "old");
    drop(AtomicDir::create(&target).unwrap());
    let unwound = std::panic::catch_unwind(|| {
        let dir = AtomicDir::create(&target).unwrap();
        std::fs::write(dir.path().join("a"), "half").unwrap();
        panic!("while writing");
    });
    assert!(unwound.is_err());
    assert_eq!(folder.names(), ["model"]);
    assert_eq!(std::fs::read(target.join("a")).unwrap(), b"old");
}

#[test]
fn a_commit_that_fails_leaves_the_old_folder() {
    let folder = Folder::new();
    let target = folder.path().join("model");
    std::fs::create_dir(&target).unwrap();
    folder.write("model/a", "old");
    let dir = AtomicDir::create(&target).unwrap();
    // Someone removes what was written: the last rename fails.
    std::fs::remove_dir_all(dir.path()).unwrap();
    assert!(dir.commit_replacing().is_err());
    assert_eq!(folder.names(), ["model"]);
    assert_eq!(std::fs::read(target.join("a")).unwrap(), b"old");

    // A file took the place meanwhile: it is not ours to remove.
    let target = folder.path().join("other");
    let dir = AtomicDir::create(&target).unwrap();
    folder.write("other", "a file");
    assert!(dir.commit_replacing().is_err());
    assert_eq!(folder.names(), ["model", "other"]);
    assert_eq!(std::fs::read(&target).unwrap(), b"a file");
}

#[cfg(unix)]
#[test]
fn names_that_are_no_text_are_written() {
    use std::os::unix::ffi::OsStrExt;
    let folder = Folder::new();
    let path = folder.path().join(std::ffi::OsStr::from_bytes(b"weird-\xff"));
    atomic_write(&path, b"x").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"x");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn hashes_are_those_of_sha256() {
    let folder = Folder::new();
    let abc = folder.write("abc", "abc");
    assert_eq!(sha256_file(&abc).unwrap(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    let long = folder.write("long", vec![b'a'; 1_000_000]);
    assert_eq!(sha256_file(&long).unwrap(), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    assert!(sha256_file(&folder.path().join("none")).is_err());
}
