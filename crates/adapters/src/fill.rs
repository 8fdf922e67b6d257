//! Where the values of an adapted model come from.

use std::collections::HashMap;

use candle_core::DType;
use tallow_nn::{Error, Fill, Pack, ParamSpec, RandomInit, Result};

use crate::start::Start;
use crate::{AdapterPlan, LoraInit, PeftAdapter};

/// The base model's values from its own source; the adapter's from files, or as their [`LoraInit`] says. Magnitudes of a new
/// DoRA are the norms of the rows of the base, so that it begins as the base itself.
pub struct AdapterFill<'a> {
    base: Base<'a>,
    plan: &'a AdapterPlan,
    source: Source<'a>,
}

/// The model without its adapter, and what it is packed by: what is computed of its values is computed of those in use.
struct Base<'a> {
    fill: &'a dyn Fill,
    specs: &'a [ParamSpec],
    pack: Option<&'a dyn Pack>,
}

enum Source<'a> {
    New(RandomInit, HashMap<&'a str, Start>),
    Files(&'a PeftAdapter),
}

impl<'a> AdapterFill<'a> {
    /// For a new adapter. `specs` are the parameters of the adapted model, `pack` what its base is packed by, `dtype` what it
    /// computes in. Where adapters start within their matrices ([`LoraInit::Olora`]), these are read here.
    ///
    /// # Errors
    /// If the base's values cannot be read.
    pub fn new(
        fill: &'a dyn Fill,
        plan: &'a AdapterPlan,
        specs: &'a [ParamSpec],
        pack: Option<&'a dyn Pack>,
        dtype: DType,
        random: RandomInit,
    ) -> Result<Self> {
        let base = Base { fill, specs, pack };
        let mut starts = HashMap::new();
        if plan.config.init == LoraInit::Olora {
            for (module, adapted) in plan.modules() {
                let start = Start::olora(&base.values(module)?, (adapted.dims.1, adapted.dims.0), adapted.rank);
                starts.insert(module, if dtype == DType::BF16 { start.in_bf16() } else { start });
            }
        }
        Ok(Self { base, plan, source: Source::New(random, starts) })
    }

    /// For an adapter in files.
    pub fn of_files(fill: &'a dyn Fill, plan: &'a AdapterPlan, specs: &'a [ParamSpec], files: &'a PeftAdapter) -> Self {
        Self { base: Base { fill, specs, pack: None }, plan, source: Source::Files(files) }
    }
}

impl Base<'_> {
    fn spec(&self, module: &str) -> Result<&ParamSpec> {
        let name = format!("{module}.weight");
        let missing = "has an adapter but is not in the model's plan";
        let spec = self.specs.iter().find(|spec| spec.name == name);
        spec.ok_or_else(|| Error::Param { name, reason: missing.into() })
    }

    /// The rows of some tokens, as the source has them: a row is small, what it was rounded to is no matter.
    fn rows(&self, module: &str, tokens: &[u32], out: &mut [f32]) -> Result<()> {
        let spec = self.spec(module)?;
        let mut values = vec![0f32; spec.num_elements()];
        self.fill.fill(spec, &mut values)?;
        let columns = values.len() / spec.shape[0].max(1);
        for (out, id) in out.chunks_exact_mut(columns.max(1)).zip(tokens) {
            out.copy_from_slice(&values[*id as usize * columns..][..columns]);
        }
        Ok(())
    }

    /// The matrix of a module.
    fn values(&self, module: &str) -> Result<Vec<f32>> {
        let spec = self.spec(module)?;
        let mut values = vec![0f32; spec.num_elements()];
        match self.pack.map(|pack| pack.pack(spec, self.fill)).transpose()?.flatten() {
            Some(matrix) => matrix.unpack(0..matrix.dims().0, &mut values),
            None => self.fill.fill(spec, &mut values)?,
        }
        Ok(values)
    }

    fn norms(&self, module: &str, out: &mut [f32]) -> Result<()> {
        let values = self.values(module)?;
        let columns = values.len() / out.len().max(1);
        for (norm, row) in out.iter_mut().zip(values.chunks_exact(columns.max(1))) {
            *norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt() as f32;
        }
        Ok(())
    }
}

impl Fill for AdapterFill<'_> {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> Result<()> {
        let (random, starts) = match &self.source {
            Source::Files(files) if files.holds_base(spec) || self.plan.is_trained(spec) => {
                return files.fill(spec, out);
            }
            Source::Files(_) => return self.base.fill.fill(spec, out),
            Source::New(random, starts) => (random, starts),
        };
        if let Some((module, tokens)) = self.plan.token_module(&spec.name) {
            return self.base.rows(module, tokens, out);
        }
        match self.plan.adapter_module(&spec.name) {
            Some((module, "lora_magnitude_vector")) => self.base.norms(module, out),
            Some((module, part)) => {
                let start = starts.get(module).and_then(|start| match part {
                    "lora_A.weight" | "lora_start_A.weight" => Some(&start.a),
                    "lora_B.weight" | "lora_start_B.weight" => Some(&start.b),
                    _ => None,
                });
                match start {
                    Some(values) => out.copy_from_slice(values),
                    None => random.fill(spec, out)?,
                }
                Ok(())
            }
            None => self.base.fill.fill(spec, out),
        }
    }
}
