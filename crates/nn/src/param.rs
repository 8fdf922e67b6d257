//! What a parameter is, before it has a value.

/// What a weight does in its model. The parallel plan picks column, row or vocabulary splits by it, adapters pick their
/// targets, and the optimizer its groups; none of them knows a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Role {
    /// Token embedding `[vocab, hidden]`: vocabulary split.
    Embed,
    /// Learned position embedding `[positions, hidden]`: replicated.
    Position,
    /// Query, key or value projection: column split, by heads.
    Qkv,
    /// Attention output projection: row split.
    AttnOut,
    /// Projection into the feed-forward width (gate, up): column split.
    MlpIn,
    /// Projection out of the feed-forward width (down): row split.
    MlpOut,
    /// Language-model head `[vocab, hidden]`: vocabulary split.
    Head,
    /// Normalisation gain or bias: replicated.
    Norm,
}

impl Role {
    /// Whether weight decay applies to a weight matrix of this role (never to norms, biases and embeddings).
    pub fn decays(self) -> bool {
        !matches!(self, Role::Embed | Role::Position | Role::Norm)
    }
}

/// How a parameter starts when nothing is loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros (biases).
    Zeros,
    /// All ones (norm gains).
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f32),
    /// Uniform between minus this and this.
    Uniform(f32),
}

/// A parameter as a model asks for it.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Full name in the Hugging Face checkpoint, e.g. `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Shape in memory; a linear weight is always `[out, in]`.
    pub shape: Vec<usize>,
    /// What it does.
    pub role: Role,
    /// Its initial value.
    pub init: Init,
    /// Whether AdamW's weight decay applies.
    pub decay: bool,
    /// The checkpoint stores the transpose (`Conv1D` of GPT-2: `[in, out]`).
    pub stored_transposed: bool,
    /// Stage of the decoder that uses it first: 0 embedding, `1 + i` block `i`, `1 + num_blocks` head.
    pub stage: usize,
}

impl ParamSpec {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Shape in the checkpoint.
    pub fn stored_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if self.stored_transposed {
            shape.reverse();
        }
        shape
    }
}
