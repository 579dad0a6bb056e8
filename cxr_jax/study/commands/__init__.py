"""What `python -m cxr_jax.study` does, a file a group of commands."""
