//! Pre-tokenizers by llama.cpp's names (`tokenizer.ggml.pre`): a trained tokenizer must carry one of these for its
//! GGUF export to load, so training offers exactly them.
//!
//! A name stands for a sequence of regexes that split the text before merging, and for two habits of llama.cpp:
//! whether a piece found whole in the vocabulary skips the merges, and whether a BOS is added by default. `tekken` and
//! `gpt-4o` follow llama.cpp's own regexes, which treat non-ASCII letters as both cases.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::split::Splitter;

struct Spec {
    /// llama.cpp's name first, then its synonyms.
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    ignore_merges: bool,
    add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Cased letters, in the Unicode of DeepSeek's first tokenizer: later additions are deliberately absent.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}]+";
const DEEPSEEK_PUNCTUATION: &str = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+";
const DEEPSEEK_CJK: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+";
const DEEPSEEK3_CJK: &str = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
const BAILING: &str = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";

macro_rules! pre {
    ([$($name:literal),+], [$($pattern:expr),+]) => { pre!([$($name),+], [$($pattern),+], false, false) };
    ([$($name:literal),+], [$($pattern:expr),+], $ignore_merges:literal, $add_bos:literal) => {
        Spec { names: &[$($name),+], patterns: &[$($pattern),+], ignore_merges: $ignore_merges, add_bos: $add_bos }
    };
}

/// Order matters where patterns coincide: the plainest name comes first, as the one a bare regex is recognised as.
static SPECS: &[Spec] = &[
    pre!(["smollm", "codeshell", "exaone", "minerva-7b", "mellum2"], [r"\p{N}", GPT2]),
    pre!(
        [
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
            "roberta-bpe",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "exaone4"
        ],
        [GPT2]
    ),
    pre!(
        ["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
        [LLAMA3],
        true,
        true
    ),
    pre!(["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"], [QWEN2]),
    pre!(["qwen35"], [QWEN35]),
    pre!(["default"], [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]),
    pre!(["deepseek-llm"], [r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_PUNCTUATION, r"\s+$", DEEPSEEK_CJK, r"\p{N}+"]),
    pre!(["deepseek-coder"], [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, r"\p{N}"]),
    pre!(["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], [r"\p{N}{1,3}", DEEPSEEK3_CJK, DEEPSEEK3]),
    pre!(["falcon"], [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"]),
    pre!(["starcoder"], [r"\p{N}", GPT2]),
    pre!(["refact"], [r"\p{N}", GPT2]),
    pre!(["command-r"], [r"\p{N}", GPT2]),
    pre!(["mpt"], [GPT2]),
    pre!(["olmo"], [GPT2]),
    pre!(["jais"], [GPT2]),
    pre!(["trillion"], [GPT2]),
    pre!(["granite-docling"], [GPT2]),
    pre!(["tekken"], [TEKKEN], true, true),
    pre!(["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], [GPT4O]),
    pre!(["dbrx", "smaug-bpe"], [LLAMA3]),
    pre!(["chatglm-bpe", "glm4"], [LLAMA3]),
    pre!(["stablelm2", "hunyuan", "solar-open", "grok-2"], [QWEN2]),
    pre!(["poro-chat", "bloom", "gpt3-finnish"], [BLOOM]),
    pre!(["viking"], [BLOOM, r"\p{N}"]),
    pre!(["bailingmoe", "bailingmoe2", "llada-moe"], [BAILING]),
    pre!(["seed-coder"], [SEED_CODER]),
];

/// A pre-tokenizer that llama.cpp knows, chosen by name.
///
/// The default is `smollm`: GPT-2's splitting with every digit alone, so that a small vocabulary is not spent on
/// runs of digits, and, unlike `llama-bpe`, llama.cpp forces neither a BOS nor a merge shortcut with it.
///
/// ```
/// use tallow_tokenizer::PreTokenizer;
/// assert_eq!(PreTokenizer::default().name(), "smollm");
/// assert_eq!("llama3".parse::<PreTokenizer>()?.name(), "llama3");
/// assert!("llama-4".parse::<PreTokenizer>().unwrap_err().to_string().contains("llama-bpe"));
/// # Ok::<(), tallow_tokenizer::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct PreTokenizer {
    spec: &'static Spec,
    name: &'static str,
}

impl PreTokenizer {
    /// The pre-tokenizer of that name; the error lists all names.
    pub fn from_name(name: &str) -> Result<Self> {
        for spec in SPECS {
            if let Some(&name) = spec.names.iter().find(|&&n| n == name) {
                return Ok(Self { spec, name });
            }
        }
        Err(Error::UnknownPreTokenizer { name: name.to_string(), known: Self::names().join(", ") })
    }

    /// All known names, synonyms included.
    pub fn names() -> Vec<&'static str> {
        SPECS.iter().flat_map(|spec| spec.names.iter().copied()).collect()
    }

    /// The name it was asked for by.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The regexes, applied in order: each splits the pieces of the one before, matches and gaps alike.
    pub fn patterns(&self) -> &'static [&'static str] {
        self.spec.patterns
    }

    /// Whether llama.cpp takes a piece that is a token whole, without trying merges.
    pub fn ignore_merges(&self) -> bool {
        self.spec.ignore_merges
    }

    /// Whether llama.cpp adds a BOS unless the file says otherwise.
    pub fn add_bos(&self) -> bool {
        self.spec.add_bos
    }

    /// The pre-tokenizer whose regexes these are, if any: how a `tokenizer.json` gets its llama.cpp name back.
    pub(crate) fn recognise(patterns: &[String], ignore_merges: bool) -> Option<Self> {
        let plain = |p: &str| {
            p.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
                .strip_suffix(r"(?!\S)|\s+")
                .map_or(p.to_string(), |head| format!(r"{head}(?!\S)"))
        };
        let same = |spec: &&Spec| {
            spec.patterns.len() == patterns.len()
                && spec.patterns.iter().zip(patterns).all(|(a, b)| plain(a) == plain(b))
        };
        let all: Vec<&'static Spec> = SPECS.iter().filter(same).collect();
        let spec = all.iter().find(|s| s.ignore_merges == ignore_merges).or(all.first())?;
        Some(Self { spec, name: spec.names[0] })
    }

    pub(crate) fn splitter(&self) -> Result<Splitter> {
        Splitter::from_patterns(self.spec.patterns).map_err(Error::Encode)
    }

    /// The same splitting as the `pre_tokenizer` of a `tokenizer.json`.
    pub(crate) fn to_json(self) -> Value {
        let mut steps: Vec<Value> = self.spec.patterns.iter().map(|p| split_json(p)).collect();
        steps.push(json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
        }));
        json!({ "type": "Sequence", "pretokenizers": steps })
    }
}

pub(crate) fn split_json(pattern: &str) -> Value {
    json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
}

impl Default for PreTokenizer {
    fn default() -> Self {
        Self { spec: &SPECS[0], name: SPECS[0].names[0] }
    }
}

impl std::fmt::Debug for PreTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PreTokenizer({})", self.name)
    }
}

impl std::fmt::Display for PreTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl std::str::FromStr for PreTokenizer {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        Self::from_name(name)
    }
}

impl PartialEq for PreTokenizer {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for PreTokenizer {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_compiles_and_no_name_is_listed_twice() {
        let mut names = PreTokenizer::names();
        for name in &names {
            let pre = PreTokenizer::from_name(name).unwrap();
            let splitter = pre.splitter().unwrap();
            let text = "Hello, World's 12345 été\n\n  中文 ½ x";
            let mut joined = String::new();
            splitter
                .split(text, &mut |p| {
                    joined.push_str(p);
                    Ok(())
                })
                .unwrap();
            assert_eq!(joined, text, "{name} must lose nothing");
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn patterns_are_recognised() {
        let owned = |p: &[&str]| p.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        assert_eq!(PreTokenizer::recognise(&owned(&[GPT2]), false).unwrap().name(), "gpt-2");
        assert_eq!(PreTokenizer::recognise(&owned(&[r"\p{N}", GPT2]), false).unwrap().name(), "smollm");
        assert_eq!(PreTokenizer::recognise(&owned(&[LLAMA3]), true).unwrap().name(), "llama-bpe");
        assert_eq!(PreTokenizer::recognise(&owned(&[LLAMA3]), false).unwrap().name(), "dbrx");
        assert!(PreTokenizer::recognise(&owned(&["x"]), false).is_none());
    }
}
