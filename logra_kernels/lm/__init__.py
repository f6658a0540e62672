"""Causal language models: text to tokens, tokens to rows, questions to ranked passages."""
