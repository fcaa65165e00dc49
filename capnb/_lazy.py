"""Packages whose names arrive on first use, so that `import capnb` costs nothing.

An area's `__init__.py` is a docstring and one call: `lazy(__name__, module="Name other_name", ...)`.
A name may equal its module (`capnb.text.parse` is the function `parse` of `capnb/text/parse.py`):
the name in the table wins, whatever was imported before."""
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


class _Lazy(ModuleType):
    def __getattr__(self, name):
        table = self.__dict__["_table"]
        if name in table: value = getattr(import_module(f"{self.__name__}.{table[name]}"), name)
        elif not name.startswith("_") and find_spec(f"{self.__name__}.{name}"): value = import_module(f"{self.__name__}.{name}")
        else: raise AttributeError(f"{self.__name__} has no name {name!r}; it has: {', '.join(sorted(table))}")
        self.__dict__[name] = value
        return value

    def __setattr__(self, name, value):
        # The import system binds every submodule in its package; a name of the table must not be hidden by that.
        if not (isinstance(value, ModuleType) and name in self.__dict__.get("_table", ())): super().__setattr__(name, value)

    def __dir__(self): return sorted(({*super().__dir__(), *self._table} - {"lazy", "_table"}))


def lazy(package, **modules):
    "Give `package` the names of `modules` (module = \"name name ...\"), each imported when it is first asked for."
    module = sys.modules[package]
    module._table = {name: where for where, names in modules.items() for name in names.split()}
    module.__all__ = sorted(module._table)
    module.__class__ = _Lazy
