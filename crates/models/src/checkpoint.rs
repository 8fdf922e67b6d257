//! [`Checkpoint`]: a model in files, opened but not yet read.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::Digest;
use tallow_formats::gguf::{GgmlType, GgufFile};
use tallow_formats::hf::ModelDir;
use tallow_formats::{DType, TensorSource};
use tallow_nn::{Fill, GgmlMatrix, ParamSpec, Role};

use crate::{Error, ModelConfig, Result, gguf, parse_config};

/// Tensors that checkpoints carry and models compute: nothing is lost by leaving them.
const COMPUTED: &[&str] = &[".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"];

/// Name in the file, type of the blocks, rows and columns.
pub(crate) type StoredBlocks = (String, GgmlType, (usize, usize));

/// How a file names its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Naming {
    /// As the model does.
    HuggingFace,
    /// As the model does, without `transformer.` in front (GPT-2 as it was first published).
    HuggingFaceBare,
    /// GGUF's names, query and key rows in GGUF's order.
    Gguf,
}

/// A model in a Hugging Face directory or a GGUF file: its configuration, and its tensors as a [`Fill`].
pub struct Checkpoint {
    path: PathBuf,
    config: Box<dyn ModelConfig>,
    hf_config: Value,
    unknown_keys: Vec<String>,
    source: Box<dyn TensorSource>,
    naming: Naming,
    /// Rows of the vocabulary in the files, where the model is to have more.
    stored_rows: Option<usize>,
}

impl Checkpoint {
    /// Opens a Hugging Face directory.
    ///
    /// # Errors
    /// If a file is missing or malformed, or the architecture is not supported.
    pub fn open_dir(dir: &ModelDir) -> Result<Self> {
        let path = dir.path().to_path_buf();
        let config_path = path.join("config.json");
        let hf_config = dir.config().clone();
        let parsed = parse_config(&hf_config).map_err(|e| e.in_file(&config_path))?;
        let source = dir.open_weights()?;
        let bare = source.info("wte.weight").is_some();
        let naming = if bare { Naming::HuggingFaceBare } else { Naming::HuggingFace };
        Ok(Self {
            path,
            config: parsed.config,
            hf_config,
            unknown_keys: parsed.unknown_keys,
            source,
            naming,
            stored_rows: None,
        })
    }

    /// Opens a GGUF file.
    ///
    /// # Errors
    /// If the file is malformed, or its architecture is not supported.
    pub fn open_gguf(file: GgufFile) -> Result<Self> {
        let path = file.path().to_path_buf();
        let hf_config = gguf::config_of(&file).map_err(|e| e.in_file(&path))?;
        let parsed = parse_config(&hf_config).map_err(|e| gguf::error_of(e, &file).in_file(&path))?;
        let source = Box::new(file);
        let naming = Naming::Gguf;
        Ok(Self { path, config: parsed.config, hf_config, unknown_keys: vec![], source, naming, stored_rows: None })
    }

    /// The configuration.
    pub fn config(&self) -> &dyn ModelConfig {
        self.config.as_ref()
    }

    /// Sets whether prompts are seen both ways, where an adapter says other than the configuration.
    pub fn set_prefix_lm(&mut self, prefix_lm: bool) {
        self.config.set_prefix_lm(prefix_lm);
    }

    /// Gives the model `rows` rows for its vocabulary, for tokens that are added to it. New rows of embedding and head are the
    /// mean of the others, so that a new token is no likelier than the others are on average (Hewitt 2021).
    ///
    /// # Errors
    /// If it has more already.
    pub fn resize_vocabulary(&mut self, rows: usize) -> Result<()> {
        let has = self.config.shape().vocab_size;
        if rows < has {
            let reason = format!("the model has {has} rows for its vocabulary; they can only become more");
            return Err(Error::config("vocab_size", reason));
        }
        if rows > has {
            self.stored_rows.get_or_insert(has);
            let prefix_lm = self.config.shape().prefix_lm;
            self.hf_config["vocab_size"] = rows.into();
            self.config = parse_config(&self.hf_config)?.config;
            self.config.set_prefix_lm(prefix_lm);
        }
        Ok(())
    }

    /// Rows of a table of the vocabulary in the files, where these have fewer than the model.
    fn fewer_rows(&self, spec: &ParamSpec) -> Option<usize> {
        let table = matches!(spec.role, Role::Embed | Role::Head) && spec.shape.len() == 2;
        self.stored_rows
            .filter(|rows| table && spec.shape[0] == self.config.shape().vocab_size && *rows < spec.shape[0])
    }

    /// The configuration with Hugging Face's keys, as the file has it or as its header amounts to.
    pub fn hf_config(&self) -> &Value {
        &self.hf_config
    }

    /// Keys of `config.json` that this program does not know; the user should be told.
    pub fn unknown_keys(&self) -> &[String] {
        &self.unknown_keys
    }

    /// The file or directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that the files have every parameter of `specs` in its shape, and nothing that would be ignored.
    ///
    /// # Errors
    /// Naming the file and the tensor.
    pub fn check(&self, specs: &[ParamSpec]) -> Result<()> {
        let mut used = HashSet::new();
        for spec in specs {
            used.insert(self.locate(spec)?);
        }
        let tied_head = self.config.shape().tied.then_some("lm_head.weight");
        let unused: Vec<&str> = self
            .source
            .names()
            .into_iter()
            .filter(|name| !used.contains(*name) && Some(*name) != tied_head)
            .filter(|name| !COMPUTED.iter().any(|suffix| name.ends_with(suffix)))
            .collect();
        match unused.first() {
            Some(first) => {
                let path = self.source.path_of(first).to_path_buf();
                Err(Error::UnusedTensors { path, count: unused.len(), first: (*first).into() })
            }
            None => Ok(()),
        }
    }

    /// The stored name of a parameter, after checking that it is there in the right shape.
    fn locate(&self, spec: &ParamSpec) -> tallow_nn::Result<String> {
        let name = match self.naming {
            Naming::HuggingFace => Some(spec.name.clone()),
            Naming::HuggingFaceBare => Some(spec.name.strip_prefix("transformer.").unwrap_or(&spec.name).to_owned()),
            Naming::Gguf => gguf::tensor_name(&spec.name),
        };
        let file = self.source.path_of(name.as_deref().unwrap_or_default());
        let wrong = |reason: String| tallow_nn::Error::Weights { path: file.into(), tensor: spec.name.clone(), reason };
        let name = name.ok_or_else(|| wrong("has no name in GGUF files".into()))?;
        let info = self.source.info(&name).ok_or_else(|| match name == spec.name {
            true => wrong("is missing; fetch the weights again, or is the configuration another model's?".into()),
            false => wrong(format!("is missing (looked for `{name}`); fetch or convert the model again")),
        })?;
        let mut expected = if self.naming == Naming::Gguf { spec.shape.clone() } else { spec.stored_shape() };
        if let Some(rows) = self.fewer_rows(spec) {
            expected[0] = rows;
        }
        if info.shape != expected {
            let hint = if name.contains("embed") || name.contains("lm_head") || name.contains("wte") {
                "; the vocabulary of the configuration does not match the weights"
            } else {
                "; does the configuration belong to these weights?"
            };
            return Err(wrong(format!(
                "is {:?} in the file but the configuration needs {expected:?}{hint}",
                info.shape
            )));
        }
        Ok(name)
    }

    /// SHA-256 over names, types and shapes of all tensors and 64 KiB spread over each: another model, another quantization of it
    /// or further training gives another.
    pub fn weights_fingerprint(&self) -> String {
        const PIECES: usize = 16;
        const PIECE: usize = 4096;
        let mut names = self.source.names();
        names.sort_unstable();
        let mut hash = sha2::Sha256::new();
        for name in names {
            let (Some(info), Ok(bytes)) = (self.source.info(name), self.source.bytes(name)) else { continue };
            hash.update(format!("{name} {} {:?} {}\n", info.dtype, info.shape, bytes.len()));
            let stride = (bytes.len() / PIECES).max(PIECE);
            for piece in bytes.chunks(stride) {
                hash.update(&piece[..piece.len().min(PIECE)]);
            }
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The blocks of a matrix as they lie in a GGUF file; `None` where it is stored as plain numbers.
    ///
    /// # Errors
    /// If the files do not have the parameter in that shape.
    pub fn stored_blocks(&self, spec: &ParamSpec) -> tallow_nn::Result<Option<GgmlMatrix>> {
        let Some((name, kind, dims)) = self.stored_kind(spec)? else { return Ok(None) };
        let mut bytes = self.source.bytes(&name)?.to_vec();
        // Blocks of zeros are zeros in every type.
        bytes.resize(bytes.len() / dims.0.max(1) * spec.shape[0], 0);
        let dims = (spec.shape[0], dims.1);
        if let Some(heads) = gguf::permuted_heads(self.config(), &spec.name) {
            gguf::unpermute(&mut bytes, heads, self.source.bytes(&name)?.len() / dims.0);
        }
        GgmlMatrix::new(kind, dims, bytes).map(Some)
    }

    /// Name, type and dimensions of a matrix that is stored in blocks.
    pub(crate) fn stored_kind(&self, spec: &ParamSpec) -> tallow_nn::Result<Option<StoredBlocks>> {
        if self.naming != Naming::Gguf {
            return Ok(None);
        }
        let name = self.locate(spec)?;
        let info = self.source.info(&name).map(|info| (info.dtype, info.shape.as_slice()));
        Ok(match info {
            Some((DType::Ggml(kind), &[rows, columns])) => Some((name, kind, (rows, columns))),
            _ => None,
        })
    }
}

impl Fill for Checkpoint {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> tallow_nn::Result<()> {
        let name = self.locate(spec)?;
        if let Some(rows) = self.fewer_rows(spec) {
            let columns = spec.shape[1];
            let (stored, new) = out.split_at_mut(rows * columns);
            self.source.read_f32(&name, stored)?;
            let mut mean = vec![0f64; columns];
            for row in stored.chunks_exact(columns) {
                mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += f64::from(*x) / rows as f64);
            }
            for row in new.chunks_exact_mut(columns) {
                row.iter_mut().zip(&mean).for_each(|(x, mean)| *x = *mean as f32);
            }
            return Ok(());
        }
        match (self.naming, spec.stored_transposed) {
            (Naming::Gguf, _) => {
                self.source.read_f32(&name, out)?;
                if let Some(heads) = gguf::permuted_heads(self.config(), &spec.name) {
                    gguf::unpermute(out, heads, spec.shape.get(1).copied().unwrap_or(1));
                }
            }
            (_, false) => self.source.read_f32(&name, out)?,
            (_, true) => {
                let mut stored = vec![0f32; out.len()];
                self.source.read_f32(&name, &mut stored)?;
                transpose(&stored, spec.shape[1], spec.shape[0], out);
            }
        }
        Ok(())
    }
}

/// `from [rows, cols]` to `to [cols, rows]`.
pub(crate) fn transpose(from: &[f32], rows: usize, cols: usize, to: &mut [f32]) {
    for (r, row) in from.chunks_exact(cols).enumerate() {
        for (c, &x) in row.iter().enumerate() {
            to[c * rows + r] = x;
        }
    }
}
