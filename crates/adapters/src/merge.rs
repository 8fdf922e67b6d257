//! An adapter added to the matrix that it stands beside.

use tallow_nn::{Error, Fill, ParamSpec, Result};

use crate::{AdapterPlan, PeftAdapter};

/// Adds the adapter of `spec`'s module, if it has one, to `values`, the base's values of `spec`: `W + w s B A`, and with
/// magnitudes, whose weight `w` is 1, `m (W + s B A) / |W + s B A|`, row by row; rows of tokens that it has take the place of the base's. `base_specs` are the parameters of the base.
///
/// # Errors
/// If the adapter's values cannot be read.
pub fn merge_into(
    plan: &AdapterPlan,
    base_specs: &[ParamSpec],
    spec: &ParamSpec,
    files: &PeftAdapter,
    weight: f32,
    values: &mut [f32],
) -> Result<()> {
    let Some(module) = spec.name.strip_suffix(".weight") else { return Ok(()) };
    if let Some(tokens) = plan.tokens.get(module) {
        let rows = crate::tokens::spec(module, spec, tokens.len());
        let mut theirs = vec![0f32; rows.num_elements()];
        files.fill(&rows, &mut theirs)?;
        let columns = rows.shape[1];
        for (row, id) in theirs.chunks_exact(columns.max(1)).zip(tokens) {
            values[*id as usize * columns..][..columns].copy_from_slice(row);
        }
        return Ok(());
    }
    let Some(adapted) = plan.modules.get(module) else { return Ok(()) };
    let Some(base) = base_specs.iter().find(|base| base.name == spec.name) else {
        return Err(Error::Param { name: spec.name.clone(), reason: "is not a parameter of the base".into() });
    };
    let parts = plan.specs_of(module, base);
    let read = |spec: &ParamSpec| -> Result<Vec<f32>> {
        let mut values = vec![0f32; spec.num_elements()];
        files.fill(spec, &mut values)?;
        Ok(values)
    };
    let (Some(a), Some(b)) = (parts.first(), parts.get(1)) else { return Ok(()) };
    let (a, mut b) = (read(a)?, read(b)?);
    b.iter_mut().for_each(|x| *x = (f64::from(*x) * adapted.scale * f64::from(weight)) as f32);
    let (rank, columns) = (adapted.rank, spec.shape[1]);
    if adapted.embedding {
        // E [vocab, c] += A [vocab, r] (s B)^T, B [c, r].
        for (row, a) in values.chunks_exact_mut(columns).zip(a.chunks_exact(rank)) {
            for (x, b) in row.iter_mut().zip(b.chunks_exact(rank)) {
                *x += a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            }
        }
        return Ok(());
    }
    let magnitudes = parts.get(2).map(read).transpose()?;
    for (o, (row, b)) in values.chunks_exact_mut(columns).zip(b.chunks_exact(rank)).enumerate() {
        for (b, a) in b.iter().zip(a.chunks_exact(columns)) {
            row.iter_mut().zip(a).for_each(|(x, a)| *x += b * a);
        }
        if let Some(magnitudes) = &magnitudes {
            let norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            let factor = (f64::from(magnitudes[o]) / norm.max(f64::from(f32::MIN_POSITIVE))) as f32;
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }
    Ok(())
}
