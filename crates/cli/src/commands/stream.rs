//! Showing a text as it is generated.

use std::io::Write;

use tallow_sampler::StopMatcher;
use tallow_tokenizer::DecodeStream;

/// Turns ids into text, stops at stop strings, and shows what is certain.
pub struct Writer {
    /// Goes in front of the text; `None` where nothing is to be shown. A prompt that fails is not shown.
    pub prompt: Option<String>,
    /// What was certain so far.
    pub text: String,
    /// Ids to text.
    pub stream: DecodeStream,
    /// Ends the text.
    pub stops: StopMatcher,
}

impl Writer {
    /// Takes the next id; whether to go on.
    pub fn token(&mut self, id: u32) -> anyhow::Result<bool> {
        if let Some(piece) = self.stream.push(id)? {
            let certain = self.stops.push(&piece).text;
            self.emit(&certain)?;
        }
        Ok(!self.stops.is_stopped())
    }

    /// What was held back, as half a character or as the beginning of a stop string.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        if self.stops.is_stopped() {
            return Ok(());
        }
        let rest = self.stream.flush()?.unwrap_or_default();
        let mut rest = self.stops.push(&rest).text;
        rest.push_str(&self.stops.finish());
        Ok(self.emit(&rest)?)
    }

    fn emit(&mut self, piece: &str) -> std::io::Result<()> {
        self.text.push_str(piece);
        self.show(piece)
    }

    /// Writes and flushes, if anything is to be shown.
    pub fn show(&mut self, text: &str) -> std::io::Result<()> {
        let Some(prompt) = &mut self.prompt else { return Ok(()) };
        let mut out = std::io::stdout().lock();
        out.write_all(std::mem::take(prompt).as_bytes())?;
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}
