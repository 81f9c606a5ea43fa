"""Will it fit, and with what: the memory of every phase of a pipeline, and the least lossy way to run it in a budget."""
