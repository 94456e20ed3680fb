# SPDX-License-Identifier: Apache-2.0
"""Register optq when transformers loads its quantizers, at no cost before. Imports neither torch nor transformers."""

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"
CONFIGS = "transformers.configuration_utils"
WATCHED = (
    CONFIGS,
    QUANTIZERS,
    # When torch itself was imported by one of these, that is too late to catch them: the next ones do.
    "transformers.models.auto.configuration_auto",
    "transformers.modeling_utils",
)


class _RegisterAfter(importlib.abc.Loader):
    """Executes a module with its own loader, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _complete_configs_if_loaded()
        _register_if_loaded()


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the loaders of `WATCHED`; knows nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def _register_if_loaded() -> bool:
    """Register if transformers' quantizers are there; never break the import that led here."""
    module = sys.modules.get(QUANTIZERS)
    if module is None or (
        getattr(module.__spec__, "_initializing", False) and not hasattr(module, "get_hf_quantizer")
    ):
        return False
    try:
        from .hf.register import register
    except ImportError as error:
        warnings.warn(f"optq could not register its GPTQ quantizer with transformers: {error}", stacklevel=2)
        return False
    register()
    return True


def _complete_configs_if_loaded() -> None:
    """Configs are read before the quantizers are imported."""
    config_class = getattr(sys.modules.get(CONFIGS), "PreTrainedConfig", None)
    if config_class is not None:
        from .hf.legacy import complete_what_is_read

        complete_what_is_read(config_class)


def install() -> None:
    """Register now if transformers' quantizers are loaded, else as soon as they are. Idempotent."""
    _complete_configs_if_loaded()
    if not _register_if_loaded() and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
