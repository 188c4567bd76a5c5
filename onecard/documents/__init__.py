"""Answers out of a folder of documents: read, indexed, searched, cited, and put before the model that answers."""
