"""Downloads from the Hugging Face Hub, and checksums of model directories."""
