"""Training recipes (TOML), one for each stage."""
