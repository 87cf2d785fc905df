"""Recipe files: YAML in, bakes out, with line and column of every mistake. Nothing is opened but the recipe itself."""
