//! What an adapter is to be.

use std::collections::BTreeMap;

use crate::{Error, Result};

/// Which modules get an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Targets {
    /// Every projection of every block; not the embedding and the head.
    #[default]
    AllLinear,
    /// Modules with one of these names: all of it (`model.layers.3.mlp.up_proj`), its end (`q_proj`, `mlp.up_proj`), or a
    /// pattern for all of it (`*.layers.1?.self_attn.*`; `*` is any text, `?` any character).
    Names(Vec<String>),
}

/// How the two matrices start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoraInit {
    /// `A` uniform in `1 / sqrt(inputs)`, `B` zero: PEFT's default.
    #[default]
    Kaiming,
    /// `A` normal with a deviation of `1 / rank`, `B` zero.
    Gaussian,
    /// Both within the matrix itself: `B` the first columns of the `Q` of its QR decomposition, `A` the first rows of `R`, and the
    /// product taken away again by a frozen pair of the same values, so that the model begins as it was (OLoRA, Büyükakyüz 2024).
    Olora,
}

/// Settings of LoRA (Hu et al. 2021) and what was made of it.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Inner width `r`.
    pub rank: usize,
    /// The product is scaled by `alpha / r`.
    pub alpha: f64,
    /// Dropout on what the adapter sees.
    pub dropout: f64,
    /// Which modules get one.
    pub targets: Targets,
    /// Modules that get none though `targets` names them; as [`Targets::Names`].
    pub exclude: Vec<String>,
    /// Other ranks for some modules; as [`Targets::Names`].
    pub ranks: BTreeMap<String, usize>,
    /// Other alphas for some modules; as [`Targets::Names`].
    pub alphas: BTreeMap<String, f64>,
    /// Scale by `alpha / sqrt(r)` instead (rsLoRA, Kalajdzievski 2023).
    pub rslora: bool,
    /// Learn the length of each output's weights apart from their direction (DoRA, Liu et al. 2024).
    pub dora: bool,
    /// Modules that are trained whole and saved with the adapter, e.g. `lm_head`; as [`Targets::Names`].
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows of the embedding and of the head are trained and saved with the adapter: new ones, say. A head that is
    /// tied has those of the embedding.
    pub tokens: Vec<u32>,
    /// How the matrices start.
    pub init: LoraInit,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            targets: Targets::AllLinear,
            exclude: vec![],
            ranks: BTreeMap::new(),
            alphas: BTreeMap::new(),
            rslora: false,
            dora: false,
            modules_to_save: vec![],
            tokens: vec![],
            init: LoraInit::Kaiming,
        }
    }
}

impl LoraConfig {
    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// Naming the setting.
    pub fn validate(&self) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::config("rank", 0, "must be at least 1, e.g. 16"));
        }
        let bad_alpha = |alpha: &f64| !(alpha.is_finite() && *alpha > 0.0);
        if let Some(alpha) = std::iter::once(&self.alpha).chain(self.alphas.values()).find(|alpha| bad_alpha(alpha)) {
            return Err(Error::config("alpha", alpha, "must be a positive number, e.g. 32"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::config("dropout", self.dropout, "must be at least 0 and below 1, e.g. 0.05"));
        }
        if self.dora && self.init == LoraInit::Olora {
            return Err(Error::config("init", "olora", "has no DoRA here; set kind = \"lora\", or init = \"kaiming\""));
        }
        match self.ranks.iter().find(|(_, rank)| **rank == 0) {
            Some((name, _)) => Err(Error::config("ranks", format!("{name} = 0"), "must be at least 1; use `exclude`")),
            None => Ok(()),
        }
    }
}

/// Whether `pattern` names `module`: whole, as its end behind a dot, or by `*` and `?` over all of it.
pub(crate) fn names(pattern: &str, module: &str) -> bool {
    if pattern.contains(['*', '?']) {
        return glob(pattern.as_bytes(), module.as_bytes());
    }
    module == pattern || module.strip_suffix(pattern).is_some_and(|rest| rest.ends_with('.'))
}

fn glob(pattern: &[u8], text: &[u8]) -> bool {
    // The last star and what it stood for so far: enough to go back to, since a later star takes over.
    let (mut p, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        if p < pattern.len() && (pattern[p] == b'?' || pattern[p] == text[t]) && pattern[p] != b'*' {
            (p, t) = (p + 1, t + 1);
        } else if pattern.get(p) == Some(&b'*') {
            star = Some((p, t));
            p += 1;
        } else if let Some((at, stood)) = star {
            (p, t, star) = (at + 1, stood + 1, Some((at, stood + 1)));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_whole_or_ends_or_patterns() {
        let module = "model.layers.12.self_attn.q_proj";
        for pattern in [module, "q_proj", "self_attn.q_proj", "*q_proj", "model.layers.1?.*", "*.self_attn.*", "*"] {
            assert!(names(pattern, module), "{pattern}");
        }
        for pattern in ["proj", "attn.q_proj", "layers.1?.*", "*k_proj", "model.layers.?.*", "", "q_proj.weight"] {
            assert!(!names(pattern, module), "{pattern}");
        }
        assert!(names("*a*b*c", "xaybzaabbc") && !names("*a*b*c", "xaybzaabb"));
    }

    #[test]
    fn settings_that_cannot_work_are_refused() {
        let with = |change: fn(&mut LoraConfig)| {
            let mut config = LoraConfig::default();
            change(&mut config);
            config.validate()
        };
        assert!(with(|_| ()).is_ok());
        assert!(with(|c| c.rank = 0).is_err());
        assert!(with(|c| c.alpha = f64::NAN).is_err());
        assert!(with(|c| c.dropout = 1.0).is_err());
        assert!(with(|c| c.ranks = [("q_proj".into(), 0)].into()).is_err());
        assert!(with(|c| (c.dora, c.init) = (true, LoraInit::Olora)).is_err());
        assert!(with(|c| c.alphas = [("q_proj".into(), -1.0)].into()).is_err());
    }
}
