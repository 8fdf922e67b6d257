//! Logits to a token: processors and strategies. Pure; knows no model.
