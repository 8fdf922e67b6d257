//! [`KvCache`]: keys and values of earlier tokens, an argument of a forward pass and never a field of a model.

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// Keys and values of earlier tokens.
pub trait KvCache {
    /// Tokens held before this pass, the same for every row and layer.
    fn len(&self) -> usize;

    /// True if no token is held.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds `k, v [b, t, h_kv, d]` of layer `layer`, and returns all of them, `[b, len + t, h_kv, d]`.
    ///
    /// # Errors
    /// If the cache is full or the shapes differ from what it was made for.
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)>;

    /// Counts the `t` tokens that every layer has appended as held. Called once after all layers of a pass.
    fn advance(&mut self, t: usize);
}

/// One buffer `[b, capacity, h_kv, d]` a layer for keys and one for values, allocated on first use.
#[derive(Debug)]
pub struct ContiguousCache {
    layers: Vec<Option<(Tensor, Tensor)>>,
    capacity: usize,
    len: usize,
    dtype: DType,
    device: Device,
}

impl ContiguousCache {
    /// For `num_layers` layers and at most `capacity` tokens a row.
    pub fn new(num_layers: usize, capacity: usize, dtype: DType, device: &Device) -> Self {
        Self { layers: vec![None; num_layers], capacity, len: 0, dtype, device: device.clone() }
    }

    /// Forgets all tokens after the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The most tokens a row can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

impl KvCache for ContiguousCache {
    fn len(&self) -> usize {
        self.len
    }

    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (b, t, h, d) = k.dims4()?;
        let end = self.len + t;
        if end > self.capacity {
            return Err(Error::Context { requested: end, limit: self.capacity, what: "the capacity of the KV cache" });
        }
        let shape = (b, self.capacity, h, d);
        let num_layers = self.layers.len();
        let Some(slot) = self.layers.get_mut(layer) else {
            return Err(Error::Context { requested: layer + 1, limit: num_layers, what: "layers of the KV cache" });
        };
        let (keys, values) = match slot {
            Some(held) => held,
            None => slot.insert((
                Tensor::zeros(shape, self.dtype, &self.device)?,
                Tensor::zeros(shape, self.dtype, &self.device)?,
            )),
        };
        keys.slice_set(&k.detach().contiguous()?, 1, self.len)?;
        values.slice_set(&v.detach().contiguous()?, 1, self.len)?;
        Ok((keys.narrow(1, 0, end)?, values.narrow(1, 0, end)?))
    }

    fn advance(&mut self, t: usize) {
        self.len += t;
    }
}
