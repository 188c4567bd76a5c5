"""Reading and writing model directories: one tensor at a time, whole or not at all."""
