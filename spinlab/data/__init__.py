"""Data: files in installed packages, windows of text, zero-shot questions."""
