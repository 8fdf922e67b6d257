//! Hub ids: what a build without the feature says, and with it the cache, the hub's refusals and a download, against a
//! cache made by hand and a hub on this machine.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests, and their helpers")]

use tallow::formats::is_hub_id;

#[test]
fn shapes_of_ids() {
    for id in ["org/name", "a/b", "HuggingFaceTB/SmolLM2-135M", "01-ai/Yi_1.5"] {
        assert!(is_hub_id(id), "{id}");
    }
    let long = format!("a/{}", "b".repeat(95));
    for id in
        ["", "a", "a/b/c", "../x", "x/..", "a/", "/b", "./b", "a/b.gguf", "a b/c", "a/b--c", "~/b", "a\\b/c", &long]
    {
        assert!(!is_hub_id(id), "{id}");
    }
}

#[cfg(not(feature = "hub"))]
#[test]
fn a_build_without_the_feature_says_so() {
    for found in [tallow::open::locate("org/no-such"), tallow::open::locate_tokenizer("org/no-such")] {
        let message = found.unwrap_err().to_string();
        for part in ["`org/no-such`", "--features hub", "a local folder", "works"] {
            assert!(message.contains(part), "{message:?} does not say {part:?}");
        }
    }
    let message = tallow::open::locate("a/b/c").unwrap_err().to_string();
    assert!(message.contains("a/b/c") && !message.contains("hub id"), "{message}");
}

#[cfg(feature = "hub")]
mod with_the_feature {
    use std::fs;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::path::{Path, PathBuf};

    use tallow::formats::ModelLocation;
    use tallow::hub::{Error, HubConfig, Want, find, locate};
    use tallow::open::{Dtype, open};

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
    const INDEX: &str = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/hf/llama-gqa")
    }

    /// A closed port, so that a test that should not touch the network fails at once where it does.
    fn config(cache: &Path, offline: bool) -> HubConfig {
        HubConfig { cache: cache.into(), offline, endpoint: "http://127.0.0.1:1".into(), token: None }
    }

    /// A cached `org/tiny` with these files of the fixture.
    fn cache(names: &[&str]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("models--org--tiny");
        let snapshot = repo.join("snapshots").join(COMMIT);
        fs::create_dir_all(repo.join("refs")).unwrap();
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(repo.join("refs/main"), COMMIT).unwrap();
        for name in names {
            fs::copy(fixture().join(name), snapshot.join(name)).unwrap();
        }
        (dir, snapshot)
    }

    fn says(found: Result<PathBuf, Error>, parts: &[&str]) {
        let message = found.unwrap_err().to_string();
        for part in parts {
            assert!(message.contains(part), "{message:?} does not say {part:?}");
        }
    }

    #[test]
    fn a_cached_model_is_found_and_opened() {
        let (dir, snapshot) = cache(&["config.json", "model.safetensors"]);
        let found = locate("org/tiny", || Ok(config(dir.path(), true)), Want::Model).unwrap();
        assert_eq!(found, ModelLocation::HfDir(snapshot.clone()));
        let model = open(&snapshot.display().to_string(), Dtype::F32).unwrap();
        assert!(model.decoder().shape().vocab_size > 0);
        // What exists here is never looked for at the hub.
        let here = locate(&snapshot.display().to_string(), || panic!("asked for the hub"), Want::Model);
        assert_eq!(here.unwrap(), ModelLocation::HfDir(snapshot));
    }

    #[test]
    fn what_is_missing_offline_is_named() {
        let (dir, snapshot) = cache(&["config.json"]);
        let offline = config(dir.path(), true);
        let way_out = ["`org/tiny`", "HF_HUB_OFFLINE", "local folder"];
        let lacks = |file: &str| {
            says(find("org/tiny", &offline, Want::Model), &way_out);
            says(find("org/tiny", &offline, Want::Model), &[file, dir.path().to_str().unwrap()]);
        };
        lacks("model.safetensors or model.safetensors.index.json");
        fs::write(snapshot.join("model.safetensors.index.json"), INDEX).unwrap();
        fs::write(snapshot.join("model-1.safetensors"), "").unwrap();
        lacks("model-2.safetensors is not in the cache");
        fs::write(snapshot.join("model-2.safetensors"), "").unwrap();
        assert_eq!(find("org/tiny", &offline, Want::Model).unwrap(), snapshot);
        fs::remove_file(snapshot.join("config.json")).unwrap();
        lacks("config.json");
        says(find("org/tiny", &offline, Want::Tokenizer), &["tokenizer.json or tokenizer.model"]);
        says(find("org/other", &offline, Want::Model), &["`org/other`", "the model is not in the cache"]);
    }

    #[test]
    fn an_index_or_reference_that_leads_elsewhere_is_not_followed() {
        let (dir, snapshot) = cache(&["config.json"]);
        let offline = config(dir.path(), true);
        for file in ["\"../x\"", "\"/etc/hosts\"", "\"a/b\"", "\"..\"", "\"\"", "7"] {
            let index = format!("{{\"weight_map\": {{\"a\": {file}}}}}");
            fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
            says(find("org/tiny", &offline, Want::Model), &["not a plain file name", "index.json"]);
        }
        fs::write(snapshot.join("model.safetensors.index.json"), "[").unwrap();
        says(find("org/tiny", &offline, Want::Model), &["is not JSON"]);
        for commit in ["..", "", "../../x", "/"] {
            fs::write(dir.path().join("models--org--tiny/refs/main"), commit).unwrap();
            says(find("org/tiny", &offline, Want::Model), &["the model is not in the cache"]);
        }
    }

    #[test]
    fn other_shapes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for id in ["a/b/c", "../x", "a/", "/b", "a", ""] {
            says(find(id, &config(dir.path(), true), Want::Model), &["is no hub id", "org/name"]);
            let message = locate(id, || panic!("asked for the hub"), Want::Model).unwrap_err().to_string();
            assert!(message.starts_with("no model"), "{message}");
        }
    }

    #[test]
    fn without_a_network_the_cache_is_taken_if_it_is_complete() {
        let (dir, snapshot) = cache(&["config.json", "model.safetensors"]);
        assert_eq!(find("org/tiny", &config(dir.path(), false), Want::Model).unwrap(), snapshot);
        fs::remove_file(snapshot.join("model.safetensors")).unwrap();
        let found = find("org/tiny", &config(dir.path(), false), Want::Model);
        says(found, &["`org/tiny`", "could not be fetched", "local folder"]);
    }

    #[test]
    fn the_environment() {
        let vars = |vars: &[(&str, &str)]| {
            let vars: Vec<(String, String)> = vars.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
            HubConfig::from_vars(|name| vars.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
        };
        let cache = |pairs: &[(&str, &str)]| vars(pairs).unwrap().cache;
        assert_eq!(cache(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]), Path::new("/c/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f")]), Path::new("/f/hub"));
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/g")]), Path::new("/g"));
        assert!(vars(&[("HF_HOME", " ")]).err().unwrap().to_string().contains("HF_HOME"));
        for (value, offline) in [("1", true), ("true", true), ("YES", true), ("on", true), ("0", false), ("", false)] {
            assert_eq!(vars(&[("HOME", "/h"), ("HF_HUB_OFFLINE", value)]).unwrap().offline, offline, "{value:?}");
        }
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "from file\n").unwrap();
        let home = home.path().to_str().unwrap();
        assert_eq!(vars(&[("HF_HOME", home)]).unwrap().token.as_deref(), Some("from file"));
        assert_eq!(vars(&[("HF_HOME", home), ("HF_TOKEN", "t")]).unwrap().token.as_deref(), Some("t"));
        let hub = vars(&[("HOME", "/h"), ("HF_ENDPOINT", "http://mirror/")]).unwrap().endpoint;
        assert_eq!(hub, "http://mirror");
    }

    /// A hub with one model, `org/tiny`, of these files; it lives as long as the test program.
    fn hub(files: Vec<(&'static str, Vec<u8>)>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines =
                    BufReader::new(stream.try_clone().unwrap()).lines().map(|line| line.unwrap_or_default());
                let request = lines.next().unwrap_or_default();
                let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                let mut range = None;
                for line in lines.take_while(|line| !line.is_empty()) {
                    range = line.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned).or(range);
                }
                let file = path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/"));
                let (status, extra, body) = if path == "/api/models/org/tiny/revision/main" {
                    let names: Vec<_> =
                        files.iter().map(|(name, _)| serde_json::json!({ "rfilename": name })).collect();
                    let info = serde_json::json!({ "sha": COMMIT, "siblings": names });
                    ("200 OK", String::new(), info.to_string().into_bytes())
                } else if let Some((name, bytes)) = files.iter().find(|(name, _)| Some(*name) == file) {
                    let range = range.unwrap_or_default();
                    let (from, to) = range.split_once('-').unwrap_or_default();
                    let from: usize = from.parse().unwrap_or(0);
                    let to = to.parse().map_or(bytes.len(), |to: usize| to + 1);
                    let range = format!("Content-Range: bytes {from}-{}/{}\r\n", to - 1, bytes.len());
                    let extra = format!("{range}ETag: \"e-{name}\"\r\nX-Repo-Commit: {COMMIT}\r\n");
                    ("206 Partial Content", extra, bytes[from..to].to_vec())
                } else {
                    ("404 Not Found", String::new(), vec![])
                };
                let length = body.len();
                let head = format!("HTTP/1.1 {status}\r\n{extra}Content-Length: {length}\r\nConnection: close\r\n\r\n");
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
            }
        });
        format!("http://{address}")
    }

    #[test]
    fn what_the_cache_lacks_is_downloaded() {
        let read = |name: &str| fs::read(fixture().join(name)).unwrap();
        let files = vec![
            ("config.json", read("config.json")),
            ("README.md", b"not wanted".to_vec()),
            ("tokenizer.model", b"wanted".to_vec()),
            ("model.safetensors", read("model.safetensors")),
        ];
        let dir = tempfile::tempdir().unwrap();
        let online = HubConfig { endpoint: hub(files), ..config(dir.path(), false) };
        let refs = dir.path().join("models--org--tiny/refs");

        let folder = find("org/tiny", &online, Want::Tokenizer).unwrap();
        assert!(folder.join("tokenizer.model").is_file() && !folder.join("model.safetensors").exists());
        assert_eq!(find("org/tiny", &online, Want::Model).unwrap(), folder);
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), read("model.safetensors"));
        assert!(!folder.join("README.md").exists());
        assert_eq!(fs::read_to_string(refs.join("main")).unwrap(), COMMIT);
        assert_eq!(fs::read_dir(&refs).unwrap().count(), 1);
        // From now on the hub is not needed.
        assert_eq!(find("org/tiny", &config(dir.path(), true), Want::Model).unwrap(), folder);

        let no_such = find("org/no-such", &online, Want::Model);
        says(no_such, &["`org/no-such`", "has no such model", "HF_TOKEN", "local folder"]);
    }

    #[test]
    fn a_hub_without_the_weights_is_an_error_and_leaves_no_reference() {
        let dir = tempfile::tempdir().unwrap();
        let files = vec![("config.json", b"{}".to_vec()), ("pytorch_model.bin", vec![])];
        let online = HubConfig { endpoint: hub(files), ..config(dir.path(), false) };
        says(find("org/tiny", &online, Want::Model), &["`org/tiny`", "there is no model.safetensors or"]);
        let files = vec![
            ("config.json", b"{}".to_vec()),
            ("model-1.safetensors", b"1".to_vec()),
            ("model.safetensors.index.json", INDEX.as_bytes().to_vec()),
        ];
        let online = HubConfig { endpoint: hub(files), ..config(dir.path(), false) };
        says(find("org/tiny", &online, Want::Model), &["`org/tiny`", "model-2.safetensors"]);
        assert!(!dir.path().join("models--org--tiny/refs/main").exists());
    }
}
