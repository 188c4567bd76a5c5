"""A server compared with the run that it should serve: what is stored for that, what is asked, what it means."""
