//! Opening a model with its tokenizer, whatever file it is in.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use serde_json::Value;
use tallow_adapters::{AdapterSet, NamedAdapter, PeftAdapter};
use tallow_formats::ModelLocation;
use tallow_formats::gguf::GgufFile;
use tallow_formats::hf::ModelDir;
#[cfg(not(feature = "hub"))]
use tallow_formats::resolve_model;
use tallow_models::{Checkpoint, Decoder, QuantizeConfig, QuantizedBase};
use tallow_nn::{Fill, Pack, ParamSpec, ParamStore, StoreOptions, plan_params};
use tallow_ops::PackedMatrix;
use tallow_tokenizer::{GgufVocab, Tokenizer};

use crate::gguf_adapter::open_adapter;

/// What can go wrong while a model is opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The files could not be found or read.
    #[error(transparent)]
    Format(#[from] tallow_formats::Error),
    /// The model could not be built.
    #[error(transparent)]
    Model(#[from] tallow_models::Error),
    /// The adapter cannot be merged.
    #[error("{}: {reason}", path.display())]
    Merge {
        /// The adapter.
        path: PathBuf,
        /// Why not, and the way out.
        reason: String,
    },
    /// The model has not what the adapter was trained beside.
    #[error("{}: was trained beside {trained}; {reason}; --base original puts it beside the model's own weights", path.display())]
    Base {
        /// The adapter.
        path: PathBuf,
        /// How the base was quantized.
        trained: String,
        /// What the model lacks.
        reason: String,
    },
    /// The adapter has no such form, or is not of this model.
    #[error("{}: {reason}", path.display())]
    Convert {
        /// The adapter.
        path: PathBuf,
        /// What is wrong, and the way out.
        reason: String,
    },
    /// The adapter could not be read, or is not of this model.
    #[error(transparent)]
    Adapter(#[from] tallow_adapters::Error),
    /// The layers could not be filled.
    #[error(transparent)]
    Layer(#[from] tallow_nn::Error),
    /// The tokenizer could not be read.
    #[error(transparent)]
    Tokenizer(#[from] tallow_tokenizer::Error),
    /// A hub id did not lead to a model.
    #[cfg(feature = "hub")]
    #[error(transparent)]
    Hub(#[from] crate::hub::Error),
    /// The tokenizer does not belong to the model.
    #[error(
        "{}: the tokenizer has {tokenizer} tokens but the model's vocabulary is {model}: they do not belong together",
        path.display()
    )]
    Vocabulary {
        /// The model.
        path: PathBuf,
        /// Tokens of the tokenizer.
        tokenizer: usize,
        /// Rows of the model's embedding.
        model: usize,
    },
}

/// `Result` with this module's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Dtype to compute in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dtype {
    /// 32 bits.
    #[default]
    F32,
    /// bf16 weights and activations, f32 inside norms, softmax and sums.
    Bf16,
}

/// The weights that an adapter is put beside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Base {
    /// Those that it was trained beside: quantized, if they were (QLoRA).
    #[default]
    AsTrained,
    /// The model's own, whatever the adapter was trained beside.
    Original,
}

/// How a model is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions<'a> {
    /// Adapters to use beside it, PEFT directories or GGUF files. The tokenizer of one that adds tokens, else of the first that
    /// has one, takes the place of the model's: it carries the chat template that the adapter was trained with.
    pub adapters: &'a [NamedAdapter],
    /// What the adapter is put beside.
    pub base: Base,
    /// What is computed in.
    pub dtype: Dtype,
}

/// A model ready to generate and score, with its tokenizer.
pub struct OpenModel {
    checkpoint: Checkpoint,
    store: ParamStore,
    decoder: Box<dyn Decoder>,
    tokenizer: std::result::Result<Tokenizer, String>,
    device: Device,
    adapters: Option<AdapterSet>,
    quantization: Option<QuantizeConfig>,
    notices: Vec<String>,
}

/// The files of a model: configuration and tensors, and its tokenizer where it has one.
pub struct OpenFiles {
    /// Configuration and tensors.
    pub checkpoint: Checkpoint,
    /// The tokenizer, or why there is none.
    pub tokenizer: std::result::Result<Tokenizer, String>,
}

/// Finds what `model` names: a Hugging Face directory, a `.gguf` file, a name in the local store or, in a build with the
/// feature `hub`, a hub id, whose files are downloaded where they are not cached (see `tallow::hub`).
///
/// # Errors
/// If there is none, saying where it was looked for.
pub fn locate(model: &str) -> Result<ModelLocation> {
    #[cfg(feature = "hub")]
    {
        crate::hub::locate(model, crate::hub::HubConfig::from_env, crate::hub::Want::Model)
    }
    #[cfg(not(feature = "hub"))]
    {
        Ok(resolve_model(model)?)
    }
}

/// Like [`locate`], for a tokenizer alone: a hub's weights are not downloaded.
///
/// # Errors
/// As [`locate`].
pub fn locate_tokenizer(model: &str) -> Result<ModelLocation> {
    #[cfg(feature = "hub")]
    {
        crate::hub::locate(model, crate::hub::HubConfig::from_env, crate::hub::Want::Tokenizer)
    }
    #[cfg(not(feature = "hub"))]
    {
        Ok(resolve_model(model)?)
    }
}

/// Opens the files of `model`: a Hugging Face directory, a `.gguf` file, a hub id, or a name in the local store.
///
/// # Errors
/// If the model cannot be found, or its files are malformed. A tokenizer that is missing is not an error yet.
pub fn open_files(model: &str) -> Result<OpenFiles> {
    let (checkpoint, tokenizer) = match locate(model)? {
        ModelLocation::Gguf(path) => {
            let file = GgufFile::open(&path)?;
            let tokenizer = gguf_tokenizer(&file).map_err(|e| e.to_string());
            (Checkpoint::open_gguf(file)?, tokenizer)
        }
        ModelLocation::HfDir(path) => {
            let dir = ModelDir::open(&path)?;
            (Checkpoint::open_dir(&dir)?, Tokenizer::from_path(&path).map_err(|e| e.to_string()))
        }
    };
    check_vocabulary(checkpoint.path(), &tokenizer, &checkpoint)?;
    Ok(OpenFiles { checkpoint, tokenizer })
}

/// A tokenizer with more tokens than the model has rows is another model's; `path` is where it is.
fn check_vocabulary(
    path: &Path,
    tokenizer: &std::result::Result<Tokenizer, String>,
    checkpoint: &Checkpoint,
) -> Result<()> {
    let (tokens, rows) = (tokenizer.as_ref().map_or(0, Tokenizer::vocab_size), checkpoint.config().shape().vocab_size);
    match tokens > rows {
        true => Err(Error::Vocabulary { path: path.to_path_buf(), tokenizer: tokens, model: rows }),
        false => Ok(()),
    }
}

/// Opens `model` and loads its weights for inference.
///
/// # Errors
/// As [`open_files`], and if a tensor is missing, malformed, of the wrong shape, or would be ignored.
pub fn open(model: &str, dtype: Dtype) -> Result<OpenModel> {
    open_adapted(model, &[], dtype)
}

/// As [`open`], with `adapters` (PEFT directories or GGUF files) beside what they were trained beside, which is held once; see
/// [`OpenOptions`].
///
/// # Errors
/// As [`open_with`].
pub fn open_adapted(model: &str, adapters: &[NamedAdapter], dtype: Dtype) -> Result<OpenModel> {
    open_with(model, OpenOptions { adapters, dtype, ..OpenOptions::default() })
}

/// Opens `model` and loads its weights for inference.
///
/// # Errors
/// As [`open`], and if an adapter is malformed, not of this model, or was trained beside blocks that this model has not, or two
/// cannot be used together.
pub fn open_with(model: &str, how: OpenOptions) -> Result<OpenModel> {
    let OpenFiles { mut checkpoint, mut tokenizer } = open_files(model)?;
    let (_, base) = plan_params(|b| checkpoint.config().build(b))?;
    checkpoint.check(&base)?;
    let mut files = vec![];
    for adapter in how.adapters {
        files.push((adapter.clone(), open_adapter(&adapter.path, checkpoint.config(), &base)?));
    }
    let (mut notices, mut adding) = (vec![], None);
    let base = match files.iter().filter_map(|(a, files)| Some((files.rows_needed(&base)?, a))).max_by_key(|x| x.0) {
        None => base,
        Some((rows, adapter)) => {
            let (has, path) = (checkpoint.config().shape().vocab_size, checkpoint.path().display());
            let name = &adapter.name;
            notices.push(format!("note: {name} adds tokens: the vocabulary of {path} grows from {has} rows to {rows}"));
            adding = Some(adapter.path.clone());
            checkpoint.resize_vocabulary(rows)?;
            plan_params(|b| checkpoint.config().build(b))?.1
        }
    };
    for (adapter, files) in &files {
        let note = files.notes().and_then(|notes| notes.get("prefix_lm"));
        if note.is_some_and(|note| !note.is_boolean()) {
            let reason = "`tallow.prefix_lm` of its adapter_config.json is neither true nor false".into();
            return Err(Error::Merge { path: adapter.path.clone(), reason });
        }
    }
    let own_prefix_lm = checkpoint.config().shape().prefix_lm;
    let prefix_lm = agreed(&files, own_prefix_lm, |files| {
        files.notes().and_then(|notes| notes.get("prefix_lm")).and_then(Value::as_bool).unwrap_or(own_prefix_lm)
    });
    let prefix_lm = prefix_lm.map_err(|path| Error::Merge {
        path,
        reason: "sees prompts another way than the adapters in front of it (prefix_lm): use it alone".into(),
    })?;
    checkpoint.set_prefix_lm(prefix_lm);
    let config = checkpoint.config();
    let device = Device::Cpu;
    let dtype = match how.dtype {
        Dtype::F32 => DType::F32,
        Dtype::Bf16 => DType::BF16,
    };
    let options = StoreOptions::frozen(dtype, device.clone());
    let (store, decoder, set, quantization) = if files.is_empty() {
        let store = ParamStore::new(base, &options, &checkpoint)?;
        let decoder = store.build(|b| config.build(b))?;
        (store, decoder, None, None)
    } else {
        let pack = match how.base {
            Base::AsTrained => trained_beside(&files, &checkpoint, &base)?,
            Base::Original => None,
        };
        if pack.is_none() {
            notices.extend(other_weights(&files, &checkpoint));
        }
        let set = AdapterSet::new(files, &base, &checkpoint)?;
        let (_, specs) = plan_params(|b| set.build(b, |b| config.build(b)))?;
        let quantization = pack.as_ref().map(QuantizedBase::config);
        let store = {
            let pack = pack.map(|pack| BaseOnly { pack, set: &set });
            let options = StoreOptions { pack: pack.as_ref().map(|pack| pack as &dyn Pack), ..options };
            ParamStore::new(specs, &options, &set.fill(&checkpoint))?
        };
        let decoder = store.build(|b| set.build(b, |b| config.build(b)))?;
        (store, decoder, Some(set), quantization)
    };
    let paths = adding.as_ref().into_iter().chain(how.adapters.iter().map(|adapter| &adapter.path));
    if let Some(path) = paths.into_iter().find(|path| path.join("tokenizer.json").is_file()) {
        tokenizer = Tokenizer::from_path(path).map_err(|e| e.to_string());
        check_vocabulary(path, &tokenizer, &checkpoint)?;
    }
    Ok(OpenModel { checkpoint, store, decoder, tokenizer, device, adapters: set, quantization, notices })
}

/// What all adapters say alike, `otherwise` without one; the first that says something else is the error.
fn agreed<T: PartialEq>(
    files: &[(NamedAdapter, PeftAdapter)],
    otherwise: T,
    says: impl Fn(&PeftAdapter) -> T,
) -> std::result::Result<T, PathBuf> {
    let Some((_, first)) = files.first() else { return Ok(otherwise) };
    let first = says(first);
    match files.iter().find(|(_, files)| says(files) != first) {
        Some((adapter, _)) => Err(adapter.path.clone()),
        None => Ok(first),
    }
}

/// Packs what adapters do not hold themselves.
struct BaseOnly<'a> {
    pack: QuantizedBase<'a>,
    set: &'a AdapterSet,
}

impl Pack for BaseOnly<'_> {
    fn pack(&self, spec: &ParamSpec, fill: &dyn Fill) -> tallow_nn::Result<Option<Arc<dyn PackedMatrix>>> {
        if self.set.holds(spec) { Ok(None) } else { self.pack.pack(spec, fill) }
    }

    fn planned_bytes(&self, spec: &ParamSpec) -> tallow_nn::Result<Option<usize>> {
        if self.set.holds(spec) { Ok(None) } else { self.pack.planned_bytes(spec) }
    }
}

/// Adapters that say that they were trained beside other weights: often the same model in another form, but not what they know.
fn other_weights(files: &[(NamedAdapter, PeftAdapter)], checkpoint: &Checkpoint) -> Vec<String> {
    let theirs = |files: &PeftAdapter| files.notes().and_then(|notes| notes.get("base_weights_sha256")).cloned();
    if files.iter().all(|(_, files)| theirs(files).is_none()) {
        return vec![];
    }
    let ours = Value::from(checkpoint.weights_fingerprint());
    let others = files.iter().filter(|(_, files)| theirs(files).is_some_and(|theirs| theirs != ours));
    let path = checkpoint.path().display();
    others.map(|(a, _)| format!("note: {} was trained beside other weights than those of {path}", a.name)).collect()
}

/// How the base of the adapters was quantized, as their files say, over the model in `checkpoint`.
fn trained_beside<'a>(
    files: &[(NamedAdapter, PeftAdapter)],
    checkpoint: &'a Checkpoint,
    base: &[ParamSpec],
) -> Result<Option<QuantizedBase<'a>>> {
    let note = |files: &PeftAdapter| files.notes().and_then(|notes| notes.get("base_quantization")).cloned();
    let error = |path: PathBuf, note: Option<&Value>, reason: String| Error::Base {
        path,
        trained: note.map_or("a base that is not quantized".into(), |note| QuantizeConfig::note_in_words(Some(note))),
        reason,
    };
    let all = agreed(files, None, note).map_err(|path| {
        let trained = files.iter().find(|(adapter, _)| adapter.path == path).and_then(|(_, files)| note(files));
        error(path, trained.as_ref(), "the adapters in front of it were trained beside another".into())
    })?;
    let (Some(note), Some((first, _))) = (all, files.first()) else { return Ok(None) };
    let error = |reason: String| error(first.path.clone(), Some(&note), reason);
    let ours = checkpoint.weights_fingerprint();
    let theirs = |files: &PeftAdapter| files.notes().and_then(|notes| notes.get("base_weights_sha256")).cloned();
    if files.iter().any(|(_, files)| theirs(files).is_some_and(|theirs| theirs != ours)) {
        return Err(error("other weights than this model's; give the model that it was trained beside".into()));
    }
    let config: QuantizeConfig = serde_json::from_value(note.clone()).map_err(|e| error(e.to_string()))?;
    QuantizedBase::new(config, checkpoint, base).map(Some).map_err(|e| error(e.to_string()))
}

/// The values of a model, or those that remain of them when it is quantized.
pub(crate) struct BaseValues<'a> {
    checkpoint: &'a Checkpoint,
    pack: Option<QuantizedBase<'a>>,
}

impl Fill for BaseValues<'_> {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> tallow_nn::Result<()> {
        match self.pack.as_ref().map(|pack| pack.pack(spec, self.checkpoint)).transpose()?.flatten() {
            Some(matrix) => matrix.unpack(0..matrix.dims().0, out),
            None => self.checkpoint.fill(spec, out)?,
        }
        Ok(())
    }
}

/// The tokenizer inside a GGUF file.
///
/// # Errors
/// If the file has none, or it is malformed or of an unknown kind.
pub fn gguf_tokenizer(file: &GgufFile) -> Result<Tokenizer> {
    let fields = file.tokenizer_fields()?;
    Ok(Tokenizer::from_gguf(GgufVocab {
        model: fields.model,
        pre: fields.pre,
        tokens: fields.tokens,
        scores: fields.scores,
        token_types: fields.token_types,
        merges: fields.merges,
        bos: fields.bos,
        eos: fields.eos,
        unk: fields.unk,
        pad: fields.pad,
        add_bos: fields.add_bos,
        add_eos: fields.add_eos,
        add_space_prefix: fields.add_space_prefix,
        remove_extra_whitespaces: fields.remove_extra_whitespaces,
        precompiled_charsmap: fields.precompiled_charsmap,
        chat_template: fields.chat_template,
    })?)
}

impl OpenModel {
    /// The model.
    pub fn decoder(&self) -> &dyn Decoder {
        self.decoder.as_ref()
    }

    /// Its files.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Its parameters.
    pub fn store(&self) -> &ParamStore {
        &self.store
    }

    /// The adapters beside it, if there are any.
    pub fn adapters(&self) -> Option<&AdapterSet> {
        self.adapters.as_ref()
    }

    /// How what the adapter stands beside is quantized, if it is.
    pub fn quantization(&self) -> Option<QuantizeConfig> {
        self.quantization
    }

    /// What the user should know of how these files go together.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// The values of the base, as the adapters were trained or the model's own; `specs` are its parameters.
    pub(crate) fn base(&self, base: Base, specs: &[ParamSpec]) -> Result<BaseValues<'_>> {
        let pack = match (base, self.quantization) {
            (Base::AsTrained, Some(config)) => Some(QuantizedBase::new(config, &self.checkpoint, specs)?),
            _ => None,
        };
        Ok(BaseValues { checkpoint: &self.checkpoint, pack })
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// If the model's files have none that can be read.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().map_err(|reason| {
            Error::Format(tallow_formats::Error::missing(self.checkpoint.path(), "a tokenizer", reason))
        })
    }

    /// Ids that end a text: the configuration's, and the tokenizer's end of sequence.
    pub fn stop_ids(&self) -> Vec<u32> {
        let mut ids = self.checkpoint.config().eos_token_ids();
        if let Some(eos) = self.tokenizer.as_ref().ok().and_then(Tokenizer::eos_id) {
            ids.push(eos);
        }
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}
