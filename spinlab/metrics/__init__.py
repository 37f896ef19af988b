"""Say how good a model is: perplexity of text, accuracy on zero-shot questions."""
