//! Train, load, encode and decode BPE, WordPiece and Unigram tokenizers. Knows no tensors.
