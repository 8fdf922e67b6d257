//! PEFT directories: `adapter_config.json` and `adapter_model.safetensors`, as the `peft` package reads and writes them.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tallow_formats::TensorSource;
use tallow_formats::safetensors::SafetensorsFile;
use tallow_nn::{Fill, ParamSpec, Role};

use crate::config::names;
use crate::tokens::TOKEN_ROWS;
use crate::{Adapted, AdapterPlan, Error, LoraConfig, Result, Targets};

/// Settings of an adapter.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Its matrices.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// What stands before a module's name in PEFT's files.
pub const PEFT_PREFIX: &str = "base_model.model.";

/// The most bytes of an `adapter_config.json`.
const MAX_CONFIG: u64 = 16 << 20;

/// Keys whose value does not change what the adapter computes.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "modules_to_save",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "tallow",
    "ensure_weight_tying",
    "trainable_token_indices",
];

/// A LoRA adapter in files, opened but not yet read.
pub struct PeftAdapter {
    dir: PathBuf,
    config: Map<String, Value>,
    /// What holds the tensors, for messages.
    weights: PathBuf,
    tensors: Box<dyn TensorSource>,
}

impl std::fmt::Debug for PeftAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("PeftAdapter").field("dir", &self.dir).field("config", &self.config).finish_non_exhaustive()
    }
}

impl PeftAdapter {
    /// Opens a PEFT directory.
    ///
    /// # Errors
    /// If a file is missing or malformed, or it is another kind of adapter than LoRA.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(ADAPTER_CONFIG);
        if !path.is_file() {
            let has = |name: &str| dir.join(name).is_file();
            let instead = match () {
                () if has("final/adapter_config.json") => {
                    format!("it is the folder of a run, whose adapter is {}/final: give that", dir.display())
                }
                () if has("final/config.json") => format!(
                    "it is the folder of a run that trained all of a model, which is {}/final: give that as --model",
                    dir.display()
                ),
                () if has("config.json") => "it is a model: give it as --model".to_owned(),
                () => "give the folder that has it".to_owned(),
            };
            return Err(Error::files(dir, format!("has no {ADAPTER_CONFIG}, so it is no PEFT adapter; {instead}")));
        }
        let size = std::fs::metadata(&path).map_or(0, |m| m.len());
        if size > MAX_CONFIG {
            return Err(Error::files(&path, format!("{size} bytes are too many for a configuration")));
        }
        let text = std::fs::read(&path).map_err(|e| Error::files(&path, e.to_string()))?;
        let config: Map<String, Value> =
            serde_json::from_slice(&text).map_err(|e| Error::files(&path, format!("is not a JSON object: {e}")))?;
        let weights = dir.join(ADAPTER_WEIGHTS);
        if !weights.is_file() {
            let hint = match dir.join("adapter_model.bin").exists() {
                true => "there is adapter_model.bin, which is not read; save it again with safe_serialization=True",
                false => "fetch the adapter again",
            };
            return Err(Error::files(dir, format!("has no {ADAPTER_WEIGHTS}; {hint}")));
        }
        let tensors = Box::new(SafetensorsFile::open(&weights)?);
        let adapter = Self { dir: dir.to_path_buf(), config, weights, tensors };
        adapter.check_config(&path)?;
        Ok(adapter)
    }

    /// An adapter of another format, at `path`, whose settings and tensors have been given PEFT's names.
    ///
    /// # Errors
    /// If the settings ask for what is not supported.
    pub fn from_parts(path: &Path, config: Map<String, Value>, tensors: Box<dyn TensorSource>) -> Result<Self> {
        let adapter = Self { dir: path.to_path_buf(), config, weights: path.to_path_buf(), tensors };
        adapter.check_config(path)?;
        Ok(adapter)
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The model that it was made for, as its file names it.
    pub fn base_model(&self) -> Option<&str> {
        self.config.get("base_model_name_or_path").and_then(Value::as_str).filter(|name| !name.is_empty())
    }

    /// What this program noted beside PEFT's own keys.
    pub fn notes(&self) -> Option<&Value> {
        self.config.get("tallow")
    }

    /// Refuses what would be ignored.
    fn check_config(&self, path: &Path) -> Result<()> {
        let kind = self.config.get("peft_type").and_then(Value::as_str).unwrap_or("unknown");
        if kind != "LORA" {
            return Err(Error::files(path, format!("is an adapter of type {kind}; LORA is supported")));
        }
        // These initialisations change the base as well, which the files do not hold.
        let changed = ["pissa", "olora", "corda", "loftq"];
        if let Some(init) = self.config.get("init_lora_weights").and_then(Value::as_str)
            && changed.iter().any(|name| init.starts_with(name))
        {
            let reason = format!(
                "was made with init_lora_weights = \"{init}\", which changes the base model as well; convert it to plain LoRA \
                 with peft's path_initial_model_for_weight_conversion"
            );
            return Err(Error::files(path, reason));
        }
        let known = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"];
        let says_something = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(list) => !list.is_empty(),
            Value::Object(map) => !map.is_empty(),
            _ => true,
        };
        for (key, value) in &self.config {
            let key = key.as_str();
            if key == "bias" && value != "none" {
                return Err(Error::files(
                    path,
                    format!("`bias` is {value}: trained biases are not supported, only \"none\""),
                ));
            }
            // How far a pattern's layers are told by their own names is seen from the tensors.
            let ignorable = known.contains(&key) || WITHOUT_EFFECT.contains(&key) || !says_something(value);
            if !ignorable && !is_default(key, value) {
                return Err(Error::files(path, format!("`{key}` = {value} is not supported")));
            }
        }
        Ok(())
    }

    /// What the files mean for the model with parameters `specs` (without an adapter).
    ///
    /// # Errors
    /// If a tensor belongs to no module of the model or has another shape than its module needs.
    pub fn plan(&self, specs: &[ParamSpec]) -> Result<AdapterPlan> {
        let file = &self.weights;
        let by_name: BTreeMap<&str, &ParamSpec> = specs.iter().map(|s| (s.name.as_str(), s)).collect();
        let (mut modules, mut saved, mut used) = (BTreeMap::new(), HashSet::new(), HashSet::new());
        let mut tokens = BTreeMap::new();
        for name in self.tensors.names() {
            let Some(inner) = name.strip_prefix(PEFT_PREFIX) else {
                return Err(Error::files(
                    file,
                    format!("tensor `{name}` does not begin with `{PEFT_PREFIX}`, as PEFT's do"),
                ));
            };
            if let Some(module) = inner.strip_suffix(TOKEN_ROWS) {
                let Some(spec) = by_name.get(format!("{module}.weight").as_str()) else {
                    self.check_tied_rows(name, specs)?;
                    continue;
                };
                tokens.insert(module.to_owned(), self.tokens_of(name, module, spec)?);
                used.insert(name.to_owned());
            } else if let Some(at) = inner.rfind(".lora_") {
                let (module, part) = (&inner[..at], &inner[at + 1..]);
                let Some(spec) = by_name.get(format!("{module}.weight").as_str()) else {
                    return Err(self.foreign(name));
                };
                if matches!(part, "lora_A.weight" | "lora_embedding_A") {
                    modules.insert(module.to_owned(), self.adapted(name, module, spec)?);
                } else if !matches!(part, "lora_B.weight" | "lora_embedding_B" | "lora_magnitude_vector") {
                    return Err(Error::files(file, format!("tensor `{name}`: `{part}` is not supported")));
                }
                used.insert(name.to_owned());
            } else if let Some(plain) = base_layer(inner) {
                match by_name.get(plain.as_str()) {
                    // The table once more, under the name of the head that is tied to it.
                    None if plain == "lm_head.weight" && !specs.iter().any(|spec| spec.role == Role::Head) => {}
                    Some(spec) if self.tensors.info(name).is_some_and(|info| info.shape == spec.stored_shape()) => {}
                    Some(spec) => {
                        let (shape, made_for) = (spec.stored_shape(), self.made_for());
                        let reason = format!("tensor `{name}`: that of this model is {shape:?}{made_for}");
                        return Err(Error::files(file, reason));
                    }
                    None => return Err(self.foreign(name)),
                }
            } else {
                let plain = inner.replace(".modules_to_save.", ".");
                if !by_name.contains_key(plain.as_str()) {
                    return Err(self.foreign(name));
                }
                saved.insert(plain);
                used.insert(name.to_owned());
            }
        }
        if modules.is_empty() {
            return Err(Error::files(file, "holds no LoRA matrices"));
        }
        let twice = |module: &&String| tokens.contains_key(*module) || saved.contains(&format!("{module}.weight"));
        if let Some(module) = modules.keys().find(twice) {
            let reason = format!("`{module}` has LoRA matrices and values of its own: which are meant cannot be told");
            return Err(Error::files(file, reason));
        }
        self.check_tied(specs, &saved, &modules)?;
        let config = LoraConfig {
            rank: modules.values().map(|m: &Adapted| m.rank).max().unwrap_or(1),
            alpha: self.number("lora_alpha").unwrap_or(1.0),
            dropout: 0.0,
            targets: Targets::Names(modules.keys().cloned().collect()),
            rslora: self.flag("use_rslora")?,
            dora: self.flag("use_dora")?,
            ..LoraConfig::default()
        };
        for spec in specs.iter().filter(|spec| matches!(spec.role, Role::Embed | Role::Head)) {
            let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
            if self.tokens_said(module, spec.role).is_some() && !tokens.contains_key(module) {
                let reason = format!(
                    "`trainable_token_indices` names tokens of `{module}`, but their rows are missing; fetch the adapter again"
                );
                return Err(Error::files(file, reason));
            }
        }
        let plan = AdapterPlan { config, modules, saved, tokens, compact: vec![] };
        self.check_shapes(&plan, specs, &used)?;
        Ok(plan)
    }

    fn made_for(&self) -> String {
        self.base_model().map(|base| format!("; it was made for {base}")).unwrap_or_default()
    }

    /// Whether the files hold the values of a parameter of the base: PEFT saves the embedding that an adapter stands beside.
    pub fn holds_base(&self, spec: &ParamSpec) -> bool {
        self.base_tensor(&spec.name).is_some()
    }

    fn base_tensor(&self, parameter: &str) -> Option<(String, &tallow_formats::TensorInfo)> {
        let (module, leaf) = parameter.rsplit_once('.')?;
        ["", ".token_adapter"].iter().find_map(|part| {
            let name = format!("{PEFT_PREFIX}{module}{part}.base_layer.{leaf}");
            let info = self.tensors.info(&name)?;
            Some((name, info))
        })
    }

    fn foreign(&self, name: &str) -> Error {
        let made_for = self.made_for();
        Error::files(&self.weights, format!("tensor `{name}`: this model has no such module{made_for}"))
    }

    fn adapted(&self, name: &str, module: &str, spec: &ParamSpec) -> Result<Adapted> {
        let file = &self.weights;
        let embedding = name.ends_with("lora_embedding_A");
        let shape = self.tensors.info(name).map(|info| info.shape.clone()).unwrap_or_default();
        let (&[rank, d_in], &[rows, columns]) = (shape.as_slice(), spec.shape.as_slice()) else {
            return Err(Error::files(
                file,
                format!("tensor `{name}` is {shape:?}, not a matrix, or its module has none"),
            ));
        };
        let dims = if embedding { (rows, columns) } else { (columns, rows) };
        if d_in != dims.0 || rank == 0 {
            let made_for = self.made_for();
            let reason =
                format!("tensor `{name}` is {shape:?}, but `{module}` of this model takes {}{made_for}", dims.0);
            return Err(Error::files(file, reason));
        }
        if embedding != (spec.role == Role::Embed) || spec.role == Role::Position {
            let reason = format!("tensor `{name}`: `{module}` of this model takes no such matrix");
            return Err(Error::files(file, reason));
        }
        let alpha = self.pattern("alpha_pattern", module)?.or(self.number("lora_alpha"));
        let Some(alpha) = alpha.filter(|alpha| alpha.is_finite()) else {
            return Err(Error::files(&self.dir.join(ADAPTER_CONFIG), "`lora_alpha` is missing or no number"));
        };
        let scale = if self.flag("use_rslora")? { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 };
        let dora = self.tensors.info(&format!("{PEFT_PREFIX}{module}.lora_magnitude_vector")).is_some();
        if dora && (embedding || spec.role == Role::Head) {
            let reason = format!("`{module}` has magnitudes (DoRA), which are supported for projections only");
            return Err(Error::files(file, reason));
        }
        if self.flag("use_dora")? && !dora && !embedding {
            let reason = format!("`use_dora` is set but `{module}` has no magnitudes; fetch the adapter again");
            return Err(Error::files(file, reason));
        }
        let stored_transposed = spec.stored_transposed;
        Ok(Adapted { rank, alpha, scale, dora, embedding, dims, stored_transposed })
    }

    /// Rows of a head that is tied to the embedding are stored too where the vocabulary has grown: they must be the embedding's.
    fn check_tied_rows(&self, name: &str, specs: &[ParamSpec]) -> Result<()> {
        let embedding = specs.iter().find(|spec| spec.role == Role::Embed);
        let embedding = embedding.and_then(|spec| spec.name.strip_suffix(".weight"));
        let twin = embedding.map(|module| format!("{PEFT_PREFIX}{module}{TOKEN_ROWS}")).unwrap_or_default();
        let shapes = self.tensors.info(name).zip(self.tensors.info(&twin)).map(|(a, b)| (&a.shape, &b.shape));
        let head_of_its_own = specs.iter().any(|spec| spec.role == Role::Head);
        let Some((shape, _)) = shapes.filter(|(a, b)| a == b && !head_of_its_own) else {
            return Err(self.foreign(name));
        };
        let (mut ours, mut theirs) = (vec![0f32; shape.iter().product()], vec![0f32; shape.iter().product()]);
        self.tensors.read_f32(name, &mut ours)?;
        self.tensors.read_f32(&twin, &mut theirs)?;
        if ours == theirs {
            return Ok(());
        }
        let reason = format!("tensor `{name}` differs from `{twin}`, but the head of this model is the embedding");
        Err(Error::files(&self.weights, reason))
    }

    /// What `trainable_token_indices` says of a module: a list means the embedding, an object names its modules by their ends.
    fn tokens_said(&self, module: &str, role: Role) -> Option<&Value> {
        match self.config.get("trainable_token_indices")? {
            Value::Object(map) => map.iter().find(|(pattern, _)| names(pattern, module)).map(|(_, list)| list),
            list => Some(list).filter(|list| role == Role::Embed && !list.is_null()),
        }
    }

    /// With a head that is tied to the embedding it matters whether PEFT trained both as one: `ensure_weight_tying`.
    fn check_tied(
        &self,
        specs: &[ParamSpec],
        saved: &HashSet<String>,
        modules: &BTreeMap<String, Adapted>,
    ) -> Result<()> {
        let key = "ensure_weight_tying";
        if specs.iter().any(|spec| spec.role == Role::Head) {
            return Ok(());
        }
        let tied = self.flag(key)?;
        let path = self.dir.join(ADAPTER_CONFIG);
        for spec in specs.iter().filter(|spec| spec.role == Role::Embed) {
            let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
            let reason = match (saved.contains(&spec.name), modules.contains_key(module)) {
                (true, _) if !tied => {
                    "trained the embedding apart from the head that is tied to it; a head of its own is not \
                                       supported: train it with ensure_weight_tying = true"
                }
                (_, true) if tied => {
                    "adapts the embedding and the head that is tied to it; only the embedding can be adapted"
                }
                _ => continue,
            };
            return Err(Error::files(&path, format!("`{module}`: `{key}` = {tied}: {reason}")));
        }
        Ok(())
    }

    /// The tokens whose rows tensor `name` has, the rows of `module` with parameter `spec`.
    fn tokens_of(&self, name: &str, module: &str, spec: &ParamSpec) -> Result<Vec<u32>> {
        let file = &self.weights;
        let key = "trainable_token_indices";
        let list = self.tokens_said(module, spec.role);
        let tokens: Option<Vec<u32>> = list.and_then(|list| serde_json::from_value(list.clone()).ok());
        let Some(tokens) = tokens.filter(|tokens| !tokens.is_empty()) else {
            let reason = format!("`{key}` does not say which tokens the rows of tensor `{name}` belong to");
            return Err(Error::files(&self.dir.join(ADAPTER_CONFIG), reason));
        };
        let shape = self.tensors.info(name).map(|info| info.shape.clone()).unwrap_or_default();
        let made_for = self.made_for();
        if !matches!(spec.role, Role::Embed | Role::Head) || shape[..] != [tokens.len(), spec.shape[1]] {
            let (n, of) = (tokens.len(), &spec.shape);
            let reason =
                format!("tensor `{name}` is {shape:?}, but {n} tokens of `{module}` {of:?} are meant{made_for}");
            return Err(Error::files(file, reason));
        }
        let mut sorted = tokens.clone();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::files(file, format!("tensor `{name}`: token {} is there twice", twice[0])));
        }
        match sorted.last() {
            Some(last) if *last as usize >= spec.shape[0] => {
                let reason = format!(
                    "tensor `{name}`: token {last} is not below the {} rows of this model, and the rows between are not in the \
                     adapter; give the model that it was trained beside{made_for}",
                    spec.shape[0]
                );
                Err(Error::files(file, reason))
            }
            _ => Ok(tokens),
        }
    }

    /// How many rows a vocabulary must have for this adapter, where that is more than the model with parameters `specs` has and
    /// the adapter has the values of all that are new: its tokens were added to the model that it was trained beside.
    pub fn rows_needed(&self, specs: &[ParamSpec]) -> Option<usize> {
        let table = |spec: &&ParamSpec| spec.role == Role::Embed;
        let spec = specs.iter().find(table)?;
        let (rows, module) = (spec.shape[0], spec.name.strip_suffix(".weight")?);
        let (_, whole) = self.find(&spec.name);
        if let Some(&[more, columns]) = whole.map(|info| info.shape.as_slice()) {
            return (more > rows && columns == spec.shape[1]).then_some(more);
        }
        let name = format!("{PEFT_PREFIX}{module}{TOKEN_ROWS}");
        let list = self.tokens_said(module, spec.role)?.as_array()?;
        let mut new: Vec<u64> = list.iter().filter_map(Value::as_u64).filter(|id| *id >= rows as u64).collect();
        new.sort_unstable();
        let dense = new.iter().zip(rows as u64..).all(|(id, row)| *id == row);
        (dense && !new.is_empty() && self.tensors.info(&name).is_some()).then_some(rows + new.len())
    }

    /// Every parameter that the plan asks for is there in its shape, and every tensor is asked for.
    fn check_shapes(&self, plan: &AdapterPlan, specs: &[ParamSpec], used: &HashSet<String>) -> Result<()> {
        let file = &self.weights;
        let mut wanted = HashSet::new();
        for (module, _) in plan.modules() {
            let base = specs.iter().find(|s| s.name.strip_suffix(".weight") == Some(module));
            for spec in base.map(|base| plan.specs_of(module, base)).unwrap_or_default() {
                let (name, info) = self.find(&spec.name);
                let Some(info) = info else {
                    return Err(Error::files(file, format!("tensor `{name}` is missing; fetch the adapter again")));
                };
                if info.shape != spec.stored_shape() {
                    let (is, needed, made_for) = (&info.shape, spec.stored_shape(), self.made_for());
                    let reason = format!("tensor `{name}` is {is:?} but {needed:?} is needed{made_for}");
                    return Err(Error::files(file, reason));
                }
                wanted.insert(name);
            }
        }
        wanted.extend(plan.tokens.keys().map(|module| format!("{PEFT_PREFIX}{module}{TOKEN_ROWS}")));
        for spec in specs.iter().filter(|spec| plan.saved.contains(&spec.name)) {
            let (name, info) = self.find(&spec.name);
            if info.is_none_or(|info| info.shape != spec.stored_shape()) {
                let reason = format!("tensor `{name}` must be {:?}, as its module in this model", spec.stored_shape());
                return Err(Error::files(file, reason));
            }
            wanted.insert(name);
        }
        match used.iter().find(|name| !wanted.contains(*name)) {
            Some(name) => {
                Err(Error::files(file, format!("tensor `{name}` would be ignored: its other half is missing")))
            }
            None => Ok(()),
        }
    }

    /// The tensor of a parameter: PEFT once wrote `modules_to_save` into the names of whole modules.
    fn find(&self, parameter: &str) -> (String, Option<&tallow_formats::TensorInfo>) {
        let name = format!("{PEFT_PREFIX}{parameter}");
        if let Some(info) = self.tensors.info(&name) {
            return (name, Some(info));
        }
        if let Some((module, leaf)) = parameter.rsplit_once('.') {
            let older = format!("{PEFT_PREFIX}{module}.modules_to_save.{leaf}");
            if let Some(info) = self.tensors.info(&older) {
                return (older, Some(info));
            }
        }
        match self.base_tensor(parameter) {
            Some((name, info)) => (name, Some(info)),
            None => (name, None),
        }
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.config.get(key).and_then(Value::as_f64)
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => {
                let reason = format!("`{key}` = {other} is neither true nor false");
                Err(Error::files(&self.dir.join(ADAPTER_CONFIG), reason))
            }
        }
    }

    /// The number of the first pattern of `key` that fits the end of a module's name, as PEFT matches them.
    fn pattern(&self, key: &str, module: &str) -> Result<Option<f64>> {
        let path = self.dir.join(ADAPTER_CONFIG);
        let map = match self.config.get(key) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(map)) => map,
            Some(other) => return Err(Error::files(&path, format!("`{key}` = {other} is no object of patterns"))),
        };
        for (pattern, value) in map {
            let wrong = |e: String| Error::files(&path, format!("`{key}`: `{pattern}`: {e}"));
            let regex = format!("^(?:.*\\.)?(?:{pattern})$");
            let regex = fancy_regex::Regex::new(&regex).map_err(|e| wrong(e.to_string()))?;
            if regex.is_match(module).map_err(|e| wrong(e.to_string()))? {
                return value.as_f64().map(Some).ok_or_else(|| wrong("is not a number".into()));
            }
        }
        Ok(None)
    }
}

/// The parameter that `NAME.base_layer.weight` holds.
fn base_layer(name: &str) -> Option<String> {
    name.contains(".base_layer.").then(|| name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", "."))
}

/// Keys of newer versions of PEFT with the values that mean nothing.
fn is_default(key: &str, value: &Value) -> bool {
    matches!((key, value.as_str()), ("megatron_core", Some("megatron.core")) | ("qalora_group_size", None))
        || (key == "qalora_group_size" && value.is_number())
}

impl Fill for PeftAdapter {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> tallow_nn::Result<()> {
        let (name, _) = self.find(&spec.name);
        if !spec.stored_transposed {
            return Ok(self.tensors.read_f32(&name, out)?);
        }
        let mut stored = vec![0f32; out.len()];
        self.tensors.read_f32(&name, &mut stored)?;
        transpose(&stored, spec.shape[1], out);
        Ok(())
    }
}

/// `from [rows, cols]` with `rows` rows, to `to [cols, rows]`.
pub(crate) fn transpose(from: &[f32], rows: usize, to: &mut [f32]) {
    let cols = from.len() / rows.max(1);
    for (r, row) in from.chunks_exact(cols.max(1)).enumerate() {
        for (c, &x) in row.iter().enumerate() {
            to[c * rows + r] = x;
        }
    }
}
