"""Settings, said once: dataclasses with defaults and units, TOML files, the environment."""
