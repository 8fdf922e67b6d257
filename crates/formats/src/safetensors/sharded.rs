//! [`ShardedSafetensors`].

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use super::SafetensorsFile;
use crate::source::read_capped;
use crate::{Error, Result, TensorInfo, TensorSource};

/// The most bytes of an index.
const MAX_INDEX: u64 = 100_000_000;

/// The safetensors files that an index lists.
#[derive(Debug)]
pub struct ShardedSafetensors {
    index: PathBuf,
    shards: Vec<SafetensorsFile>,
    /// Name to shard.
    place: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: Option<WeightMap>,
}

/// Tensor and file, in the order of the index; no tensor twice.
struct WeightMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("`weight_map` to be an object of file names by tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let (mut pairs, mut seen) = (vec![], std::collections::HashSet::new());
                while let Some(tensor) = map.next_key::<String>()? {
                    let at = |reason: &dyn fmt::Display| A::Error::custom(format!("tensor `{tensor}`: {reason}"));
                    if !seen.insert(tensor.clone()) {
                        return Err(at(&"is in `weight_map` twice"));
                    }
                    let file = map.next_value().map_err(|e| at(&e))?;
                    pairs.push((tensor, file));
                }
                Ok(WeightMap(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

impl ShardedSafetensors {
    /// Opens every file that the index at `path` lists, and checks that each tensor is where it says and nowhere else.
    /// Tensors of these files that the index does not list are there too.
    ///
    /// # Errors
    /// If a file is missing or malformed, lies in another folder, or lacks a tensor that the index promises; if a tensor
    /// is in two files.
    pub fn open(path: &Path) -> Result<Self> {
        let text = read_capped(path, MAX_INDEX, "an index")?;
        let index: Index = serde_json::from_slice(&text).map_err(|e| Error::malformed(path, e.to_string()))?;
        let Some(WeightMap(map)) = index.weight_map else {
            return Err(Error::key(path, "weight_map", "is missing: this is no index of safetensors files"));
        };
        let folder = path.parent().unwrap_or(Path::new(""));
        let (mut shards, mut known): (Vec<SafetensorsFile>, HashMap<String, usize>) = (vec![], HashMap::new());
        let mut place = BTreeMap::new();
        for (tensor, file) in map {
            let shard = match known.get(&file) {
                Some(&shard) => shard,
                None => {
                    shards.push(open_shard(path, folder, &tensor, &file)?);
                    known.insert(file.clone(), shards.len() - 1);
                    shards.len() - 1
                }
            };
            if shards[shard].info(&tensor).is_none() {
                let reason = format!("is not there, but {} says so; fetch both again", path.display());
                return Err(Error::tensor(&folder.join(file), &tensor, reason));
            }
            place.insert(tensor, shard);
        }
        if shards.is_empty() {
            return Err(Error::key(path, "weight_map", "lists no tensor"));
        }
        for (shard, file) in shards.iter().enumerate() {
            for name in file.names() {
                let other = *place.entry(name.to_owned()).or_insert(shard);
                if other != shard {
                    let reason = format!("is in {} too; keep one of them", shards[other].path().display());
                    return Err(Error::tensor(file.path(), name, reason));
                }
            }
        }
        Ok(Self { index: path.to_path_buf(), shards, place })
    }
}

/// Opens a shard, which lies beside its index: an index that names another folder's files is not followed.
fn open_shard(index: &Path, folder: &Path, tensor: &str, file: &str) -> Result<SafetensorsFile> {
    let mut components = Path::new(file).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    if !plain || file.contains(['/', '\\', ':', '\0']) {
        let reason = format!("`weight_map` says it is in {file:?}, which is not a plain file name");
        return Err(Error::tensor(index, tensor, reason));
    }
    let path = folder.join(file);
    if !path.exists() {
        let reason = format!("`weight_map` says it is in {file}, which is missing from the folder; fetch that file");
        return Err(Error::tensor(index, tensor, reason));
    }
    SafetensorsFile::open(&path)
}

impl TensorSource for ShardedSafetensors {
    fn names(&self) -> Vec<&str> {
        self.place.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.place.get(name).and_then(|&shard| self.shards[shard].info(name))
    }

    fn bytes(&self, name: &str) -> Result<&[u8]> {
        match self.place.get(name) {
            Some(&shard) => self.shards[shard].bytes(name),
            None => Err(Error::tensor(&self.index, name, "there is no such tensor")),
        }
    }

    fn path_of(&self, name: &str) -> &Path {
        self.place.get(name).map_or(&self.index, |&shard| self.shards[shard].path())
    }
}
