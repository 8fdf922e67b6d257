//! [`AdapterSet`]: several adapters beside one model, weighed anew in each pass.

use std::path::PathBuf;
use std::sync::Arc;

use tallow_nn::{Build, Fill, ParamSpec};

use crate::factory::indexed;
use crate::{AdapterFactory, AdapterPlan, Error, PeftAdapter, Result, merge_into};

/// An adapter in files, what it is called and how much of it is added where a pass does not say.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedAdapter {
    /// Its name among those that a model holds.
    pub name: String,
    /// Its PEFT directory.
    pub path: PathBuf,
    /// Its weight `w`: `y = x W^T + sum_i w_i s_i (x A_i^T) B_i^T`. 0 leaves it out.
    pub weight: f32,
}

impl NamedAdapter {
    /// Called by its path, with weight 1.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self { name: path.display().to_string(), path, weight: 1.0 }
    }
}

struct Member {
    name: String,
    files: PeftAdapter,
    plan: AdapterPlan,
}

/// Adapters of one model, opened but not yet read. Their ranks, modules and settings may differ; the base is held once. With
/// [`ForwardContext::adapters`](tallow_nn::ForwardContext::adapters) each pass may weigh them differently.
///
/// Modules that an adapter holds whole (`modules_to_save`), and rows of tokens, stand in for the base's as long as the set is used, whatever the
/// weight: only one adapter may have them, and its weight cannot be 0. DoRA is no sum: it stands alone, with weight 1 or 0.
pub struct AdapterSet {
    members: Vec<Member>,
    weights: Arc<[f32]>,
}

impl AdapterSet {
    /// Opens `adapters`, PEFT directories, of the model with parameters `base` (without an adapter), whose values `fill` has.
    ///
    /// # Errors
    /// As [`new`](Self::new), and if one cannot be opened.
    pub fn open(adapters: &[NamedAdapter], base: &[ParamSpec], fill: &dyn Fill) -> Result<Self> {
        let opened = adapters.iter().map(|adapter| Ok((adapter.clone(), PeftAdapter::open(&adapter.path)?)));
        Self::new(opened.collect::<Result<_>>()?, base, fill)
    }

    /// Of opened files of the model with parameters `base` (without an adapter), whose values `fill` has.
    ///
    /// # Errors
    /// If there is none, one is not of this model, a name is there twice, or two cannot be used together.
    pub fn new(adapters: Vec<(NamedAdapter, PeftAdapter)>, base: &[ParamSpec], fill: &dyn Fill) -> Result<Self> {
        let weights: Vec<f32> = adapters.iter().map(|(adapter, _)| adapter.weight).collect();
        let mut members: Vec<Member> = vec![];
        for (NamedAdapter { name, .. }, files) in adapters {
            if members.iter().any(|member| member.name == name) {
                let reason = "is there twice; name it once, with the sum of the weights".to_owned();
                return Err(Error::config("adapter", name, reason));
            }
            let plan = files.plan(base)?;
            members.push(Member { name, files, plan });
        }
        let set = Self { members, weights: Arc::new([]) };
        set.check_together(base, fill)?;
        let weights = set.weights_of(&weights)?;
        Ok(Self { weights, ..set })
    }

    fn check_together(&self, base: &[ParamSpec], fill: &dyn Fill) -> Result<()> {
        let Some(first) = self.members.first() else {
            return Err(Error::config("adapter", "[]", "names no adapter"));
        };
        if self.members.len() == 1 {
            return Ok(());
        }
        if let Some(dora) = self.members.iter().find(|m| m.plan.modules().any(|(_, module)| module.dora)) {
            let other = if dora.name == first.name { &self.members[1].name } else { &first.name };
            let reason =
                format!("has magnitudes (DoRA), which do not add up with `{other}`; use it alone, or merge it first");
            return Err(Error::config("adapter", &dora.name, reason));
        }
        let whole: Vec<&Member> = self.members.iter().filter(|m| m.holds_values()).collect();
        if let [one, two, ..] = whole.as_slice() {
            let reason = format!(
                "holds whole modules (modules_to_save) or rows of tokens, and `{}` as well: only one of those used together may",
                two.name
            );
            return Err(Error::config("adapter", &one.name, reason));
        }
        for member in &self.members {
            let other = |m: &&Member| m.name != member.name && m.plan.modules.keys().any(|k| member.saves(k));
            if let Some(other) = self.members.iter().find(other) {
                let reason = format!("holds a module whole that `{}` adapts; they cannot be used together", other.name);
                return Err(Error::config("adapter", &member.name, reason));
            }
            for spec in base.iter().filter(|spec| member.files.holds_base(spec)) {
                let (mut theirs, mut ours) = (vec![0f32; spec.num_elements()], vec![0f32; spec.num_elements()]);
                member.files.fill(spec, &mut theirs)?;
                fill.fill(spec, &mut ours)?;
                if theirs != ours {
                    let reason = format!("holds another `{}` than the model: it can be used only alone", spec.name);
                    return Err(Error::config("adapter", &member.name, reason));
                }
            }
        }
        Ok(())
    }

    /// Their names, in the order of the weights.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| member.name.as_str())
    }

    /// What each means for the model, in the same order.
    pub fn plans(&self) -> impl Iterator<Item = &AdapterPlan> {
        self.members.iter().map(|member| &member.plan)
    }

    /// Whether the values of a parameter come from an adapter's files and not from the base.
    pub fn holds(&self, spec: &ParamSpec) -> bool {
        self.members.iter().enumerate().any(|(index, Member { files, plan, .. })| {
            let own = spec.name.strip_prefix(&indexed(index, ""));
            plan.saved.contains(&spec.name) || files.holds_base(spec) || own.is_some_and(|name| plan.is_own(name))
        })
    }

    /// The weights where a pass names none.
    pub fn weights(&self) -> &Arc<[f32]> {
        &self.weights
    }

    /// `weights`, one for each adapter, for a pass.
    ///
    /// # Errors
    /// If they are not as many as adapters, one is not finite, or an adapter cannot have its weight.
    pub fn weights_of(&self, weights: &[f32]) -> Result<Arc<[f32]>> {
        if weights.len() != self.members.len() {
            let reason = format!("there are {} adapters, each has one weight", self.members.len());
            return Err(Error::config("adapters", format!("{weights:?}"), reason));
        }
        for (member, &weight) in self.members.iter().zip(weights) {
            let dora = member.plan.modules().any(|(_, module)| module.dora);
            let reason = if !weight.is_finite() {
                "must be a finite number"
            } else if weight == 0.0 && member.holds_values() {
                "it holds whole modules (modules_to_save) or rows of tokens, which cannot be left out; open the model without it"
            } else if dora && weight != 0.0 && weight != 1.0 {
                "an adapter with magnitudes (DoRA) is no sum: its weight can be 1 or 0"
            } else {
                continue;
            };
            return Err(Error::config("adapter", format!("{}={weight}", member.name), reason));
        }
        Ok(weights.into())
    }

    /// Builds a model with the adapters around it: `build` is the model's own.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn build<M>(&self, b: &Build, build: impl FnOnce(&Build) -> tallow_nn::Result<M>) -> tallow_nn::Result<M> {
        let factory = AdapterFactory::of_all(b.factory(), self.plans().collect(), self.weights.clone());
        build(&Build::new(&factory))
    }

    /// The values of the model that [`build`](Self::build) builds; those of the base are in `base`.
    pub fn fill<'a>(&'a self, base: &'a dyn Fill) -> impl Fill + 'a {
        SetFill { set: self, base, merged: None }
    }

    /// The values of the base with all of them added by their weights; `base_specs` are its parameters.
    pub fn merged<'a>(&'a self, base: &'a dyn Fill, base_specs: &'a [ParamSpec]) -> impl Fill + 'a {
        SetFill { set: self, base, merged: Some(base_specs) }
    }
}

impl Member {
    /// Whether it has values of its own in place of the base's, which no weight scales.
    fn holds_values(&self) -> bool {
        !self.plan.saved.is_empty() || !self.plan.tokens.is_empty()
    }

    fn saves(&self, module: &str) -> bool {
        self.plan.saved.contains(&format!("{module}.weight")) || self.plan.tokens.contains_key(module)
    }
}

struct SetFill<'a> {
    set: &'a AdapterSet,
    base: &'a dyn Fill,
    merged: Option<&'a [ParamSpec]>,
}

impl Fill for SetFill<'_> {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> tallow_nn::Result<()> {
        for (index, Member { files, plan, .. }) in self.set.members.iter().enumerate() {
            let holds = plan.saved.contains(&spec.name) || files.holds_base(spec);
            if holds {
                files.fill(spec, out)?;
                return self.add(spec, out);
            }
            let own = spec.name.strip_prefix(&indexed(index, "")).filter(|name| plan.is_own(name));
            if let Some(own) = own {
                return files.fill(&ParamSpec { name: own.to_owned(), ..spec.clone() }, out);
            }
        }
        self.base.fill(spec, out)?;
        self.add(spec, out)
    }
}

impl SetFill<'_> {
    fn add(&self, spec: &ParamSpec, out: &mut [f32]) -> tallow_nn::Result<()> {
        let Some(base_specs) = self.merged else { return Ok(()) };
        for (Member { files, plan, .. }, &weight) in self.set.members.iter().zip(self.set.weights.iter()) {
            if weight != 0.0 {
                merge_into(plan, base_specs, spec, files, weight, out)?;
            }
        }
        Ok(())
    }
}
