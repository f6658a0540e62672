"""Custom kernels for LLM-scale data valuation: LoGra influence functions, stores, streaming scores."""
