"""The commands of `hf-mics`, a module each: `add_arguments(parser)`, and `run(options)` with its exit code."""
