//! Models by their id at the Hugging Face hub, `org/name`, over the cache that its other programs use.
//!
//! The cache is `$HF_HUB_CACHE`, else `$HF_HOME/hub`, else `~/.cache/huggingface/hub`. A model there is the folder
//! `models--org--name/snapshots/COMMIT`, with the commit in `refs/main`. With `HF_HUB_OFFLINE=1` the network is never
//! touched; otherwise the hub is asked for the newest commit and what is missing is fetched. `HF_ENDPOINT` is another hub,
//! `HF_TOKEN` or `$HF_HOME/token` the key to gated models.
//!
//! Not for files of other kinds: of a model, only its configuration, safetensors and tokenizer are fetched.
//!
//! ```no_run
//! use tallow::hub::{HubConfig, Want, find};
//!
//! let folder = find("HuggingFaceTB/SmolLM2-135M", &HubConfig::from_env()?, Want::Model)?;
//! println!("{}", folder.display());
//! # Ok::<(), tallow::hub::Error>(())
//! ```

mod error;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;
use tallow_formats::safetensors::{INDEX, WEIGHTS};
use tallow_formats::{ModelLocation, is_hub_id, resolve_model};

pub use self::error::{Error, Result};

const CONFIG: &str = "config.json";
const TOKENIZERS: [&str; 2] = ["tokenizer.json", "tokenizer.model"];
/// Fetched where a model has them.
const EXTRAS: [&str; 4] =
    ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];
/// What the hub is asked for first, in errors.
const LISTING: &str = "its list of files";
/// The most bytes of an index, as when it is opened.
const MAX_INDEX: u64 = 100_000_000;
/// How long the hub may take to say what a model consists of.
const ASK: Duration = Duration::from_secs(20);

/// What is needed of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Configuration, weights, and the tokenizer if it has one.
    Model,
    /// The tokenizer alone.
    Tokenizer,
}

/// Where models are cached and whether more may be fetched.
#[derive(Clone)]
pub struct HubConfig {
    /// The folder that holds `models--org--name`.
    pub cache: PathBuf,
    /// Never touch the network.
    pub offline: bool,
    /// The hub, `https://huggingface.co`.
    pub endpoint: String,
    /// The key to private and gated models.
    pub token: Option<String>,
}

impl HubConfig {
    /// What the environment says; this module's page lists the variables.
    ///
    /// # Errors
    /// If there is no home directory and no variable names the cache.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// What these variables say. An empty one counts as unset.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let set = |name: &str| var(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let home = set("HF_HOME").map(PathBuf::from).or_else(|| {
            let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| set("HOME").map(|home| Path::new(&home).join(".cache")));
            cache.map(|cache| cache.join("huggingface"))
        });
        let cache = set("HF_HUB_CACHE").map(PathBuf::from).or_else(|| home.as_ref().map(|home| home.join("hub")));
        let token = set("HF_TOKEN").or_else(|| {
            let text = std::fs::read_to_string(home?.join("token")).ok()?;
            Some(text.trim().to_owned()).filter(|text| !text.is_empty())
        });
        let offline = set("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "true", "yes", "on"].iter().any(|on| value.eq_ignore_ascii_case(on)));
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Ok(Self { cache: cache.ok_or(Error::NoCache)?, offline, endpoint, token })
    }
}

/// The folder of the model `id`, with all that is wanted in it: the newest snapshot, downloaded where the cache lacks it.
/// If the hub cannot be reached or refuses, a complete snapshot of the cache is taken, and stderr says so.
///
/// # Errors
/// If `id` is not `org/name`, the model or a file of it is neither cached nor to be had, or an index is malformed.
pub fn find(id: &str, config: &HubConfig, want: Want) -> Result<PathBuf> {
    if !is_hub_id(id) {
        return Err(Error::Id { id: id.into() });
    }
    let hub = Hub { id, config, want };
    let cached = hub.snapshot();
    let lacks = match &cached {
        Some(folder) => hub.lacks(folder),
        None => Ok(Some("the model".into())),
    };
    if config.offline {
        return match (cached, lacks?) {
            (Some(folder), None) => Ok(folder),
            (_, file) => Err(Error::NotCached {
                repo: id.into(),
                file: file.unwrap_or_else(|| "the model".into()),
                cache: config.cache.clone(),
            }),
        };
    }
    match (hub.fetch(), cached, lacks) {
        (Err(error), Some(folder), Ok(None)) => {
            eprintln!("note: {error}; using the cached {}", folder.display());
            Ok(folder)
        }
        (result, ..) => result,
    }
}

/// What `model` names: a folder, a file or a name in the local store, else a hub id; `config` is asked for that alone.
///
/// # Errors
/// If it is none of these, or as [`find`].
pub fn locate(
    model: &str,
    config: impl FnOnce() -> Result<HubConfig>,
    want: Want,
) -> crate::open::Result<ModelLocation> {
    match resolve_model(model) {
        // A file that is no model is no hub id either.
        Err(_) if is_hub_id(model) && !Path::new(model).exists() => {
            Ok(ModelLocation::HfDir(find(model, &config()?, want)?))
        }
        other => Ok(other?),
    }
}

struct Hub<'a> {
    id: &'a str,
    config: &'a HubConfig,
    want: Want,
}

impl Hub<'_> {
    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.into(), RepoType::Model, revision.into())
    }

    /// The folder of the commit that `refs/main` names.
    fn snapshot(&self) -> Option<PathBuf> {
        let folder = self.config.cache.join(self.repo("main").folder_name());
        let commit = std::fs::read_to_string(folder.join("refs/main")).ok()?;
        let commit = commit.trim();
        let snapshot = folder.join("snapshots").join(commit);
        (is_commit(commit) && snapshot.is_dir()).then_some(snapshot)
    }

    /// The first wanted file that a snapshot lacks.
    fn lacks(&self, folder: &Path) -> Result<Option<String>> {
        let has = |name: &str| folder.join(name).is_file();
        if self.want == Want::Tokenizer {
            let found = TOKENIZERS.iter().any(|name| has(name));
            return Ok((!found).then(|| TOKENIZERS.join(" or ")));
        }
        if !has(CONFIG) {
            return Ok(Some(CONFIG.into()));
        }
        if has(WEIGHTS) {
            return Ok(None);
        }
        if !has(INDEX) {
            return Ok(Some(format!("{WEIGHTS} or {INDEX}")));
        }
        Ok(self.shards(&folder.join(INDEX))?.into_iter().find(|name| !has(name)))
    }

    /// The files that an index lists.
    fn shards(&self, index: &Path) -> Result<BTreeSet<String>> {
        let wrong = |reason: String| Error::Malformed { repo: self.id.into(), path: index.into(), reason };
        let size = std::fs::metadata(index).map_err(|e| wrong(e.to_string()))?.len();
        if size > MAX_INDEX {
            return Err(wrong(format!("has {size} bytes, which is too large for an index")));
        }
        let text = std::fs::read(index).map_err(|e| wrong(e.to_string()))?;
        let json: Value = serde_json::from_slice(&text).map_err(|e| wrong(format!("is not JSON: {e}")))?;
        let map = json.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| wrong("has no `weight_map`".into()))?;
        let plain = |file: &Value| {
            let name = file.as_str().filter(|name| is_plain(name));
            name.map(str::to_owned).ok_or_else(|| wrong(format!("lists {file}, which is not a plain file name")))
        };
        map.values().map(plain).collect()
    }

    /// Downloads what is missing of the newest commit. `refs/main` names that commit only once all that is wanted is there.
    fn fetch(&self) -> Result<PathBuf> {
        let api = ApiBuilder::from_cache(Cache::new(self.config.cache.clone()))
            .with_endpoint(self.config.endpoint.clone())
            .with_token(self.config.token.clone())
            .with_retries(3)
            .with_user_agent("tallow", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|e| self.refused(LISTING, &e))?;
        let info = self.ask(&api)?;
        let at_hub = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
        let need = |names: &[&'static str]| {
            let found = names.iter().copied().find(|name| at_hub(name));
            found.ok_or_else(|| Error::NoFile { repo: self.id.into(), file: names.join(" or ") })
        };
        // The weights come last, so that what is wrong with the small files is known first.
        let mut names = match self.want {
            Want::Model => vec![need(&[CONFIG])?],
            Want::Tokenizer => vec![need(&TOKENIZERS)?],
        };
        let more = |name: &&str| at_hub(name) && !names.contains(name);
        let others: Vec<&str> = TOKENIZERS.iter().chain(&EXTRAS).copied().filter(more).collect();
        names.extend(others);
        if self.want == Want::Model {
            names.push(need(&[WEIGHTS, INDEX])?);
        }
        let cache = Cache::new(self.config.cache.clone());
        let folder = cache.repo(self.repo("main")).pointer_path(&info.sha);
        for name in &names {
            self.download(&api, &info.sha, &folder, name)?;
        }
        if names.contains(&INDEX) {
            for name in self.shards(&folder.join(INDEX))? {
                self.download(&api, &info.sha, &folder, &name)?;
            }
        }
        let named = cache.repo(self.repo("main")).create_ref(&info.sha);
        named.map_err(|e| self.refused("refs/main", &ApiError::IoError(e)))?;
        Ok(folder)
    }

    /// The newest commit and its files.
    fn ask(&self, api: &Api) -> Result<RepoInfo> {
        let request = api.repo(self.repo("main")).info_request().config().timeout_global(Some(ASK)).build();
        let text = request.call().and_then(|mut response| response.body_mut().read_to_string());
        let text = text.map_err(|e| self.refused(LISTING, &ApiError::RequestError(Box::new(e))))?;
        let fail = |reason| Error::Fetch { repo: self.id.into(), file: LISTING.into(), reason };
        let info: RepoInfo = serde_json::from_str(&text).map_err(|e| fail(format!("the hub's answer: {e}")))?;
        // It becomes the name of a folder.
        if !is_commit(&info.sha) {
            return Err(fail(format!("the hub's answer: {:?} is no commit", info.sha)));
        }
        Ok(info)
    }

    fn download(&self, api: &Api, commit: &str, folder: &Path, name: &str) -> Result<()> {
        if folder.join(name).is_file() {
            return Ok(());
        }
        eprintln!("fetching {} {name}", self.id);
        api.repo(self.repo(commit)).download(name).map_err(|e| self.refused(name, &e))?;
        // A reference of the download's own, which the cache's other users do not expect.
        let own = self.config.cache.join(self.repo("main").folder_name()).join("refs").join(commit);
        let _ = std::fs::remove_file(own);
        Ok(())
    }

    fn refused(&self, file: &str, error: &ApiError) -> Error {
        if let ApiError::TooManyRetries(error) = error {
            return self.refused(file, error);
        }
        let status = match error {
            ApiError::RequestError(error) => match **error {
                ureq::Error::StatusCode(status) => Some(status),
                _ => None,
            },
            _ => None,
        };
        let (repo, file) = (self.id.to_owned(), file.to_owned());
        match (status, error) {
            // The hub says 401 for a model that is not there, too.
            (Some(401 | 403 | 404), _) if file == LISTING => {
                Error::NoRepo { repo, endpoint: self.config.endpoint.clone() }
            }
            (Some(404), _) => Error::NoFile { repo, file },
            (Some(401 | 403), _) => {
                Error::Fetch { repo, file, reason: format!("{error}: it needs a key that may read it, in HF_TOKEN") }
            }
            (_, ApiError::InvalidResume) => {
                let blobs = self.config.cache.join(self.repo("main").folder_name()).join("blobs");
                Error::Fetch { repo, file, reason: format!("{error}: remove the .part files of {}", blobs.display()) }
            }
            _ => Error::Fetch { repo, file, reason: error.to_string() },
        }
    }
}

/// Whether this is a commit's name: letters and digits, so that it stays inside its folder.
fn is_commit(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// Whether this is the name of a file in the same folder.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', ':', '\0'])
}
