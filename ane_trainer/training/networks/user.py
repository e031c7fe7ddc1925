"""Models out of a user's file or an installed module: `path/to/file.py:ClassName`, `package.module:ClassName`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from torch import nn

from ane_trainer.ane.errors import UsageError
from ane_trainer.utils import did_you_mean


def load_model_class(spec: str, where: str = "model") -> Callable[..., Any]:
    """The class or function that "path/to/file.py:ClassName" or "package.module:ClassName" names.

    A file is run, as by `python file.py` but with a name of its own, and may import modules beside it; a module is
    imported. UsageError ANE102 if there is none.
    """
    path_text, _, attribute = spec.rpartition(":")
    if not path_text or not attribute:
        raise UsageError(
            f"{where}: needs path/to/file.py:ClassName or package.module:ClassName; got {spec!r}.",
            code="ANE102",
        )
    if all(part.isidentifier() for part in path_text.split(".")) and not path_text.endswith(".py"):
        return _attribute(_import(path_text, where), path_text, attribute, where)
    path = Path(path_text).expanduser()
    if not path.is_file():
        raise UsageError(
            f"{where}: needs a Python file; got {path_text!r}, which does not exist.", code="ANE102"
        )
    path = path.resolve()
    module_name = f"ane_trainer_user_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(
        module_name, path, loader=_AsItStands(module_name, str(path))
    )
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"{where}: needs a Python file (.py); got {path_text!r}.", code="ANE102")
    module = importlib.util.module_from_spec(module_spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        del sys.modules[module_name]
        raise UsageError(f"{where}: {path_text} cannot be imported: {error}", code="ANE102") from error
    return _attribute(module, path_text, attribute, where)


class _AsItStands(SourceFileLoader):
    """Compiles the file as it stands: a cache goes by size and second, and would miss a quick change of a digit."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _import(name: str, where: str) -> ModuleType:
    """An installed module, or one in the current folder."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except (ImportError, SyntaxError) as error:
        raise UsageError(
            f"{where}: {name} cannot be imported: {error}. Install it, or give path/to/file.py:ClassName.",
            code="ANE102",
        ) from error


def _attribute(module: ModuleType, path_text: str, attribute: str, where: str) -> Callable[..., object]:
    found = getattr(module, attribute, None)
    if not callable(found):
        own = [
            key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        ]
        hint = did_you_mean(attribute, own) if own else "It has no class or function."
        raise UsageError(
            f"{where}: needs a class or function in {path_text}; got {attribute!r}. {hint}", code="ANE102"
        )
    return found  # type: ignore[no-any-return]


def classes_in(path: str) -> str:
    """A sentence that names the classes and functions of a Python file, which is read and not run."""
    try:
        tree = ast.parse(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return "There is no such file that can be read."
    found = [
        node.name for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    ]  # fmt: skip
    return f"It has: {', '.join(found)}." if found else "It has no class or function."


def build_user_model(spec: str, offered: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """Call the user's class with what it takes of `offered`, and all of `options`."""
    found = load_model_class(spec)
    if isinstance(found, nn.Module) and not options:
        return found
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise UsageError(
            f"model {spec}: needs a class that can be built; got an abstract one. Define {missing}.",
            code="ANE103",
        )
    parameters = inspect.signature(found).parameters
    arguments = {key: value for key, value in offered.items() if key in parameters} | options
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        raise UsageError(
            f"model {spec}: needs a constructor callable with {', '.join(arguments) or 'no arguments'}; "
            f"got {inspect.signature(found)} ({error}). Give its parameters defaults or pass them.",
            code="ANE103",
        ) from None
    model = found(**arguments)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {spec}: needs an nn.Module; got {type(model).__name__}.", code="ANE103")
    return model
