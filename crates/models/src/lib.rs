//! One short file per model family, and a registry keyed by Hugging Face architectures.
