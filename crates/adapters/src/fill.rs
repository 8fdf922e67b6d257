//! Where the values of an adapted model come from.

use tallow_nn::{Error, Fill, Pack, ParamSpec, RandomInit, Result};

use crate::{AdapterPlan, PeftAdapter};

/// The base model's values from its own source; the adapter's from files, or at random as their [`tallow_nn::Init`] says.
/// Magnitudes of a new DoRA are the norms of the rows of the base, so that it begins as the base itself.
pub struct AdapterFill<'a> {
    base: &'a dyn Fill,
    plan: &'a AdapterPlan,
    specs: &'a [ParamSpec],
    pack: Option<&'a dyn Pack>,
    source: Source<'a>,
}

enum Source<'a> {
    New(RandomInit),
    Files(&'a PeftAdapter),
}

impl<'a> AdapterFill<'a> {
    /// For a new adapter. `specs` are the parameters of the adapted model, `pack` what its base is packed by: norms are
    /// those of the values in use.
    pub fn new(
        base: &'a dyn Fill,
        plan: &'a AdapterPlan,
        specs: &'a [ParamSpec],
        pack: Option<&'a dyn Pack>,
        random: RandomInit,
    ) -> Self {
        Self { base, plan, specs, pack, source: Source::New(random) }
    }

    /// For an adapter in files.
    pub fn of_files(base: &'a dyn Fill, plan: &'a AdapterPlan, specs: &'a [ParamSpec], files: &'a PeftAdapter) -> Self {
        Self { base, plan, specs, pack: None, source: Source::Files(files) }
    }

    fn norms(&self, module: &str, out: &mut [f32]) -> Result<()> {
        let name = format!("{module}.weight");
        let Some(spec) = self.specs.iter().find(|spec| spec.name == name) else {
            return Err(Error::Param { name, reason: "has an adapter but is not in the model's plan".into() });
        };
        let mut values = vec![0f32; spec.num_elements()];
        match self.pack.map(|pack| pack.pack(spec, self.base)).transpose()?.flatten() {
            Some(matrix) => matrix.unpack(0..matrix.dims().0, &mut values),
            None => self.base.fill(spec, &mut values)?,
        }
        let columns = values.len() / out.len().max(1);
        for (norm, row) in out.iter_mut().zip(values.chunks_exact(columns.max(1))) {
            *norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt() as f32;
        }
        Ok(())
    }
}

impl Fill for AdapterFill<'_> {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> Result<()> {
        match &self.source {
            Source::Files(files) if files.holds_base(spec) => files.fill(spec, out),
            _ if !self.plan.is_trained(spec) => self.base.fill(spec, out),
            Source::Files(files) => files.fill(spec, out),
            Source::New(random) => match self.plan.adapter_module(&spec.name) {
                Some((module, "lora_magnitude_vector")) => self.norms(module, out),
                Some(_) => random.fill(spec, out),
                None => self.base.fill(spec, out),
            },
        }
    }
}
