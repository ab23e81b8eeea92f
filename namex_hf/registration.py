"""Patched models open after ``import namex_hf``, whichever of this package and transformers is imported first.

Importing `namex_hf.models` registers its classes with transformers, and takes seconds. It is therefore imported when
transformers is, and not before.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIBRARY = "transformers"
MODELS = "namex_hf.models"


class Hook(MetaPathFinder):
    """Finds transformers as the other finders do, and imports our models once it has been executed.

    A look for the module without an import of it, and an import that fails, leave the hook in its place. The import
    system's own lock of the module keeps threads apart.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of transformers with a loader that registers; None for all other modules."""
        if fullname != LIBRARY:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((spec for finder in finders if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader)
        return spec

    def _wrap(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == LIBRARY and self in sys.meta_path:
                import_module(MODELS)
                sys.meta_path.remove(self)

        loader.exec_module = exec_module  # of this one loader: every search for a module makes its own


def register_models() -> None:
    """Register our classes with transformers: now where it has been imported, else as soon as it is."""
    if sys.modules.get(LIBRARY) is not None:
        import_module(MODELS)
    elif not any(isinstance(finder, Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, Hook())
