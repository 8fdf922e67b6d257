//! Every fused op as a candle custom op with a backward, a composed-candle reference beside each.
