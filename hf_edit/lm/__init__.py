"""A causal language model as something to read from and to run."""
