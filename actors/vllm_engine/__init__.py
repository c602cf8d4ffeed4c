"""vLLM: the only package that imports it, in the processes that run an engine or broadcast to one over NCCL."""
