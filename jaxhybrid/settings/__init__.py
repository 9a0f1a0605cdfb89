"""Every setting of a run, and reading them from YAML."""
