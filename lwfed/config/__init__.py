from lwfed.config.load import load_config, presets
from lwfed.config.schema import DataSection, ModelSection, RunConfig, TransferSection, ViewsSection

__all__ = ["DataSection", "ModelSection", "RunConfig", "TransferSection", "ViewsSection", "load_config", "presets"]
