//! Layers and the seams around them: LayerFactory, Role, ParamStore, KvCache.
