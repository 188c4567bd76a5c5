"""Asking and chatting in a terminal."""
