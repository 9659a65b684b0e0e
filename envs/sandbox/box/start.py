"""Starts the box: `python -I start.py CONTROL_FD FOLDER WORKERS MEMORY_MIB MODE [HIDDEN…]`.

The folder is loaded as a package of its own, `box`: its relative imports hold, and nothing of etpo is loaded.
"""

import importlib.util
import os
import sys


def load_package(name: str, folder: str) -> None:
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    load_package("box", os.path.dirname(os.path.abspath(__file__)))
    __package__ = "box"
    from . import memory
    from .layers import Layers
    from .server import Server, prepare

    # Before the libraries are loaded: namespaces want a process with one thread, cheap forks a small one, and
    # the libraries are to come from the copies that programs see.
    prepare()
    memory.keep_together()
    layers = Layers(sys.argv[5] != "off", sys.argv[2], sys.argv[6:])
    server = Server(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), layers)
    try:
        server.rehearse()
        server.warm_up()
        server.serve()
    finally:
        server.close()
