//! What an adapter's settings mean for one model.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tallow_nn::{Build, Fill, Init, Pack, ParamSpec, Role};
use tallow_ops::PackedMatrix;

use crate::config::names;
use crate::tokens::TOKEN_ROWS;
use crate::{AdapterFactory, Error, LoraConfig, LoraInit, Result, Targets};

/// The adapter of one module.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapted {
    /// Inner width.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// Factor of the product.
    pub scale: f64,
    /// Magnitudes of its own.
    pub dora: bool,
    /// An embedding, whose matrices PEFT stores the other way round.
    pub embedding: bool,
    /// Inputs and outputs (rows and channels of an embedding).
    pub dims: (usize, usize),
    /// The base matrix is stored as `[in, out]`.
    pub stored_transposed: bool,
}

/// Which modules of a model have an adapter, and which parameters are trained.
#[derive(Clone, Debug)]
pub struct AdapterPlan {
    pub(crate) config: LoraConfig,
    pub(crate) modules: BTreeMap<String, Adapted>,
    pub(crate) saved: HashSet<String>,
    /// The modules some of whose rows are trained, and of which tokens.
    pub(crate) tokens: BTreeMap<String, Vec<u32>>,
    /// The modules by the ends of their names, where these name no other.
    pub(crate) compact: Vec<String>,
}

/// The module that a matrix belongs to, if an adapter can stand beside it.
fn module_of(spec: &ParamSpec) -> Option<&str> {
    let adaptable =
        matches!(spec.role, Role::Qkv | Role::AttnOut | Role::MlpIn | Role::MlpOut | Role::Head | Role::Embed);
    (adaptable && spec.shape.len() == 2).then(|| spec.name.strip_suffix(".weight")).flatten()
}

impl AdapterPlan {
    /// What `config` means for the model with parameters `specs` (without an adapter).
    ///
    /// # Errors
    /// For settings that cannot work, a name that no module has, or a rank above the smaller side of a module.
    pub fn new(config: &LoraConfig, specs: &[ParamSpec]) -> Result<Self> {
        config.validate()?;
        let candidates: Vec<(&str, &ParamSpec)> = specs.iter().filter_map(|s| Some((module_of(s)?, s))).collect();
        let known: Vec<&str> = candidates.iter().map(|(module, _)| *module).collect();
        let all: Vec<&str> = specs.iter().filter_map(|s| s.name.rsplit_once('.').map(|(module, _)| module)).collect();
        if let Targets::Names(patterns) = &config.targets {
            if patterns.is_empty() {
                return Err(Error::config(
                    "targets",
                    "[]",
                    "names nothing; e.g. \"all-linear\" or [\"q_proj\", \"v_proj\"]",
                ));
            }
            check_known("targets", patterns, &known)?;
        }
        check_known("exclude", &config.exclude, &known)?;
        check_known("ranks", config.ranks.keys(), &known)?;
        check_known("alphas", config.alphas.keys(), &known)?;
        check_known("modules_to_save", &config.modules_to_save, &all)?;
        let any = |patterns: &[String], module: &str| patterns.iter().any(|pattern| names(pattern, module));
        let mut modules = BTreeMap::new();
        for (module, spec) in candidates {
            let wanted = match &config.targets {
                Targets::AllLinear => !matches!(spec.role, Role::Head | Role::Embed),
                Targets::Names(patterns) => any(patterns, module),
            };
            if wanted && !any(&config.exclude, module) {
                modules.insert(module.to_owned(), adapted(config, module, spec)?);
            }
        }
        if modules.is_empty() {
            return Err(Error::config("exclude", format!("{:?}", config.exclude), "leaves no module with an adapter"));
        }
        let saved: HashSet<String> = specs
            .iter()
            .filter(|s| s.name.rsplit_once('.').is_some_and(|(module, _)| any(&config.modules_to_save, module)))
            .map(|s| s.name.clone())
            .collect();
        let both = |module: &&String| saved.contains(&format!("{module}.weight"));
        if let Some(module) = modules.keys().find(both) {
            let reason = "has an adapter as well; name it in `modules_to_save` or in `targets`, not both";
            return Err(Error::config("modules_to_save", module, reason));
        }
        let tokens = token_rows(config, specs, &saved)?;
        if let Some(module) = tokens.keys().find(|module| modules.contains_key(*module)) {
            let reason = format!("`{module}` has an adapter as well; leave it out of `targets`, or the tokens");
            return Err(Error::config("tokens", format!("{:?}", config.tokens), reason));
        }
        let compact = compact(&modules, &known);
        Ok(Self { config: config.clone(), modules, saved, tokens, compact })
    }

    /// The settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The modules with an adapter, by name.
    pub fn modules(&self) -> impl Iterator<Item = (&str, &Adapted)> {
        self.modules.iter().map(|(name, adapted)| (name.as_str(), adapted))
    }

    /// The parameters that are trained whole and saved beside the matrices.
    pub fn saved(&self) -> impl Iterator<Item = &str> {
        self.saved.iter().map(String::as_str)
    }

    /// The modules some of whose rows are trained, and the tokens of these rows.
    pub fn tokens(&self) -> impl Iterator<Item = (&str, &[u32])> {
        self.tokens.iter().map(|(module, tokens)| (module.as_str(), tokens.as_slice()))
    }

    /// Whether another plan has the same modules, ranks and scales.
    pub fn is_same(&self, other: &Self) -> bool {
        // Files hold numbers in decimals, which may come back with another last digit.
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * a.abs().max(b.abs());
        let same = |a: &Adapted, b: &Adapted| {
            near(a.alpha, b.alpha)
                && near(a.scale, b.scale)
                && *a == Adapted { alpha: a.alpha, scale: a.scale, ..b.clone() }
        };
        self.modules.keys().eq(other.modules.keys())
            && self.modules.values().zip(other.modules.values()).all(|(a, b)| same(a, b))
            && self.saved == other.saved
            && self.tokens == other.tokens
    }

    /// Whether a parameter is trained and saved; the others are frozen.
    pub fn is_trained(&self, spec: &ParamSpec) -> bool {
        self.saved.contains(&spec.name) || (self.is_own(&spec.name) && !self.is_start(spec))
    }

    /// Whether a parameter is where another one started: frozen, but the adapter's and saved with it.
    pub fn is_start(&self, spec: &ParamSpec) -> bool {
        self.adapter_module(&spec.name).is_some_and(|(_, part)| part.starts_with("lora_start_"))
    }

    /// The name of where a trained parameter started, where that is kept.
    pub(crate) fn start_of(&self, spec: &ParamSpec) -> Option<String> {
        let (module, part) = self.adapter_module(&spec.name)?;
        let matrix = matches!(part, "lora_A.weight" | "lora_B.weight") && self.config.init == LoraInit::Olora;
        matrix.then(|| format!("{module}.{}", part.replace("lora_", "lora_start_")))
    }

    /// Keeps `pack` from what is the adapter's own.
    pub fn pack<'a>(&'a self, pack: &'a dyn Pack) -> impl Pack + 'a {
        BaseOnly { plan: self, pack }
    }

    /// What the files of this adapter say: a start is a part of the adapter there, which has twice the rank.
    pub fn in_files(&self) -> Self {
        if self.config.init != LoraInit::Olora {
            return self.clone();
        }
        // alpha / r is the same, alpha / sqrt(r) likewise.
        let factor = if self.config.rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        let mut plan = self.clone();
        plan.config.init = LoraInit::Kaiming;
        (plan.config.rank, plan.config.alpha) = (2 * self.config.rank, factor * self.config.alpha);
        plan.modules.values_mut().for_each(|m| (m.rank, m.alpha) = (2 * m.rank, factor * m.alpha));
        plan
    }

    /// Whether a parameter is the adapter's and not the model's.
    pub(crate) fn is_own(&self, name: &str) -> bool {
        self.adapter_module(name).is_some() || self.token_module(name).is_some()
    }

    /// The module whose rows a parameter has, and their tokens.
    pub(crate) fn token_module<'a>(&self, name: &'a str) -> Option<(&'a str, &[u32])> {
        let module = name.strip_suffix(TOKEN_ROWS)?;
        Some((module, self.tokens.get(module)?.as_slice()))
    }

    /// The module and the part (`lora_A.weight`...) of an adapter's parameter.
    pub(crate) fn adapter_module<'a>(&self, name: &'a str) -> Option<(&'a str, &'a str)> {
        let at = name.rfind(".lora_")?;
        let (module, part) = (&name[..at], &name[at + 1..]);
        self.modules.contains_key(module).then_some((module, part))
    }

    /// Builds a model with its adapters around it: `build` is the model's own.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn build<M>(&self, b: &Build, build: impl FnOnce(&Build) -> tallow_nn::Result<M>) -> tallow_nn::Result<M> {
        let factory = AdapterFactory::new(b.factory(), self);
        build(&Build::new(&factory))
    }

    /// The two matrices of a module as parameters, and the magnitudes of DoRA.
    pub fn specs_of(&self, module: &str, base: &ParamSpec) -> Vec<ParamSpec> {
        let Some(adapted) = self.modules.get(module) else { return vec![] };
        let (rank, (d_in, d_out)) = (adapted.rank, adapted.dims);
        let spec = |part: &str, shape: Vec<usize>, init: Init, stored_transposed: bool| ParamSpec {
            name: format!("{module}.{part}"),
            shape,
            role: base.role,
            init,
            decay: part != "lora_magnitude_vector",
            stored_transposed,
            stage: base.stage,
        };
        let a_init = match self.config.init {
            LoraInit::Kaiming | LoraInit::Olora => Init::Uniform(1.0 / (d_in as f32).sqrt()),
            LoraInit::Gaussian => Init::Normal(1.0 / rank as f32),
        };
        if adapted.embedding {
            // In memory rows are looked up by id, so A is kept as [vocab, r]; the file has [r, vocab].
            return vec![
                spec("lora_embedding_A", vec![d_in, rank], Init::Zeros, true),
                spec("lora_embedding_B", vec![d_out, rank], Init::Normal(1.0), false),
            ];
        }
        let mut specs = vec![
            spec("lora_A.weight", vec![rank, d_in], a_init, false),
            spec("lora_B.weight", vec![d_out, rank], Init::Zeros, false),
        ];
        if adapted.dora {
            specs.push(spec("lora_magnitude_vector", vec![d_out], Init::Ones, false));
        }
        specs
    }
}

impl AdapterPlan {
    /// The frozen pair of a module whose adapter starts within its matrix: where its two matrices started.
    pub(crate) fn start_specs_of(&self, module: &str, base: &ParamSpec) -> Option<[ParamSpec; 2]> {
        if self.config.init != LoraInit::Olora {
            return None;
        }
        let mut specs = self.specs_of(module, base).into_iter();
        let start = |part: &str, spec: ParamSpec| ParamSpec { name: format!("{module}.{part}"), decay: false, ..spec };
        Some([start("lora_start_A.weight", specs.next()?), start("lora_start_B.weight", specs.next()?)])
    }
}

struct BaseOnly<'a> {
    plan: &'a AdapterPlan,
    pack: &'a dyn Pack,
}

impl BaseOnly<'_> {
    fn is_base(&self, spec: &ParamSpec) -> bool {
        !self.plan.saved.contains(&spec.name) && !self.plan.is_own(&spec.name)
    }
}

impl Pack for BaseOnly<'_> {
    fn pack(&self, spec: &ParamSpec, fill: &dyn Fill) -> tallow_nn::Result<Option<Arc<dyn PackedMatrix>>> {
        if self.is_base(spec) { self.pack.pack(spec, fill) } else { Ok(None) }
    }

    fn planned_bytes(&self, spec: &ParamSpec) -> tallow_nn::Result<Option<usize>> {
        if self.is_base(spec) { self.pack.planned_bytes(spec) } else { Ok(None) }
    }
}

/// The tables that `config.tokens` have rows of, but those that are trained whole.
fn token_rows(config: &LoraConfig, specs: &[ParamSpec], saved: &HashSet<String>) -> Result<BTreeMap<String, Vec<u32>>> {
    let mut tables = BTreeMap::new();
    let wrong = |reason: String| Err(Error::config("tokens", format!("{:?}", config.tokens), reason));
    let mut sorted = config.tokens.clone();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return wrong(format!("token {} is there twice", twice[0]));
    }
    let Some(last) = sorted.last() else { return Ok(tables) };
    for spec in specs.iter().filter(|spec| matches!(spec.role, Role::Embed | Role::Head)) {
        if *last as usize >= spec.shape[0] {
            return wrong(format!("token {last} is not below the {} rows of `{}`", spec.shape[0], spec.name));
        }
        if let Some(module) = spec.name.strip_suffix(".weight").filter(|_| !saved.contains(&spec.name)) {
            tables.insert(module.to_owned(), config.tokens.clone());
        }
    }
    Ok(tables)
}

fn adapted(config: &LoraConfig, module: &str, spec: &ParamSpec) -> Result<Adapted> {
    let of = |patterns: Vec<&String>| patterns.into_iter().find(|pattern| names(pattern, module)).cloned();
    let rank = of(config.ranks.keys().collect()).and_then(|key| config.ranks.get(&key)).copied().unwrap_or(config.rank);
    let alpha =
        of(config.alphas.keys().collect()).and_then(|key| config.alphas.get(&key)).copied().unwrap_or(config.alpha);
    let embedding = spec.role == Role::Embed;
    let (d_out, d_in) = if embedding { (spec.shape[1], spec.shape[0]) } else { (spec.shape[0], spec.shape[1]) };
    let most = d_in.min(d_out);
    if rank > most {
        let reason = format!("`{module}` is {d_out} x {d_in}: a rank above {most} is more than the matrix itself has");
        return Err(Error::config("rank", rank, reason));
    }
    if config.init == LoraInit::Olora && (embedding || spec.role == Role::Head) {
        let reason = format!("`{module}` cannot start within its matrix; leave it out, or set init = \"kaiming\"");
        return Err(Error::config("init", "olora", reason));
    }
    if embedding && config.dora {
        return Err(Error::config(
            "targets",
            module,
            "an embedding has no DoRA here; leave it out, or set kind = \"lora\"",
        ));
    }
    if spec.role == Role::Head && config.dora {
        return Err(Error::config(
            "targets",
            module,
            "the head has no DoRA here; leave it out, or set kind = \"lora\"",
        ));
    }
    let scale = if config.rslora { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 };
    let stored_transposed = spec.stored_transposed;
    Ok(Adapted { rank, alpha, scale, dora: config.dora, embedding, dims: (d_in, d_out), stored_transposed })
}

/// The ends of the modules' names that name them all and no other.
fn compact(modules: &BTreeMap<String, Adapted>, known: &[&str]) -> Vec<String> {
    let end = |module: &str| module.rsplit_once('.').map_or(module, |(_, end)| end).to_owned();
    let mut ends: Vec<String> = modules.keys().map(|module| end(module)).collect();
    ends.sort_unstable();
    ends.dedup();
    let exact = known.iter().all(|module| modules.contains_key(*module) || !ends.contains(&end(module)));
    if exact { ends } else { vec![] }
}

/// Fails at the first pattern that names nothing.
fn check_known<'a>(key: &'static str, patterns: impl IntoIterator<Item = &'a String>, known: &[&str]) -> Result<()> {
    for pattern in patterns {
        if known.iter().any(|module| names(pattern, module)) {
            continue;
        }
        let mut ends: Vec<&str> = known.iter().map(|m| m.rsplit_once('.').map_or(*m, |(_, end)| end)).collect();
        ends.sort_unstable();
        ends.dedup();
        let nearest = ends.iter().max_by(|a, b| strsim::jaro(a, pattern).total_cmp(&strsim::jaro(b, pattern)));
        let nearest = nearest.map(|end| format!("; the nearest is `{end}`")).unwrap_or_default();
        let tied = match pattern.as_str() {
            "lm_head" => "; a head that is tied to the embedding has no weights of its own: name the embedding",
            _ => "",
        };
        let reason = format!("names no module of this model{nearest}; there are {}{tied}", ends.join(", "));
        return Err(Error::config(key, format!("{pattern:?}"), reason));
    }
    Ok(())
}
