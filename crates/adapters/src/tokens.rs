//! Rows of an embedding, or of a head, that are trained beside the frozen table: PEFT's `trainable_token_indices`.

use candle_core::Tensor;
use tallow_nn::{Embedding, ForwardContext, Head, Lookup, ParamSpec, Result};
use tallow_ops::{ReplacedRows, Table, Weight, embedding};

/// How the name of a parameter ends that has rows of tokens. PEFT's name: they are the rows themselves, not a difference.
pub const TOKEN_ROWS: &str = ".token_adapter.trainable_tokens_delta";

/// The rows `[n, c]` of `n` tokens, of a module whose table is `base`.
pub(crate) fn spec(module: &str, base: &ParamSpec, tokens: usize) -> ParamSpec {
    ParamSpec {
        name: format!("{module}{TOKEN_ROWS}"),
        shape: vec![tokens, base.shape.get(1).copied().unwrap_or(0)],
        role: base.role,
        init: tallow_nn::Init::Zeros,
        // A table's rows are not pulled to zero, whichever of the two it is.
        decay: false,
        stored_transposed: false,
        stage: base.stage,
    }
}

/// `y = rows[id]` for the tokens that have one, `E[id]` for the others. A head that is tied to it has the same rows.
#[derive(Debug)]
pub(crate) struct TokenEmbedding {
    base: Embedding,
    rows: ReplacedRows,
}

impl TokenEmbedding {
    pub(crate) fn new(base: Embedding, rows: ReplacedRows) -> Self {
        Self { base, rows }
    }
}

impl Lookup for TokenEmbedding {
    fn forward(&self, ids: &Tensor, _: &ForwardContext) -> Result<Tensor> {
        Ok(embedding(ids, Table { weight: self.base.weight(), replaced: Some(&self.rows) })?)
    }

    fn weight(&self) -> &Weight {
        self.base.weight()
    }

    fn tied_head(&self) -> Head {
        with_rows(self.base.tied_head(), &self.rows)
    }
}

/// A head with `rows` in place of its own.
pub(crate) fn with_rows(head: Head, rows: &ReplacedRows) -> Head {
    match head {
        Head::Plain(weight) => Head::Replaced(weight, rows.clone()),
        other => other,
    }
}
