//! Examples to learn from by imitation: conversations, prompts with completions, and text.

mod encode;
mod example;
mod json;
mod mask;
mod preview;
mod record;
mod words;

pub use encode::{EncodeChat, Utf8Chat};
pub use example::{AlpacaAs, Content, Example, Shape, Turn};
pub(crate) use json::parse as parse_json;
pub use mask::TrainOn;
pub(crate) use mask::{Masked, learnt};
pub use preview::preview;
pub(crate) use record::{RecordReader, Unread, columns};
pub use words::KnownWords;
