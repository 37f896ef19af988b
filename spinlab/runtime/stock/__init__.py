"""Integer linears in the stock modules of transformers."""
