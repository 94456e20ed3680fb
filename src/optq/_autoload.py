# SPDX-License-Identifier: Apache-2.0
"""Register optq when transformers and PEFT load what it adds to, at no cost before. Imports none of them."""

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

HOSTS = (
    "transformers.configuration_utils",
    "transformers.quantizers.auto",
    "transformers.modeling_utils",
    "peft.helpers",
)
"""What `optq.hf.patches` changes something in."""

WATCHED = (
    *HOSTS,
    # When torch itself was imported by one of these, that is too late to catch them: this one does, or modeling_utils.
    "transformers.models.auto.configuration_auto",
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
        _register()


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


def _register() -> bool:
    """Register with those of `HOSTS` that are loaded; say if all are. Never break the import that led here."""
    if not any(host in sys.modules for host in HOSTS):
        return False
    hosts = import_module("optq.hf.patches").HOSTS
    missing = set()
    for host, (last, change) in hosts.items():
        module = sys.modules.get(host)
        if module is None or (getattr(module.__spec__, "_initializing", False) and not hasattr(module, last)):
            missing.add(host)
            continue
        try:
            change()
        except ImportError as error:
            warnings.warn(f"optq could not register with {host}: {error}", stacklevel=2)
            missing.add(host)
    return not missing


def register() -> None:
    """Register with transformers and PEFT: now where they are loaded, else as soon as they are. Idempotent."""
    if not _register() and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def unregister() -> None:
    """Undo all changes to other libraries, until `register` is called. Idempotent.

    Models that are loaded go on to work. From then on, transformers handles GPTQ checkpoints by itself.
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    import_module("optq.patching").undo_all()
