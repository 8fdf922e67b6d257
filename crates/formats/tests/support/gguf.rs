//! A GGUF written byte by byte, each part as the test wants it.
#![allow(dead_code, reason = "each test takes what it needs")]

/// A metadata value.
#[derive(Clone)]
pub enum Meta {
    U8(u8),
    U32(u32),
    U64(u64),
    I32(i32),
    F32(f32),
    F64(f64),
    Bool(bool),
    Str(String),
    /// Element type and elements.
    Array(u32, Vec<Meta>),
    /// Type number and bytes, as they are.
    Raw(u32, Vec<u8>),
}

impl Meta {
    pub fn text(text: &str) -> Self {
        Meta::Str(text.into())
    }

    pub fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        Meta::Array(8, texts.into_iter().map(Meta::text).collect())
    }

    fn kind(&self) -> u32 {
        match self {
            Meta::U8(_) => 0,
            Meta::U32(_) => 4,
            Meta::I32(_) => 5,
            Meta::F32(_) => 6,
            Meta::Bool(_) => 7,
            Meta::Str(_) => 8,
            Meta::Array(..) => 9,
            Meta::U64(_) => 10,
            Meta::F64(_) => 12,
            Meta::Raw(kind, _) => *kind,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Meta::U8(x) => vec![*x],
            Meta::U32(x) => x.to_le_bytes().to_vec(),
            Meta::I32(x) => x.to_le_bytes().to_vec(),
            Meta::F32(x) => x.to_le_bytes().to_vec(),
            Meta::Bool(x) => vec![u8::from(*x)],
            Meta::Str(x) => string(x),
            Meta::U64(x) => x.to_le_bytes().to_vec(),
            Meta::F64(x) => x.to_le_bytes().to_vec(),
            Meta::Array(kind, values) => {
                let mut bytes = kind.to_le_bytes().to_vec();
                bytes.extend((values.len() as u64).to_le_bytes());
                bytes.extend(values.iter().flat_map(Meta::bytes));
                bytes
            }
            Meta::Raw(_, bytes) => bytes.clone(),
        }
    }
}

/// Length and bytes of a text.
pub fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// A tensor: dimensions innermost first, as the file has them.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub dims: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// Instead of the place where it is written.
    pub offset: Option<u64>,
}

/// A file to be.
#[derive(Clone)]
pub struct Gguf {
    pub version: u32,
    pub alignment: u64,
    pub num_tensors: Option<u64>,
    pub num_keys: Option<u64>,
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<Entry>,
}

impl Gguf {
    pub fn new() -> Self {
        Self { version: 3, alignment: 32, num_tensors: None, num_keys: None, metadata: vec![], tensors: vec![] }
    }

    #[must_use]
    pub fn meta(mut self, key: &str, value: Meta) -> Self {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.into(), value));
        self
    }

    #[must_use]
    pub fn without(mut self, key: &str) -> Self {
        self.metadata.retain(|(k, _)| k != key);
        self
    }

    #[must_use]
    pub fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: Vec<u8>) -> Self {
        self.tensors.push(Entry { name: name.into(), dims: dims.to_vec(), kind, data, offset: None });
        self
    }

    /// An f32 tensor; the shape outermost first.
    #[must_use]
    pub fn f32s(self, name: &str, shape: &[usize], value: f32) -> Self {
        let dims: Vec<u64> = shape.iter().rev().map(|&d| d as u64).collect();
        let data = (0..shape.iter().product()).flat_map(|_| value.to_le_bytes()).collect();
        self.tensor(name, &dims, 0, data)
    }

    pub fn build(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.num_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        bytes.extend(self.num_keys.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            bytes.extend(string(key));
            bytes.extend(value.kind().to_le_bytes());
            bytes.extend(value.bytes());
        }
        let mut at = 0;
        for tensor in &self.tensors {
            bytes.extend(string(&tensor.name));
            bytes.extend((tensor.dims.len() as u32).to_le_bytes());
            bytes.extend(tensor.dims.iter().flat_map(|d| d.to_le_bytes()));
            bytes.extend(tensor.kind.to_le_bytes());
            bytes.extend(tensor.offset.unwrap_or(at).to_le_bytes());
            at = (at + tensor.data.len() as u64).next_multiple_of(self.alignment);
        }
        for tensor in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(self.alignment as usize), 0);
            bytes.extend_from_slice(&tensor.data);
        }
        bytes
    }
}
