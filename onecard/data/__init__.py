"""From a file of records to token ids: readers, formats, chat templates, tokenization, cached data sets, batches."""
