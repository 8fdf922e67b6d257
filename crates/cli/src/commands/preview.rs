//! Rows of a run as the model will see them: what is learnt, what is only read, and where documents meet.

use std::io::{IsTerminal, Write};

use serde_json::{Value, json};
use tallow_data::{IGNORE_INDEX, Row};
use tallow_tokenizer::Tokenizer;
use tallow_train::Run;
use tallow_train::progress::{format_count, several};

/// A token and how much it counts in the loss; 0 where it is only read.
pub type Weighed = (u32, f32);

/// One document of a row, or its part in that row.
struct Document {
    tokens: Vec<Weighed>,
    /// Places of the row that it takes: its last token may be a target only.
    places: usize,
    /// Tokens in front of the first that is learnt; of examples only.
    prompt: usize,
}

/// The documents of a row, and the places behind them that hold nothing.
fn documents(row: &Row) -> (Vec<Document>, usize) {
    let weight = |i: usize| match row.targets[i] {
        IGNORE_INDEX => 0.0,
        _ => row.weights.get(i).copied().unwrap_or(1.0),
    };
    let (mut documents, mut start) = (vec![], 0);
    for places in row.doc_start.chunk_by(|a, b| a == b) {
        let end = start + places.len();
        let first = std::iter::once((row.input_ids[start], 0.0));
        let inner = (start + 1..end).map(|i| (row.input_ids[i], weight(i - 1)));
        // The last target may stand in no input: an example's end, or the first token of the next row.
        let last = Some(row.targets[end - 1]).filter(|&id| id != IGNORE_INDEX).map(|id| (id, weight(end - 1)));
        let prompt = row.prefix_end.get(start).map_or(0, |&end| end as usize - start);
        documents.push(Document { tokens: first.chain(inner).chain(last).collect(), places: places.len(), prompt });
        start = end;
    }
    let empty = |document: &Document| document.tokens.iter().all(|&token| token == (0, 0.0));
    let padding = documents.pop_if(|document| empty(document)).map_or(0, |document| document.places);
    (documents, padding)
}

fn learnt(tokens: &[Weighed]) -> usize {
    tokens.iter().filter(|(_, weight)| *weight > 0.0).count()
}

/// How text is marked: by colours on a terminal, by brackets elsewhere.
#[derive(Clone, Copy)]
pub struct Marks {
    colour: bool,
}

impl Marks {
    /// Colours where stdout is a terminal that has them, or `CLICOLOR_FORCE` asks for them; never with `NO_COLOR`.
    pub fn of_stdout() -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let forced = set("CLICOLOR_FORCE") && std::env::var_os("CLICOLOR_FORCE").is_some_and(|value| value != "0");
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let colour = !set("NO_COLOR") && (forced || (std::io::stdout().is_terminal() && !dumb));
        Self { colour }
    }

    /// What the marks mean.
    fn legend(self) -> String {
        let said = |weight, special, text: &str| self.marked(weight, special, text);
        let special = match self.colour {
            true => format!(
                ", {}, {}",
                said(0.0, true, "special tokens"),
                said(1.0, true, "special tokens that are learnt")
            ),
            false => String::new(),
        };
        format!("{}, {}{special}; ↵ is a line end", said(1.0, false, "learnt"), said(0.0, false, "only read"))
    }

    /// Text of tokens that count alike.
    fn marked(self, weight: f32, special: bool, text: &str) -> String {
        if !self.colour {
            return match weight {
                0.0 => text.to_owned(),
                1.0 => format!("⟦{text}⟧"),
                weight => format!("⟦×{weight}: {text}⟧"),
            };
        }
        let style = match (weight > 0.0, special) {
            (true, false) => "\x1b[1;32m",
            (true, true) => "\x1b[1;35m",
            (false, false) => "\x1b[2m",
            (false, true) => "\x1b[2;35m",
        };
        // Each line has its own style: a pager shows lines one by one.
        let styled = |line: &str| if line.is_empty() { String::new() } else { format!("{style}{line}\x1b[0m") };
        text.split('\n').map(styled).collect::<Vec<String>>().join("\n")
    }

    /// Tokens as marked text, special tokens spelled out and control characters escaped.
    ///
    /// # Errors
    /// If an id is not in the vocabulary.
    pub fn text(self, tokens: &[Weighed], tokenizer: Option<&Tokenizer>) -> anyhow::Result<String> {
        let (mut out, mut before) = (String::new(), 0.0);
        for (weight, special, text) in runs(tokens, tokenizer, self.colour)? {
            // In brackets it stands inside of them.
            if self.colour && weight != before && weight != 0.0 && weight != 1.0 {
                out += &format!("\x1b[33m×{weight}\x1b[0m ");
            }
            before = weight;
            out += &self.marked(weight, special, &visible(&text));
        }
        Ok(out)
    }
}

/// Runs of tokens that count alike as text; with `apart`, special tokens are runs of their own.
fn runs(tokens: &[Weighed], tokenizer: Option<&Tokenizer>, apart: bool) -> anyhow::Result<Vec<(f32, bool, String)>> {
    let mut runs: Vec<(f32, bool, String)> = vec![];
    let mut stream = tokenizer.map(|tokenizer| tokenizer.decode_stream(false));
    let mut split = SplitCharacter::default();
    for &(id, weight) in tokens {
        let special = apart && tokenizer.is_some_and(|tokenizer| tokenizer.is_special(id));
        let text = match &mut stream {
            Some(stream) => stream.push(id)?.unwrap_or_default(),
            None => format!("{id} "),
        };
        if runs.last().is_none_or(|(w, s, _)| (*w, *s) != (weight, special)) {
            runs.push((weight, special, String::new()));
        }
        let held_back = stream.as_ref().map_or(0, tallow_tokenizer::DecodeStream::held_back);
        let (at, text) = (runs.len() - 1, split.across(&mut runs, &text, held_back));
        runs[at].2.push_str(&text);
    }
    let rest = stream.map(|mut stream| stream.flush()).transpose()?.flatten();
    if let (Some((.., run)), Some(rest)) = (runs.last_mut(), rest) {
        run.push_str(&rest);
    }
    Ok(runs)
}

/// A character whose bytes come from several tokens, of which not all count alike.
#[derive(Default)]
struct SplitCharacter {
    /// Bytes so far, by the run that they belong to.
    parts: Vec<(usize, usize)>,
}

impl SplitCharacter {
    /// Takes the text that a token of the last run made certain, with `held_back` bytes still to come. Bytes of a character
    /// that lies across runs are spelled out, each in its own: `\xE2\x82` and `\xAC`. Returns what belongs to the last run.
    fn across(&mut self, runs: &mut [(f32, bool, String)], text: &str, held_back: usize) -> String {
        let at = runs.len() - 1;
        let before: usize = self.parts.iter().map(|(_, bytes)| bytes).sum();
        if text.is_empty() {
            self.parts.extend(Some((at, held_back.saturating_sub(before))).filter(|(_, bytes)| *bytes > 0));
            return String::new();
        }
        let parts = std::mem::take(&mut self.parts);
        self.parts.extend(Some((at, held_back)).filter(|(_, bytes)| *bytes > 0));
        let first = text.chars().next().filter(|c| c.len_utf8() > before && *c != '\u{fffd}');
        let Some(first) = first.filter(|_| parts.iter().any(|(run, _)| *run != at)) else { return text.to_owned() };
        let (character, rest) = text.split_at(first.len_utf8());
        let spelled = |bytes: &[u8]| bytes.iter().map(|byte| format!("\\x{byte:02X}")).collect::<String>();
        let mut bytes = character.as_bytes();
        for (run, count) in parts {
            let (here, later) = bytes.split_at(count);
            runs[run].2.push_str(&spelled(here));
            bytes = later;
        }
        spelled(bytes) + rest
    }
}

/// Characters that change the order of what a terminal shows.
const ORDER: [char; 12] = [
    '\u{61c}', '\u{200e}', '\u{200f}', '\u{202a}', '\u{202b}', '\u{202c}', '\u{202d}', '\u{202e}', '\u{2066}',
    '\u{2067}', '\u{2068}', '\u{2069}',
];

/// Line ends made visible, and no control character left that would act on the terminal.
fn visible(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '\n' => out.push_str("↵\n"),
            '\t' => out.push('\t'),
            c if c.is_control() || ORDER.contains(&c) => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

/// Shows the first `count` rows of a run on stdout.
///
/// # Errors
/// If the data cannot be read.
pub fn show(run: &Run, count: u64, as_json: bool) -> anyhow::Result<()> {
    let (loader, tokenizer) = (run.loader(), run.tokenizer());
    let mut out = std::io::stdout().lock();
    let marks = Marks::of_stdout();
    match as_json {
        true => writeln!(out, "{}", summary(run))?,
        false => print_summary(&mut out, run, marks)?,
    }
    let (mut row, prefix) = (Row::default(), run.resolved.run.objective.is_prefix());
    for index in 0..count.min(loader.rows_per_epoch()) {
        loader.sample(index, &mut row)?;
        let (documents, padding) = documents(&row);
        if as_json {
            let documents: Vec<Value> = documents
                .iter()
                .map(|document| as_value(document, tokenizer, prefix))
                .collect::<anyhow::Result<_>>()?;
            writeln!(out, "{}", json!({ "row": index, "documents": documents, "padding": padding }))?;
            continue;
        }
        let (places, what) = (row.input_ids.len(), noun(run));
        writeln!(
            out,
            "\nrow {index}: {} in {} of {places} places, {} learnt, {padding} padding",
            several(documents.len() as u64, what),
            places - padding,
            row.num_targets,
        )?;
        for (number, document) in documents.iter().enumerate() {
            let (tokens, learnt) = (document.tokens.len(), learnt(&document.tokens));
            let both_ways = match prefix {
                true => format!(", the first {} seen both ways", document.prompt),
                false => String::new(),
            };
            // It stands in no place of the row, since nothing is predicted from it.
            let last = if tokens > document.places { " (the last is only predicted, and takes no place)" } else { "" };
            writeln!(out, "--- {what} {}: {tokens} tokens{last}, {learnt} learnt{both_ways}", number + 1)?;
            writeln!(out, "{}", marks.text(&document.tokens, tokenizer)?)?;
        }
    }
    Ok(())
}

fn noun(run: &Run) -> &'static str {
    if run.loader().dataset().examples().is_some() { "example" } else { "document" }
}

fn print_summary(out: &mut impl Write, run: &Run, marks: Marks) -> std::io::Result<()> {
    let (loader, dataset) = (run.loader(), run.loader().dataset());
    let (tokens, targets) = (dataset.num_tokens(), dataset.num_targets());
    writeln!(
        out,
        "data.train: {} in {} of {} tokens ({:.1}% full); {} of {} tokens are learnt ({:.1}%)",
        several(dataset.num_documents(), noun(run)),
        several(loader.rows_per_epoch(), "row"),
        loader.options().context_length,
        100.0 * loader.packing_efficiency(),
        format_count(targets),
        format_count(tokens),
        100.0 * targets as f64 / tokens.max(1) as f64
    )?;
    let held_out = run.validation().map_or(0, |valid| valid.num_documents());
    if held_out > 0 {
        writeln!(out, "to validate on: {}", several(held_out, noun(run)))?;
    }
    writeln!(out, "{}", run.kind_in_words())?;
    for notice in run.notices() {
        writeln!(out, "{notice}")?;
    }
    writeln!(out, "{}", marks.legend())
}

fn summary(run: &Run) -> Value {
    let (loader, dataset) = (run.loader(), run.loader().dataset());
    let mut value = json!({
        "documents": dataset.num_documents(),
        "held_out": run.validation().map_or(0, |valid| valid.num_documents()),
        "rows": loader.rows_per_epoch(),
        "context_length": loader.options().context_length,
        "tokens": dataset.num_tokens(),
        "learnt": dataset.num_targets(),
        "packing_efficiency": loader.packing_efficiency(),
    });
    if let (Some(map), Some(index)) = (value.as_object_mut(), dataset.examples()) {
        map.insert("dropped".into(), index.dropped.into());
        map.insert("truncated".into(), index.truncated.into());
        map.insert("nothing_learnt".into(), index.nothing_learnt.into());
        map.insert("refused".into(), index.refused.into());
    }
    value
}

fn as_value(document: &Document, tokenizer: Option<&Tokenizer>, prefix: bool) -> anyhow::Result<Value> {
    let texts = runs(&document.tokens, tokenizer, false)?;
    let ids = document.tokens.chunk_by(|a, b| a.1 == b.1);
    let runs: Vec<Value> = ids
        .zip(texts)
        .map(|(tokens, (weight, _, text))| {
            let ids: Vec<u32> = tokens.iter().map(|(id, _)| *id).collect();
            json!({ "weight": weight, "ids": ids, "text": text })
        })
        .collect();
    let mut value = json!({ "tokens": document.tokens.len(), "learnt": learnt(&document.tokens), "runs": runs });
    if prefix {
        value["prefix"] = json!([0, document.prompt]);
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_comes_apart_into_its_documents() {
        // 7 | 8 9(2x) and the end 3 (2x) | 5 6 | two places of padding.
        let row = Row {
            input_ids: vec![7, 8, 9, 5, 0, 0],
            targets: vec![8, 9, 3, 6, IGNORE_INDEX, IGNORE_INDEX],
            positions: vec![0, 1, 2, 0, 0, 1],
            doc_start: vec![0, 0, 0, 3, 4, 4],
            prefix_end: vec![2, 2, 2, 4, 4, 4],
            weights: vec![0.0, 2.0, 2.0, 1.0, 0.0, 0.0],
            num_targets: 4,
            weight_sum: 5.0,
        };
        let (documents, padding) = documents(&row);
        let tokens: Vec<&[Weighed]> = documents.iter().map(|document| document.tokens.as_slice()).collect();
        assert_eq!(tokens, [&[(7, 0.0), (8, 0.0), (9, 2.0), (3, 2.0)][..], &[(5, 0.0), (6, 1.0)]]);
        assert_eq!((padding, documents[0].prompt, documents[1].prompt), (2, 2, 1));
        let plain = Marks { colour: false };
        assert_eq!(plain.text(tokens[0], None).expect("text"), "7 8 ⟦×2: 9 3 ⟧");
        let coloured = |document: usize| Marks { colour: true }.text(tokens[document], None).expect("text");
        assert_eq!(coloured(1), "\x1b[2m5 \x1b[0m\x1b[1;32m6 \x1b[0m");
        assert_eq!(coloured(0), "\x1b[2m7 8 \x1b[0m\x1b[33m×2\x1b[0m \x1b[1;32m9 3 \x1b[0m");
    }

    #[test]
    fn a_character_across_a_border_is_spelled_out_on_both_sides() {
        // € is E2 82 AC; the second run begins behind its first byte, and ends with all of another.
        let mut runs = vec![(0.0, false, String::from("a"))];
        let mut split = SplitCharacter::default();
        assert_eq!(split.across(&mut runs, "", 1), "");
        runs.push((1.0, false, String::new()));
        assert_eq!(split.across(&mut runs, "", 2), "");
        assert_eq!(split.across(&mut runs, "€b", 0), "\\xACb");
        assert_eq!((runs[0].2.as_str(), runs[1].2.as_str()), ("a\\xE2", "\\x82"));
        // Within one run it is whole.
        assert_eq!(split.across(&mut runs, "", 2), "");
        assert_eq!(split.across(&mut runs, "€", 0), "€");
    }

    #[test]
    fn nothing_in_a_text_acts_on_the_terminal() {
        assert_eq!(visible("a\n\x1b[31mb\r\u{9b}c"), "a↵\n\\u{1b}[31mb\\u{d}\\u{9b}c");
        assert_eq!(Marks { colour: true }.marked(0.0, false, "a\nb"), "\x1b[2ma\x1b[0m\n\x1b[2mb\x1b[0m");
    }
}
