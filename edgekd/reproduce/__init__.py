"""The papers' tables: read from TOML, trained, and printed beside the printed numbers."""
