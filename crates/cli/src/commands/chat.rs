//! `tallow chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Instant;

use clap::Args;
use tallow::open::OpenModel;
use tallow_engine::{GenerateOptions, generate};
use tallow_tokenizer::{ChatEncoder, ChatOptions, Message, SpecialInContent};

use super::model::ModelArgs;
use super::sampling::{SamplingArgs, usage_of_engine};
use super::stream::Writer;
use crate::exit;
use crate::terminal;

/// Arguments of `tallow chat`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow chat --model SmolLM2-135M-Instruct.Q4_1.gguf
  tallow chat --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/tuned/final --temperature 0
  echo 'What is 2 + 2?' | tallow chat --model final --system 'Answer with a number.'

In a conversation: /system TEXT begins anew with that system message, /clear begins anew, /undo takes back the last turn,
/exit or Ctrl-D ends. Special tokens in what is typed are read as text: they cannot forge a turn.")]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The system message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// How conversations are written: a Jinja template in a file, or chatml, llama3, alpaca...; the model's own unless given
    #[arg(long, value_name = "TEMPLATE")]
    chat_template: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// A conversation that goes on.
struct Conversation<'a> {
    model: &'a OpenModel,
    encoder: ChatEncoder,
    options: GenerateOptions,
    messages: Vec<Message>,
}

/// Runs `tallow chat`.
pub fn run(args: ChatArgs) -> anyhow::Result<()> {
    let options = args.sampling.options(vec![])?;
    args.sampling.stops()?;
    let model = args.model.open()?;
    let tokenizer = model.tokenizer()?;
    let encoder = match &args.chat_template {
        None => tokenizer.chat_encoder().map_err(|e| exit::usage(format!("{e}; or give --chat-template")))?,
        Some(given) => {
            let text = std::fs::read_to_string(given).unwrap_or_else(|_| given.clone());
            tokenizer.chat_encoder_with(&text).map_err(|e| exit::usage(format!("--chat-template {given}: {e}")))?
        }
    };
    let system = |text: &String| Message::new("system", text.clone());
    let options = GenerateOptions { stop_ids: model.stop_ids(), ..options };
    let messages = args.system.as_ref().map(system).into_iter().collect();
    let mut conversation = Conversation { model: &model, encoder, options, messages };
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        terminal::line("/clear, /undo, /system TEXT, /exit; Ctrl-D ends");
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if interactive {
            print!("> ");
            std::io::stdout().flush()?;
        }
        let Some(line) = lines.next().transpose()? else { break };
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => break,
            "/clear" => conversation.messages.retain(|message| message.role == "system"),
            "/undo" => conversation.undo(),
            command if command.starts_with("/system") => {
                let text = command.trim_start_matches("/system").trim().to_owned();
                conversation.messages.clear();
                conversation.messages.extend(Some(text).filter(|text| !text.is_empty()).as_ref().map(system));
            }
            command if command.starts_with('/') && !command[1..].contains(['/', ' ']) => {
                terminal::line(&format!("there is no {command}; /clear, /undo, /system TEXT, /exit"));
            }
            text => {
                conversation.messages.push(Message::new("user", text));
                if let Err(error) = conversation.answer(&args.sampling, interactive) {
                    if !interactive {
                        return Err(error);
                    }
                    // The turn that failed is taken back, the conversation goes on.
                    conversation.messages.pop();
                    terminal::line(&format!("error: {error}"));
                }
            }
        }
    }
    Ok(())
}

impl Conversation<'_> {
    fn undo(&mut self) {
        while let Some(message) = self.messages.pop() {
            match message.role.as_str() {
                "user" => break,
                "system" => {
                    self.messages.push(message);
                    break;
                }
                _ => {}
            }
        }
    }

    fn answer(&mut self, sampling: &SamplingArgs, interactive: bool) -> anyhow::Result<()> {
        let options = ChatOptions {
            add_generation_prompt: true,
            special_in_content: SpecialInContent::Text,
            ..ChatOptions::default()
        };
        let prompt = self.encoder.encode(&self.messages, &options)?;
        let mut stream = self.model.tokenizer()?.decode_stream(true);
        if let Some(&last) = prompt.last() {
            stream.push(last)?;
        }
        let mut writer = Writer { prompt: Some(String::new()), text: String::new(), stream, stops: sampling.stops()? };
        let (mut failure, started) = (None, Instant::now());
        let out = generate(self.model.decoder(), self.model.device(), &prompt, &self.options, &mut |id| {
            writer.token(id).unwrap_or_else(|error| {
                failure = Some(error);
                false
            })
        });
        if let Some(error) = failure {
            return Err(error);
        }
        let out = out.map_err(usage_of_engine)?;
        writer.finish()?;
        writer.show("\n")?;
        if interactive {
            let rate = out.ids.len() as f64 / started.elapsed().as_secs_f64();
            terminal::line(&format!("[{} tokens, {rate:.1} tokens/s]", out.ids.len()));
        }
        self.messages.push(Message::new("assistant", writer.text));
        Ok(())
    }
}
