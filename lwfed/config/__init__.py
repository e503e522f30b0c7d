from lwfed.config.load import load_config, presets
from lwfed.config.schema import ModelSection, RunConfig, ViewsSection

__all__ = ["ModelSection", "RunConfig", "ViewsSection", "load_config", "presets"]
