"""Presets: `base.yaml` states every key; the others state what they change."""
