//! Tallow, an LLM framework on candle: the facade that other projects import.
