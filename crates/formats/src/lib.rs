//! Model files: safetensors (sharded), GGUF, Hugging Face config.json. Knows no model.
