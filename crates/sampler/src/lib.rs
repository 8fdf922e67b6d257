//! Logits to a token: penalties, bias, temperature, top-k, top-p, min-p, a seeded draw, and stop strings.
//!
//! The crate is pure: slices of `f32` and token ids go in, a token id comes out. It knows no model, no tensor library,
//! no tokenizer and no clock, and the same options, logits and history always give the same token.
//!
//! It is not for running a model (that is `tallow-nn` and `tallow-models`), for turning ids into text
//! (`tallow-tokenizer`), or for deciding when to run which request (the scheduler).
//!
//! # The pipeline
//!
//! Every step is a small [`Processor`] over the [`Candidates`], in this order:
//!
//! | step | formula | off at |
//! |---|---|---|
//! | [`Penalties`] | repetition `r`: `l / r` if `l > 0` else `l * r`; then `l - count * frequency - presence` | 1, 0, 0 |
//! | [`LogitBias`] | `l + bias[id]`; `-inf` forbids the token | empty |
//! | [`Temperature`] | `(l - max l) / T`; `T = 0` takes the largest logit and draws nothing | 1 |
//! | [`TopK`] | the `k` largest | 0 |
//! | [`TopP`] | the smallest set of most likely tokens whose probability reaches `p` | 1 |
//! | [`MinP`] | probability at least `min_p` times the largest | 0 |
//! | draw | inverse of the cumulative softmax over what is left, in the order of ids | - |
//!
//! Hugging Face `generate` takes the same order for temperature, top-k, top-p and min-p, and their results here are
//! compared with its warpers on a committed fixture. Where others differ:
//!
//! - llama.cpp's default chain applies the temperature last, so that its filters see the model's own distribution;
//!   here, as in Hugging Face and vLLM, they see the tempered one.
//! - Hugging Face keeps every token that ties with the k-th; here, as in llama.cpp, exactly `k` stay and the lowest ids
//!   win a tie.
//! - Hugging Face and llama.cpp add a bias before the penalties; here it comes after, so that a repetition penalty
//!   never rescales what the user asked for.
//! - Hugging Face counts repetitions over the whole sequence; here, as in llama.cpp, over the last
//!   [`repeat_last_n`](SamplerOptions::repeat_last_n) tokens, 64 by default and `-1` for all.
//!
//! # Example
//!
//! ```
//! use tallow_sampler::{Sampler, SamplerOptions, StopMatcher};
//!
//! let options = SamplerOptions { temperature: 0.8, top_k: 2, seed: 7, ..SamplerOptions::default() };
//! let mut sampler = Sampler::new(options)?;
//! let history = [1, 2]; // the tokens so far: their number keys the random draw
//! let sampled = sampler.sample(&[0.1, 3.0, -1.0, 2.5], &history)?;
//! assert!(sampled.id == 1 || sampled.id == 3);
//! assert_eq!(sampled, sampler.sample(&[0.1, 3.0, -1.0, 2.5], &history)?);
//!
//! let mut stop = StopMatcher::new(&["END".to_string()], &[2])?;
//! assert_eq!(stop.push("the E").text, "the "); // "E" may begin "END": held back
//! assert_eq!(stop.push("NDLESS").stopped.as_deref(), Some("END"));
//! # Ok::<(), tallow_sampler::SamplerError>(())
//! ```
#![forbid(unsafe_code)]

mod candidates;
mod error;
mod exp;
mod filters;
mod logprobs;
mod options;
mod processors;
mod rng;
mod sampler;
mod stop;

pub use candidates::{Candidate, Candidates};
pub use error::{Result, SamplerError};
pub use filters::{MinP, TopK, TopP};
pub use logprobs::{log_softmax_at, log_sum_exp, top_logprobs};
pub use options::SamplerOptions;
pub use processors::{LogitBias, Penalties, Processor, Temperature};
pub use rng::{Philox, uniform};
pub use sampler::{Sampled, Sampler};
pub use stop::{StopMatcher, StopOutput};
