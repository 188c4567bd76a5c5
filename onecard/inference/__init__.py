"""A loaded model that answers: sampling, streaming, the request queue, chat history."""
