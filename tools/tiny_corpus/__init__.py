"""What `sample/tiny-llama` is made of: a generated bilingual corpus, its tokenizer and its training.

Every task lives in one module of this package; `build.py` gathers them and writes the sample files too. Apart from
`tokenizer.py` and `pretrain.py` it is plain text from a seed, and knows neither torch nor transformers.
"""
