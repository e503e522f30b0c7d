from lwfed.config.load import load_config, presets
from lwfed.config.schema import DataSection, ModelSection, RunConfig, ViewsSection

__all__ = ["DataSection", "ModelSection", "RunConfig", "ViewsSection", "load_config", "presets"]
