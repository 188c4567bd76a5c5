"""Listening sockets, and what guards them."""
