//! Measures of what a model answers, text against text.
//!
//! For: [`exact_match`] and [`f1`] of a generated answer against its reference. Not for: running a model (see
//! `tallow-engine`) or losses and perplexity (see `tallow-train`).
//!
//! ```
//! use tallow_eval::{exact_match, f1};
//!
//! assert!(exact_match("The cat.", "cat"));
//! assert_eq!(f1("a small cat", "the small dog"), 0.5);
//! ```
#![forbid(unsafe_code)]

mod answer;

pub use answer::{exact_match, f1, normalize_answer};
