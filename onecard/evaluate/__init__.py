"""Did it help? Benchmarks in local folders, open answers, extraction and perplexity, measured and reported."""
