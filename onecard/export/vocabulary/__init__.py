"""New tokens for a base: trained on text, merged into its tokenizer, given rows in its embeddings."""
