"""Python imports this at its start when this folder is on PYTHONPATH: `import torch_npu` then brings the stand-in up.

A process that never asks for an NPU pays nothing, and one that does finds torch_npu as late as it would on hardware.
"""

import importlib.machinery
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent.parent


class Finder:
    """Finds torch_npu where it is, and wraps its import."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = Loader(spec.loader)
        return spec


class Loader:
    """torch_npu's own loader, between the two halves of the stand-in."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        import stand_in

        stand_in.prepare()
        self.loader.exec_module(module)
        if not stand_in.started():
            stand_in.bring_up(kernels=True, hccl=True)


sys.path.insert(1, str(SUPPORT))
sys.meta_path.insert(0, Finder())
