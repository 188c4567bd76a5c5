"""Quantised copies of a model: GPTQ, and bitsandbytes in 4 and 8 bits."""
